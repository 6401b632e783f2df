# SPDX-License-Identifier: Apache-2.0
"""The calls of ptrace(2) that a tracer of system calls needs, and their constants (x86-64)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

SYSCALL = 24
SEIZE = 0x4206
INTERRUPT = 0x4207
LISTEN = 0x4208
GET_SYSCALL_INFO = 0x420E
DETACH = 17

O_TRACESYSGOOD = 1
O_TRACEFORK = 2
O_TRACEVFORK = 4
O_TRACECLONE = 8
O_TRACEEXEC = 16
O_EXITKILL = 1 << 20
FOLLOW = O_TRACESYSGOOD | O_TRACEFORK | O_TRACEVFORK | O_TRACECLONE | O_TRACEEXEC

EVENT_EXEC = 4
EVENT_STOP = 128
WALL = 0x40000000
SYSCALL_STOP = 0x80

INFO_ENTRY = 1
INFO_EXIT = 2
_INFO = struct.Struct("<B3xIQQ")
_INFO_SIZE = 88

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def call(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """Issue a ptrace request; OSError when it fails."""
    result = int(_ptrace(request, tid, address, data))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class SyscallInfo:
    """What PTRACE_GET_SYSCALL_INFO says: ``op`` INFO_ENTRY with number and arguments, or INFO_EXIT."""

    __slots__ = ("args", "is_error", "number", "op", "result", "sp")

    def __init__(self, tid: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        call(GET_SYSCALL_INFO, tid, _INFO_SIZE, ctypes.addressof(buffer))
        raw = buffer.raw
        self.op, _, _, self.sp = _INFO.unpack_from(raw)
        self.number = 0
        self.args: tuple[int, ...] = ()
        self.result = 0
        self.is_error = False
        if self.op == INFO_ENTRY:
            self.number, *args = struct.unpack_from("<7Q", raw, 24)
            self.args = tuple(args)
        elif self.op == INFO_EXIT:
            self.result, error = struct.unpack_from("<qB", raw, 24)
            self.is_error = bool(error)


def syscall_info(tid: int) -> SyscallInfo:
    """Return at which end of which system call the thread stands."""
    return SyscallInfo(tid, ctypes.create_string_buffer(_INFO_SIZE))


def gone(error: OSError) -> bool:
    """Whether the error means that the thread does not exist any more."""
    return error.errno == errno.ESRCH
