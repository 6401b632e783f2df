# SPDX-License-Identifier: Apache-2.0
"""A pseudo file system mounted for this process alone, without a place in any mount namespace."""

from __future__ import annotations

import ctypes
import os

# The same on every architecture; since Linux 5.2.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6


def _syscall(number: int, *args: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def mount_detached(kind: str) -> int:
    """Mount a file system of *kind*, such as ``debugfs``, nowhere, and return the descriptor of its root.

    The mount goes with its last file descriptor, even when the process is killed.  OSError: EPERM without
    CAP_SYS_ADMIN, ENODEV where the kernel has no such file system, ENOSYS before Linux 5.2.
    """
    context = _syscall(_SYS_FSOPEN, kind.encode("ascii"), _FSOPEN_CLOEXEC)
    try:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
