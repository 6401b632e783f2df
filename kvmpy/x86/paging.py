# SPDX-License-Identifier: Apache-2.0
"""A guest's page tables, written through the host's mappings of guest memory.

Every edit checks first and changes afterwards, so that a refused one leaves the tables as they were. A new
table is filled before it is linked; flushing TLBs of vCPUs that run meanwhile is the guest's business, as on
real hardware. A KVM without two-dimensional paging shadows the tables and notices the guest's own writes
only: there the guest must write a present entry that it has used itself before its flush shows the change.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

from pyroaring import BitMap

from kvmpy.core import observe
from kvmpy.core.address import PAGE_SHIFT, PAGE_SIZE, SIZE_2M, EncryptionBit, Gpa, Gva, RawGpa
from kvmpy.core.errors import PrivateMemoryError
from kvmpy.core.frames import GFN_LIMIT
from kvmpy.core.memory import GuestMemory, OutOfGuestMemoryError, PageAllocator
from kvmpy.uapi.paging import Chunk, Leaves, NativeTables, Op, Survey, TableReachError
from kvmpy.x86.entry import (
    ACCESSED,
    DIRTY,
    FORMATS,
    GLOBAL,
    KEY_SHIFT,
    NO_EXECUTE,
    PAGE_SIZE_BIT,
    PRESENT,
    SIZE_NAMES,
    USER,
    WRITABLE,
    Format,
    Mapped,
    Walk,
    WalkStep,
    pat_bits,
    privacy_word,
    raw_address,
    split_raw,
)
from kvmpy.x86.paging_errors import (
    EncryptionBitError,
    MixedPrivacyError,
    NonCanonicalError,
    NotMappedError,
    OverlapError,
    PagingError,
    PhysicalRangeError,
    TableAccessError,
    UnalignedError,
)

_Plan = Callable[[], list[Chunk]]


class PageTables:
    """The page tables of one address space.

    *levels* is 4 or 5, 3 for PAE, or 2 for tables of 32-bit entries. *encryption* is put into leaves, into
    table pointers and into CR3; *private_tables* says whether the tables themselves are private pages
    (without encryption bit: whatever the allocator's default is). *physical_bits* is the guest's physical
    address width, *max_page_size* the largest page that ``page_size=None`` picks: 1 GiB ones need the CPUID
    feature GBPAGES, 4 MiB ones CR4.PSE.

    With PAE only leaves carry the encryption bit: CR3 has no room for it, so the tables are shared.  Entries
    of 32 bits have none.
    """

    def __init__(
        self,
        memory: GuestMemory,
        allocator: PageAllocator,
        *,
        levels: int = 4,
        encryption: EncryptionBit | None = None,
        private_tables: bool = True,
        physical_bits: int = 52,
        max_page_size: int | None = None,
    ) -> None:
        if levels not in FORMATS:
            raise ValueError(f"levels={levels}: x86 page tables have 2, 3 (PAE), 4 or 5")
        self.form: Format = FORMATS[levels]
        self._sizes = {size: level for level, size in self.form.page_sizes.items()}
        if not 32 <= physical_bits <= 52:
            raise ValueError(f"physical_bits={physical_bits}: x86-64 has 32 to 52")
        if max_page_size is None:
            max_page_size = self.form.span(2)
        if max_page_size not in self._sizes:
            raise ValueError(f"max_page_size={max_page_size:#x}: pages are {self.form.leaf_names}")
        if encryption is not None and levels < 4:
            if levels == 2 or not encryption.set_means_private:
                raise ValueError(f"levels={levels}: such page tables have no room for the {encryption.name}")
            private_tables = False
        self.memory = memory
        self.allocator = allocator
        self.levels = levels
        self.encryption = encryption
        self.private_tables = private_tables
        self.physical_bits = min(physical_bits, self.form.physical_bits)
        self.max_page_size = max_page_size
        self._tables_private = private_tables if encryption is not None else None if private_tables else False
        self._lock = threading.RLock()
        self._owned: list[tuple[Gpa, int]] = []
        self._known: object = None
        self._freed = False
        self.root = self._alloc(1)
        if levels < 4 and int(self.root) >> 32:
            raise OutOfGuestMemoryError(f"no page below 4 GiB for a root of {levels} levels")
        private = memory.is_private(self.root)
        self.cr3 = RawGpa(int(self.root)) if encryption is None else encryption.to_raw(self.root, private)
        self._native = NativeTables(
            int(self.cr3),
            levels,
            0 if encryption is None else encryption.mask,
            encryption is None or encryption.set_means_private,
            private,
        )

    # Edits.

    def map(
        self,
        gva: Gva,
        gpa: Gpa,
        size: int,
        *,
        page_size: int | None = None,
        writable: bool = True,
        user: bool = False,
        nx: bool = False,
        global_: bool = False,
        private: bool | None = None,
        pat: int = 0,
        protection_key: int = 0,
        overwrite: bool = False,
    ) -> None:
        """Map *size* bytes at *gva* to *gpa*.

        *page_size* None takes the largest pages that alignment, ``max_page_size`` and the pages' privacy
        allow; *private* None asks the memory's bitmap, page by page. *pat* is an entry of the PAT (0 to 7),
        *protection_key* 0 to 15. *overwrite* replaces what is mapped there (larger pages are split as
        needed). Raises UnalignedError, NonCanonicalError, PhysicalRangeError, EncryptionBitError,
        OverlapError, MixedPrivacyError, OutOfGuestMemoryError.
        """
        unit = PAGE_SIZE if page_size is None else page_size
        if unit not in self._sizes:
            raise UnalignedError(f"page_size={unit:#x}: pages are {self.form.leaf_names}")
        linear = self._linear(gva, size, unit)
        start = self._physical(gpa, size, unit)
        if not 0 <= protection_key <= 15:
            raise ValueError(f"protection key {protection_key} is outside 0..15")
        self._check_bits(nx, protection_key)
        flags = PRESENT | (WRITABLE if writable else 0) | (USER if user else 0) | (GLOBAL if global_ else 0)
        flags |= (NO_EXECUTE if nx else 0) | protection_key << KEY_SHIFT
        bits = {
            level: flags | pat_bits(pat, level) | (PAGE_SIZE_BIT if level > 1 else 0)
            for level in self.form.page_sizes
        }

        def plan() -> list[Chunk]:
            chunks = []
            for piece, end, encrypted in self._runs(start, size, private):
                if page_size is None:
                    pieces = list(self._pieces(piece, end, linear - start, self._sizes[self.max_page_size]))
                else:
                    pieces = [(piece, end, self._sizes[unit])]
                    if (piece | end) & (unit - 1):
                        edge = piece if piece & (unit - 1) else end
                        raise MixedPrivacyError(
                            f"the {SIZE_NAMES[unit]} page at gpa {edge & ~(unit - 1):#x} mixes private and "
                            f"shared pages (at gpa {edge:#x}): use smaller pages or say private="
                        )
                chunks += [
                    Chunk(linear + a - start, b - a, a, bits[level] | encrypted, 0, level)
                    for a, b, level in pieces
                ]
            return chunks

        with self._lock:
            self._refresh()
            chunks = plan()
            survey = self._survey(chunks, Op.FILL)
            if survey.mapped and not overwrite:
                old = self._mapped(
                    Leaves(
                        survey.found_gva,
                        self.form.span(survey.found_level),
                        survey.found_entry,
                        survey.found_level,
                    )
                )
                raise OverlapError(
                    f"gva {gva}, {size:#x} bytes: {survey.mapped:#x} bytes of it are mapped already "
                    f"({old}): unmap them, or say overwrite=True"
                )
            self._apply(plan, chunks, survey, Op.FILL)

    def unmap(self, gva: Gva, size: int, *, missing_ok: bool = False) -> None:
        """Remove the mapping of *size* bytes at *gva*.

        Huge pages that reach beyond are split, tables that become empty are used again for new ones.
        NotMappedError when a page of them is not mapped, unless *missing_ok*.
        """
        self._edit(gva, size, Op.CLEAR, lambda linear: [Chunk(linear, size)], missing_ok=missing_ok)

    def protect(
        self,
        gva: Gva,
        size: int,
        *,
        writable: bool | None = None,
        user: bool | None = None,
        nx: bool | None = None,
        global_: bool | None = None,
        private: bool | None = None,
        accessed: bool | None = None,
        dirty: bool | None = None,
        protection_key: int | None = None,
    ) -> None:
        """Change what the leaves of *size* bytes at *gva* allow; None leaves a property as it is.

        *private* rewrites the encryption bit alone, not the memory's bitmap. Huge pages that reach beyond are
        split. NotMappedError when a page is not mapped.
        """
        if private is not None and self.encryption is None:
            raise PagingError(f"private={private}: these page tables have no encryption bit")
        if protection_key is not None and not 0 <= protection_key <= 15:
            raise ValueError(f"protection key {protection_key} is outside 0..15")
        self._check_bits(bool(nx), protection_key or 0)
        set_bits = clear = 0
        for bit, value in (
            (WRITABLE, writable),
            (USER, user),
            (NO_EXECUTE, nx),
            (GLOBAL, global_),
            (ACCESSED, accessed),
            (DIRTY, dirty),
        ):
            if value is not None:
                clear |= bit
                set_bits |= bit if value else 0
        if private is not None and self.encryption is not None:
            clear |= self.encryption.mask
            set_bits |= self.encryption.bits(private)
        if protection_key is not None:
            clear |= 0xF << KEY_SHIFT
            set_bits |= protection_key << KEY_SHIFT
        self._edit(gva, size, Op.UPDATE, lambda linear: [Chunk(linear, size, 0, set_bits, clear)])

    def remap(self, gva: Gva, gpa: Gpa, size: int, *, private: bool | None = None) -> None:
        """Point the mapped *size* bytes at *gva* to *gpa*, keeping permissions; each entry changes in one
        store.

        Huge pages stay where alignment and privacy allow, and are split elsewhere. *private* as for
        :meth:`map`. NotMappedError when a page is not mapped; use :meth:`map` with ``overwrite=True`` for a
        fresh start.
        """
        start = self._physical(gpa, size, PAGE_SIZE)
        clear = 0 if self.encryption is None else self.encryption.mask

        def plan(linear: int) -> list[Chunk]:
            return [
                Chunk(linear + offset - start, end - offset, offset, encrypted, clear)
                for offset, end, encrypted in self._runs(start, size, private)
            ]

        self._edit(gva, size, Op.RETARGET, plan)

    def refresh_private(self, gva: Gva, size: int) -> None:
        """Make the encryption bit of every leaf of *size* bytes at *gva* follow the memory's bitmap again.

        For pages that were converted after they were mapped. Huge pages whose pages disagree now are split;
        holes stay holes.
        """
        if self.encryption is None:
            return
        mask = self.encryption.mask

        def plan(linear: int) -> list[Chunk]:
            chunks = []
            for item in self._collect(linear, size):
                first = max(linear, item.gva)
                last = min(linear + size, item.gva + item.size)
                start = int(self._mapped(item).gpa) + first - item.gva
                chunks += [
                    Chunk(first + offset - start, end - offset, 0, encrypted, mask)
                    for offset, end, encrypted in self._runs(start, last - first, None)
                ]
            return chunks

        self._edit(gva, size, Op.UPDATE, plan, missing_ok=True)

    def split(self, gva: Gva, size: int | None = None, *, page_size: int = PAGE_SIZE) -> None:
        """Split the huge pages of *size* bytes at *gva* (None: the one that maps *gva*) down to *page_size*.

        The new leaves map the same with the same flags. NotMappedError when a page is not mapped.
        """
        level = self._sizes.get(page_size)
        if level is None or level == self.form.leaf_levels:
            *_, largest = self._sizes
            raise UnalignedError(
                f"page_size={page_size:#x}: a split makes pages smaller than {SIZE_NAMES[largest]}"
            )
        if size is None:
            entry = self.walk(gva)
            if entry.leaf is None:
                raise NotMappedError(f"gva {gva} is not mapped, so there is nothing to split")
            gva, size = gva.align_down(entry.page_size), entry.page_size
        length = size
        self._edit(gva, length, Op.SPLIT, lambda linear: [Chunk(linear, length, level=level)])

    def free(self) -> None:
        """Give all tables back to the allocator; the tables and ``cr3`` are not to be used afterwards."""
        with self._lock:
            for gpa, pages in self._owned:
                self.allocator.free(gpa, pages)
            self._owned.clear()
            self._freed = True

    # Questions.

    def walk(self, gva: Gva) -> Walk:
        """Return the entries from the root to the leaf of *gva*, or to where the walk ends.

        NonCanonicalError; TableAccessError where the host cannot see the root.
        """
        linear = self._linear(gva, 1, 1)
        with self._lock:
            self._refresh()
            try:
                steps = self._native.walk(linear)
            except TableReachError as fault:
                raise self._table_error(fault) from None
        encryption = self.encryption
        return Walk(
            Gva(int(gva)),
            tuple(WalkStep(s.level, RawGpa(s.table), s.slot, s.entry, encryption, self.form) for s in steps),
            encryption,
        )

    def translate(self, gva: Gva) -> Gpa:
        """Return the guest-physical address behind *gva*; NotMappedError with the walk when there is none."""
        walk = self.walk(gva)
        if walk.gpa is None:
            raise NotMappedError(str(walk))
        return walk.gpa

    def extents(self, gva: Gva, size: int) -> list[tuple[Gpa, int]]:
        """Return the ranges ``(gpa, bytes)`` behind *size* bytes at *gva*; NotMappedError at a hole."""
        linear = self._linear(gva, size, 1)
        position, results = linear, list[tuple[Gpa, int]]()
        with self._lock:
            self._refresh()
            for item in self._collect(linear, size):
                if item.gva > position:
                    break
                length = min(linear + size, item.gva + item.size) - position
                start = self._mapped(item).gpa + (position - item.gva)
                if results and int(results[-1][0]) + results[-1][1] == int(start):
                    start, length = results[-1][0], results[-1][1] + length
                    del results[-1]
                results.append((start, length))
                position = min(linear + size, item.gva + item.size)
        if position < linear + size:
            raise NotMappedError(
                f"gva {self._canonical(position):#x} is not mapped (in {size:#x} bytes at {gva})"
            )
        return results

    def mappings(self, gva: Gva | None = None, size: int | None = None) -> list[Mapped]:
        """Return what is mapped (by default: all), leaves merged where addresses, size and flags continue.

        The accessed and dirty flags are not compared. Huge leaves that reach beyond the range are told whole.
        """
        with self._lock:
            self._refresh()
            if gva is None:
                return [self._mapped(item) for item in self._collect(0, 1 << self._bits)]
            length = PAGE_SIZE if size is None else size
            return [self._mapped(item) for item in self._collect(self._linear(gva, length, 1), length)]

    def dump(self) -> str:
        """Return CR3 and all mappings as text, one line for each run."""
        head = f"CR3 {self.cr3}, {self.levels} levels"
        if self.encryption is not None:
            private = self.encryption.from_raw(self.cr3)[1]
            head += f", {self.encryption.name} {self.encryption.bit}, tables {privacy_word(private)}"
        return "\n".join([head] + [f"  {item}" for item in self.mappings()])

    @property
    def table_pages(self) -> int:
        """How many pages of guest memory the tables take, the spare ones included."""
        return sum(pages for _gpa, pages in self._owned)

    @property
    def spare_pages(self) -> int:
        """How many of :attr:`table_pages` are not in use: they become the next tables."""
        return self._native.pool_pages

    # Inner parts.

    def _check_bits(self, nx: bool, protection_key: int) -> None:
        if nx and self.levels == 2:
            raise PagingError("nx=True: entries of 32 bits have no NX")
        if protection_key and self.levels < 4:
            raise PagingError(f"protection_key={protection_key}: protection keys are of long mode")

    @property
    def _bits(self) -> int:
        return self.form.bits

    def _canonical(self, linear: int) -> int:
        if self.levels < 4:
            return linear
        return linear | (1 << 64) - (1 << self._bits) if linear >> (self._bits - 1) else linear

    def _linear(self, gva: Gva, size: int, unit: int) -> int:
        start, half = int(Gva(gva)), 1 << (self._bits - 1)
        if size <= 0:
            raise UnalignedError(f"size {size:#x} at gva {start:#x} is not positive")
        if (start | size) & (unit - 1):
            raise UnalignedError(f"gva {start:#x}, size {size:#x}: not a multiple of {unit:#x}")
        if self.levels < 4:
            if start + size > 1 << self._bits:
                raise NonCanonicalError(f"gva {start:#x}, {size:#x} bytes is not below 4 GiB")
            return start
        low = start < half and start + size <= half
        high = start >= (1 << 64) - half and start + size <= 1 << 64
        if not low and not high:
            raise NonCanonicalError(
                f"gva {start:#x}, {size:#x} bytes is not canonical with {self.levels} levels"
            )
        return start & ((1 << self._bits) - 1)

    def _physical(self, gpa: Gpa, size: int, unit: int) -> int:
        start = int(Gpa(gpa))
        bit, last = self.encryption, start + size - 1
        if bit is not None and ((start | last) & bit.mask or start >> bit.bit != last >> bit.bit):
            raise EncryptionBitError(
                f"gpa {start:#x}, {size:#x} bytes has bit {bit.bit}, the {bit.name}: "
                "a Gpa never carries it; use from_raw() and private="
            )
        if start + size > 1 << self.physical_bits:
            raise PhysicalRangeError(
                f"gpa {start:#x}, {size:#x} bytes exceeds the physical width of {self.physical_bits} bits"
            )
        if start & (unit - 1):
            raise UnalignedError(f"gpa {start:#x}: not a multiple of {unit:#x}")
        return start

    def _runs(self, start: int, size: int, private: bool | None) -> Iterator[tuple[int, int, int]]:
        """Split physical [start, start + size) into runs ``(start, end, encryption bits)``."""
        if self.encryption is None or private is not None:
            yield start, start + size, 0 if self.encryption is None else self.encryption.bits(bool(private))
            return
        shared, hidden = self.encryption.bits(False), self.encryption.bits(True)
        first, last = start >> PAGE_SHIFT, min((start + size) >> PAGE_SHIFT, GFN_LIMIT)
        count = self.memory.private.range_cardinality(first, last) if first < last else 0
        if count in (0, last - first) and (not count or start + size == last << PAGE_SHIFT):
            yield start, start + size, hidden if count else shared
            return
        part = self.memory.private & BitMap(range(first, last))
        edges = (part ^ part.shift(1)).to_array()
        position = start
        for index, gfn in enumerate(edges):
            if gfn << PAGE_SHIFT > position:
                yield position, gfn << PAGE_SHIFT, hidden if index % 2 else shared
                position = gfn << PAGE_SHIFT
        limit = last << PAGE_SHIFT
        if position < limit:
            yield position, limit, hidden if len(edges) % 2 else shared
        if limit < start + size:
            yield max(position, limit), start + size, shared

    def _mapped(self, item: Leaves) -> Mapped:
        gpa, private = split_raw(raw_address(item.entry, item.level, self.form), self.encryption)
        return Mapped(
            Gva(self._canonical(item.gva)),
            item.size,
            gpa,
            self.form.span(item.level),
            item.entry,
            private,
            self.form,
        )

    def _edit(
        self,
        gva: Gva,
        size: int,
        op: Op,
        chunks_of: Callable[[int], list[Chunk]],
        *,
        missing_ok: bool = False,
    ) -> None:
        linear = self._linear(gva, size, PAGE_SIZE)
        with self._lock:
            self._refresh()
            chunks = chunks_of(linear)
            survey = self._survey(chunks, op)
            if survey.holes and not missing_ok:
                raise NotMappedError(
                    f"gva {gva}, {size:#x} bytes: {survey.holes:#x} bytes are not mapped, "
                    f"first {self._canonical(survey.hole_gva):#x}"
                )
            self._apply(lambda: chunks_of(linear), chunks, survey, op)

    def _apply(self, plan: _Plan, chunks: list[Chunk], survey: Survey, op: Op) -> None:
        # New tables may change the privacy of the very pages that are being mapped: plan again after each
        # allocation.
        while survey.missing > self._native.pool_pages:
            self._grow(survey.missing - self._native.pool_pages)
            chunks = plan()
            survey = self._survey(chunks, op)
        if observe.host:
            self._show_tables()
        self._native.apply(chunks, op, survey)

    def _show_tables(self) -> None:
        for gpa, pages in self._owned:
            with suppress(PrivateMemoryError):  # the edit itself says so where it needs them
                self.memory.show(gpa, pages * PAGE_SIZE)

    def _survey(self, chunks: list[Chunk], op: Op) -> Survey:
        try:
            return self._native.survey(chunks, op)
        except TableReachError as fault:
            raise self._table_error(fault) from None

    def _collect(self, linear: int, size: int) -> list[Leaves]:
        try:
            return self._native.collect(linear, size, ACCESSED | DIRTY)
        except TableReachError as fault:
            raise self._table_error(fault) from None

    def _table_error(self, fault: TableReachError) -> TableAccessError:
        why = (
            (self.memory.seal or "the host has no mapping of it")
            if fault.hidden
            else "it is outside guest memory"
        )
        kind = "private" if fault.private else "shared"
        return TableAccessError(f"the page table at gpa {fault.gpa:#x} ({kind}) is out of reach: {why}")

    def _alloc(self, pages: int) -> Gpa:
        gpa = self.allocator.alloc(pages, private=self._tables_private)
        self._owned.append((gpa, pages))
        return gpa

    def _grow(self, pages: int) -> None:
        step = pages
        while pages:
            try:
                gpa = self._alloc(min(step, pages))
            except OutOfGuestMemoryError:
                if step == 1:
                    raise
                step = (min(step, pages) + 1) // 2
                continue
            self._native.add_pages(int(gpa), min(step, pages))
            self._fault_in_bulk(gpa, min(step, pages))
            pages -= min(step, pages)
        self._refresh()

    def _fault_in_bulk(self, gpa: Gpa, pages: int) -> None:
        # A page fault costs three times as much as filling the table behind it: let many tables share one.
        if pages < SIZE_2M // PAGE_SIZE:
            return
        segment = self.memory.find(gpa)
        private = self.memory.is_private(gpa)
        mapping, offset = segment.shared, segment.shared_offset
        if private and segment.private is not None:
            mapping, offset = segment.private, segment.private_offset
        with suppress(OSError):  # memory that cannot have huge pages, or has them anyway
            mapping.madvise(mmap.MADV_HUGEPAGE, offset + gpa - segment.gpa, pages * PAGE_SIZE)

    def _refresh(self) -> None:
        """Tell the editor where memory is now: ranges come and go, and a launch seals what is private."""
        if self._freed:
            raise PagingError("these page tables were freed")
        now = _views_of(self.memory)
        if now != self._known:
            self._native.set_segments(now)
            self._known = now

    def _pieces(self, start: int, end: int, delta: int, level: int) -> Iterator[tuple[int, int, int]]:
        """Cut physical [start, end) into the largest leaves that fit; *delta* is gva - gpa."""
        unit = self.form.span(level)
        first, last = -(-start // unit) * unit, end // unit * unit
        if level > 1 and (delta % unit or first >= last):
            yield from self._pieces(start, end, delta, level - 1)
            return
        if start < first:
            yield from self._pieces(start, first, delta, level - 1)
        yield first, last, level
        if last < end:
            yield from self._pieces(last, end, delta, level - 1)


def _views_of(memory: GuestMemory) -> list[tuple[int, int, int, int]]:
    sealed = memory.seal is not None
    views = []
    for segment in memory.segments():
        shared = 0 if segment.shared.closed else segment.shared_hva
        gone = sealed or segment.private is None or segment.private.closed
        views.append((int(segment.gpa), segment.size, shared, 0 if gone else segment.private_hva))
    return views


def walk_from(
    memory: GuestMemory, cr3: int, levels: int, gva: Gva, *, encryption: EncryptionBit | None = None
) -> Walk:
    """Walk tables that somebody else has made, from *cr3* (raw) on; *levels* as for :class:`PageTables`.

    *gva* is taken modulo the width of a linear address.  TableAccessError where the root is out of reach.
    """
    form = FORMATS[levels]
    private = encryption is not None and encryption.from_raw(RawGpa(cr3))[1]
    mask = 0 if encryption is None else encryption.mask
    native = NativeTables(cr3, levels, mask, encryption is None or encryption.set_means_private, private)
    native.set_segments(_views_of(memory))
    try:
        steps = native.walk(int(gva) & (1 << form.bits) - 1)
    except TableReachError as fault:
        raise TableAccessError(f"the root of the page tables, {cr3:#x}, is out of reach") from fault
    return Walk(
        gva,
        tuple(WalkStep(s.level, RawGpa(s.table), s.slot, s.entry, encryption, form) for s in steps),
        encryption,
    )
