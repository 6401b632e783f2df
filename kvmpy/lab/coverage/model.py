# SPDX-License-Identifier: Apache-2.0
"""The kernel that was measured: its lines and functions by number, and which of them counters stand for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyroaring import BitMap

from kvmpy.lab.coverage import notes
from kvmpy.lab.coverage.kept import Kept
from kvmpy.lab.coverage.notes import Flow, Terms, positive
from kvmpy.lab.coverage.store import Counted
from kvmpy.lab.errors import LabError

# What is known of a function's counters is kept until there are so many.
_REMEMBERED = 200_000


@dataclass(frozen=True, order=True)
class Place:
    """A function: its file in the kernel's tree, its first and last line, its name."""

    file: str
    line: int
    end: int
    name: str


@dataclass(frozen=True)
class _Solved:
    function: int
    entry: Terms
    lines: tuple[tuple[Terms, BitMap], ...]


class Model:
    """Numbers for KVM's own lines and functions: what the software AMD-SP adds is not among them."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self._stamps: dict[str, int] = {}
        read: dict[str, list[notes.Function]] = {}
        for name in kept.objects:
            self._stamps[name], read[name] = notes.read_notes(kept.notes(name), f"{name}.gcno")
        places: set[Place] = set()
        lines: set[tuple[str, int]] = set()
        flows: dict[tuple[str, int], tuple[Place, Flow]] = {}
        for name, functions in read.items():
            for function in functions:
                start = None if function.artificial else kept.place(function.file, function.line)
                if start is None:
                    continue
                end = kept.place(function.file, function.end) or start
                place = Place(start[0], start[1], end[1], function.name)
                flow = Flow(function)
                flows[name, function.ident] = place, flow
                places.add(place)
                lines |= self._own(line for _, found in flow.lines for line in found)
        self.functions = sorted(places)
        self.lines = sorted(lines)
        numbers = {line: number for number, line in enumerate(self.lines)}
        which = {place: number for number, place in enumerate(self.functions)}
        self._solved = {
            key: _Solved(
                which[place],
                flow.entry,
                tuple(
                    (terms, BitMap(numbers[line] for line in self._own(found))) for terms, found in flow.lines
                ),
            )
            for key, (place, flow) in flows.items()
        }
        self._known: dict[tuple[str, int, tuple[tuple[int, int], ...]], tuple[bool, BitMap]] = {}

    def executed(self, counted: Counted) -> tuple[BitMap, BitMap]:
        """Return the lines and the functions that *counted* says were executed, by number.

        LabError for counters of another kernel.
        """
        lines, functions = [], BitMap()
        for name, stamp, by_function in counted.counters():
            self.check(name, stamp)
            for ident, counters in by_function.items():
                solved = self._solved.get((name, ident))
                if solved is None:
                    continue
                entered, found = self._evaluate((name, ident, tuple(counters)), solved)
                lines.append(found)
                if entered:
                    functions.add(solved.function)
        return BitMap.union(*lines) if lines else BitMap(), functions

    def check(self, name: str, stamp: int) -> None:
        """Raise LabError unless *stamp* is that of the object *name*."""
        if self._stamps.get(name) != stamp:
            raise LabError(f"counters of {name} are of another kernel: gcc's stamp is {stamp:#x}")

    def _own(self, entries: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
        return {place for file, line in entries if (place := self.kept.place(file, line)) is not None}

    def _evaluate(
        self, key: tuple[str, int, tuple[tuple[int, int], ...]], solved: _Solved
    ) -> tuple[bool, BitMap]:
        known = self._known.get(key)
        if known is None:
            counters = dict(key[2])
            found = BitMap()
            for terms, lines in solved.lines:
                if positive(terms, counters):
                    found |= lines
            known = positive(solved.entry, counters), found
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = known
        return known
