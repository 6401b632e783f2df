# SPDX-License-Identifier: Apache-2.0
"""Which lines a function's counters stand for: gcc's notes (.gcno) read, and each block's count as a sum.

gcov and gcovr tell it for one set of counters in seconds. Here it is for one test after another, thousands of
them, and only whether a line was executed. gcc counts some arcs of a function's flow graph; what goes
into a block comes out of it, so every other count is a sum of counted ones with signs. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvmpy.lab.errors import LabError

_NOTES, _DATA = 0x67636E6F, 0x67636461
_FUNCTION, _BLOCKS, _ARCS, _LINES, _COUNTERS = 0x01000000, 0x01410000, 0x01430000, 0x01450000, 0x01A10000
_ON_TREE = 1
# From gcc 12 on lengths are in bytes, before that in words; a file has a checksum.
_BYTES_SINCE = 12
_OLDEST = 9
_ENTRY = 0
# Numbers of counters, and how often each counts.
Terms = tuple[tuple[int, int], ...]


@dataclass
class Function:
    """A function of an object: *counters* is how many it has, *lines* the lines of each block by file."""

    ident: int
    name: str
    file: str
    line: int
    end: int
    checksums: tuple[int, int]
    artificial: bool = False
    blocks: int = 0
    counters: int = 0
    arcs: list[tuple[int, int, bool]] = field(default_factory=list)
    lines: dict[int, list[tuple[str, int]]] = field(default_factory=dict)


class _Reader:
    def __init__(self, data: bytes, magic: int, what: str) -> None:
        self._data = data
        self._at = 0
        self._what = what
        if len(data) < 12 or self.word() != magic:
            raise LabError(f"{what} is no file of gcov's")
        version = struct.pack(">I", self.word()).decode("ascii", "replace")
        # "B22*" is gcc 12.2, "A93*" 9.3.
        self.gcc = (ord(version[0]) - ord("A")) * 10 + ord(version[1]) - ord("0")
        if not _OLDEST <= self.gcc < 100:
            raise LabError(f"{what} is of an unknown version of gcc: {version!r}")
        self.stamp = self.word()
        self.zeros = 0
        self._unit = 1 if self.gcc >= _BYTES_SINCE else 4
        if self.gcc >= _BYTES_SINCE:
            self.word()

    def word(self) -> int:
        try:
            (value,) = struct.unpack_from("<I", self._data, self._at)
        except struct.error as error:
            raise LabError(f"{self._what} ends in the middle") from error
        self._at += 4
        return int(value)

    def text(self) -> str:
        length = self.word() * self._unit
        value = self._data[self._at : self._at + length]
        self._at += length
        return value.rstrip(b"\0").decode("utf-8", "replace")

    def records(self) -> Iterator[tuple[int, int]]:
        """Yield the tag and the end of each record."""
        while self._at + 8 <= len(self._data):
            tag, length = self.word(), self.word()
            if not tag:
                return
            if length >> 31:  # libgcov writes only the number of counters that are all zero
                self.zeros, length = (1 << 32) - length, 0
            end = length * self._unit + self._at
            yield tag, end
            self._at = end

    @property
    def at(self) -> int:
        return self._at

    def counters(self, end: int) -> tuple[int, ...]:
        if end > len(self._data):
            raise LabError(f"{self._what} ends in the middle")
        if end == self._at:
            return (0,) * (self.zeros * self._unit // 8)
        return struct.unpack_from(f"<{(end - self._at) // 8}Q", self._data, self._at)


def read_notes(data: bytes, what: str = "the notes") -> tuple[int, list[Function]]:
    """Return the stamp and the functions of an object's notes; LabError for what are none."""
    reader = _Reader(data, _NOTES, what)
    reader.text()  # the folder in which gcc ran
    reader.word()
    functions: list[Function] = []
    for tag, end in reader.records():
        if tag == _FUNCTION:
            ident, *checksums = (reader.word() for _ in range(3))
            name, artificial = reader.text(), bool(reader.word())
            file, line = reader.text(), reader.word()
            reader.word()  # the column
            last = reader.word()
            functions.append(
                Function(ident, name, file, line, last, (checksums[0], checksums[1]), artificial)
            )
        elif tag == _BLOCKS:
            functions[-1].blocks = reader.word()
        elif tag == _ARCS:
            source = reader.word()
            while reader.at < end:
                target, flags = reader.word(), reader.word()
                functions[-1].arcs.append((source, target, bool(flags & _ON_TREE)))
                functions[-1].counters += not flags & _ON_TREE
        elif tag == _LINES:
            _read_lines(reader, end, functions[-1].lines.setdefault(reader.word(), []))
    return reader.stamp, functions


def _read_lines(reader: _Reader, end: int, lines: list[tuple[str, int]]) -> None:
    file = ""
    while reader.at < end:
        if number := reader.word():
            lines.append((file, number))
        elif not (file := reader.text()):
            return


def read_counters(data: bytes, what: str = "the counters") -> tuple[int, dict[int, tuple[int, ...]]]:
    """Return the stamp and, by the functions' idents, the counters of a .gcda file; LabError for none."""
    reader = _Reader(data, _DATA, what)
    counters: dict[int, tuple[int, ...]] = {}
    ident = 0
    for tag, end in reader.records():
        if tag == _FUNCTION and end > reader.at:
            ident = reader.word()
        elif tag == _COUNTERS:
            counters[ident] = reader.counters(end)
    return reader.stamp, counters


class Flow:
    """A function's flow graph, solved: which counters each of its blocks is the sum of."""

    def __init__(self, function: Function) -> None:
        sums = _solve(function)
        # One entry for blocks with the same sum: (counter, factor) and the lines.
        lines: dict[Terms, set[tuple[str, int]]] = {}
        for block, entries in function.lines.items():
            if entries:
                lines.setdefault(sums[block], set()).update(entries)
        self.lines = [(terms, frozenset(found)) for terms, found in lines.items()]
        self.entry = sums[_ENTRY]


def positive(terms: Terms, counters: Mapping[int, int]) -> bool:
    """Whether a sum of counters, those that are not zero, says that something was executed."""
    return sum(counters.get(number, 0) * factor for number, factor in terms) > 0


def _solve(function: Function) -> list[Terms]:
    arcs = function.arcs
    into: list[set[int]] = [set() for _ in range(function.blocks)]
    out: list[set[int]] = [set() for _ in range(function.blocks)]
    sums: dict[int, Mapping[int, int]] = {}
    counter = 0
    for number, (source, target, on_tree) in enumerate(arcs):
        out[source].add(number)
        into[target].add(number)
        if not on_tree:
            sums[number] = {counter: 1}
            counter += 1
    blocks: list[Mapping[int, int] | None] = [None] * function.blocks
    waiting = list(range(function.blocks))
    while waiting:
        block = waiting.pop()
        for side in (into[block], out[block]):
            # Nothing goes into the entry, nothing comes out of the exit.
            if blocks[block] is None and side and all(arc in sums for arc in side):
                blocks[block] = _added((sums[arc], 1) for arc in side)
        known = blocks[block]
        if known is None:
            continue
        for side in (into[block], out[block]):
            missing = [arc for arc in side if arc not in sums]
            if len(missing) == 1:
                (arc,) = missing
                sums[arc] = _added([(known, 1), *((sums[other], -1) for other in side if other != arc)])
                waiting += arcs[arc][:2]
    return [tuple(sorted((known or {}).items())) for known in blocks]


def _added(terms: Iterable[tuple[Mapping[int, int], int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for mapping, sign in terms:
        for number, factor in mapping.items():
            value = total.get(number, 0) + sign * factor
            if value:
                total[number] = value
            else:
                total.pop(number, None)
    return total


def write_counters(
    notes: bytes, functions: Sequence[Function], counters: Mapping[int, Mapping[int, int]]
) -> bytes:
    """Return the .gcda file that belongs to *notes*, with the *counters* of each function by ident."""
    reader = _Reader(notes, _NOTES, "the notes")
    unit = 4 if reader.gcc >= _BYTES_SINCE else 1
    words = [_DATA, *struct.unpack_from("<2I", notes, 4)] + ([0] if reader.gcc >= _BYTES_SINCE else [])
    parts = [struct.pack(f"<{len(words)}I", *words)]
    for function in functions:
        known = counters.get(function.ident, {})
        parts.append(struct.pack("<5I", _FUNCTION, 3 * unit, function.ident, *function.checksums))
        parts.append(struct.pack("<2I", _COUNTERS, 2 * function.counters * unit))
        values = (min(known.get(number, 0), (1 << 63) - 1) for number in range(function.counters))
        parts.append(struct.pack(f"<{function.counters}Q", *values))
    return b"".join(parts)
