# SPDX-License-Identifier: Apache-2.0
"""The page-table editor in C (``native/paging.c``) behind plain integers: no cdata leaves this module.

Addresses are linear (a canonical address without its sign extension), sizes are bytes, levels count from 1 (4
KiB leaves). The caller checks addresses; this module only moves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from kvmpy.uapi import ffi, lib

_COLLECT = 4096


class Op(IntEnum):
    """What is to be done with the entries of a chunk (``KVMPY_PT_*`` in ``native/paging.h``)."""

    FILL = 0
    CLEAR = 1
    UPDATE = 2
    RETARGET = 3
    SPLIT = 4


class Chunk(NamedTuple):
    """A piece of work: leaves get the bits of *set*, lose those of *clear*, keep the others (FILL: none)."""

    gva: int
    size: int
    gpa: int = 0
    set: int = 0
    clear: int = 0
    level: int = 1


class Survey(NamedTuple):
    """What a range holds now, and how many tables (*missing*) the work would need."""

    mapped: int
    tables: int
    missing: int
    found: int
    found_gva: int
    found_entry: int
    found_level: int
    holes: int
    hole_gva: int


class Leaves(NamedTuple):
    """Leaves alike that follow one another in both address spaces; *entry* is the first."""

    gva: int
    size: int
    entry: int
    level: int


class Step(NamedTuple):
    """One step of a walk: the raw address of the table, the slot in it and the entry there."""

    table: int
    slot: int
    entry: int
    level: int


class TableReachError(Exception):
    """A table is out of reach: ``.hidden`` from the host, or outside guest memory."""

    def __init__(self, gpa: int, private: bool, hidden: bool) -> None:
        self.gpa = gpa
        self.private = private
        self.hidden = hidden
        super().__init__(
            f"page table at gpa {gpa:#x} {'is hidden from the host' if hidden else 'is outside guest memory'}"
        )


class NativeTables:
    """One set of page tables and the pool of zeroed pages for new ones."""

    def __init__(
        self, root: int, levels: int, mask: int, set_means_private: bool, tables_private: bool
    ) -> None:
        self._pt = ffi.new("struct kvmpy_pt *")
        self._pt.root = root
        self._pt.levels = levels
        self._pt.enc_mask = mask
        self._pt.enc_private = set_means_private
        self._pt.tables_private = tables_private
        self._pool: Any = None
        self._segments: Any = None
        self._room(64)

    def set_segments(self, segments: Sequence[tuple[int, int, int, int]]) -> None:
        """Say where guest memory is: ``(gpa, size, shared hva, private hva)`` by gpa, hva 0: no view."""
        # lifetime: pt.segments points into self._segments; the mappings belong to the guest memory.
        self._segments = ffi.new("struct kvmpy_pt_segment[]", [tuple(s) for s in segments])
        self._pt.segments = self._segments
        self._pt.nsegments = len(segments)
        self._pt.hint = 0

    @property
    def pool_pages(self) -> int:
        """How many pages the pool has."""
        return int(self._pt.pool_pages)

    def add_pages(self, gpa: int, pages: int) -> None:
        """Give *pages* contiguous zeroed pages to the pool."""
        self._room(1)
        index = self._pt.npool
        self._pool[index] = (gpa, pages)
        self._pt.npool = index + 1
        self._pt.pool_pages += pages

    def _room(self, extra: int) -> None:
        used = int(self._pt.npool)
        if used + extra <= self._pt.pool_max:
            return
        size = 2 * (used + extra)
        # lifetime: pt.pool points into self._pool
        pool = ffi.new("struct kvmpy_pt_run[]", size)
        if used:
            pool[0:used] = self._pool[0:used]
        self._pool = pool
        self._pt.pool = pool
        self._pt.pool_max = size

    def survey(self, chunks: Sequence[Chunk], op: Op) -> Survey:
        """Look at the ranges of *chunks* (by rising gva) without changing anything; TableReachError."""
        out = ffi.new("struct kvmpy_pt_survey *")
        self._check(lib.kvmpy_pt_survey(self._pt, self._array(chunks), len(chunks), op, out))
        return Survey(
            out.mapped,
            out.tables,
            out.missing,
            out.found,
            out.found_gva,
            out.found_entry,
            out.found_level,
            out.holes,
            out.hole_gva,
        )

    def apply(self, chunks: Sequence[Chunk], op: Op, survey: Survey) -> None:
        """Do the work that *survey* looked at; the pool must hold ``survey.missing`` pages."""
        # Tables that become empty go back to the pool, at most those that exist now or come with the work.
        self._room(survey.tables + survey.missing)
        array = self._array(chunks)
        if op is Op.FILL:
            self._check(lib.kvmpy_pt_fill(self._pt, array, len(chunks)))
        else:
            self._check(lib.kvmpy_pt_edit(self._pt, array, len(chunks), op))

    def collect(self, gva: int, size: int, ignore: int) -> list[Leaves]:
        """Return what [gva, gva + size) maps, merged where only *ignore* bits differ; TableReachError."""
        out = ffi.new("struct kvmpy_pt_mapping[]", _COLLECT)
        results: list[Leaves] = []
        end = gva + size
        while True:
            count = self._check(lib.kvmpy_pt_collect(self._pt, gva, end - gva, ignore, out, _COLLECT))
            results += [Leaves(out[i].gva, out[i].size, out[i].entry, out[i].level) for i in range(count)]
            gva = int(self._pt.cursor)
            if not gva:
                return results

    def walk(self, gva: int) -> list[Step]:
        """Return the entries from the root on; the last is a leaf, not present, or leads out of reach."""
        steps = ffi.new("struct kvmpy_pt_step[5]")
        count = self._check(lib.kvmpy_pt_walk(self._pt, gva, steps))
        return [Step(s.table, s.index, s.entry, s.level) for s in (steps[i] for i in range(count))]

    @staticmethod
    def _array(chunks: Sequence[Chunk]) -> Any:
        return ffi.new("struct kvmpy_pt_chunk[]", list(chunks))

    def _check(self, result: int) -> int:
        if result >= 0:
            return result
        if result in (-1, -2):
            raise TableReachError(int(self._pt.fault_gpa), bool(self._pt.fault_private), result == -2)
        raise RuntimeError(f"page-table editor failed: {result}, {self._pt.pool_pages} pages in its pool")
