# SPDX-License-Identifier: Apache-2.0
"""Which guest pages were written: the dirty log (a bitmap per slot) and the dirty ring (a queue per vCPU)."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SIZE
from kvmpy.core.errors import ClosedError
from kvmpy.core.fd import KvmFd
from kvmpy.core.topic import Topic
from kvmpy.uapi import ffi, ioctls, lib
from kvmpy.uapi.constants import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_DIRTY_LOG_PAGE_OFFSET,
)
from kvmpy.uapi.structs import kvm_clear_dirty_log, kvm_dirty_log

if TYPE_CHECKING:
    from kvmpy.core.vm import Vm

GFN_SIZE = 16


class DirtyBitmap:
    """One bit for every page of a memory slot, as KVM_GET_DIRTY_LOG fills it.

    Pages count from the start of the slot.
    """

    def __init__(self, pages: int, data: bytes | bytearray | None = None) -> None:
        if pages <= 0:
            raise ValueError(f"a dirty bitmap of {pages} pages")
        size = -(-pages // 64) * 8
        if data is not None and len(data) > size:
            raise ValueError(f"{len(data)} bytes are more than a bitmap of {pages} pages has ({size})")
        self.pages = pages
        self.data = bytearray(size)
        if data is not None:
            self.data[: len(data)] = data

    @classmethod
    def of(cls, pages: int, dirty: Iterable[int]) -> DirtyBitmap:
        """Return the bitmap of a slot of *pages* pages in which those of *dirty* are set."""
        filled = cls(pages)
        for page in dirty:
            filled._check(page)
            filled.data[page >> 3] |= 1 << (page & 7)
        return filled

    def _check(self, page: int) -> None:
        if not 0 <= page < self.pages:
            raise ValueError(f"page {page} is outside a slot of {self.pages} pages")

    def __contains__(self, page: int) -> bool:
        self._check(page)
        return bool(self.data[page >> 3] >> (page & 7) & 1)

    def __len__(self) -> int:
        return int(lib.kvmpy_dirty_count(ffi.from_buffer(self.data), self.pages))

    def __bool__(self) -> bool:
        return len(self) > 0

    def _numbers(self) -> array[int]:
        numbers = array("I", bytes(4 * len(self)))
        out = ffi.from_buffer("uint32_t[]", numbers)
        lib.kvmpy_dirty_scan(ffi.from_buffer(self.data), self.pages, out, len(numbers))
        return numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers())

    def bitmap(self) -> BitMap:
        """Return the dirty pages as a roaring bitmap, for set arithmetic."""
        return BitMap(self._numbers())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        return self.pages == other.pages and self._numbers() == other._numbers()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<DirtyBitmap {len(self)} of {self.pages} pages>"


class DirtyGfn(NamedTuple):
    """An entry of a dirty ring: *slot* (address space << 16 | slot) and the page's number in it."""

    slot: int
    offset: int


class DirtyRing:
    """The dirty ring of one vCPU, mapped; entries come in the order in which the guest wrote.

    After a harvest :meth:`Dirty.reset_rings` gives the entries back to KVM and makes it watch the
    pages again; do that before reading the pages, or writes in between are missed. A running vCPU may hold
    entries back: kick it first (api.rst, KVM_CAP_DIRTY_LOG_RING).
    """

    def __init__(self, vcpu: KvmFd, entries: int) -> None:
        if entries <= 0 or entries & (entries - 1):
            raise ValueError(f"{entries} entries: a dirty ring has a power of two of them")
        self.entries = entries
        self.name = f"{vcpu.name}/dirty-ring"
        self.index = 0
        self._area: mmap.mmap | None = vcpu.mmap(entries * GFN_SIZE, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE)
        self._slots = array("I", bytes(4 * entries))
        self._offsets = array("I", bytes(4 * entries))

    def _take(self, limit: int | None) -> int:
        if self._area is None:
            raise ClosedError(f"{self.name} is closed")
        count = int(
            lib.kvmpy_dirty_harvest(
                ffi.from_buffer(self._area),
                self.entries,
                self.index,
                ffi.from_buffer("uint32_t[]", self._slots),
                ffi.from_buffer("uint32_t[]", self._offsets),
                self.entries if limit is None else max(0, min(limit, self.entries)),
            )
        )
        self.index = (self.index + count) % (1 << 32)
        return count

    def harvest(self, limit: int | None = None) -> list[DirtyGfn]:
        """Take the dirty entries out, at most *limit* of them, oldest first."""
        count = self._take(limit)
        return list(map(DirtyGfn, self._slots[:count], self._offsets[:count]))

    def harvest_pages(self) -> dict[int, BitMap]:
        """Take all dirty entries out and return the pages by slot.

        A page that was written twice is there once.
        """
        count = self._take(None)
        slots, offsets = self._slots[:count], self._offsets[:count]
        kinds = set(slots)
        if len(kinds) == 1:
            return {kinds.pop(): BitMap(offsets)}
        results: dict[int, BitMap] = {slot: BitMap() for slot in sorted(kinds)}
        for slot, offset in zip(slots, offsets, strict=True):
            results[slot].add(offset)
        return results

    def close(self) -> None:
        """Unmap the ring."""
        area, self._area = self._area, None
        if area is not None:
            area.close()


class Dirty(Topic):
    """Which pages of a VM were written."""

    _owner: Vm

    def __init__(self, owner: Vm) -> None:
        super().__init__(owner)
        self.ring_entries = 0
        self._rings: list[DirtyRing] = []

    def _slot_pages(self, slot: int, pages: int | None) -> int:
        if pages is not None:
            return pages
        known = self._owner.slots.get(slot & 0xFFFF)
        if known is None:
            raise ValueError(f"slot {slot:#x} is not one of {sorted(self._owner.slots)}: give pages=")
        return known.size // PAGE_SIZE

    def get_log(self, slot: int, pages: int | None = None) -> DirtyBitmap:
        """Return the pages of *slot* written since the last call (KVM_GET_DIRTY_LOG, api.rst section 4.8).

        *slot* carries the address space in bits 16 and up. *pages* is the size of the slot, known for slots
        made with add_memory. Without manual protection KVM clears the log in the same step. ENOENT: no such
        slot, or KVM_MEM_LOG_DIRTY_PAGES is not set on it; ENXIO: the dirty ring replaces the log.
        """
        bitmap = DirtyBitmap(self._slot_pages(slot, pages))
        # lifetime: `pointer` holds the buffer until the ioctl is done.
        pointer = ffi.from_buffer(bitmap.data)
        arg = kvm_dirty_log(slot=slot, dirty_bitmap=int(ffi.cast("uintptr_t", pointer)))
        self._owner.ioctl(ioctls.KVM_GET_DIRTY_LOG, arg)
        del pointer
        return bitmap

    def clear_log(
        self,
        slot: int,
        dirty: DirtyBitmap | bytes | bytearray,
        *,
        first_page: int = 0,
        num_pages: int | None = None,
    ) -> None:
        """Clear the set bits of *dirty* in KVM's log and write-protect the pages again (KVM_CLEAR_DIRTY_LOG).

        Bit 0 of *dirty* is *first_page*, a multiple of 64. *num_pages* must be one too unless the range ends
        with the slot; by default it is the whole bitmap.
        """
        if isinstance(dirty, DirtyBitmap):
            data, count = dirty.data, dirty.pages
        else:
            data, count = bytearray(dirty), 8 * len(dirty)
        pages = count if num_pages is None else num_pages
        missing = -(-pages // 64) * 8 - len(data)
        if missing > 0:
            data = data + bytes(missing)
        # lifetime: `pointer` holds the buffer until the ioctl is done.
        pointer = ffi.from_buffer(data)
        arg = kvm_clear_dirty_log(
            slot=slot,
            num_pages=pages,
            first_page=first_page,
            dirty_bitmap=int(ffi.cast("uintptr_t", pointer)),
        )
        self._owner.ioctl(ioctls.KVM_CLEAR_DIRTY_LOG, arg)
        del pointer

    def enable_manual_log(self, *, initially_set: bool = False) -> None:
        """Let only KVM_CLEAR_DIRTY_LOG clear the log (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).

        *initially_set*: logging starts with all pages dirty, so that write protection comes with the first
        clear.
        """
        flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | (KVM_DIRTY_LOG_INITIALLY_SET if initially_set else 0)
        self._owner.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)

    def enable_ring(self, entries: int) -> None:
        """Queue dirty pages in a ring of *entries* for each vCPU (KVM_CAP_DIRTY_LOG_RING).

        Before the first vCPU is made. A power of two, at least 256 (a page) and more than KVM keeps for
        itself. MissingError where KVM has no ring.
        """
        cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL
        if not self._owner.check_extension(cap):
            cap = KVM_CAP_DIRTY_LOG_RING
            self._owner.need_cap(cap)
        self._owner.enable_cap(cap, entries * GFN_SIZE)
        self.ring_entries = entries

    def ring(self, vcpu: KvmFd) -> DirtyRing:
        """Map the dirty ring of *vcpu*; it is unmapped with the VM. One harvester a ring."""
        if not self.ring_entries:
            raise ValueError(f"{self._owner.name} has no dirty rings: call dirty.enable_ring() first")
        ring = DirtyRing(vcpu, self.ring_entries)
        self._rings.append(ring)
        return ring

    def reset_rings(self) -> int:
        """Give all harvested entries back to KVM and return their number (KVM_RESET_DIRTY_RINGS)."""
        return self._owner.ioctl(ioctls.KVM_RESET_DIRTY_RINGS)

    def close(self) -> None:
        """Unmap the rings."""
        for ring in self._rings:
            ring.close()
        self._rings.clear()
