# SPDX-License-Identifier: Apache-2.0
"""Minor faults and write protection of userfaultfd, under a guest."""

from __future__ import annotations

import mmap
import struct

import pytest

from kvmpy import PAGE_SIZE, Anonymous, Backing, Gpa, Gva, MemFd, PageFault, UffdFeature, UffdRegisterMode
from selftests.conftest import Accessor
from selftests.demand_paging.conftest import MakePager

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
PAGES = 8
SIZE = PAGES * PAGE_SIZE
MINOR = UffdRegisterMode.UFFDIO_REGISTER_MODE_MINOR
WP = UffdRegisterMode.UFFDIO_REGISTER_MODE_WP


def test_a_minor_fault_finds_what_the_file_has_then(accessor: Accessor, make_pager: MakePager) -> None:
    """A page of the file that is not mapped yet waits for UFFDIO_CONTINUE, and shows the content of then.

    Documentation/admin-guide/mm/userfaultfd.rst, UFFDIO_REGISTER_MODE_MINOR and UFFDIO_CONTINUE.
    """
    mapping = accessor.vm.own(MemFd().map(SIZE))
    accessor.vm.add_alias(int(GPA), SIZE, mapping)
    accessor.map(GVA, GPA, SIZE)
    with mmap.mmap(mapping.fd, SIZE) as other:
        for number in range(PAGES):
            struct.pack_into("<Q", other, number * PAGE_SIZE, 0xA0 + number)

        def update(fault: PageFault) -> None:
            offset = (fault.address & -PAGE_SIZE) - mapping.hva
            struct.pack_into("<Q", other, offset, 0xB0 + offset // PAGE_SIZE)

        pager = make_pager(update, features=UffdFeature.UFFD_FEATURE_MINOR_SHMEM)
        pager.register(mapping.hva, SIZE, MINOR)
        assert [accessor.read(GVA + number * PAGE_SIZE) for number in (6, 1)] == [0xB6, 0xB1]
        assert all(fault.minor for fault in pager.faults)
        assert {(fault.address - mapping.hva) // PAGE_SIZE for fault in pager.faults} == {1, 6}
        # Nobody asked for the others, so nobody changed them.
        assert struct.unpack_from("<Q", other, 2 * PAGE_SIZE) == (0xA2,)


@pytest.mark.parametrize(
    ("backing", "feature"),
    [
        pytest.param(Anonymous(huge="never"), UffdFeature.UFFD_FEATURE_PAGEFAULT_FLAG_WP, id="anonymous"),
        pytest.param(MemFd(), UffdFeature.UFFD_FEATURE_WP_HUGETLBFS_SHMEM, id="memfd"),
    ],
)
def test_a_protected_page_is_saved_before_it_changes(
    accessor: Accessor, make_pager: MakePager, backing: Backing, feature: UffdFeature
) -> None:
    """A guest's first write to a protected page waits, so that user space can save it; reads do not wait.

    Documentation/admin-guide/mm/userfaultfd.rst, Write Protect Notifications.
    """
    slot = accessor.vm.add_slot(GPA, SIZE, backing=backing)
    accessor.map(GVA, GPA, SIZE)
    memory = slot.mapping
    for number in range(PAGES):
        accessor.write(GVA + number * PAGE_SIZE, 0xA0 + number)
    saved: dict[int, int] = {}

    def save(fault: PageFault) -> None:
        # Reads do not fault under write protection, so looking at the page here is no deadlock.
        address = (fault.address & -PAGE_SIZE) - memory.hva
        saved[address // PAGE_SIZE] = struct.unpack_from("<Q", memory.view(address, 8))[0]

    pager = make_pager(save, features=feature)
    pager.register(memory.hva, SIZE, WP)
    pager.uffd.writeprotect(memory.hva, SIZE, True)
    assert [accessor.read(GVA + number * PAGE_SIZE) for number in range(PAGES)] == [
        0xA0 + number for number in range(PAGES)
    ]
    assert saved == {}
    for number in (5, 2, 5):
        accessor.write(GVA + number * PAGE_SIZE, 0xB0 + number)
    assert saved == {5: 0xA5, 2: 0xA2}
    assert [(fault.wp, fault.write) for fault in pager.faults] == [(True, True)] * len(pager.faults)
    values = [accessor.read(GVA + number * PAGE_SIZE) for number in range(PAGES)]
    assert values == [0xA0, 0xA1, 0xB2, 0xA3, 0xA4, 0xB5, 0xA6, 0xA7]


def test_protection_comes_back(accessor: Accessor, make_pager: MakePager) -> None:
    """A page that was protected again is reported again, although the guest could write it a moment ago.

    Documentation/admin-guide/mm/userfaultfd.rst, UFFDIO_WRITEPROTECT.
    """
    slot = accessor.vm.add_slot(GPA, SIZE, backing=Anonymous(huge="never"))
    accessor.map(GVA, GPA, SIZE)
    accessor.write(GVA, 1)
    pager = make_pager(lambda _fault: None, features=UffdFeature.UFFD_FEATURE_PAGEFAULT_FLAG_WP)
    pager.register(slot.mapping.hva, SIZE, WP)
    for turn in range(3):
        pager.faults.clear()
        pager.uffd.writeprotect(slot.mapping.hva, PAGE_SIZE, True)
        accessor.write(GVA, turn)
        assert pager.faults
        pager.faults.clear()
        accessor.write(GVA, turn + 100)
        assert pager.faults == []
        assert accessor.read(GVA) == turn + 100
