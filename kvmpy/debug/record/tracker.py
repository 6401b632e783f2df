# SPDX-License-Identifier: Apache-2.0
"""What guest memory holds when it first runs, and what the host writes later: the recorder's view of memory.

The first run of a VM reads the populated pages of its slots (/proc/self/pagemap tells which they are).  Later
writes are told by the library; memory that somebody holds a view of is compared before each run.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field

from kvmpy.debug.record.capture import Source
from kvmpy.debug.record.events import Map, Memory, Unmap, Write
from kvmpy.debug.record.format import MAP_NO_READ, MAP_NO_WRITE, MAP_SHARED, MEMORY_INITIAL, PAGE_SIZE
from kvmpy.debug.record.writer import RecordWriter, out_of_the_way
from kvmpy.uapi import ffi

# Present or swapped out: the two highest bits of a page's entry, whose last byte this is.
_POPULATED = re.compile(rb"[\x40-\xff]+")
_RUN_PAGES = 1024
# Views that are compared before every run; larger ones are compared before the next run alone.
_LARGEST_VIEW = 64 << 10
_MOST_VIEWS = 64


def address_of(view: memoryview) -> int:
    """Return where *view* lies in this process."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(view)))


@dataclass
class Shown:
    """A view that somebody may write through, and what it held when it was looked at last."""

    address: int
    view: memoryview
    once: bool
    content: bytes = field(repr=False)


@dataclass
class VmMemory:
    """The memory of one VM, and what is copied into it at launch."""

    largest: int = PAGE_SIZE
    """Bytes of its largest slot."""
    ran: bool = False
    # What KVM was given to copy into the guest: ranges, and the id of each page's content.
    sources: list[tuple[int, int]] = field(default_factory=list)
    source_pages: dict[int, int] = field(default_factory=dict)


class MemoryTracker:
    """Follows the memory of all VMs; every method may be called by any thread."""

    def __init__(self, writer: RecordWriter) -> None:
        self._writer = writer
        self._vms: dict[object, VmMemory] = {}
        # Ranges that were read, by address, and the VMs that use them.
        self._regions: dict[tuple[int, int], set[object]] = {}
        self._fresh: list[tuple[int, int]] = []
        self._mapped: set[int] = set()
        self._source: Source | None = None
        self.shown: list[Shown] = []
        self._lock = threading.RLock()
        self._pagemap, self._mem, self._maps = (
            out_of_the_way(os.open(f"/proc/self/{name}", os.O_RDONLY | os.O_CLOEXEC))
            for name in ("pagemap", "mem", "maps")
        )
        self._everything = Source(self._mem)

    # Slots.

    def slot_set(self, vm: object, address: int, size: int, tid: int) -> None:
        """A slot was set; *size* 0 deletes it."""
        if size == 0:
            return
        with self._lock:
            state = self._vms.setdefault(vm, VmMemory())
            state.largest = max(state.largest, size)
            region = (address, size)
            if region in self._regions:
                self._regions[region].add(vm)
            elif not any(a <= address and address + size <= a + s for a, s in self._regions):
                self._regions[region] = {vm}
                self._source = None
                self._fresh.append(region)
                if address not in self._mapped:
                    self._writer.put(Map(address, size, flags=self._protection(address)), tid=tid)

    def mapped(self, address: int) -> None:
        """Memory at *address* was told of by a MAP frame."""
        self._mapped.add(address)

    def was_mapped(self, address: int) -> bool:
        """Tell whether a MAP frame told of *address*."""
        return address in self._mapped

    def holds(self, address: int) -> bool:
        """Tell whether *address* is guest memory."""
        return any(a <= address < a + s for a, s in self._regions)

    @property
    def source(self) -> Source:
        """This process's memory, but for what is in the record without being copied with an argument."""
        source = self._source
        if source is None:
            with self._lock:
                copied = (each for state in self._vms.values() for each in state.sources)
                source = self._source = Source(held=[*self._regions, *copied])
        return source

    def vm_closed(self, vm: object, tid: int) -> None:
        """A VM is about to be closed: its memory may go, and its addresses may come again."""
        with self._lock:
            self.sources_done(vm, tid)
            self._vms.pop(vm, None)
            self._source = None
            for region, users in list(self._regions.items()):
                users.discard(vm)
                if users:
                    continue
                del self._regions[region]
                address, size = region
                self._writer.put(Unmap(address, size), tid=tid)
                self._mapped.discard(address)
                self.shown = [each for each in self.shown if not address <= each.address < address + size]
            self._fresh = [region for region in self._fresh if region in self._regions]

    # Content.

    @property
    def unread(self) -> bool:
        """Whether there are slots whose content was not read yet."""
        return bool(self._fresh)

    def read_fresh(self, vm: object, tid: int) -> None:
        """Write what slots hold that were made since the last call; *vm* is about to look at its memory."""
        with self._lock:
            state = self._vms.setdefault(vm, VmMemory())
            for address, size in self._fresh:
                self._read(address, size, 0 if state.ran else MEMORY_INITIAL, tid)
            # Only now: a vCPU in another thread must not run, and write, while this is read.
            self._fresh = []
            state.ran = True
            self.look_again()

    def copied(self, vm: object, address: int, size: int, tid: int) -> None:
        """Write what lies at *address*, whole pages that *vm* is about to copy into its guest.

        A length that no slot has is a mistake: no more is read than the largest one.
        """
        if address % PAGE_SIZE or size <= 0 or self.holds(address):
            return
        with self._lock:
            state = self._vms.setdefault(vm, VmMemory())
            size = min(size, state.largest)
            for offset in range(address, address + size, _RUN_PAGES * PAGE_SIZE):
                data = self.peek(offset, min(_RUN_PAGES * PAGE_SIZE, address + size - offset))
                pages = [data[n : n + PAGE_SIZE] for n in range(0, len(data) - PAGE_SIZE + 1, PAGE_SIZE)]
                if not pages:
                    break
                self._source_pages(state, offset, pages, tid)

    def _source_pages(self, state: VmMemory, address: int, pages: list[bytes], tid: int) -> None:
        ids = self._writer.page_ids(pages, tid)
        known = state.source_pages
        places = range(address, address + len(ids) * PAGE_SIZE, PAGE_SIZE)
        if any(place not in known for place in places):
            state.sources.append((address, len(places) * PAGE_SIZE))
            self._source = None
            self._writer.put(Map(address, len(places) * PAGE_SIZE, flags=self._protection(address)), tid=tid)
        for fresh, flags in ((True, MEMORY_INITIAL), (False, 0)):
            for place, ident in zip(places, ids, strict=True):
                if (place not in known) is fresh and known.get(place, 0) != ident:
                    self._writer.put(Memory(place, (ident,), flags), tid=tid)
            if fresh:
                known.update({place: known.get(place, ids[n]) for n, place in enumerate(places)})
        known.update(zip(places, ids, strict=True))

    def sources_done(self, vm: object, tid: int) -> None:
        """*vm* copies nothing any more: the memory may go, and its addresses may come again."""
        with self._lock:
            state = self._vms.get(vm)
            if state is None:
                return
            for address, size in state.sources:
                self._writer.put(Unmap(address, size), tid=tid)
            state.sources.clear()
            self._source = None
            state.source_pages.clear()

    def _read(self, address: int, size: int, flags: int, tid: int) -> None:
        count = size // PAGE_SIZE
        for start in range(0, count, 1 << 20):
            entries = os.pread(
                self._pagemap, 8 * min(count - start, 1 << 20), (address // PAGE_SIZE + start) * 8
            )
            for run in _POPULATED.finditer(entries[7::8]):
                first = address + (start + run.start()) * PAGE_SIZE
                for position in range(0, run.end() - run.start(), _RUN_PAGES):
                    pages = min(_RUN_PAGES, run.end() - run.start() - position)
                    self._write_pages(first + position * PAGE_SIZE, pages, flags, tid)

    def _write_pages(self, address: int, count: int, flags: int, tid: int) -> None:
        data = self.peek(address, count * PAGE_SIZE)
        whole = len(data) // PAGE_SIZE * PAGE_SIZE
        ids = self._writer.page_ids(
            [data[offset : offset + PAGE_SIZE] for offset in range(0, whole, PAGE_SIZE)], tid
        )
        # Pages of zeroes at either end go without saying.
        low, high = 0, len(ids)
        while low < high and ids[low] == 0:
            low += 1
        while high > low and ids[high - 1] == 0:
            high -= 1
        if low < high:
            self._writer.put(Memory(address + low * PAGE_SIZE, ids[low:high], flags), tid=tid)

    def peek(self, address: int, size: int) -> bytes:
        """Return up to *size* bytes at *address*; what cannot be read is left out, and nothing faults."""
        return self._everything.read(address, size) if size > 0 else b""

    def look(self, address: int, size: int) -> bytes:
        """Return *size* bytes at *address*, as zeroes where nobody touched a page yet or it cannot be read.

        The memory may have lost its access, or be served by somebody's userfaultfd: no page is faulted in,
        no signal comes, nobody waits.
        """
        data = bytearray(size)
        first = address // PAGE_SIZE
        count = (address + size - 1) // PAGE_SIZE - first + 1
        entries = os.pread(self._pagemap, 8 * count, 8 * first)
        for run in _POPULATED.finditer(entries[7::8]):
            low = max(address, (first + run.start()) * PAGE_SIZE)
            high = min(address + size, (first + run.end()) * PAGE_SIZE)
            part = self.peek(low, high - low)
            data[low - address : low - address + len(part)] = part
        return bytes(data)

    def _protection(self, address: int) -> int:
        # As one mapping: memory whose parts are protected differently is told as its first part.
        os.lseek(self._maps, 0, os.SEEK_SET)
        text = b"".join(iter(lambda: os.read(self._maps, 1 << 16), b""))
        for line in text.decode(errors="replace").splitlines():
            span, rights = line.split(" ", 2)[:2]
            start, _, end = span.partition("-")
            if int(start, 16) <= address < int(end, 16):
                result = 0 if rights[0] == "r" else MAP_NO_READ
                result |= 0 if rights[1] == "w" else MAP_NO_WRITE
                return result | (MAP_SHARED if rights[3] == "s" else 0)
        return MAP_NO_READ | MAP_NO_WRITE

    # What the host writes after the first run.

    def _watched(self, address: int) -> bool:
        return any(a <= address < a + s for a, s in self._regions if (a, s) not in self._fresh)

    def written(self, view: memoryview, tid: int) -> None:
        """The host wrote the memory under *view*."""
        if not len(view):
            return
        address = address_of(view)
        with self._lock:
            if not self._watched(address):
                return
            data = self.look(address, view.nbytes)
            self._writer.put(Write(address, data), tid=tid)
            for each in self.shown:
                if each.address < address + len(data) and address < each.address + len(each.content):
                    each.content = self.look(each.address, len(each.content))

    def show(self, view: memoryview, once: bool) -> None:
        """The host may write through *view*: compare it before each run, with *once* before the next."""
        if not len(view):
            return
        address = address_of(view)
        with self._lock:
            large = view.nbytes > _LARGEST_VIEW
            once = once or large
            if not (self._watched(address) if once else self.holds(address)):
                return
            for each in self.shown:
                if each.address == address and len(each.content) == view.nbytes:
                    each.once = each.once and once
                    return
            self.shown.append(Shown(address, view, once, self.look(address, view.nbytes)))
            if len(self.shown) > _MOST_VIEWS and not once:
                # The oldest is the one that is least likely to be written again.
                self.shown.remove(next(each for each in self.shown if not each.once))

    def compare(self, tid: int) -> None:
        """Write what changed under the views since they were looked at last; a vCPU is about to run."""
        with self._lock:
            for each in self.shown:
                now = self.look(each.address, len(each.content))
                if now != each.content:
                    low, high = differing(each.content, now)
                    self._writer.put(Write(each.address + low, now[low:high]), tid=tid)
                    each.content = now
            self.shown = [each for each in self.shown if not each.once]

    def look_again(self) -> None:
        """A vCPU ran: what is under the views now is the guest's work."""
        with self._lock:
            for each in self.shown:
                each.content = self.look(each.address, len(each.content))

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self.shown.clear()
            for name in ("_pagemap", "_mem", "_maps"):
                fd = getattr(self, name)
                setattr(self, name, -1)
                if fd >= 0:
                    os.close(fd)


def differing(old: bytes, new: bytes) -> tuple[int, int]:
    """Return the range [low, high) outside which two contents of one length agree; they differ somewhere."""
    low, high = 0, len(old)
    while high - low > 1:
        middle = (low + high) // 2
        if old[low:middle] == new[low:middle]:
            low = middle
        else:
            high = middle
    start = low
    low, high = start, len(old)
    while high - low > 1:
        middle = (low + high) // 2
        if old[middle:high] == new[middle:high]:
            high = middle
        else:
            low = middle
    return start, high
