# SPDX-License-Identifier: Apache-2.0
"""Coalesced MMIO and PIO: guest writes that KVM collects instead of exiting (api.rst section 4.116)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvmpy.core.address import PAGE_SIZE

_HEADER = struct.Struct("<II")
_ENTRY = struct.Struct("<QII8s")
ENTRIES = (PAGE_SIZE - _HEADER.size) // _ENTRY.size


class CoalescedWrite(NamedTuple):
    """One guest write: its address (a port where *pio*) and its data."""

    addr: int
    data: bytes
    pio: bool

    @property
    def value(self) -> int:
        """The data as an unsigned number."""
        return int.from_bytes(self.data, "little")


class CoalescedRing:
    """The ring of a VM, over the one page that every vCPU of it maps.

    It holds 169 writes; the next one then exits as usual. One thread at a time may drain it.
    """

    def __init__(self, page: memoryview) -> None:
        if len(page) < PAGE_SIZE:
            raise ValueError(f"the ring is a page of {PAGE_SIZE} bytes, {len(page)} were given")
        self._page = page

    def __len__(self) -> int:
        first, last = _HEADER.unpack_from(self._page)
        self._check(first, last)
        return int(last - first) % ENTRIES

    @staticmethod
    def _check(first: int, last: int) -> None:
        if first >= ENTRIES or last >= ENTRIES:
            raise ValueError(f"coalesced ring is broken: first {first}, last {last}, {ENTRIES} entries")

    def drain(self) -> list[CoalescedWrite]:
        """Take all writes out, oldest first; ValueError when the indices are outside the ring."""
        first, last = _HEADER.unpack_from(self._page)
        self._check(first, last)
        writes = []
        while first != last:
            addr, size, pio, data = _ENTRY.unpack_from(self._page, _HEADER.size + first * _ENTRY.size)
            if size > 8:
                raise ValueError(f"coalesced ring is broken: entry {first} has {size} bytes")
            writes.append(CoalescedWrite(addr, data[:size], bool(pio)))
            first = (first + 1) % ENTRIES
        struct.pack_into("<I", self._page, 0, first)
        return writes

    def begin_at(self, index: int) -> None:
        """Drop what is there, and let the next write be entry *index*; ValueError outside the ring."""
        self._check(index, index)
        _HEADER.pack_into(self._page, 0, index, index)

    def release(self) -> None:
        """Give the page back; the ring may not be used afterwards."""
        self._page.release()
