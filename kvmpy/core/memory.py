# SPDX-License-Identifier: Apache-2.0
"""Guest-physical memory as the host sees it: which mapping holds a page, and whether the page is private.

Needs no KVM: it knows host mappings and guest-physical addresses only.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pyroaring import BitMap

from kvmpy.core import observe
from kvmpy.core.address import PAGE_SHIFT, PAGE_SIZE, Gpa
from kvmpy.core.backing import Mapping
from kvmpy.core.errors import PrivateMemoryError
from kvmpy.core.frames import GFN_LIMIT, mark

_PRIVATE_LIMIT = GFN_LIMIT << PAGE_SHIFT


@dataclass(frozen=True)
class Segment:
    """A range of guest memory: *shared* holds what the guest sees as shared, *private* what it sees as
    private.

    Without encryption both are the same mapping.  *private* is None where the host has no view of it
    (guest_memfd that cannot be mapped).  The offsets are bytes into the mappings.  *always_shared*: a plain
    slot of a VM with private memory, which cannot hold private pages.
    """

    gpa: Gpa
    size: int
    shared: Mapping
    private: Mapping | None
    shared_offset: int = 0
    private_offset: int = 0
    always_shared: bool = False

    @property
    def end_gfn(self) -> int:
        """The number of the first frame behind the range."""
        return self.gpa.gfn + (self.size >> PAGE_SHIFT)

    @property
    def shared_hva(self) -> int:
        """Host address of the shared view."""
        return self.shared.hva + self.shared_offset

    @property
    def private_hva(self) -> int:
        """Host address of the private view, 0 where the host has none."""
        return 0 if self.private is None else self.private.hva + self.private_offset


@dataclass
class GuestMemory:
    """All of a VM's guest memory.

    *seal* is the reason for which the host may no longer touch private pages (None while it may).  *convert*,
    where there is one, is called with (gpa, size, private, discard) before the bitmap changes, and carries
    the change out in KVM: an exception leaves the bitmap as it was.
    """

    seal: str | None = None
    convert: Callable[[Gpa, int, bool, bool], None] | None = field(default=None, repr=False)
    # Two threads that convert one range: KVM and the bitmap must see them in the same order.
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    private: BitMap = field(default_factory=BitMap)
    """The frame numbers of private pages."""
    _segments: list[Segment] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)

    def check_free(self, gpa: Gpa, size: int) -> int:
        """Return the place of a new range in the order of addresses.

        ValueError when it is unaligned or overlaps another.
        """
        start, end = int(gpa), int(gpa) + size
        if start % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise ValueError(f"guest memory at {start:#x}, size {size:#x} is not made of whole 4 KiB pages")
        index = bisect_right(self._starts, start)
        before = self._segments[index - 1] if index else None
        after = self._segments[index] if index < len(self._segments) else None
        for other in (before, after):
            if other is not None and int(other.gpa) < end and start < int(other.gpa) + other.size:
                raise ValueError(
                    f"guest memory {start:#x}..{end:#x} overlaps "
                    f"{int(other.gpa):#x}..{int(other.gpa) + other.size:#x}"
                )
        return index

    def add(self, segment: Segment) -> None:
        """Add a range; ValueError when it is unaligned or overlaps another."""
        offset = self.check_free(segment.gpa, segment.size)
        self._starts.insert(offset, int(segment.gpa))
        self._segments.insert(offset, segment)

    def remove(self, segment: Segment) -> None:
        """Take a range out; its pages are no longer private."""
        place = self._segments.index(segment)
        del self._segments[place], self._starts[place]
        mark(self.private, segment.gpa, segment.size, False)

    def segments(self) -> list[Segment]:
        """Return the ranges in the order of their addresses."""
        return list(self._segments)

    def find(self, gpa: Gpa, size: int = 1) -> Segment:
        """Return the range that holds *size* bytes at *gpa*; ValueError when they are outside of all."""
        address = int(gpa)
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            segment = self._segments[index]
            if address + size <= self._starts[index] + segment.size:
                return segment
        ranges = ", ".join(f"{int(s.gpa):#x}..{int(s.gpa) + s.size - 1:#x}" for s in self._segments)
        raise ValueError(f"gpa {address:#x}, {size:#x} bytes, is outside guest memory ({ranges or 'none'})")

    # Which pages are private.

    def is_private(self, gpa: Gpa) -> bool:
        """Tell whether the page at *gpa* is private."""
        gfn = int(gpa) >> PAGE_SHIFT
        return gfn < GFN_LIMIT and gfn in self.private

    def set_private(self, gpa: Gpa, size: int, *, discard: bool = False) -> None:
        """Make *size* bytes (whole pages, also of several ranges) at *gpa* private.

        Where private pages live in a guest_memfd, the guest finds there what the guest_memfd holds: zeroes
        in a page that was never private or was discarded, unless the guest's key encrypts it.  Then, as under
        SNP, these are the host's zeroes decrypted (Linux: sev_gmem_prepare()), and undefined.  So is the
        content elsewhere, and the guest must change its page tables.

        *discard* gives back what the shared pages held, where :attr:`convert` can: they are zeroes when they
        are shared again.  ValueError above 16 TiB and where a page is outside guest memory.
        """
        self._assign(gpa, size, True, discard)

    def set_shared(self, gpa: Gpa, size: int, *, discard: bool = False) -> None:
        """Make *size* bytes (whole pages, also of several ranges) at *gpa* shared.

        *discard* gives back what the private pages held, where :attr:`convert` can.  ValueError where a page
        is outside guest memory.
        """
        self._assign(gpa, size, False, discard)

    def _check_convertible(self, address: int, size: int, private: bool) -> None:
        if (address | size) & (PAGE_SIZE - 1) or size <= 0:
            raise ValueError(f"gpa {address:#x}, size {size:#x}: private memory is made of whole 4 KiB pages")
        end = address + size
        place, barred = address, None
        while place < end:
            index = bisect_right(self._starts, place) - 1
            segment = self._segments[index] if index >= 0 else self.find(Gpa(place))
            after = self._starts[index] + segment.size
            if after <= place:
                self.find(Gpa(place))  # which says what there is
            if segment.always_shared:
                barred = segment
            place = after
        if private and end > _PRIVATE_LIMIT:
            raise ValueError(
                f"gpa {address:#x}, size {size:#x}: private memory lies below {_PRIVATE_LIMIT:#x}"
            )
        if private and barred is not None:
            raise ValueError(
                f"gpa {address:#x}, size {size:#x}: the slot at {barred.gpa} holds shared pages only"
            )

    def _assign(self, gpa: Gpa, size: int, private: bool, discard: bool) -> None:
        self._check_convertible(int(gpa), size, private)
        with self.lock:
            if self.convert is not None:
                self.convert(gpa, size, private, discard)
            mark(self.private, gpa, size, private)

    def hand_out(self, gpa: Gpa, size: int, *, private: bool, clear: bool) -> None:
        """Make pages that an allocator gives away private or shared, and with *clear* zero.

        Private pages that the guest's key encrypts are not: see :meth:`set_private`.
        PrivateMemoryError where neither the host nor :attr:`convert` can clear private pages.
        """
        first, last = gpa.gfn, gpa.gfn + (size >> PAGE_SHIFT)
        with self.lock:
            if clear and private and self.seal is not None:
                if self.convert is None:
                    raise PrivateMemoryError(f"gpa {gpa}, {size:#x} bytes, was used before: {self.seal}")
                # What was given back comes as the host's zeroes when it is private again.
                self._assign(gpa, size, False, True)
            if self.private.range_cardinality(first, last) != (last - first if private else 0):
                self._assign(gpa, size, private, False)
            if clear and not (private and self.seal is not None):
                view = self.view(gpa, size)
                view[:] = bytes(len(view))

    def runs(self, gpa: Gpa, size: int) -> Iterator[tuple[Gpa, int, bool]]:
        """Split *size* bytes at *gpa* into runs ``(gpa, size, private)`` of pages that agree."""
        end = int(gpa) + size
        position = int(gpa)
        last = (end - 1) >> PAGE_SHIFT
        while position < end:
            gfn = position >> PAGE_SHIFT
            private = self.is_private(Gpa(position))
            if self.private.range_cardinality(gfn, last + 1) == (last + 1 - gfn if private else 0):
                stop = end
            elif private:
                stop = min(end, self._first_hole(gfn, last) << PAGE_SHIFT)
            else:
                stop = min(end, self.private.next_set_bit(gfn) << PAGE_SHIFT)
            yield Gpa(position), stop - position, private
            position = stop

    def _first_hole(self, gfn: int, last: int) -> int:
        low, high = gfn, last
        while low < high:
            middle = (low + high) // 2
            if self.private.range_cardinality(gfn, middle + 1) == middle + 1 - gfn:
                low = middle + 1
            else:
                high = middle
        return low

    # Views: the memory itself, not copies.

    def view(self, gpa: Gpa, size: int) -> memoryview:
        """Return *size* bytes at *gpa* as the guest sees them, as a writable view.

        PrivateMemoryError where the host may not see them; ValueError where the range mixes private and
        shared pages of different mappings (go page by page then, or use :meth:`read` and :meth:`write`).
        """
        window = self._view(gpa, size)
        if observe.host:
            _shown(window)
        return window

    def _view(self, gpa: Gpa, size: int) -> memoryview:
        segment = self.find(gpa, size)
        offset = int(gpa) - int(segment.gpa)
        first, last = int(gpa) >> PAGE_SHIFT, (int(gpa) + max(size, 1) - 1) >> PAGE_SHIFT
        count = self.private.range_cardinality(first, last + 1)
        if count == 0:
            return segment.shared.look(segment.shared_offset + offset, size)
        if segment.private is not segment.shared and count != last + 1 - first:
            raise ValueError(
                f"gpa {int(gpa):#x}, {size:#x} bytes: {count} of {last + 1 - first} pages are private, "
                "the others shared"
            )
        return self._private(segment, gpa, offset, size)

    def _private(self, segment: Segment, gpa: Gpa, offset: int, size: int) -> memoryview:
        if self.seal is not None:
            raise PrivateMemoryError(f"gpa {int(gpa):#x}, {size:#x} bytes is private: {self.seal}")
        if segment.private is None:
            raise PrivateMemoryError(
                f"gpa {int(gpa):#x}, {size:#x} bytes is private, and the host has no mapping of it"
            )
        return segment.private.look(segment.private_offset + offset, size)

    def shared_view(self, gpa: Gpa, size: int) -> memoryview:
        """Return what the guest sees through the shared alias of *gpa*, whatever the page is now."""
        window = self.shared_look(gpa, size)
        if observe.host:
            _shown(window)
        return window

    def shared_look(self, gpa: Gpa, size: int) -> memoryview:
        """Return the same for a caller who tells observers itself what it writes."""
        segment = self.find(gpa, size)
        return segment.shared.look(segment.shared_offset + int(gpa) - int(segment.gpa), size)

    def private_view(self, gpa: Gpa, size: int) -> memoryview:
        """Return what the guest sees through the private alias of *gpa*; PrivateMemoryError where the host
        may not.
        """
        segment = self.find(gpa, size)
        window = self._private(segment, gpa, int(gpa) - int(segment.gpa), size)
        if observe.host:
            _shown(window)
        return window

    def show(self, gpa: Gpa, size: int) -> None:
        """Tell recorders that *size* bytes at *gpa* may be written by host address before the next run."""
        for piece, part in self._parts(gpa, size):
            _shown(self._view(piece, part), once=True)

    def hva(self, gpa: Gpa, private: bool | None = None) -> int:
        """Return the host address of *gpa*: of the given alias, or of the one the page has now."""
        segment = self.find(gpa)
        offset = int(gpa) - int(segment.gpa)
        if private if private is not None else self.is_private(gpa):
            if self.seal is not None or segment.private is None:
                self._private(segment, gpa, offset, 1)
            return segment.private_hva + offset
        return segment.shared_hva + offset

    def read(self, gpa: Gpa, size: int) -> bytes:
        """Return a copy of *size* bytes at *gpa* as the guest sees them; the range may cross page kinds and
        ranges.
        """
        return b"".join(bytes(self._view(start, part)) for start, part in self._parts(gpa, size))

    def write(self, gpa: Gpa, data: bytes | bytearray | memoryview) -> None:
        """Write *data* at *gpa* so that the guest sees it; the range may cross page kinds and ranges."""
        source = memoryview(data).cast("B")
        done = 0
        for start, part in self._parts(gpa, len(source)):
            view = self._view(start, part)
            view[:] = source[done : done + part]
            for observer in observe.host:
                observer.memory_written(view)
            done += part

    def _parts(self, gpa: Gpa, size: int) -> Iterator[tuple[Gpa, int]]:
        position, end = gpa, int(gpa) + size
        while int(position) < end:
            segment = self.find(position)
            stop = min(end, int(segment.gpa) + segment.size)
            for start, part, _private in self.runs(position, stop - int(position)):
                yield start, part
            position = Gpa(stop)

    def close(self) -> None:
        """Forget all ranges (their mappings belong to the memory slots)."""
        self._segments.clear()
        self._starts.clear()


def _shown(view: memoryview, *, once: bool = False) -> None:
    for observer in observe.host:
        observer.memory_shown(view, once)


class OutOfGuestMemoryError(MemoryError):
    """The guest's physical memory has no room for an allocation."""


class PageAllocator:
    """Hands out guest-physical pages, zeroed, each marked private or shared in the memory's bitmap.

    Every method may be called by any thread.
    """

    def __init__(self, memory: GuestMemory, *, private: bool = False, start: int = PAGE_SIZE) -> None:
        self.memory = memory
        self.private = private
        self.used = BitMap()
        self._recycled = BitMap()
        self._next = start >> PAGE_SHIFT
        self._lock = threading.RLock()
        if start > 0:
            self.used.add_range(0, start >> PAGE_SHIFT)

    def reserve(self, gpa: Gpa, size: int) -> None:
        """Keep *size* bytes at *gpa* from being handed out; ValueError when a page of them is taken."""
        first, last = gpa.gfn, (int(gpa) + size + PAGE_SIZE - 1) >> PAGE_SHIFT
        with self._lock:
            if self.used.range_cardinality(first, last):
                raise ValueError(f"gpa {int(gpa):#x}, {size:#x} bytes: a page of it is in use")
            self.used.add_range(first, last)

    def alloc(self, pages: int = 1, *, private: bool | None = None, align: int = PAGE_SIZE) -> Gpa:
        """Return *pages* contiguous zeroed pages, aligned to *align* bytes (a power of two);
        OutOfGuestMemoryError when full.

        After the launch of a guest whose private memory is encrypted, private pages are not zero.
        """
        if pages <= 0 or align < PAGE_SIZE or align & (align - 1):
            raise ValueError(
                f"alloc({pages} pages, align {align:#x}): at least one page, "
                "aligned to a power of two >= 4 KiB"
            )
        step = align >> PAGE_SHIFT
        kind = self.private if private is None else private
        with self._lock:
            return self._alloc(pages, step, kind)

    def _alloc(self, pages: int, step: int, kind: bool) -> Gpa:
        first = self._fit(self._next, pages, step, kind)
        if first is None:
            first = self._fit(0, pages, step, kind)
            if first is None:
                raise OutOfGuestMemoryError(
                    f"no {pages} contiguous free pages (align {step << PAGE_SHIFT:#x}) in guest memory: "
                    "create the VM with a larger memory="
                )
        else:
            self._next = first + pages
        gpa = Gpa(first << PAGE_SHIFT)
        dirty = bool(self._recycled and self._recycled.range_cardinality(first, first + pages))
        self.memory.hand_out(gpa, pages << PAGE_SHIFT, private=kind, clear=dirty)
        self.used.add_range(first, first + pages)
        if dirty:
            self._recycled.remove_range(first, first + pages)
        return gpa

    def _fit(self, start: int, pages: int, step: int, private: bool) -> int | None:
        for segment in self.memory.segments():
            if private and segment.always_shared:
                continue
            first = max(start, segment.gpa.gfn)
            limit = min(segment.end_gfn, GFN_LIMIT)
            first += -first % step
            while first + pages <= limit:
                if not self.used.range_cardinality(first, first + pages):
                    return first
                # Skip past the last used page of the window: nothing that starts before it can fit.
                count = self.used.rank(first + pages - 1)
                first = self.used[count - 1] + 1 if count else first + 1
                first += -first % step
        return None

    @property
    def recycled(self) -> BitMap:
        """Frames that were handed out and taken back, and not handed out again."""
        return BitMap(self._recycled)

    def free(self, gpa: Gpa, pages: int = 1) -> None:
        """Take *pages* pages back; ValueError when one of them was not handed out."""
        first = gpa.gfn
        with self._lock:
            if self.used.range_cardinality(first, first + pages) != pages:
                raise ValueError(f"gpa {int(gpa):#x}, {pages} pages: not all of them are in use")
            self.used.remove_range(first, first + pages)
            self._recycled.add_range(first, first + pages)
