# SPDX-License-Identifier: Apache-2.0
"""Conversions of guest memory between private and shared: one after the other, and the plain ones in C."""

from __future__ import annotations

from types import TracebackType

from kvmpy.core.frames import NotedFrames
from kvmpy.uapi import ffi, lib

_acquire = lib.kvmpy_conversions_acquire
_release = lib.kvmpy_conversions_release
_convert = lib.kvmpy_convert
_ELSEWHERE = lib.KVMPY_CONVERT_ELSEWHERE


class Conversions:
    """The lock that a VM's conversions take, so that KVM and the bitmaps see them in one order.

    One thread may take it several times.  In a range that was :meth:`allow`-ed, :meth:`at_once` does the
    whole of a conversion in C.
    """

    def __init__(self) -> None:
        made = lib.kvmpy_conversions_new()
        if not made:
            raise MemoryError
        self._c = ffi.gc(made, lib.kvmpy_conversions_free)

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; False when another thread has it and *blocking* is false."""
        return bool(_acquire(self._c, blocking))

    def release(self) -> None:
        """Give the lock back; only for the thread that has it."""
        _release(self._c)

    def __enter__(self) -> None:
        _acquire(self._c, True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _release(self._c)

    def allow(self, start: int, end: int) -> None:
        """Let :meth:`at_once` convert any page from *start* up to *end*, and none elsewhere."""
        lib.kvmpy_conversions_allow(self._c, start, end)

    def at_once(
        self,
        fd: int,
        request: int,
        gpa: int,
        size: int,
        attributes: int,
        accepted: NotedFrames,
        frames: NotedFrames,
    ) -> int | None:
        """Set the attributes of a range and note the change in *accepted* and *frames*.

        Returns 0 or the errno of KVM_SET_MEMORY_ATTRIBUTES, which leaves the notes as they were.  None, with
        nothing done, where the range is not allowed or not made of whole pages.
        """
        try:
            result = _convert(self._c, fd, request, gpa, size, attributes, accepted.notes, frames.notes)
        except OverflowError:
            return None
        if not result:
            return 0
        return None if result == _ELSEWHERE else ffi.errno
