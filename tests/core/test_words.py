# SPDX-License-Identifier: Apache-2.0
"""Ioctls whose struct is made in C: the same calls, errors and observations as with a struct of Python's."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core import fd as funnel
from kvmpy.core import observe, recent
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.errors import ClosedError, KvmError
from kvmpy.core.fd import KvmFd
from kvmpy.core.slots import VmSlots
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE as PRIVATE
from kvmpy.uapi.ioctls import Ioctl
from kvmpy.uapi.structs import Struct, kvm_memory_attributes

# FIOCLEX: every file takes it, whatever its argument.
TAKEN = replace(ioctls.KVM_SET_MEMORY_ATTRIBUTES, nr=0x5451)
U64 = st.integers(0, (1 << 64) - 1)
WORDS = (0x5000, 2 * PAGE_SIZE, int(PRIVATE), 0)


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

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno: int) -> None:  # noqa: ARG002
        """Note the argument and what came of it."""
        self.seen.append((f"{result} {errno}", arg))


@pytest.fixture
def vm(monkeypatch: pytest.MonkeyPatch) -> Iterator[VmSlots]:
    """The slots of no VM: conversions succeed and change nothing."""
    monkeypatch.setattr(ioctls, "KVM_SET_MEMORY_ATTRIBUTES", TAKEN)
    with VmSlots(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "vm-of-words") as made:
        yield made


@given(U64, U64, U64, U64)
def test_words_are_the_fields_in_their_order(first: int, second: int, third: int, fourth: int) -> None:
    null = KvmFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "null")
    with null, pytest.raises(KvmError) as caught:
        null.ioctl_words(ioctls.KVM_SET_MEMORY_ATTRIBUTES, first, second, third, fourth)
    wanted = kvm_memory_attributes(address=first, size=second, attributes=third, flags=fourth)
    assert (caught.value.errno, caught.value.arg) == (errno.ENOTTY, repr(wanted))


def test_the_kernel_reads_them() -> None:
    """A terminal's size is the first of the words, and can be read back."""
    master, slave = os.openpty()
    os.close(slave)
    with KvmFd(master, "terminal") as fd:
        op = replace(TAKEN, nr=termios.TIOCSWINSZ)
        assert fd.ioctl_words(op, 0x0004_0003_0002_0001, 5, 6, 7) == 0
        assert struct.unpack("<4H", fcntl.ioctl(fd.fd, termios.TIOCGWINSZ, bytes(8))) == (1, 2, 3, 4)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("word", [-1, 1 << 64])
def test_what_is_no_word_is_not_issued(vm: VmSlots, place: int, word: int) -> None:
    words = [0, 0, 0, 0]
    words[place] = word
    recent.calls.clear()
    with pytest.raises(OverflowError):
        vm.ioctl_words(TAKEN, *words)
    assert not recent.calls


def test_a_closed_descriptor_is_told(vm: VmSlots) -> None:
    vm.close()
    with pytest.raises(ClosedError, match="vm-of-words is closed"):
        vm.ioctl_words(TAKEN, *WORDS)


def test_a_postmortem_shows_the_struct(vm: VmSlots) -> None:
    recent.calls.clear()
    vm.ioctl_words(TAKEN, *WORDS)
    told = recent.lines(vm.name, list(recent.calls))
    vm.ioctl(TAKEN, kvm_memory_attributes.of_values(*WORDS))
    assert told == recent.lines(vm.name, list(recent.calls)[1:])
    assert len(told) == 1


def test_observers_get_a_struct(vm: VmSlots) -> None:
    watcher, arg = Watcher(), kvm_memory_attributes.of_values(*WORDS)
    with observe.observing(watcher):
        assert vm.ioctl_words(TAKEN, *WORDS) == 0
    assert watcher.seen == [("vm-of-words KVM_SET_MEMORY_ATTRIBUTES", arg), ("0 0", arg)]


def test_interrupted_words_are_issued_again(vm: VmSlots, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was interrupted goes the usual way, which repeats it until it is done."""
    issued: list[tuple[int, ...]] = []

    def interrupted(_fd: int, _request: int, *words: int) -> int:
        issued.append(words)
        ffi.errno = errno.EINTR
        return -1

    monkeypatch.setattr(funnel, "_ioctl_words", interrupted)
    assert vm.ioctl_words(TAKEN, *WORDS) == 0
    assert issued == [WORDS]


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
