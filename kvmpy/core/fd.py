# SPDX-License-Identifier: Apache-2.0
"""One class for every KVM file descriptor, and the funnel that all ioctls go through."""

from __future__ import annotations

import errno
import mmap
import os
from typing import ClassVar

from kvmpy.core import observe
from kvmpy.core.closing import Closing
from kvmpy.core.errors import ClosedError, KvmError
from kvmpy.core.settings import Settings
from kvmpy.uapi import ffi, lib
from kvmpy.uapi.ioctls import Ioctl
from kvmpy.uapi.structs import Struct

_ioctl_int = lib.kvmpy_ioctl
_ioctl_ptr = lib.kvmpy_ioctl_ptr


class KvmFd(Closing):
    """A file descriptor of KVM that this object owns; closing it twice is harmless."""

    kind: ClassVar[str] = "system"

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self._label = ffi.new("char[]", f"{self.kind} {name}".encode())
        self.settings = Settings()
        for observer in observe.active:
            observer.fd_opened(self)

    @property
    def fd(self) -> int:
        """The number of the file descriptor; ClosedError once closed."""
        if self._fd < 0:
            raise ClosedError(f"{self.name} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether the file descriptor was closed."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return :attr:`fd`, for select() and friends."""
        return self.fd

    def ioctl_raw(self, op: Ioctl, arg: Struct | int | None = None) -> tuple[int, int]:
        """Issue *op* and return ``(result, errno)``; errno is 0 unless the result is negative.

        *arg* is passed by value when it is an int (None means 0) and by address when it is a struct,
        whatever the ioctl table says: negative tests need the wrong ones too.
        """
        if self._fd < 0:
            raise ClosedError(f"{self.name} is closed")
        for observer in observe.active:
            observer.ioctl_enter(self, op, arg)
        if observe.interposers:
            result, number = observe.interposers[0].ioctl(self, op, arg, lambda: self._issue(op, arg))
        else:
            result, number = self._issue(op, arg)
        for observer in observe.active:
            observer.ioctl_exit(self, op, arg, result, number)
        if op.lasting is not None and result >= 0:
            self.settings.remember(op, arg)
        return result, number

    def _issue(self, op: Ioctl, arg: Struct | int | None) -> tuple[int, int]:
        fd = self._fd
        if fd < 0:
            raise ClosedError(f"{self.name} is closed")
        if arg is None or isinstance(arg, int):
            result = _ioctl_int(self._label, fd, op.nr, arg or 0)
        else:
            result = _ioctl_ptr(self._label, fd, op.nr, arg.cdata, arg.nbytes, arg.INDEX)
        return result, ffi.errno if result < 0 else 0

    def ioctl(self, op: Ioctl, arg: Struct | int | None = None) -> int:
        """Issue *op* and return its result; KvmError when it fails.

        What a signal interrupts is issued again once the signal is handled, but for KVM_RUN.
        """
        result, number = self.ioctl_raw(op, arg)
        # KVM_CREATE_VM and others give up when they see a signal, kvmpy's own deadlines included.
        while number == errno.EINTR and op.name != "KVM_RUN":
            result, number = self.ioctl_raw(op, arg)
        if result < 0:
            raise self.error(op, number, arg)
        return result

    def error(self, op: Ioctl, number: int, arg: Struct | int | None = None) -> KvmError:
        """Return the exception for a failed *op*; classes with more to say override it."""
        return KvmError(op, number, self.name, arg)

    def mmap(self, size: int, offset: int = 0) -> mmap.mmap:
        """Map *size* bytes of the file descriptor, shared, readable and writable; OSError if KVM refuses."""
        # mmap.mmap(fd) would keep a duplicate of the descriptor for as long as a view of the mapping is held.
        area = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        place = ffi.from_buffer(area)
        address = int(ffi.cast("uintptr_t", place))
        if lib.kvmpy_map_over(place, size, self.fd, offset):
            number = ffi.errno
            raise OSError(number, os.strerror(number), f"mmap of {self.name}")
        for observer in observe.host:
            observer.mapped(self, address, size, offset)
        return area

    def close(self) -> None:
        """Close the file descriptor."""
        if self._fd >= 0:
            for observer in observe.active:
                observer.fd_closed(self)
            fd, self._fd = self._fd, -1
            if fd >= 0:  # else another thread was faster
                os.close(fd)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}{' closed' if self.closed else f' fd {self._fd}'}>"
