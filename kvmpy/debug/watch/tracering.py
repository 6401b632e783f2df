# SPDX-License-Identifier: Apache-2.0
"""The kernel's trace ring buffer, taken apart: event formats, pages, records.

Nothing about the layout is assumed: it is read from ``events/header_page``, ``events/header_event`` and every
event's ``format`` file (Linux: Documentation/trace/events.rst, section 3, and ring_buffer.h).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

_FIELD = re.compile(
    r"^\s*field:(?P<type>[^;]*?)\b(?P<name>\w+)(?P<array>\[[^\]]*\])?;"
    r"\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);(?:\s*signed:(?P<signed>[01]);)?"
)
_BITS = re.compile(r"^\s*(?P<name>\w+)\s*:\s*(?P<bits>\d+) bits", re.MULTILINE)
_TYPE = re.compile(r"^\s*(?P<name>\w+)\s*:\s*type == (?P<number>\d+)", re.MULTILINE)
_LONGEST = re.compile(r"data max type_len\s*==\s*(?P<number>\d+)")

# Above the length in a page's commit word (Linux: RB_MISSED_EVENTS, RB_MISSED_STORED).
_MISSED = 1 << 31
_MISSED_STORED = 1 << 30
_COMMIT = (1 << 27) - 1


class FormatError(ValueError):
    """A description of the kernel's that this module cannot read."""


@dataclass(frozen=True)
class Field:
    """One field of a record: *size* bytes at *offset*."""

    name: str
    type: str
    offset: int
    size: int
    signed: bool
    array: bool = False

    def value(self, payload: bytes) -> int | bytes:
        """Return the field as a number, or its bytes where it is an array."""
        raw = payload[self.offset : self.offset + self.size]
        if len(raw) != self.size:
            raise FormatError(
                f"field {self.name} ends at byte {self.offset + self.size}, {len(payload)} were recorded"
            )
        return raw if self.array else int.from_bytes(raw, sys.byteorder, signed=self.signed)


def _fields(text: str) -> dict[str, Field]:
    results = {}
    for line in text.splitlines():
        match = _FIELD.match(line)
        if match:
            results[match["name"]] = Field(
                match["name"],
                match["type"].strip(),
                int(match["offset"]),
                int(match["size"]),
                match["signed"] == "1",
                match["array"] is not None,
            )
        elif line.lstrip().startswith("field:"):
            raise FormatError(f"not a field description: {line.strip()!r}")
    return results


@dataclass(frozen=True)
class EventFormat:
    """An event as its ``format`` file describes it."""

    name: str
    id: int
    fields: dict[str, Field]

    @classmethod
    def parse(cls, text: str) -> EventFormat:
        """Read a ``format`` file; FormatError when it is none."""
        name = re.search(r"^name:\s*(\S+)", text, re.MULTILINE)
        number = re.search(r"^ID:\s*(\d+)", text, re.MULTILINE)
        fields = _fields(text)
        if name is None or number is None or "common_type" not in fields or "common_pid" not in fields:
            raise FormatError(f"not an event's format: {text[:80]!r}")
        return cls(name[1], int(number[1]), fields)

    def need(self, *names: str) -> None:
        """FormatError unless the event has all of these fields: it is another kernel's event then."""
        missing = [name for name in names if name not in self.fields]
        if missing:
            raise FormatError(
                f"event {self.name} has no field {', '.join(missing)}: "
                f"this kernel gives it {', '.join(self.fields)}"
            )

    def number(self, payload: bytes, name: str, default: int = 0) -> int:
        """Return a scalar field; *default* where this kernel's event lacks it."""
        known = self.fields.get(name)
        value = default if known is None else known.value(payload)
        if isinstance(value, bytes):
            raise FormatError(f"field {name} of {self.name} is an array")
        return value


@dataclass(frozen=True)
class Record:
    """An event that was recorded: *timestamp* in the units of the trace clock, *payload* with its common
    fields.
    """

    timestamp: int
    cpu: int
    format: EventFormat
    payload: bytes = field(repr=False)

    @property
    def tid(self) -> int:
        """The thread that raised it (in the initial PID namespace)."""
        return self.format.number(self.payload, "common_pid")

    def __getitem__(self, name: str) -> int:
        if name not in self.format.fields:
            raise KeyError(name)
        return self.format.number(self.payload, name)


@dataclass(frozen=True)
class Page:
    """What one page of the ring buffer holds: ``(timestamp, payload)`` of each record, and what was lost
    before it (-1: some, number unknown).
    """

    records: list[tuple[int, bytes]]
    lost: int


@dataclass(frozen=True)
class PageLayout:
    """The layout of ring-buffer pages, as ``header_page`` and ``header_event`` describe it."""

    timestamp: Field
    commit: Field
    data: Field
    delta_bits: int
    type_bits: int
    padding: int
    time_extend: int
    time_stamp: int
    longest: int

    @classmethod
    def parse(cls, header_page: str, header_event: str) -> PageLayout:
        """Read the two descriptions; FormatError when they are none."""
        page = _fields(header_page)
        bits = {match["name"]: int(match["bits"]) for match in _BITS.finditer(header_event)}
        types = {match["name"]: int(match["number"]) for match in _TYPE.finditer(header_event)}
        longest = _LONGEST.search(header_event)
        try:
            layout = cls(
                page["timestamp"],
                page["commit"],
                page["data"],
                bits["time_delta"],
                bits["type_len"],
                types["padding"],
                types["time_extend"],
                types["time_stamp"],
                int(longest["number"]) if longest else -1,
            )
        except KeyError as error:
            raise FormatError(f"the ring buffer's description lacks {error}") from None
        if layout.type_bits + layout.delta_bits != 32 or longest is None:
            raise FormatError("the ring buffer's records do not begin with a 32-bit word")
        return layout

    @property
    def size(self) -> int:
        """Bytes of a page."""
        return self.data.offset + self.data.size

    def read(self, page: bytes) -> Page:
        """Take a page apart; FormatError when it contradicts itself."""
        stamp, commit = self.timestamp.value(page), self.commit.value(page)
        if isinstance(stamp, bytes) or isinstance(commit, bytes):
            raise FormatError("the page header holds arrays")
        end = self.data.offset + (commit & _COMMIT)
        if end > len(page):
            raise FormatError(f"a page of {len(page)} bytes claims {end}")
        lost = 0
        if commit & _MISSED:
            stored = page[end : end + self.commit.size] if commit & _MISSED_STORED else b""
            lost = int.from_bytes(stored, sys.byteorder) if len(stored) == self.commit.size else -1
        return Page(list(self._records(page, stamp, end)), lost)

    def _records(self, page: bytes, now: int, end: int) -> Iterator[tuple[int, bytes]]:
        address = self.data.offset
        while address + 4 <= end:
            head = int.from_bytes(page[address : address + 4], sys.byteorder)
            kind, delta = head & (1 << self.type_bits) - 1, head >> self.type_bits
            address += 4
            if kind == self.padding and delta == 0:
                return
            # What lies behind the first word: its length, the rest of a time, or the record itself.
            array = 0
            if kind in (0, self.padding, self.time_extend, self.time_stamp):
                array = int.from_bytes(page[address : address + 4], sys.byteorder)
            if kind == self.padding:
                # A record that was discarded; its time still counts.
                now += delta
                address += array
            elif kind == self.time_extend:
                now += (array << self.delta_bits) + delta
                address += 4
            elif kind == self.time_stamp:
                # Absolute, without the topmost bits.
                bits = 32 + self.delta_bits
                now = now >> bits << bits | array << self.delta_bits | delta
                address += 4
            else:
                if kind > self.longest:
                    raise FormatError(f"a record of unknown type {kind}")
                now += delta
                start, length = (address, kind * 4) if kind else (address + 4, array - 4)
                if length < 0 or start + length > end:
                    raise FormatError(f"a record of {length} bytes at {start} ends outside its page")
                yield now, page[start : start + length]
                address = start + length
