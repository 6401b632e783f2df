# SPDX-License-Identifier: Apache-2.0
"""NUMA policies of guest_memfd: set through one mapping, they belong to the file."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, PAGE_SIZE, GuestMemfd, MissingError, Vm
from kvmpy.testing import host
from selftests.guest_memfd.place import Reserved

PAGES = 4
SIZE = PAGES * PAGE_SIZE
DEFAULT, BIND, INTERLEAVE = 0, 2, 3


@pytest.fixture
def gmem(mmap_vm: Vm) -> GuestMemfd:
    return mmap_vm.create_guest_memfd(SIZE, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)


@pytest.fixture
def place(gmem: GuestMemfd) -> Iterator[Reserved]:
    """Two mappings of the file, one behind the other; MissingError without NUMA."""
    if host.kernel_config("NUMA") == "n" or not Path("/sys/devices/system/node/node0").is_dir():
        raise MissingError("NUMA policies", "a kernel with CONFIG_NUMA=y")
    with Reserved(2 * SIZE) as reserved:
        reserved.map_fixed(reserved.address, SIZE, gmem.fd)
        reserved.map_fixed(reserved.address + SIZE, SIZE, gmem.fd)
        yield reserved


@pytest.fixture
def shared_policy(place: Reserved) -> Reserved:
    """MissingError where a policy stays with the mapping: then the file has none."""
    place.mbind(place.address, SIZE, BIND, 1)
    if place.policy(place.address + SIZE)[0] != BIND:
        raise MissingError("NUMA policies of guest_memfd", "Linux 6.19 or newer")
    place.mbind(place.address, SIZE, DEFAULT, 0)
    return place


@pytest.mark.parametrize("mode", [BIND, INTERLEAVE], ids=["bind", "interleave"])
def test_a_policy_is_that_of_its_pages(place: Reserved, mode: int) -> None:
    """mbind() gives pages a policy that get_mempolicy() tells; other pages keep theirs, and it can be lifted.

    mbind(2); kvm_gmem_set_policy(), virt/kvm/guest_memfd.c.
    """
    address = place.address
    assert place.mbind(address + PAGE_SIZE, 2 * PAGE_SIZE, mode, 1) == 0
    assert [place.policy(address + page * PAGE_SIZE) for page in range(PAGES)] == [
        (DEFAULT, 0),
        (mode, 1),
        (mode, 1),
        (DEFAULT, 0),
    ]
    assert place.mbind(address, SIZE, DEFAULT, 0) == 0
    assert place.policy(address + PAGE_SIZE) == (DEFAULT, 0)


def test_a_policy_belongs_to_the_file(shared_policy: Reserved) -> None:
    """A policy that was set through one mapping holds in every other mapping of the file.

    kvm_gmem_set_policy(), virt/kvm/guest_memfd.c: the policy is shared, as that of shmem.
    """
    address = shared_policy.address
    assert shared_policy.mbind(address + PAGE_SIZE, PAGE_SIZE, INTERLEAVE, 1) == 0
    assert shared_policy.policy(address + SIZE + PAGE_SIZE) == (INTERLEAVE, 1)
    assert shared_policy.policy(address + SIZE) == (DEFAULT, 0)


@pytest.mark.parametrize("node", [0, 1])
def test_pages_come_from_the_node_of_their_policy(shared_policy: Reserved, node: int) -> None:
    """Pages come from the node that the file's policy binds them to, whichever mapping they are touched by.

    kvm_gmem_get_folio(), virt/kvm/guest_memfd.c; mbind(2), MPOL_BIND.
    """
    if not Path("/sys/devices/system/node/node1").is_dir():
        raise MissingError("a second NUMA node", "`kvmpy lab run`, whose machines have two")
    address = shared_policy.address
    assert shared_policy.mbind(address, 2 * PAGE_SIZE, BIND, 1 << node) == 0
    assert shared_policy.mbind(address + 2 * PAGE_SIZE, 2 * PAGE_SIZE, BIND, 2 >> node) == 0
    assert [shared_policy.node(address + SIZE + page * PAGE_SIZE) for page in range(PAGES)] == [
        node,
        node,
        1 - node,
        1 - node,
    ]


@pytest.mark.parametrize(
    ("mode", "nodes"), [(999, 1), (BIND, 0), (BIND, 1 << 63)], ids=["mode", "no-node", "absent-node"]
)
def test_bad_policies_are_refused(place: Reserved, mode: int, nodes: int) -> None:
    """An unknown mode, no node and a node that does not exist are EINVAL.

    mbind(2).
    """
    assert place.mbind(place.address, PAGE_SIZE, mode, nodes) == errno.EINVAL
    assert place.policy(place.address) == (DEFAULT, 0)
