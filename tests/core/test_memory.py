# SPDX-License-Identifier: Apache-2.0
"""Guest memory and its allocator, without KVM."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.core.address import PAGE_SIZE, SIZE_2M, Gpa
from kvmpy.core.backing import Anonymous, HugeTlb, Mapping, MemFd
from kvmpy.core.errors import PrivateMemoryError
from kvmpy.core.memory import GuestMemory, OutOfGuestMemoryError, PageAllocator, Segment

SIZE = 64 * PAGE_SIZE


@pytest.fixture
def both() -> Iterator[tuple[Mapping, Mapping]]:
    shared, private = Anonymous().map(SIZE), Anonymous().map(SIZE)
    yield shared, private
    shared.close()
    private.close()


@pytest.fixture
def memory(both: tuple[Mapping, Mapping]) -> GuestMemory:
    new_memory = GuestMemory()
    new_memory.add(Segment(Gpa(0x10000), SIZE, *both))
    return new_memory


def test_a_page_is_seen_through_the_mapping_of_its_kind(memory: GuestMemory) -> None:
    page = Gpa(0x10000)
    memory.shared_view(page, 4)[:] = b"open"
    memory.private_view(page, 4)[:] = b"shut"
    assert memory.read(page, 4) == b"open"
    memory.set_private(page, PAGE_SIZE)
    assert memory.read(page, 4) == b"shut"
    memory.set_shared(page, PAGE_SIZE)
    assert memory.read(page, 4) == b"open"


def test_a_view_is_the_memory_itself(memory: GuestMemory) -> None:
    first, second = memory.view(Gpa(0x10000), 8), memory.view(Gpa(0x10000), 8)
    first[0] = 0x5A
    assert second[0] == 0x5A


def test_reads_and_writes_cross_page_kinds(memory: GuestMemory) -> None:
    memory.set_private(Gpa(0x11000), PAGE_SIZE)
    data = bytes(range(256)) * 48
    memory.write(Gpa(0x10000), data)
    assert memory.read(Gpa(0x10000), len(data)) == data
    assert memory.private_view(Gpa(0x11000), PAGE_SIZE) == data[PAGE_SIZE : 2 * PAGE_SIZE]
    assert memory.shared_view(Gpa(0x11000), PAGE_SIZE) == bytes(PAGE_SIZE)
    assert memory.shared_view(Gpa(0x12000), PAGE_SIZE) == data[2 * PAGE_SIZE :]


def test_a_view_across_kinds_is_refused(memory: GuestMemory) -> None:
    memory.set_private(Gpa(0x11000), PAGE_SIZE)
    with pytest.raises(ValueError, match="1 of 2 pages are private"):
        memory.view(Gpa(0x10000), 2 * PAGE_SIZE)


def test_sealed_private_pages_are_refused_with_the_reason(memory: GuestMemory) -> None:
    memory.set_private(Gpa(0x11000), PAGE_SIZE)
    memory.seal = "the protection keeps it"
    with pytest.raises(
        PrivateMemoryError, match="gpa 0x11008, 0x8 bytes is private: the protection keeps it"
    ):
        memory.view(Gpa(0x11008), 8)
    with pytest.raises(PrivateMemoryError):
        memory.hva(Gpa(0x11000))
    with pytest.raises(PrivateMemoryError):
        memory.write(Gpa(0x10FFC), b"12345678")
    assert len(memory.view(Gpa(0x12000), 8)) == 8


def test_outside_memory_names_the_ranges(memory: GuestMemory) -> None:
    with pytest.raises(
        ValueError, match=r"gpa 0x50000, 0x1 bytes, is outside guest memory \(0x10000..0x4ffff\)"
    ):
        memory.view(Gpa(0x50000), 1)
    with pytest.raises(ValueError, match="outside"):
        memory.view(Gpa(0x4FFFF), 2)
    with pytest.raises(ValueError, match="outside"):
        memory.hva(Gpa(0xFFFF))


@pytest.mark.parametrize("gpa", [0x10000, 0xF000, 0x4F000, 0x20000])
def test_overlapping_ranges_are_refused(memory: GuestMemory, both: tuple[Mapping, Mapping], gpa: int) -> None:
    with pytest.raises(ValueError, match="overlaps"):
        memory.add(Segment(Gpa(gpa), 2 * PAGE_SIZE, *both))


@pytest.mark.parametrize(("gpa", "size"), [(0x50800, PAGE_SIZE), (0x50000, 0x800), (0x50000, 0)])
def test_ranges_are_whole_pages(
    memory: GuestMemory, both: tuple[Mapping, Mapping], gpa: int, size: int
) -> None:
    with pytest.raises(ValueError, match="whole 4 KiB pages"):
        memory.add(Segment(Gpa(gpa), size, *both))


@given(st.sets(st.integers(0, 63)), st.integers(0, 63), st.integers(1, 64))
def test_runs_are_maximal_and_agree_with_the_bitmap(private: set[int], first: int, count: int) -> None:
    memory = GuestMemory()
    memory.private.update(private)
    count = min(count, 64 - first)
    runs = list(memory.runs(Gpa(first * PAGE_SIZE), count * PAGE_SIZE))
    seen = {}
    for gpa, size, kind in runs:
        for page in range(gpa.gfn, gpa.gfn + size // PAGE_SIZE):
            seen[page] = kind
    assert seen == {page: page in private for page in range(first, first + count)}
    assert all(before[2] != after[2] for before, after in pairwise(runs))


def test_addresses_above_the_bitmap_are_shared(memory: GuestMemory, both: tuple[Mapping, Mapping]) -> None:
    shared, private = both
    high = Gpa(1 << 46)
    memory.add(Segment(high, 2 * PAGE_SIZE, shared, private))
    assert not memory.is_private(high)
    memory.write(high + 8, b"high")
    assert bytes(shared.view(8, 4)) == b"high"
    assert [(int(address), size, kind) for address, size, kind in memory.runs(high, 2 * PAGE_SIZE)] == [
        (1 << 46, 2 * PAGE_SIZE, False)
    ]
    with pytest.raises(ValueError, match="private memory lies below 0x100000000000"):
        memory.set_private(high, PAGE_SIZE)


class TestAllocator:
    def test_pages_are_contiguous_and_private_as_asked(self, memory: GuestMemory) -> None:
        allocator = PageAllocator(memory, private=True, start=0)
        one, two = allocator.alloc(3), allocator.alloc(2, private=False)
        assert memory.private.range_cardinality(one.gfn, one.gfn + 3) == 3
        assert memory.private.range_cardinality(two.gfn, two.gfn + 2) == 0
        assert two >= one + 3 * PAGE_SIZE

    def test_alignment_is_kept(self, memory: GuestMemory) -> None:
        allocator = PageAllocator(memory, start=0)
        allocator.alloc(1)
        assert allocator.alloc(1, align=8 * PAGE_SIZE).is_aligned(8 * PAGE_SIZE)

    def test_a_page_that_comes_back_is_zeroed(self, memory: GuestMemory) -> None:
        allocator = PageAllocator(memory, start=0)
        everything = SIZE // PAGE_SIZE
        gpa = allocator.alloc(everything)
        memory.write(gpa, b"\xff" * SIZE)
        allocator.free(gpa + PAGE_SIZE, 2)
        again = allocator.alloc(2)
        assert again == gpa + PAGE_SIZE
        assert memory.read(again, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)

    def test_full_memory_says_so(self, memory: GuestMemory) -> None:
        allocator = PageAllocator(memory, start=0)
        allocator.alloc(SIZE // PAGE_SIZE)
        with pytest.raises(OutOfGuestMemoryError, match="memory="):
            allocator.alloc(1)

    def test_reserved_pages_are_left_out(self, memory: GuestMemory) -> None:
        allocator = PageAllocator(memory, start=0)
        allocator.reserve(Gpa(0x12000), 2 * PAGE_SIZE)
        taken = {allocator.alloc(1).gfn for _ in range(SIZE // PAGE_SIZE - 2)}
        assert taken.isdisjoint({0x12, 0x13})
        with pytest.raises(ValueError, match="in use"):
            allocator.reserve(Gpa(0x12000), PAGE_SIZE)

    def test_free_of_a_free_page_is_refused(self, memory: GuestMemory) -> None:
        allocator = PageAllocator(memory, start=0)
        gpa = allocator.alloc(1)
        allocator.free(gpa)
        with pytest.raises(ValueError, match="not all of them are in use"):
            allocator.free(gpa)

    @settings(max_examples=50)
    @given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.sampled_from([1, 2, 4, 16])), max_size=60))
    def test_no_page_is_handed_out_twice(self, steps: list[tuple[bool, int, int]]) -> None:
        shared = Anonymous().map(SIZE)
        memory = GuestMemory()
        memory.add(Segment(Gpa(0x10000), SIZE, shared, shared))
        allocator = PageAllocator(memory, start=0)
        held: dict[int, int] = {}
        for release, pages, align in steps:
            if release and held:
                first, count = held.popitem()
                allocator.free(Gpa(first * PAGE_SIZE), count)
                continue
            try:
                gpa = allocator.alloc(pages, align=align * PAGE_SIZE)
            except OutOfGuestMemoryError:
                continue
            assert gpa.is_aligned(align * PAGE_SIZE)
            for first, count in held.items():
                assert gpa.gfn + pages <= first or first + count <= gpa.gfn
            held[gpa.gfn] = pages
        shared.close()


class TestBackings:
    def test_thp_is_aligned_to_its_page_size(self) -> None:
        mapping = Anonymous(huge="thp").map(2 * SIZE_2M)
        assert mapping.hva % SIZE_2M == 0
        mapping.view(2 * SIZE_2M - 1, 1)[0] = 1
        mapping.close()

    def test_memfd_is_shared_with_its_file(self) -> None:
        import os

        mapping = MemFd().map(PAGE_SIZE)
        mapping.view(0, 5)[:] = b"hello"
        assert os.pread(mapping.fd, 5, 0) == b"hello"
        fd = mapping.fd
        mapping.close()
        with pytest.raises(OSError):
            os.fstat(fd)

    def test_a_view_outlives_close(self) -> None:
        mapping = Anonymous().map(PAGE_SIZE)
        view = mapping.view(0, 4)
        view[:] = b"kept"
        mapping.close()
        assert mapping.closed
        assert bytes(view) == b"kept"
        with pytest.raises(ValueError, match="closed"):
            mapping.view(0, 1)

    def test_huge_sizes_are_checked(self) -> None:
        with pytest.raises(ValueError, match="multiple"):
            HugeTlb().map(PAGE_SIZE)
        with pytest.raises(ValueError, match="multiple"):
            MemFd(huge_page_size=SIZE_2M).map(PAGE_SIZE)
        with pytest.raises(ValueError, match="expected"):
            Anonymous(huge="always").map(PAGE_SIZE)
