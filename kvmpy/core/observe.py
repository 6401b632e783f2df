# SPDX-License-Identifier: Apache-2.0
"""Observers of the ioctl funnel: recorder, decoder and timeline attach here and cost nothing when absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvmpy.core.fd import KvmFd
    from kvmpy.uapi.ioctls import Ioctl
    from kvmpy.uapi.structs import Struct


class Observer(Protocol):
    """What the funnel tells: every file descriptor's life and every ioctl, before and after it ran.

    The struct passed is the caller's own: copy what must outlive the call. The thread is the calling one.
    """

    def fd_opened(self, fd: KvmFd) -> None:
        """A KVM file descriptor came into being."""

    def fd_closed(self, fd: KvmFd) -> None:
        """A KVM file descriptor is about to be closed."""

    def ioctl_enter(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None) -> None:
        """An ioctl is about to be issued."""

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno: int) -> None:
        """An ioctl returned *result*; *errno* is 0 unless it is negative."""


active: list[Observer] = []


def add(observer: Observer) -> None:
    """Attach *observer* to every KVM object of this process."""
    active.append(observer)


def remove(observer: Observer) -> None:
    """Detach *observer*; ValueError when it is not attached."""
    active.remove(observer)


@contextmanager
def observing(observer: Observer) -> Iterator[Observer]:
    """Attach *observer* for the length of a with block."""
    add(observer)
    try:
        yield observer
    finally:
        remove(observer)
