# SPDX-License-Identifier: Apache-2.0
"""Private and shared pages: the bitmap and what carries its changes out, without KVM."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.backing import Anonymous, Inaccessible, MemFd
from kvmpy.core.errors import PrivateMemoryError
from kvmpy.core.memory import GuestMemory, OutOfGuestMemoryError, PageAllocator, Segment
from kvmpy.guest.private import PrivacyDifference, frame_runs

BASE = Gpa(0x10000)
PAGES = 16

Call = tuple[Gpa, int, bool, bool]


class Converter:
    """Takes conversions, and may refuse them."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.calls: list[Call] = []
        self.error: Exception | None = None
        memory.convert = self

    def __call__(self, gpa: Gpa, size: int, private: bool, discard: bool) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append((gpa, size, private, discard))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Two ranges that touch each other."""
    new_memory = GuestMemory()
    mappings = [Anonymous().map(PAGES * PAGE_SIZE) for _ in range(4)]
    new_memory.add(Segment(BASE, PAGES * PAGE_SIZE, mappings[0], mappings[1]))
    new_memory.add(Segment(BASE + PAGES * PAGE_SIZE, PAGES * PAGE_SIZE, mappings[2], mappings[3]))
    yield new_memory
    for mapping in mappings:
        mapping.close()


@pytest.fixture
def converter(memory: GuestMemory) -> Converter:
    """Carries out what the memory is told."""
    return Converter(memory)


def page(number: int) -> Gpa:
    """The address of a page of the two ranges."""
    return BASE + number * PAGE_SIZE


def test_a_change_is_carried_out_and_noted(memory: GuestMemory, converter: Converter) -> None:
    memory.set_private(page(1), 2 * PAGE_SIZE)
    memory.set_shared(page(2), PAGE_SIZE, discard=True)
    assert converter.calls == [(page(1), 2 * PAGE_SIZE, True, False), (page(2), PAGE_SIZE, False, True)]
    assert list(memory.private) == [page(1).gfn]


def test_one_conversion_for_a_range_across_slots(memory: GuestMemory, converter: Converter) -> None:
    memory.set_private(page(PAGES - 1), 2 * PAGE_SIZE)
    assert converter.calls == [(page(PAGES - 1), 2 * PAGE_SIZE, True, False)]
    assert list(memory.private) == [page(PAGES - 1).gfn, page(PAGES).gfn]


def test_what_cannot_be_carried_out_is_not_noted(memory: GuestMemory, converter: Converter) -> None:
    memory.set_private(page(0), PAGE_SIZE)
    converter.error = OSError(22, "no")
    with pytest.raises(OSError, match="no"):
        memory.set_private(page(1), PAGE_SIZE)
    with pytest.raises(OSError, match="no"):
        memory.set_shared(page(0), PAGE_SIZE)
    assert list(memory.private) == [page(0).gfn]


@pytest.mark.parametrize(("first", "pages"), [(-1, 1), (-1, 3), (2 * PAGES, 1), (2 * PAGES - 1, 2)], ids=str)
def test_a_page_outside_memory_refuses_the_whole_range(
    memory: GuestMemory, converter: Converter, first: int, pages: int
) -> None:
    for change in (memory.set_private, memory.set_shared):
        with pytest.raises(ValueError, match="outside guest memory"):
            change(page(0) + first * PAGE_SIZE, pages * PAGE_SIZE)
    assert converter.calls == []
    assert not memory.private


def test_a_range_that_stays_shared_takes_no_private_page(memory: GuestMemory, converter: Converter) -> None:
    mapping = memory.segments()[0].shared
    place = page(2 * PAGES)
    memory.add(Segment(place, PAGES * PAGE_SIZE, mapping, mapping, always_shared=True))
    with pytest.raises(ValueError, match=f"the slot at {place} holds shared pages only"):
        memory.set_private(place + (PAGES - 1) * PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(ValueError, match="shared pages only"):
        memory.set_private(place - PAGE_SIZE, 2 * PAGE_SIZE)
    memory.set_private(place - PAGE_SIZE, PAGE_SIZE)
    memory.set_shared(place - PAGE_SIZE, 2 * PAGE_SIZE)
    assert len(converter.calls) == 2


Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(st.sampled_from(["private", "shared", "add", "remove"]), st.integers(0, 19), st.integers(0, 9)),
    max_size=30,
)


@given(steps)
def test_conversions_beside_plain_sets(taken: list[Step]) -> None:
    """Ranges of four pages come and go, the third of them always shared."""
    memory, mapping = GuestMemory(), Anonymous().map(4 * PAGE_SIZE)
    there, private = dict[int, Segment](), set[int]()
    for kind, first, pages in taken:
        number = first % 4
        if kind == "add" and number not in there:
            gpa = Gpa(number * 4 * PAGE_SIZE)
            there[number] = Segment(gpa, 4 * PAGE_SIZE, mapping, mapping, always_shared=number == 2)
            memory.add(there[number])
        elif kind == "remove" and number in there:
            memory.remove(there.pop(number))
            private -= set(range(number * 4, number * 4 + 4))
        elif kind in ("private", "shared"):
            change = memory.set_private if kind == "private" else memory.set_shared
            wanted = set(range(first, first + pages))
            covered = {page for offset in there for page in range(offset * 4, offset * 4 + 4)}
            if not wanted or wanted - covered or (kind == "private" and wanted & set(range(8, 12))):
                with pytest.raises(ValueError, match="gpa"):
                    change(Gpa(first * PAGE_SIZE), pages * PAGE_SIZE)
            else:
                change(Gpa(first * PAGE_SIZE), pages * PAGE_SIZE)
                private = private | wanted if kind == "private" else private - wanted
        assert set(memory.private) == private
    mapping.close()


def test_a_remembered_range_takes_whole_pages_only(memory: GuestMemory, converter: Converter) -> None:
    memory.set_private(page(0), PAGES * PAGE_SIZE)
    for gpa, size in (
        (page(0) + 1, PAGE_SIZE),
        (page(0), PAGE_SIZE + 1),
        (page(0), 0),
        (page(1), -PAGE_SIZE),
    ):
        for change in (memory.set_private, memory.set_shared):
            with pytest.raises(ValueError, match="whole 4 KiB pages"):
                change(gpa, size)
    assert len(converter.calls) == 1


def test_closed_memory_converts_nothing(memory: GuestMemory, converter: Converter) -> None:
    memory.set_private(page(0), PAGE_SIZE)
    memory.close()
    with pytest.raises(ValueError, match="outside guest memory"):
        memory.set_shared(page(0), PAGE_SIZE)
    assert len(converter.calls) == 1


def test_private_allocations_keep_out_of_it(memory: GuestMemory) -> None:
    first, second = memory.segments()
    memory.remove(first)
    memory.add(Segment(first.gpa, first.size, first.shared, first.shared, always_shared=True))
    allocator = PageAllocator(memory, private=True, start=0)
    assert allocator.alloc(1) == second.gpa
    assert allocator.alloc(PAGES, private=False) == first.gpa
    with pytest.raises(OutOfGuestMemoryError):
        allocator.alloc(PAGES)


def test_allocation_converts_only_what_changes(memory: GuestMemory, converter: Converter) -> None:
    allocator = PageAllocator(memory, private=True, start=0)
    shared = allocator.alloc(2, private=False)
    private = allocator.alloc(3)
    assert converter.calls == [(private, 3 * PAGE_SIZE, True, False)]
    assert not memory.is_private(shared)


def test_used_private_pages_are_discarded_when_the_host_cannot_clear_them(
    memory: GuestMemory, converter: Converter
) -> None:
    allocator = PageAllocator(memory, private=True, start=0)
    gpa = allocator.alloc(PAGES)
    allocator.alloc(PAGES - 1)
    memory.seal = "kept from the host"
    allocator.free(gpa, 2)
    converter.calls.clear()
    assert list(allocator.recycled) == [gpa.gfn, gpa.gfn + 1]
    assert allocator.alloc(2) == gpa
    assert converter.calls == [(gpa, 2 * PAGE_SIZE, False, True), (gpa, 2 * PAGE_SIZE, True, False)]
    assert not allocator.recycled


def test_used_pages_that_nobody_can_clear_are_not_handed_out(memory: GuestMemory) -> None:
    allocator = PageAllocator(memory, private=True, start=0)
    gpa = allocator.alloc(PAGES)
    allocator.alloc(PAGES)
    memory.seal = "kept from the host"
    allocator.free(gpa, 1)
    with pytest.raises(PrivateMemoryError, match="was used before: kept from the host"):
        allocator.alloc(1)
    assert list(allocator.recycled) == [gpa.gfn]
    assert gpa.gfn not in allocator.used


def test_used_private_pages_become_zeroed_shared_ones(memory: GuestMemory, converter: Converter) -> None:
    allocator = PageAllocator(memory, private=True, start=0)
    gpa = allocator.alloc(PAGES)
    allocator.alloc(PAGES)
    memory.shared_view(gpa, 4)[:] = b"dirt"
    memory.seal = "kept from the host"
    allocator.free(gpa, 1)
    converter.calls.clear()
    assert allocator.alloc(1, private=False) == gpa
    assert converter.calls == [(gpa, PAGE_SIZE, False, False)]
    assert memory.read(gpa, 4) == bytes(4)


def test_nobody_else_converts_before_a_conversion_is_noted(memory: GuestMemory) -> None:
    free: list[bool] = []

    def convert(_gpa: Gpa, _size: int, _private: bool, _discard: bool) -> None:
        other = threading.Thread(target=lambda: free.append(memory.lock.acquire(blocking=False)))
        other.start()
        other.join(30)

    memory.convert = convert
    memory.set_private(page(0), PAGE_SIZE)
    assert free == [False]


def test_untouched_memory_is_known() -> None:
    mapping = Anonymous(huge="never").map(64 * PAGE_SIZE)
    assert mapping.touched(0, mapping.size) == []
    for number in (3, 4, 9):
        mapping.view(number * PAGE_SIZE + 5, 1)[:] = b"x"
    assert mapping.touched(0, mapping.size) == [(3 * PAGE_SIZE, 2 * PAGE_SIZE), (9 * PAGE_SIZE, PAGE_SIZE)]
    assert mapping.touched(4 * PAGE_SIZE, 5 * PAGE_SIZE) == [(4 * PAGE_SIZE, PAGE_SIZE)]
    mapping.close()


def test_without_a_page_map_all_memory_counts_as_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = Anonymous().map(4 * PAGE_SIZE)

    def refuse(*_args: object, **_keywords: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr("builtins.open", refuse)
    assert mapping.touched(PAGE_SIZE, 2 * PAGE_SIZE) == [(PAGE_SIZE, 2 * PAGE_SIZE)]
    monkeypatch.undo()
    mapping.close()


def test_inaccessible_memory_is_only_addresses() -> None:
    mapping = Inaccessible().map(4 * PAGE_SIZE)
    with open("/proc/self/maps", encoding="ascii") as maps:
        entry = next(line for line in maps if covers(line, mapping.hva))
    assert entry.split()[1] == "---p"
    mapping.close()


def covers(line: str, address: int) -> bool:
    """Whether a line of /proc/self/maps holds an address."""
    first, last = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
    return first <= address < last


def test_a_memfd_is_told_from_anonymous_memory() -> None:
    with_file, without = MemFd().map(PAGE_SIZE), Anonymous().map(PAGE_SIZE)
    assert with_file.fd >= 0 > without.fd
    with_file.close()
    without.close()


@given(st.sets(st.integers(0, 80)), st.sets(st.integers(0, 80)))
def test_runs_hold_each_frame_once_and_stop_at_borders(frames: set[int], ends: set[int]) -> None:
    runs = frame_runs(sorted(frames), ends)
    covered = [gpa.gfn + n for gpa, size in runs for n in range(size // PAGE_SIZE)]
    assert covered == sorted(frames)
    for gpa, size in runs:
        assert not any(gpa.gfn < end < gpa.gfn + size // PAGE_SIZE for end in ends)
        behind = gpa.gfn + size // PAGE_SIZE
        assert behind not in frames or behind in ends


def test_a_difference_in_words() -> None:
    difference = PrivacyDifference("kvm", Gpa(0x5000), 0x2000, True)
    assert str(difference) == "gpa 0x5000, 0x2000 bytes: private in the bitmap, shared by kvm"
