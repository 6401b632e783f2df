# SPDX-License-Identifier: Apache-2.0
"""Cut a record down to what a condition needs: ioctls first, then pages, bytes of memory, fields."""

from __future__ import annotations

import os
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
from kvmpy.owned import OwnedFolder
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
        chunks = [kept[offset : offset + size] for offset in range(0, len(kept), size)]
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
    opened = {each.order for each in entries if isinstance(each.what, Ioctl) and each.what.result >= 0}
    alive: set[int] = {0}
    kept = []
    for each in sorted(entries, key=_creation_first):
        payload = each.what
        if isinstance(payload, Object):
            if payload.made_by and payload.made_by not in opened:
                continue
            alive.add(payload.id)
        elif isinstance(payload, _ON_OBJECTS) and payload.object not in alive:
            opened.discard(each.order)
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
        self._folder = OwnedFolder("shrink")
        self._path = str(self._folder.path / "candidate.rec")

    def close(self) -> None:
        """Remove what lies on disk."""
        self._folder.close()

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

    def _say(self, action: str) -> None:
        if self._progress is not None:
            self._progress(f"{action}: {size_text(self.best)}, {self.attempts} attempts")

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
            (number, index)
            for number, entry in enumerate(self.best.entries)
            if isinstance(entry.what, Memory)
            for index, ident in enumerate(entry.what.ids)
            if ident
        ]
        base = self.best

        def needed(part: list[tuple[int, int]]) -> bool:
            kept = set(part)
            entries = list(base.entries)
            for number, entry in enumerate(entries):
                if isinstance(entry.what, Memory):
                    ids = tuple(
                        ident if (number, index) in kept else 0 for index, ident in enumerate(entry.what.ids)
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
            (ident, start)
            for ident in used
            for start in range(0, PAGE_SIZE, block)
            if any(base.pages[ident][start : start + block])
        ]

        def needed(part: list[tuple[int, int]]) -> bool:
            pages = dict(base.pages)
            for ident in used:
                content = bytearray(PAGE_SIZE)
                for owner, offset in part:
                    if owner == ident:
                        content[offset : offset + block] = base.pages[ident][offset : offset + block]
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
        argument = self._argument(order)
        if argument is None:
            return False
        number, ioctl, _ = argument
        chunks = tuple(
            Chunk(c.address, data, When.IN if c.when == When.BOTH else c.when, c.what, c.flags)
            if c.address == ioctl.arg and c.when & When.IN
            else c
            for c in ioctl.chunks
        )
        entries = list(self.best.entries)
        entries[number] = entries[number].but(replace(ioctl, chunks=chunks))
        return self._try(self.best.with_entries(entries))

    def _struct(self, order: int) -> Struct | None:
        argument = self._argument(order)
        buffer = BUFFERS.get(argument[1].request) if argument is not None else None
        if argument is None or buffer is None or buffer.struct is None:
            return None
        kind = struct_class(buffer.struct)
        if len(argument[2]) < kind.SIZE or (
            not issubclass(kind, FlexStruct) and len(argument[2]) != kind.SIZE
        ):
            return None
        return kind.from_bytes(argument[2])

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
            output = kind.from_bytes(head + b"".join(part))
            setattr(output._holder(), str(kind.COUNT), len(part))
            return self._with_argument(order, output.to_bytes())

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
            for position, size in part:
                content[position : position + size] = raw[position : position + size]
            return self._with_argument(order, bytes(content))

        ddmin(places, needed)


def leaves(value: Struct, base: int = 0) -> list[tuple[int, int]]:
    """Return offset and size of every number in *value* ahead of its open array."""
    results: list[tuple[int, int]] = []
    for field in value.FIELDS.values():
        content = getattr(value, field.attribute)
        if field.size == 0:
            continue
        if isinstance(content, Struct):
            results += leaves(content, base + field.offset)
        elif isinstance(content, int):
            results.append((base + field.offset, field.size))
        else:
            size = max(1, field.size // max(1, len(content)))
            results += [(base + field.offset + offset, size) for offset in range(0, field.size, size)]
    return sorted(set(results))


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
