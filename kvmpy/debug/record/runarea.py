# SPDX-License-Identifier: Apache-2.0
"""The run area of a vCPU as a recorder sees it: what KVM_RUN left there, and what the host changed since."""

from __future__ import annotations

import mmap

from kvmpy.debug.record.arguments import chunk
from kvmpy.debug.record.format import PAGE_SIZE, What, When
from kvmpy.debug.record.tracker import address_of, differing
from kvmpy.uapi.constants import KVM_EXIT_IO
from kvmpy.uapi.structs import kvm_run

_FIELDS = kvm_run.fields()
# The exit union, and the two bitmaps of synchronised registers behind it.
UNION_END = _FIELDS["kvm_valid_regs"][0]
_SYNC = slice(UNION_END, _FIELDS["kvm_dirty_regs"][0] + _FIELDS["kvm_dirty_regs"][1])
HEAD = _SYNC.stop
WHOLE = kvm_run.SIZE
_REASON = _FIELDS["exit_reason"][0]
_IO = _FIELDS["io"][0]
_NO_SYNC = bytes(_SYNC.stop - _SYNC.start)
_EXIT_IO = bytes([KVM_EXIT_IO, 0, 0, 0])
_IN, _OUT, _RUN = int(When.IN), int(When.OUT), int(What.RUN)
_RING = 2 * PAGE_SIZE
# A data area longer than this is not one.
_MOST_IO = 4096


class RunArea:
    """One vCPU's run area."""

    __slots__ = ("_area", "_io", "_last", "_ring", "address", "size")

    def __init__(self, area: mmap.mmap) -> None:
        self._area = area
        self.address = address_of(memoryview(area))
        self.size = len(area)
        self._last = bytes(HEAD)
        self._io: tuple[int, bytes] | None = None
        # What the host has taken out of the ring of coalesced writes.
        self._ring = self._first()

    def _first(self) -> bytes:
        return self._area[_RING : _RING + 4] if self.size > _RING else b""

    def before(self) -> list[bytes]:
        """Return chunks for what the host changed since the last run."""
        area = self._area
        now = area[:HEAD]
        results = []
        last = self._last
        if now[_SYNC] != _NO_SYNC:
            now = area[:WHOLE]
            last = last.ljust(WHOLE, b"\0")
        if now != last[: len(now)]:
            low, high = differing(last[: len(now)], now)
            results.append(chunk(self.address + low, now[low:high], _IN, _RUN))
        if self._io is not None:
            offset, data = self._io
            answer = area[offset : offset + len(data)]
            if answer != data:
                results.append(chunk(self.address + offset, answer, _IN, _RUN))
        first = self._first()
        if first != self._ring:
            self._ring = first
            results.append(chunk(self.address + _RING, first, _IN, _RUN))
        return results

    def after(self) -> list[bytes]:
        """Return chunks for what KVM_RUN left."""
        area = self._area
        now = area[:HEAD]
        if now[_SYNC] != _NO_SYNC:
            now = area[:WHOLE]
            chunks = [chunk(self.address, now, _OUT, _RUN)]
        else:
            chunks = [chunk(self.address, now[:UNION_END], _OUT, _RUN)]
        self._last = now
        self._io = None
        if now[_REASON : _REASON + 4] == _EXIT_IO:
            size = now[_IO + 1] * int.from_bytes(now[_IO + 4 : _IO + 8], "little")
            offset = int.from_bytes(now[_IO + 8 : _IO + 16], "little")
            if 0 < size <= _MOST_IO and offset + size <= self.size:
                data = area[offset : offset + size]
                self._io = (offset, data)
                chunks.append(chunk(self.address + offset, data, _OUT, _RUN))
        return chunks
