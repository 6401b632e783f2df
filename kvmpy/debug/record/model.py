# SPDX-License-Identifier: Apache-2.0
"""A record in memory: its events in order, its objects, the contents of pages; loaded, changed and saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvmpy.debug.record.events import (
    End,
    Enter,
    Ioctl,
    Lines,
    Memory,
    Note,
    Object,
    Pages,
    Payload,
    pack_all,
    unpack,
)
from kvmpy.debug.record.format import Frame, FrameReader, FrameType, Problem, RecordError, private
from kvmpy.owned import write_atomically
from kvmpy.uapi.ioctls import BY_NR

_BATCH = 256


@dataclass(frozen=True)
class Entry:
    """One event: who did it and when, and what it is."""

    frame: Frame
    what: Payload

    @property
    def order(self) -> int:
        """When it began."""
        return self.frame.order

    @property
    def end(self) -> int:
        """When it ended; 0 where it never did."""
        return self.what.end_order if isinstance(self.what, Ioctl) else self.frame.order

    def but(self, payload: Payload) -> Entry:
        """Return the same event with another content."""
        return replace(self, what=payload)


@dataclass
class Record:
    """What a record file says.

    ``problems`` tells what of the file could not be read; ``complete`` whether it was closed in order;
    ``in_flight`` holds ioctls that were announced and never returned.
    """

    host: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    pages: dict[int, bytes] = field(default_factory=dict, repr=False)
    problems: list[Problem] = field(default_factory=list)
    complete: bool = False
    in_flight: list[Entry] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, resync: bool = False) -> Record:
        """Read the record at *path*; RecordError when nothing of it can be used."""
        return cls.from_bytes(Path(path).read_bytes(), resync=resync)

    @classmethod
    def from_bytes(cls, data: bytes, *, resync: bool = False) -> Record:
        """Read the record in *data*, up to the first damage (with *resync* beyond it)."""
        reader = FrameReader(data, resync=resync)
        reader.check()
        record = cls()
        entered: dict[tuple[int, int], Entry] = {}
        for frame in reader:
            try:
                event = unpack(frame)
            except RecordError as error:
                record.problems.append(Problem(frame.offset, str(error).partition(": ")[2]))
                break
            record._take(frame, event, entered)
        record.problems += reader.problems
        record.in_flight = sorted(entered.values(), key=lambda each: each.order)
        record.entries.sort(key=lambda each: each.order)
        return record

    def _take(self, frame: Frame, payload: Payload | None, entered: dict[tuple[int, int], Entry]) -> None:
        entry = Entry(frame, payload) if payload is not None else None
        if entry is None:
            return
        if isinstance(payload, Enter):
            entered[frame.pid, frame.order] = entry
            return
        if isinstance(payload, Ioctl):
            entered.pop((frame.pid, frame.order), None)
        if isinstance(payload, Pages):
            for number, page in enumerate(payload.pages):
                self.pages[payload.first + number] = page
        elif isinstance(payload, Lines) and not isinstance(payload, Note):
            self.host.update(payload.values)
        elif isinstance(payload, End):
            self.complete = True
        else:
            self.entries.append(entry)

    @property
    def objects(self) -> dict[int, Object]:
        """The objects by id."""
        return {each.what.id: each.what for each in self.entries if isinstance(each.what, Object)}

    @property
    def ioctls(self) -> list[Entry]:
        """The ioctls that returned, in the order in which they began."""
        return [each for each in self.entries if isinstance(each.what, Ioctl)]

    @property
    def notes(self) -> dict[str, str]:
        """All remarks; later ones win."""
        results: dict[str, str] = {}
        for each in self.entries:
            if isinstance(each.what, Note):
                results.update(each.what.values)
        return results

    def page(self, ident: int) -> bytes:
        """Return the content of a page; RecordError when the record lacks it."""
        if ident == 0:
            return bytes(4096)
        if ident not in self.pages:
            raise RecordError(f"the content of page {ident} is not in the record")
        return self.pages[ident]

    def content(self, memory: Memory) -> bytes:
        """Return what the pages of *memory* hold."""
        return b"".join(map(self.page, memory.ids))

    def with_entries(self, entries: Iterable[Entry]) -> Record:
        """Return a record of these events, with the same host and pages."""
        return replace(self, entries=list(entries), problems=[], in_flight=[], complete=True)

    def save(self, path: str | os.PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Write the record to *path* in one piece; *about* adds lines to the frame HOST."""
        head = Frame(FrameType.HOST, b"")
        out: list[tuple[Frame, Payload]] = [(head, Lines({**self.host, **(about or {})}))]
        numbers: dict[int, int] = {0: 0}
        for entry in self.entries:
            payload = entry.what
            if isinstance(payload, Memory):
                fresh = [ident for ident in dict.fromkeys(payload.ids) if ident not in numbers]
                for offset in range(0, len(fresh), _BATCH):
                    part = fresh[offset : offset + _BATCH]
                    first = len(numbers)
                    numbers.update({ident: first + number for number, ident in enumerate(part)})
                    out.append((entry.frame, Pages(first, tuple(map(self.page, part)))))
                payload = replace(payload, ids=tuple(numbers[ident] for ident in payload.ids))
            out.append((entry.frame, payload))
        out.append((head, End(len(out))))
        write_atomically(Path(path), pack_all(out), private)

    def describe(self) -> str:
        """Return in a line what can be read of it and why not more."""
        count = len(self.ioctls)
        text = f"{count} ioctl{'s' if count != 1 else ''}"
        if self.in_flight:
            text += f", {request_name(self.in_flight[-1].what)} in flight"
        if self.problems:
            text += f"; {self.problems[0]}"
        elif not self.complete:
            text += "; it was not closed in order"
        return text


def request_name(payload: Payload) -> str:
    """Return the name of an ioctl, or its number where kvmpy does not know it."""
    request = payload.request if isinstance(payload, Ioctl) else 0
    return BY_NR[request].name if request in BY_NR else f"ioctl {request:#x}"
