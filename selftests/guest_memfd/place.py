# SPDX-License-Identifier: Apache-2.0
"""Addresses of one's own, into which files are mapped where a test wants them; and NUMA policies."""

from __future__ import annotations

import ctypes
import mmap
import os
from types import TracebackType

_MAP_FIXED = 0x10
_FAILED = (1 << 64) - 1
_MBIND, _GET_MEMPOLICY = 237, 239
_MPOL_F_NODE, _MPOL_F_ADDR = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    address_of_map = _libc.mmap(address, size, protection, flags, fd, 0)
    if address_of_map is None or address_of_map == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap: {os.strerror(number)}")
    return int(address_of_map)


class Reserved:
    """*size* bytes of addresses; everything in them is unmapped at the end of the block."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = _map(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)

    def map_fixed(self, address: int, size: int, fd: int) -> None:
        """Map a file there, shared; OSError as mmap(2) fails."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        _map(address, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)

    def madvise(self, address: int, size: int, advice: int) -> int:
        """Return the errno of madvise(2), 0 for none."""
        return ctypes.get_errno() if _libc.madvise(address, size, advice) else 0

    def mbind(self, address: int, size: int, mode: int, nodes: int) -> int:
        """Return the errno of mbind(2), 0 for none; *nodes* is a mask."""
        mask = ctypes.c_ulong(nodes)
        words = [ctypes.c_ulong(word) for word in (_MBIND, address, size, mode)]
        failed = _libc.syscall(*words, ctypes.byref(mask), ctypes.c_ulong(64), ctypes.c_ulong(0))
        return ctypes.get_errno() if failed else 0

    def policy(self, address: int) -> tuple[int, int]:
        """Return mode and node mask at an address (get_mempolicy(2)); OSError as that fails."""
        return self._get_mempolicy(address, _MPOL_F_ADDR)

    def node(self, address: int) -> int:
        """Touch the page at an address and return its NUMA node; OSError as get_mempolicy(2) fails."""
        return self._get_mempolicy(address, _MPOL_F_NODE | _MPOL_F_ADDR)[0]

    def _get_mempolicy(self, address: int, flags: int) -> tuple[int, int]:
        mode, mask = ctypes.c_int(-1), ctypes.c_ulong(0)
        failed = _libc.syscall(
            ctypes.c_ulong(_GET_MEMPOLICY),
            ctypes.byref(mode),
            ctypes.byref(mask),
            ctypes.c_ulong(64),
            ctypes.c_ulong(address),
            ctypes.c_ulong(flags),
        )
        if failed:
            number = ctypes.get_errno()
            raise OSError(number, f"get_mempolicy: {os.strerror(number)}")
        return mode.value, mask.value

    def __enter__(self) -> Reserved:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _libc.munmap(self.address, self.size)
