# SPDX-License-Identifier: Apache-2.0
"""Conversions in one step: what they do, what they leave to the long way, in which order they are noted."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core import observe, recent
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.backing import Anonymous
from kvmpy.core.errors import KvmError
from kvmpy.core.memory import Segment
from kvmpy.core.slots import VmSlots
from kvmpy.uapi import ioctls, lib
from kvmpy.uapi.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE as PRIVATE
from kvmpy.uapi.structs import kvm_memory_attributes
from tests.core.test_words import TAKEN, Watcher

PAGES = 16


class Conversion:
    """The slots of no VM, and memory at 0 that takes conversions in one step: they succeed and do nothing."""

    def __init__(self) -> None:
        self.vm = VmSlots(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "vm-at-once")
        self.mapping = Anonymous().map(PAGES * PAGE_SIZE)
        self.memory = self.vm.memory
        self.memory.at_once = True
        self.memory.convert = lambda gpa, size, private, _discard: self.vm.set_memory_attributes(
            gpa, size, PRIVATE if private else 0
        )
        self.segment = Segment(Gpa(0), PAGES * PAGE_SIZE, self.mapping, self.mapping)
        self.memory.add(self.segment)

    def convert(self, first: int, pages: int, private: bool) -> bool:
        """As GuestMemory.set_private() and set_shared() do; whether one step was enough."""
        gpa, size = Gpa(first * PAGE_SIZE), pages * PAGE_SIZE
        if self.vm.convert_at_once(gpa, size, private):
            return True
        (self.memory.set_private if private else self.memory.set_shared)(gpa, size)
        return False

    def frames(self) -> tuple[list[int], list[int]]:
        """What is private in the bitmap, and by KVM's attributes."""
        return list(self.memory.private), list(self.vm.private_attributes)

    def close(self) -> None:
        """Give all back."""
        self.vm.close()
        self.mapping.close()


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Conversion]:
    """Memory that no conversion has looked at."""
    monkeypatch.setattr(ioctls, "KVM_SET_MEMORY_ATTRIBUTES", TAKEN)
    made = Conversion()
    yield made
    made.close()


def test_the_first_conversion_looks_and_the_next_do_not(slots: Conversion) -> None:
    assert not slots.convert(0, 1, True)
    assert slots.convert(3, 2, True)
    assert slots.convert(3, 1, False)
    assert slots.convert(0, PAGES, True)
    assert slots.convert(1, PAGES - 1, False)
    assert slots.frames() == ([0], [0])


def test_a_shared_range_does_not_show_where_private_pages_may_be(slots: Conversion) -> None:
    assert not slots.convert(0, 1, False)
    assert not slots.convert(0, 1, False)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (1, PAGE_SIZE),
        (0, PAGE_SIZE + 1),
        (0, 0),
        (PAGE_SIZE, -PAGE_SIZE),
        (-PAGE_SIZE, PAGE_SIZE),
        (PAGES * PAGE_SIZE, PAGE_SIZE),
        ((PAGES - 1) * PAGE_SIZE, 2 * PAGE_SIZE),
        (PAGE_SIZE, (1 << 64) - PAGE_SIZE),
        (1 << 64, PAGE_SIZE),
    ],
)
def test_other_ranges_go_the_long_way(slots: Conversion, gpa: int, size: int) -> None:
    slots.convert(0, 1, True)
    for private in (True, False):
        assert not slots.vm.convert_at_once(gpa, size, private)
    assert slots.frames() == ([0], [0])


def test_a_protection_with_more_to_do_is_not_skipped(slots: Conversion) -> None:
    slots.memory.at_once = False
    slots.convert(0, 1, True)
    assert not slots.convert(0, 1, False)


def test_memory_that_went_takes_none(slots: Conversion) -> None:
    slots.convert(0, 2, True)
    slots.memory.remove(slots.segment)
    assert not slots.vm.convert_at_once(Gpa(0), PAGE_SIZE, True)
    assert slots.frames() == ([], [0, 1])
    slots.memory.add(slots.segment)
    assert not slots.convert(0, 1, True)
    slots.vm.close()
    assert not slots.vm.convert_at_once(Gpa(0), PAGE_SIZE, True)


def test_observers_are_told(slots: Conversion) -> None:
    slots.convert(0, 1, True)
    watcher = Watcher()
    with observe.observing(watcher):
        assert not slots.convert(0, 1, False)
    arg = kvm_memory_attributes(address=0, size=PAGE_SIZE)
    assert watcher.seen == [("vm-at-once KVM_SET_MEMORY_ATTRIBUTES", arg), ("0 0", arg)]
    assert slots.convert(0, 1, True)


def test_what_kvm_refuses_is_told_and_not_noted(slots: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    slots.convert(2, 1, True)
    monkeypatch.undo()
    gpa, size = 5 * PAGE_SIZE, PAGE_SIZE
    for private in (True, False):
        with pytest.raises(KvmError) as caught:
            slots.vm.convert_at_once(gpa, size, private)
        wanted = kvm_memory_attributes(address=gpa, size=size, attributes=PRIVATE if private else 0)
        assert (caught.value.errno, caught.value.arg) == (errno.ENOTTY, repr(wanted))
    assert slots.frames() == ([2], [2])
    assert [line.partition(" = ")[2] for line in recent.lines("vm-at-once", list(recent.calls), 2)] == [
        "-1 ENOTTY",
        "-1 ENOTTY",
    ]


def test_a_postmortem_shows_it_as_any_other(slots: Conversion) -> None:
    recent.calls.clear()
    slots.convert(1, 2, True)
    assert slots.convert(1, 2, True)
    long, short = recent.lines("vm-at-once", list(recent.calls))
    assert long == short


def test_notes_that_pile_up_are_carried_out_the_long_way(slots: Conversion) -> None:
    slots.convert(0, 1, True)
    steps = [slots.convert(number % PAGES, 1, number % 3 == 0) for number in range(3 * lib.KVMPY_NOTES_MANY)]
    assert steps.count(False) >= 2
    assert slots.memory.noted.notes.count < lib.KVMPY_NOTES_MANY
    last = {number % PAGES: number % 3 == 0 for number in range(3 * lib.KVMPY_NOTES_MANY)}
    wanted = [page for page, private in sorted(last.items()) if private]
    assert slots.frames() == (wanted, wanted)


def test_it_waits_for_who_converts(slots: Conversion) -> None:
    slots.convert(0, 1, True)
    done = threading.Event()

    def convert() -> None:
        slots.convert(0, 1, False)
        done.set()

    other = threading.Thread(target=convert)
    with slots.memory.lock, slots.memory.lock:
        other.start()
        assert not done.wait(0.1)
        assert list(slots.memory.private) == [0]
    assert done.wait(30)
    other.join(30)
    assert slots.frames() == ([], [])


def test_the_lock_is_the_threads_own(slots: Conversion) -> None:
    lock, others = slots.memory.lock, list[bool]()

    def take() -> None:
        others.append(lock.acquire(blocking=False))
        if others[-1]:
            lock.release()

    def from_elsewhere() -> None:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(30)

    assert lock.acquire()
    assert lock.acquire(blocking=False)
    from_elsewhere()
    lock.release()
    from_elsewhere()
    lock.release()
    from_elsewhere()
    assert others == [False, False, True]


steps = st.lists(
    st.tuples(st.integers(0, PAGES + 1), st.integers(0, PAGES), st.booleans(), st.booleans()), max_size=30
)


@given(steps)
def test_conversions_beside_a_plain_set(taken: list[tuple[int, int, bool, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ioctls, "KVM_SET_MEMORY_ATTRIBUTES", TAKEN)
        slots, model = Conversion(), set[int]()
        for first, pages, private, by_hand in taken:
            wanted = set(range(first, first + pages))
            if by_hand and wanted and first + pages <= PAGES:
                # Another way into KVM, which the bitmap does not follow.
                slots.vm.set_memory_attributes(
                    first * PAGE_SIZE, pages * PAGE_SIZE, PRIVATE if private else 0
                )
                slots.memory.noted.note(first * PAGE_SIZE, pages * PAGE_SIZE, private)
            elif not wanted or first + pages > PAGES:
                with pytest.raises(ValueError, match="gpa"):
                    slots.convert(first, pages, private)
                continue
            else:
                slots.convert(first, pages, private)
            model = model | wanted if private else model - wanted
            assert slots.frames() == (sorted(model), sorted(model))
        slots.close()


def test_threads_leave_kvm_and_the_bitmap_agreed(slots: Conversion) -> None:
    """All convert the same pages: whoever was last, both know it from the same conversion."""
    slots.convert(0, PAGES, True)
    wrong: list[str] = []

    def work(own: int) -> None:
        for turn in range(500):
            slots.convert((own + turn) % PAGES, 1, (own + turn) % 2 == 0)
            with slots.memory.lock:
                private, attributes = slots.frames()
            if private != attributes:
                wrong.append(f"{private} {attributes}")

    threads = [threading.Thread(target=work, args=(own,)) for own in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
