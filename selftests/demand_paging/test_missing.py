# SPDX-License-Identifier: Apache-2.0
"""Guest memory that comes when the guest asks for it: missing pages and userfaultfd."""

from __future__ import annotations

import mmap
import struct

import pytest

from kvmpy import (
    PAGE_SIZE,
    SIZE_2M,
    Anonymous,
    Backing,
    Gpa,
    Gva,
    HugeTlb,
    Mapping,
    MemFd,
    PageFault,
    UffdFeature,
)
from selftests.conftest import Accessor
from selftests.demand_paging.conftest import MakePager

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
PAGES = 16
SIZE = PAGES * PAGE_SIZE


def pattern(number: int, generation: int = 0, size: int = PAGE_SIZE) -> bytes:
    """The content of page *number*: its first and last word say which page it is."""
    first, last = 0xF000_0000 + (generation << 16) + number, 0xE000_0000 + (generation << 16) + number
    return struct.pack("<Q", first) + bytes(size - 16) + struct.pack("<Q", last)


def words(accessor: Accessor, number: int) -> tuple[int, int]:
    """What the guest reads in the first and the last word of a page."""
    page = GVA + number * PAGE_SIZE
    return accessor.read(page), accessor.read(page + PAGE_SIZE - 8)


@pytest.fixture
def memory(accessor: Accessor) -> Mapping:
    """The host memory behind the guest's GVA, not touched by anybody yet."""
    slot = accessor.vm.add_slot(GPA, SIZE, backing=Anonymous(huge="never"))
    accessor.map(GVA, GPA, SIZE)
    return slot.mapping


def test_every_page_has_the_content_it_was_given(
    accessor: Accessor, memory: Mapping, make_pager: MakePager
) -> None:
    """A guest's access to a missing page waits, and finds the content that user space puts there.

    Documentation/admin-guide/mm/userfaultfd.rst, UFFDIO_COPY and QEMU/KVM.
    """

    def fill(fault: PageFault) -> bytes:
        return pattern((fault.address - memory.hva) // PAGE_SIZE)

    pager = make_pager(fill)
    pager.register(memory.hva, SIZE)
    # Backwards, so that it is not the order of the pages that makes the content right.
    for number in reversed(range(PAGES)):
        assert words(accessor, number) == (0xF000_0000 + number, 0xE000_0000 + number)
    asked = {(fault.address & -PAGE_SIZE) - memory.hva for fault in pager.faults}
    assert asked == {number * PAGE_SIZE for number in range(PAGES)}


def test_only_what_the_guest_touches_is_asked_for(
    accessor: Accessor, memory: Mapping, make_pager: MakePager
) -> None:
    """Pages that the guest does not touch are not asked for, and stay missing.

    Documentation/admin-guide/mm/userfaultfd.rst: a message for each page fault in the registered range.
    """
    pager = make_pager(lambda fault: pattern((fault.address - memory.hva) // PAGE_SIZE))
    pager.register(memory.hva, SIZE)
    touched = {2, 3, 11}
    for number in touched:
        assert accessor.read(GVA + number * PAGE_SIZE) == 0xF000_0000 + number
    assert {(fault.address - memory.hva) // PAGE_SIZE for fault in pager.faults} == touched


def test_a_page_is_asked_for_once(accessor: Accessor, memory: Mapping, make_pager: MakePager) -> None:
    """A page that came is memory like any other: reads and writes of it ask no more.

    Documentation/admin-guide/mm/userfaultfd.rst, UFFDIO_REGISTER_MODE_MISSING.
    """
    pager = make_pager(lambda _fault: pattern(5))
    pager.register(memory.hva, SIZE)
    assert words(accessor, 5) == (0xF000_0005, 0xE000_0005)
    asked = len(pager.faults)
    accessor.write(GVA + 5 * PAGE_SIZE + 8, 1)
    for _ in range(3):
        assert words(accessor, 5) == (0xF000_0005, 0xE000_0005)
    assert accessor.read(GVA + 5 * PAGE_SIZE + 8) == 1
    assert len(pager.faults) == asked


def test_a_write_lands_on_the_content(accessor: Accessor, memory: Mapping, make_pager: MakePager) -> None:
    """A write to a missing page changes what it writes; the rest of the page is what user space put there.

    Documentation/admin-guide/mm/userfaultfd.rst, UFFD_PAGEFAULT_FLAG_WRITE and UFFDIO_COPY.
    """
    pager = make_pager(lambda _fault: pattern(1))
    pager.register(memory.hva, SIZE)
    accessor.write(GVA + PAGE_SIZE + 0x100, 0x1234)
    assert [fault.write for fault in pager.faults[:1]] == [True]
    assert words(accessor, 1) == (0xF000_0001, 0xE000_0001)
    assert accessor.read(GVA + PAGE_SIZE + 0x100) == 0x1234
    pager.stop()
    assert struct.unpack_from("<Q", memory.view(PAGE_SIZE + 0x100, 8)) == (0x1234,)


def test_zero_pages(accessor: Accessor, memory: Mapping, make_pager: MakePager) -> None:
    """UFFDIO_ZEROPAGE gives the guest a page of zeroes, which it can write.

    Documentation/admin-guide/mm/userfaultfd.rst, UFFDIO_ZEROPAGE.
    """
    pager = make_pager(lambda _fault: None)
    pager.register(memory.hva, SIZE)
    assert words(accessor, 3) == (0, 0)
    accessor.write(GVA + 3 * PAGE_SIZE, 7)
    assert words(accessor, 3) == (7, 0)
    assert {(fault.address - memory.hva) // PAGE_SIZE for fault in pager.faults} == {3}


def test_a_page_that_was_taken_away_is_asked_for_again(
    accessor: Accessor, memory: Mapping, make_pager: MakePager
) -> None:
    """A page that MADV_DONTNEED drops while the guest has it mapped is asked for again.

    Documentation/virt/kvm/api.rst 4.35: changes in the backing "are automatically reflected into the guest".
    """
    generation = 0

    def fill(fault: PageFault) -> bytes:
        return pattern((fault.address - memory.hva) // PAGE_SIZE, generation)

    pager = make_pager(fill)
    pager.register(memory.hva, SIZE)
    assert [accessor.read(GVA + number * PAGE_SIZE) for number in (4, 5)] == [0xF000_0004, 0xF000_0005]
    generation = 1
    memory.madvise(mmap.MADV_DONTNEED, 4 * PAGE_SIZE, PAGE_SIZE)
    assert [accessor.read(GVA + number * PAGE_SIZE) for number in (4, 5)] == [0xF001_0004, 0xF000_0005]


def test_after_the_pager_pages_are_ordinary(
    accessor: Accessor, memory: Mapping, make_pager: MakePager
) -> None:
    """What came stays, and what is still missing when nobody listens any more reads as zeroes.

    Documentation/admin-guide/mm/userfaultfd.rst: closing the userfaultfd unregisters its ranges.
    """
    pager = make_pager(lambda _fault: pattern(2))
    pager.register(memory.hva, SIZE)
    assert words(accessor, 2) == (0xF000_0002, 0xE000_0002)
    pager.stop()
    assert words(accessor, 2) == (0xF000_0002, 0xE000_0002)
    assert words(accessor, 3) == (0, 0)


@pytest.mark.parametrize(
    ("backing", "feature", "page_size"),
    [
        pytest.param(MemFd(), UffdFeature.UFFD_FEATURE_MISSING_SHMEM, PAGE_SIZE, id="memfd"),
        pytest.param(HugeTlb(SIZE_2M), UffdFeature.UFFD_FEATURE_MISSING_HUGETLBFS, SIZE_2M, id="hugetlb-2M"),
    ],
)
def test_other_memory_is_paged_in_too(
    accessor: Accessor, make_pager: MakePager, backing: Backing, feature: UffdFeature, page_size: int
) -> None:
    """Missing pages of shared memory and of huge pages come the same way, in pages of their own size.

    Documentation/admin-guide/mm/userfaultfd.rst, UFFD_FEATURE_MISSING_SHMEM and _HUGETLBFS.
    """
    slot = accessor.vm.add_slot(GPA, 2 * page_size, backing=backing)
    accessor.map(GVA, GPA, 2 * page_size)
    hva = slot.mapping.hva
    pager = make_pager(
        lambda fault: pattern((fault.address - hva) // page_size, size=page_size),
        features=feature,
        page_size=page_size,
    )
    pager.register(hva, 2 * page_size)
    for number in (1, 0):
        page = GVA + number * page_size
        assert accessor.read(page + page_size - 8) == 0xE000_0000 + number
        assert accessor.read(page) == 0xF000_0000 + number
    assert {(fault.address - hva) // page_size for fault in pager.faults} == {0, 1}
