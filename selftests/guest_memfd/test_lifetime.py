# SPDX-License-Identifier: Apache-2.0
"""guest_memfd and its VM: which of them may go first, and what stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvmpy import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    PAGE_SIZE,
    GuestMemfd,
    Vm,
    refused,
)

GPA = 0x10_0000
HVA = 0x10_0000
SIZE = 4 * PAGE_SIZE
BOTH = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED


@pytest.fixture
def orphan(mmap_vm: Vm) -> Iterator[GuestMemfd]:
    """A guest_memfd, bound once, whose VM was closed; it begins with the bytes "kept"."""
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    mapping = mmap_vm.own(gmem.map())
    mapping.view(0, 4)[:] = b"kept"
    mmap_vm.set_user_memory_region2(0, GPA, SIZE, mapping.hva, KVM_MEM_GUEST_MEMFD, gmem=gmem)
    with GuestMemfd(mmap_vm, os.dup(gmem.fd), gmem.size, gmem.flags) as copy:
        mmap_vm.close()
        yield copy


def test_it_outlives_its_vm(orphan: GuestMemfd) -> None:
    """A guest_memfd is "released when the last reference is dropped", not with its VM: size and memory stay.

    Documentation/virt/kvm/api.rst 4.142.
    """
    assert os.fstat(orphan.fd).st_size == SIZE
    mapping = orphan.map()
    assert bytes(mapping.view(0, 6)) == b"kept\0\0"
    mapping.view(PAGE_SIZE, 3)[:] = b"new"
    mapping.close()
    again = orphan.map(PAGE_SIZE, PAGE_SIZE)
    assert bytes(again.view(0, 3)) == b"new"
    again.close()


def test_holes_can_be_punched_after_the_vm(orphan: GuestMemfd) -> None:
    """File operations do not need the VM: a hole is punched in a file whose VM and slots are gone.

    Documentation/virt/kvm/api.rst 4.142.
    """
    mapping = orphan.map()
    orphan.punch_hole(0, PAGE_SIZE)
    assert bytes(mapping.view(0, 4)) == bytes(4)
    orphan.allocate()
    mapping.close()


def test_no_other_vm_takes_it_over(orphan: GuestMemfd, mmap_vm: Vm) -> None:
    """A guest_memfd is "bound to [its] owning virtual machine", also when that was closed: EINVAL.

    Documentation/virt/kvm/api.rst 4.142.
    """
    with mmap_vm.kvm.create_vm() as heir, refused(errno.EINVAL):
        heir.set_user_memory_region2(0, GPA, SIZE, HVA, KVM_MEM_GUEST_MEMFD, gmem=orphan)


def test_it_may_be_closed_before_its_slot(gmem_vm: Vm) -> None:
    """A file that is closed while it is bound leaves a slot that can be deleted and replaced.

    kvm_gmem_release(), virt/kvm/guest_memfd.c.
    """
    gmem = gmem_vm.create_guest_memfd(SIZE)
    gmem_vm.set_user_memory_region2(0, GPA, SIZE, HVA, KVM_MEM_GUEST_MEMFD, gmem=gmem)
    gmem.close()
    gmem_vm.set_user_memory_region2(0, GPA, 0, 0)
    fresh = gmem_vm.create_guest_memfd(SIZE)
    gmem_vm.set_user_memory_region2(0, GPA, SIZE, HVA, KVM_MEM_GUEST_MEMFD, gmem=fresh)
    gmem_vm.set_user_memory_region2(0, GPA, 0, 0)


def test_the_range_stays_taken_while_the_file_is_open_elsewhere(gmem_vm: Vm) -> None:
    """Closing one of two descriptors changes nothing: the pages are bound, and stay so.

    Documentation/virt/kvm/api.rst 4.142: "binding multiple memory regions to a single guest_memfd range".
    """
    gmem = gmem_vm.create_guest_memfd(SIZE)
    gmem_vm.set_user_memory_region2(0, GPA, SIZE, HVA, KVM_MEM_GUEST_MEMFD, gmem=gmem)
    with GuestMemfd(gmem_vm, os.dup(gmem.fd), gmem.size, gmem.flags) as copy:
        gmem.close()
        with refused(errno.EEXIST, errno.EINVAL):
            gmem_vm.set_user_memory_region2(1, GPA + SIZE, SIZE, HVA, KVM_MEM_GUEST_MEMFD, gmem=copy)
        # EEXIST in Linux 7.2; before, the same code returned EINVAL for this as for every other mistake.
        gmem_vm.set_user_memory_region2(0, GPA, 0, 0)
        gmem_vm.set_user_memory_region2(1, GPA + SIZE, SIZE, HVA, KVM_MEM_GUEST_MEMFD, gmem=copy)
        gmem_vm.set_user_memory_region2(1, GPA, 0, 0)
