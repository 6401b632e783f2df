# SPDX-License-Identifier: Apache-2.0
"""Cut a record down to what a condition needs: ioctls first, then pages, bytes of memory, fields."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from kvmpy.debug.record.condition import Condition
from kvmpy.debug.record.events import (
    Chunk,
    Close,
    Deadline,
    Event,
    FileCall,
    Ioctl,
    Kick,
    Map,
    Memory,
    Object,
)
from kvmpy.debug.record.format import PAGE_SIZE, When
from kvmpy.debug.record.model import Entry, Record
from kvmpy.uapi.buffers import BUFFERS, struct_class
from kvmpy.uapi.struct_base import FlexStruct, Struct

_T = TypeVar("_T")
Progress = Callable[[str], None]
# Blocks of memory that are cleared together, from coarse to fine.
_BLOCKS = (512, 64, 16)
_ON_OBJECTS = (Ioctl, Kick, Deadline, FileCall, Event, Close, Map)


class Exhausted(Exception):  # noqa: N818 - no error: the end of what was allowed
    """As many attempts were made as may be."""


def ddmin(items: Sequence[_T], needed: Callable[[list[_T]], bool]) -> list[_T]:
    """Return a part of *items* that is still *needed* and of which no single one can go.

    *needed* tells whether a part suffices; it does for all items.
    """
    kept = list(items)
    if not kept or needed([]):
        return []
    parts = 2
    while len(kept) >= 2:
        size = -(-len(kept) // parts)
        chunks = [kept[at : at + size] for at in range(0, len(kept), size)]
        for number in range(len(chunks)):
            rest = [item for other, chunk in enumerate(chunks) if other != number for item in chunk]
            if rest and needed(rest):
                kept = rest
                parts = max(parts - 1, 2)
                break
        else:
            if parts >= len(kept):
                break
            parts = min(len(kept), parts * 2)
    return kept


def consistent(entries: list[Entry]) -> list[Entry]:
    """Return *entries* without those that act on objects which nothing makes any more."""
    made = {each.order for each in entries if isinstance(each.what, Ioctl) and each.what.result >= 0}
    alive: set[int] = {0}
    kept = []
    for each in sorted(entries, key=_creation_first):
        what = each.what
        if isinstance(what, Object):
            if what.made_by and what.made_by not in made:
                continue
            alive.add(what.id)
        elif isinstance(what, _ON_OBJECTS) and what.object not in alive:
            made.discard(each.order)
            continue
        kept.append(each)
    return sorted(kept, key=lambda each: each.order)


def _creation_first(entry: Entry) -> int:
    # An object's frame follows the ioctl that made it, perhaps with others of the same thread between.
    return entry.what.made_by or entry.order if isinstance(entry.what, Object) else entry.order


class Shrinker:
    """Cuts *record* down as long as *condition* holds; :attr:`best` is the smallest so far.

    *limit* bounds the number of attempts.  *progress* is told what happens.
    """

    def __init__(
        self,
        record: Record,
        condition: Condition,
        *,
        limit: int = 5000,
        progress: Progress | None = None,
    ) -> None:
        self.best = record
        self.attempts = 0
        self._condition = condition
        self._limit = limit
        self._progress = progress
        self._folder = tempfile.TemporaryDirectory(prefix="kvmpy-shrink-")
        self._path = os.path.join(self._folder.name, "candidate.rec")

    def close(self) -> None:
        """Remove what lies on disk."""
        self._folder.cleanup()

    def __enter__(self) -> Shrinker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def holds(self) -> bool:
        """Tell whether the condition holds for the record as it is; ask this first."""
        return self._try(self.best)

    def _try(self, candidate: Record) -> bool:
        if self.attempts >= self._limit:
            raise Exhausted
        self.attempts += 1
        candidate.save(self._path)
        if not self._condition.holds(self._path):
            return False
        self.best = candidate
        return True

    def _say(self, what: str) -> None:
        if self._progress is not None:
            self._progress(f"{what}: {size_text(self.best)}, {self.attempts} attempts")

    def run(self) -> Record:
        """Cut down everything that can be cut down and return the result."""
        for name, work in (
            ("ioctls", self.events),
            ("pages", self.pages),
            ("memory", self.memory),
            ("fields", self.fields),
        ):
            try:
                work()
            except Exhausted:
                self._say(f"{name} (stopped after {self._limit} attempts)")
                break
            self._say(name)
        return self.best

    # Events.

    def events(self) -> None:
        """Remove events that are not needed."""
        removable = [e for e in self.best.entries if not isinstance(e.what, (Memory, Object, Map))]
        fixed = [e for e in self.best.entries if isinstance(e.what, (Memory, Object, Map))]
        base = self.best

        def needed(part: list[Entry]) -> bool:
            return self._try(base.with_entries(consistent([*fixed, *part])))

        ddmin(removable, needed)

    # Memory.

    def pages(self) -> None:
        """Clear pages whose content is not needed."""
        places = [
            (number, at)
            for number, entry in enumerate(self.best.entries)
            if isinstance(entry.what, Memory)
            for at, ident in enumerate(entry.what.ids)
            if ident
        ]
        base = self.best

        def needed(part: list[tuple[int, int]]) -> bool:
            kept = set(part)
            entries = list(base.entries)
            for number, entry in enumerate(entries):
                if isinstance(entry.what, Memory):
                    ids = tuple(
                        ident if (number, at) in kept else 0 for at, ident in enumerate(entry.what.ids)
                    )
                    entries[number] = entry.but(replace(entry.what, ids=ids))
            return self._try(base.with_entries(_without_empty(entries)))

        ddmin(places, needed)

    def memory(self) -> None:
        """Clear parts of pages that are not needed, in finer and finer blocks."""
        for block in _BLOCKS:
            self._blocks(block)

    def _blocks(self, block: int) -> None:
        base = self.best
        used = sorted({i for e in base.entries if isinstance(e.what, Memory) for i in e.what.ids if i})
        places = [
            (ident, at)
            for ident in used
            for at in range(0, PAGE_SIZE, block)
            if any(base.pages[ident][at : at + block])
        ]

        def needed(part: list[tuple[int, int]]) -> bool:
            pages = dict(base.pages)
            for ident in used:
                content = bytearray(PAGE_SIZE)
                for owner, at in part:
                    if owner == ident:
                        content[at : at + block] = base.pages[ident][at : at + block]
                pages[ident] = bytes(content)
            return self._try(replace(base, pages=pages))

        ddmin(places, needed)

    # Fields.

    def fields(self) -> None:
        """Set fields of arguments to 0 and take entries out of lists."""
        for order in [e.order for e in self.best.entries if isinstance(e.what, Ioctl) and e.what.argument_in]:
            self._entries_of(order)
            self._fields_of(order)

    def _argument(self, order: int) -> tuple[int, Ioctl, bytes] | None:
        for number, entry in enumerate(self.best.entries):
            if entry.order == order and isinstance(entry.what, Ioctl) and entry.what.argument_in:
                return number, entry.what, entry.what.argument_in
        return None

    def _with_argument(self, order: int, data: bytes) -> bool:
        found = self._argument(order)
        if found is None:
            return False
        number, what, _ = found
        chunks = tuple(
            Chunk(c.address, data, When.IN if c.when == When.BOTH else c.when, c.what, c.flags)
            if c.address == what.arg and c.when & When.IN
            else c
            for c in what.chunks
        )
        entries = list(self.best.entries)
        entries[number] = entries[number].but(replace(what, chunks=chunks))
        return self._try(self.best.with_entries(entries))

    def _struct(self, order: int) -> Struct | None:
        found = self._argument(order)
        buffer = BUFFERS.get(found[1].request) if found is not None else None
        if found is None or buffer is None or buffer.struct is None:
            return None
        kind = struct_class(buffer.struct)
        if len(found[2]) < kind.SIZE or (not issubclass(kind, FlexStruct) and len(found[2]) != kind.SIZE):
            return None
        return kind.from_bytes(found[2])

    def _entries_of(self, order: int) -> None:
        value = self._struct(order)
        if not isinstance(value, FlexStruct) or value.COUNT is None or len(value) < 2:
            return
        kind = type(value)
        head = value.to_bytes()[: value.OPEN_OFFSET]
        size = value.ENTRY_SIZE
        raw = value.to_bytes()
        items = [raw[value.OPEN_OFFSET + n * size :][:size] for n in range(min(len(value), value.room))]

        def needed(part: list[bytes]) -> bool:
            made = kind.from_bytes(head + b"".join(part))
            setattr(made._holder(), str(kind.COUNT), len(part))
            return self._with_argument(order, made.to_bytes())

        ddmin(items, needed)

    def _fields_of(self, order: int) -> None:
        value = self._struct(order)
        if value is None:
            return
        raw = value.to_bytes()
        places = [place for place in leaves(value) if any(raw[place[0] : place[0] + place[1]])]

        def needed(part: list[tuple[int, int]]) -> bool:
            content = bytearray(len(raw))
            if isinstance(value, FlexStruct):
                content[value.OPEN_OFFSET :] = raw[value.OPEN_OFFSET :]
            for at, size in part:
                content[at : at + size] = raw[at : at + size]
            return self._with_argument(order, bytes(content))

        ddmin(places, needed)


def leaves(value: Struct, base: int = 0) -> list[tuple[int, int]]:
    """Return offset and size of every number in *value* ahead of its open array."""
    found: list[tuple[int, int]] = []
    for field in value.FIELDS.values():
        content = getattr(value, field.attribute)
        if field.size == 0:
            continue
        if isinstance(content, Struct):
            found += leaves(content, base + field.offset)
        elif isinstance(content, int):
            found.append((base + field.offset, field.size))
        else:
            size = max(1, field.size // max(1, len(content)))
            found += [(base + field.offset + at, size) for at in range(0, field.size, size)]
    return sorted(set(found))


def _without_empty(entries: list[Entry]) -> list[Entry]:
    return [e for e in entries if not isinstance(e.what, Memory) or any(e.what.ids)]


def size_text(record: Record) -> str:
    """Return how large a record is, in ioctls and pages of memory."""
    pages = sum(1 for e in record.entries if isinstance(e.what, Memory) for i in e.what.ids if i)
    filled = sum(
        PAGE_SIZE - record.page(i).count(0)
        for e in record.entries
        if isinstance(e.what, Memory)
        for i in e.what.ids
        if i
    )
    return f"{len(record.ioctls)} ioctls, {pages} pages with {filled} bytes that are not 0"


def save(record: Record, path: str | os.PathLike[str]) -> None:
    """Write what is left to *path*."""
    record.save(path, {"shrunk": "yes"})


__all__ = ["Exhausted", "Shrinker", "consistent", "ddmin", "leaves", "save", "size_text"]
