# SPDX-License-Identifier: Apache-2.0
"""Observers of the ioctl funnel: recorder, decoder and timeline attach here and cost nothing when absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from kvmpy.uapi import lib

if TYPE_CHECKING:
    # By this name an observer outside of this room knows what it is told of.
    from kvmpy.core.fd import KvmFd as KvmFd  # noqa: PLC0414
    from kvmpy.core.vcpu import Vcpu
    from kvmpy.uapi.ioctls import Ioctl
    from kvmpy.uapi.structs import Struct


class Observer(Protocol):
    """What the funnel tells: every file descriptor's life and every ioctl, before and after it ran.

    The struct passed is the caller's own: copy what must outlive the call. The thread is the calling one.
    In a forked child ``forked()`` is called, where an observer has it: what it writes to is the parent's.
    """

    def fd_opened(self, fd: KvmFd) -> None:
        """A KVM file descriptor came into being."""

    def fd_closed(self, fd: KvmFd) -> None:
        """A KVM file descriptor is about to be closed."""

    def ioctl_enter(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None) -> None:
        """An ioctl is about to be issued."""

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno: int) -> None:
        """An ioctl returned *result*; *errno* is 0 unless it is negative."""

    def ioctl_dropped(self, fd: KvmFd, op: Ioctl) -> None:
        """An ioctl was not issued after all: a vCPU that another thread runs, or that may run no more."""


class HostObserver(Protocol):
    """What else the host does to a VM: a recorder needs it to tell the whole story.

    Addresses are host-virtual ones of this process.  A view is the memory itself: copy what must outlive the
    call.
    """

    def mapped(self, fd: KvmFd, address: int, size: int, offset: int) -> None:
        """*fd* was mapped, from *offset* on."""

    def memory_written(self, view: memoryview) -> None:
        """The host has just written the guest memory under *view*."""

    def memory_shown(self, view: memoryview, once: bool) -> None:
        """The host may write the guest memory under *view*, with *once* before the next run only."""

    def kicked(self, vcpu: KvmFd, tid: int, signal: int) -> None:
        """A vCPU is about to be kicked; the thread *tid* that runs it gets *signal* (0: none runs it)."""

    def deadline_set(self, vcpu: KvmFd, ns: int) -> None:
        """Runs of a vCPU end *ns* from now; 0 lifts that."""

    def file_called(self, fd: KvmFd, mode: int, offset: int, size: int, errno: int) -> None:
        """fallocate(2) was called on guest memory."""

    def event_signalled(self, fd: int, count: int) -> None:
        """The host added *count* to the eventfd *fd*."""


class Interposer(Protocol):
    """What decides how often a call of the funnel is issued: fault injection does so.

    *issue* issues it and returns what it returned; observers hear of the call as a whole.
    """

    def ioctl(
        self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, issue: Callable[[], tuple[int, int]]
    ) -> tuple[int, int]:
        """Issue *op*, and return result and errno."""

    def run(self, vcpu: Vcpu, issue: Callable[[], int]) -> int:
        """Issue KVM_RUN, and return how it ended, as :meth:`~kvmpy.core.vcpu.Vcpu.run_once` does."""


@contextmanager
def inspecting() -> Iterator[None]:
    """Mark the ioctls of this thread in a with block as a tool's own look at a VM, such as a post-mortem's.

    Observers hear of them all the same; those that show what led to a failure leave them out.
    """
    lib.kvmpy_inspect(1)
    try:
        yield
    finally:
        lib.kvmpy_inspect(-1)


def is_inspecting() -> bool:
    """Whether the calling thread is inside :func:`inspecting`."""
    return bool(lib.kvmpy_inspect(0))


active: list[Observer] = []
host: list[HostObserver] = []
interposers: list[Interposer] = []


def add(observer: Observer) -> None:
    """Attach *observer* to every KVM object of this process."""
    active.append(observer)


def remove(observer: Observer) -> None:
    """Detach *observer*; ValueError when it is not attached."""
    active.remove(observer)


class FullObserver(Observer, HostObserver, Protocol):
    """One that is told everything."""


def attach(observer: FullObserver) -> None:
    """Tell *observer* of ioctls and of the host; harmless a second time."""
    if observer not in active:
        active.append(observer)
        host.append(observer)


def detach(observer: FullObserver) -> bool:
    """Take back :func:`attach`; return whether there was one."""
    attached = observer in active
    if attached:
        active.remove(observer)
        host.remove(observer)
    return attached


def _in_child() -> None:
    # Here and once: a hook of each observer's own would keep it, and all it holds, until the process ends.
    for observer in list(active):
        forked = getattr(observer, "forked", None)
        if forked is not None:
            forked()


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def observing(observer: Observer) -> Iterator[Observer]:
    """Attach *observer* for the length of a with block."""
    add(observer)
    try:
        yield observer
    finally:
        remove(observer)


@contextmanager
def interposing(interposer: Interposer) -> Iterator[None]:
    """Let *interposer* issue the ioctls of this process in a with block; RuntimeError if another one does."""
    if interposers:
        raise RuntimeError(f"{interposers[0]} issues the ioctls already")
    interposers.append(interposer)
    try:
        yield
    finally:
        interposers.remove(interposer)
