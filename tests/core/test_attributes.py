# SPDX-License-Identifier: Apache-2.0
"""Conversions down to KVM_SET_MEMORY_ATTRIBUTES: what is issued, noted and told, and in which order."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core import observe, recent
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.backing import Anonymous
from kvmpy.core.errors import ClosedError, KvmError
from kvmpy.core.fd import KvmFd
from kvmpy.core.memory import Segment
from kvmpy.core.slots import VmSlots
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE as PRIVATE
from kvmpy.uapi.ioctls import Ioctl
from kvmpy.uapi.structs import Struct, kvm_memory_attributes

PAGES = 16
# FIOCLEX: every file takes it, whatever its argument.
TAKEN = replace(ioctls.KVM_SET_MEMORY_ATTRIBUTES, nr=0x5451)


class Watcher:
    """Notes what the funnel tells."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Struct | int | None]] = []

    def fd_opened(self, fd: KvmFd) -> None:
        """Not looked at."""

    def fd_closed(self, fd: KvmFd) -> None:
        """Not looked at."""

    def ioctl_enter(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None) -> None:
        """Note the argument."""
        self.seen.append((f"{fd.name} {op.name}", arg))

    def ioctl_dropped(self, fd: KvmFd, op: Ioctl) -> None:
        """Note that there was no ioctl."""
        self.seen.append((f"{fd.name} {op.name} dropped", None))

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno: int) -> None:  # noqa: ARG002
        """Note the argument and what came of it."""
        self.seen.append((f"{result} {errno}", arg))


class Slots:
    """The slots of no VM, and memory at 0: conversions succeed and change nothing."""

    def __init__(self) -> None:
        self.vm = VmSlots(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "vm-of-slots")
        self.mapping = Anonymous().map(PAGES * PAGE_SIZE)
        self.memory = self.vm.memory
        self.memory.convert = lambda gpa, size, private, _discard: self.vm.set_memory_attributes(
            gpa, size, PRIVATE if private else 0
        )
        self.memory.add(Segment(Gpa(0), PAGES * PAGE_SIZE, self.mapping, self.mapping))

    def convert(self, first: int, pages: int, private: bool) -> None:
        """Convert *pages* pages from number *first* on."""
        change = self.memory.set_private if private else self.memory.set_shared
        change(Gpa(first * PAGE_SIZE), pages * PAGE_SIZE)

    def frames(self) -> tuple[list[int], list[int]]:
        """What is private in the bitmap, and by KVM's attributes."""
        return list(self.memory.private), list(self.vm.private_attributes)

    def close(self) -> None:
        """Give all back."""
        self.vm.close()
        self.mapping.close()


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slots]:
    """Slots whose conversions every file takes."""
    monkeypatch.setattr(ioctls, "KVM_SET_MEMORY_ATTRIBUTES", TAKEN)
    built = Slots()
    yield built
    built.close()


@pytest.fixture
def vm(slots: Slots) -> VmSlots:
    """The same without a look at the memory."""
    return slots.vm


def test_an_observer_changes_nothing(slots: Slots) -> None:
    """With and without one, a conversion is the same call of the same function on the same descriptor."""
    issued: list[tuple[str, Struct | int | None]] = []
    issue = slots.vm._issue

    def spied(op: Ioctl, arg: Struct | int | None) -> tuple[int, int]:
        issued.append((op.name, arg))
        return issue(op, arg)

    slots.vm._issue = spied  # type: ignore[method-assign]
    slots.convert(3, 2, True)
    watcher = Watcher()
    with observe.observing(watcher):
        slots.convert(3, 2, True)
    wanted = kvm_memory_attributes(address=3 * PAGE_SIZE, size=2 * PAGE_SIZE, attributes=PRIVATE)
    assert issued == [("KVM_SET_MEMORY_ATTRIBUTES", wanted)] * 2
    assert watcher.seen == [("vm-of-slots KVM_SET_MEMORY_ATTRIBUTES", wanted), ("0 0", wanted)]
    assert slots.frames() == ([3, 4], [3, 4])


def test_what_kvm_refuses_is_told_and_not_noted(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    slots.convert(2, 1, True)
    monkeypatch.undo()
    for private in (True, False):
        with pytest.raises(KvmError) as caught:
            slots.convert(5 if private else 2, 1, private)
        wanted = kvm_memory_attributes(
            address=(5 if private else 2) * PAGE_SIZE, size=PAGE_SIZE, attributes=PRIVATE if private else 0
        )
        assert (caught.value.errno, caught.value.arg) == (errno.ENOTTY, repr(wanted))
    assert slots.frames() == ([2], [2])
    taken = recent.of_vm("vm-of-slots", recent.taken(), 2)
    assert [entry["result"] for entry in recent.entries(taken)] == ["ENOTTY", "ENOTTY"]


def test_attributes_are_noted_when_they_were_accepted(vm: VmSlots, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.set_memory_attributes(Gpa(0x5000), 2 * PAGE_SIZE, PRIVATE)
    vm.set_memory_attributes(0x6000, PAGE_SIZE, 0)
    vm.set_memory_attributes(0x9000, PAGE_SIZE, PRIVATE | 0x10)
    vm.set_memory_attributes(0xA000, PAGE_SIZE, 0x10)
    assert list(vm.private_attributes) == [5, 9]
    monkeypatch.undo()
    with pytest.raises(KvmError) as caught:
        vm.set_memory_attributes(0x7000, PAGE_SIZE, PRIVATE)
    assert caught.value.errno == errno.ENOTTY
    assert list(vm.private_attributes) == [5, 9]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("word", [-1, 1 << 64])
def test_what_is_no_word_is_not_issued(vm: VmSlots, place: int, word: int) -> None:
    words = [0, 0, 0, 0]
    words[place] = word
    recent.clear()
    with pytest.raises(OverflowError):
        vm.set_memory_attributes(*words)
    assert not recent.taken()
    assert not vm.private_attributes


def test_a_closed_descriptor_is_told(vm: VmSlots) -> None:
    vm.close()
    with pytest.raises(ClosedError, match="vm-of-slots is closed"):
        vm.set_memory_attributes(0, PAGE_SIZE, PRIVATE)
    assert not vm.private_attributes


def test_an_interrupted_conversion_is_issued_again(vm: VmSlots) -> None:
    issued: list[tuple[int, int]] = []
    issue = vm._issue

    def interrupted(op: Ioctl, arg: Struct | int | None) -> tuple[int, int]:
        issued.append((-1, errno.EINTR) if len(issued) < 2 else issue(op, arg))
        ffi.errno = errno.EINTR
        return issued[-1]

    vm._issue = interrupted  # type: ignore[method-assign]
    vm.set_memory_attributes(0, PAGE_SIZE, PRIVATE)
    assert issued == [(-1, errno.EINTR), (-1, errno.EINTR), (0, 0)]
    assert list(vm.private_attributes) == [0]


def test_it_waits_for_who_converts(slots: Slots) -> None:
    slots.convert(0, 1, True)
    began, done = threading.Event(), threading.Event()

    def convert() -> None:
        began.set()
        slots.convert(0, 1, False)
        done.set()

    other = threading.Thread(target=convert)
    with slots.memory.lock, slots.memory.lock:
        other.start()
        assert began.wait(30)
        assert not done.wait(0.1)
        assert list(slots.memory.private) == [0]
    assert done.wait(30)
    other.join(30)
    assert slots.frames() == ([], [])


steps = st.lists(
    st.tuples(st.integers(0, PAGES + 1), st.integers(0, PAGES), st.booleans(), st.booleans()), max_size=30
)


@given(steps)
def test_conversions_beside_a_plain_set(taken: list[tuple[int, int, bool, bool]]) -> None:
    """The bitmap follows conversions, and KVM's attributes also what goes past it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ioctls, "KVM_SET_MEMORY_ATTRIBUTES", TAKEN)
        slots, private, attributes = Slots(), set[int](), set[int]()
        for first, pages, there, by_hand in taken:
            part = set(range(first, first + pages))
            if by_hand:
                slots.vm.set_memory_attributes(first * PAGE_SIZE, pages * PAGE_SIZE, PRIVATE if there else 0)
            elif not part or first + pages > PAGES:
                with pytest.raises(ValueError, match="gpa"):
                    slots.convert(first, pages, there)
                continue
            else:
                slots.convert(first, pages, there)
                private = private | part if there else private - part
            attributes = attributes | part if there else attributes - part
            assert slots.frames() == (sorted(private), sorted(attributes))
        slots.close()


def test_threads_leave_kvm_and_the_bitmap_agreed(slots: Slots) -> None:
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


def test_attributes_are_noted_in_the_order_in_which_kvm_took_them(slots: Slots) -> None:
    """Without a conversion around them, too: who sets them between an ioctl and its note has to wait."""
    issue, done = slots.vm._issue, threading.Event()

    def share() -> None:
        slots.vm.set_memory_attributes(0, PAGE_SIZE, 0)
        done.set()

    other = threading.Thread(target=share)

    def spied(op: Ioctl, arg: Struct | int | None) -> tuple[int, int]:
        result = issue(op, arg)
        if not other.ident:
            other.start()
            assert not done.wait(0.1)
        return result

    slots.vm._issue = spied  # type: ignore[method-assign]
    slots.vm.set_memory_attributes(0, PAGE_SIZE, PRIVATE)
    other.join(30)
    assert done.is_set()
    assert not slots.vm.private_attributes
