# SPDX-License-Identifier: Apache-2.0
"""Which tests to run: those that reach what changed, or the few that reach most of everything. Pure."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pyroaring import BitMap

from kvmpy.lab.coverage.changes import Touched
from kvmpy.lab.coverage.maps import Map, Test
from kvmpy.lab.coverage.store import OWN_SUITE
from kvmpy.testing.verdicts import area_of

# Seconds that a test costs beside its own: collection, reports, looks for leaks.
_OVERHEAD = 0.2


@dataclass(frozen=True)
class Touching:
    """The tests that enter functions that change.

    *of* is how many tests there are; *booted* are the functions that only the kernel's start enters: any test
    may depend on what they prepare. *unreached* are those that nothing enters, *unknown* those that are not
    in the map: new, or not compiled.
    """

    tests: Sequence[Test]
    of: int
    booted: Sequence[str]
    unreached: Sequence[str]
    unknown: Sequence[str]
    outside: Sequence[str]

    def lines(self) -> list[str]:
        """Return what to tell."""
        areas = Counter(area_of(test.id) for test in self.tests)
        text = [f"{len(self.tests)} of {self.of} tests reach what changes"]
        if areas:
            text[0] += f", in {', '.join(f'{area} ({number})' for area, number in areas.most_common())}"
        for title, names in (
            ("only the boot executes, so that any test may depend on it", self.booted),
            ("no test reaches", self.unreached),
            ("not in the map (new, or not compiled)", self.unknown),
            ("outside of functions, not looked at", self.outside),
        ):
            text += [f"{title}: {name}" for name in names]
        return text


def touching(known: Map, touched: Touched) -> Touching:
    """Return the suite's tests that reach a change."""
    own = BitMap(number for number, test in enumerate(known.tests) if test.suite == OWN_SUITE)
    chosen = BitMap()
    booted: list[str] = []
    unreached: list[str] = []
    unknown: list[str] = []
    boot = [known.lines[number] for number in known.boot]
    for file, name in sorted(touched.functions):
        named = [
            (place, tests & own)
            for place, tests in zip(known.functions, known.function_tests, strict=True)
            if fnmatchcase(place.name, name)
        ]
        # One that moved to another file is still the same.
        here = [each for each in named if each[0].file == file] or named
        if not here:
            unknown.append(f"{file} {name}()")
        elif not any(tests for _, tests in here):
            early = any(
                place.file == path and place.line <= line <= place.end
                for place, _ in here
                for path, line in boot
            )
            (booted if early else unreached).append(f"{file} {name}()")
        for _, tests in here:
            chosen |= tests
    return Touching(known.named(chosen), len(own), booted, unreached, unknown, touched.outside)


@dataclass(frozen=True)
class Quick:
    """Few tests that together reach most: of *lines* that all tests execute they execute *covered*."""

    tests: Sequence[Test]
    covered: int
    lines: int
    seconds: float


def quick(known: Map, share: float) -> Quick:
    """Return few and fast tests of the suite that execute *share*, from 0 to 1, of what all of them do."""
    lines: dict[int, BitMap] = {
        number: BitMap() for number, test in enumerate(known.tests) if test.suite == OWN_SUITE
    }
    for line, tests in enumerate(known.line_tests):
        for number in tests:
            if number in lines:
                lines[number].add(line)
    everything = BitMap.union(*lines.values()) if lines else BitMap()
    wanted = share * len(everything)
    cost = {number: known.tests[number].seconds + _OVERHEAD for number in lines}
    covered = BitMap()
    chosen: list[int] = []
    # What a test adds only shrinks: who was best and still is needs no comparison with the others.
    heap = [(-len(found) / cost[number], number) for number, found in lines.items()]
    heapq.heapify(heap)
    while heap and len(covered) < wanted:
        _, number = heapq.heappop(heap)
        worth = -len(lines[number] - covered) / cost[number]
        if heap and worth > heap[0][0]:
            heapq.heappush(heap, (worth, number))
            continue
        if worth == 0:
            break
        chosen.append(number)
        covered |= lines[number]
    chosen = _without_needless(chosen, lines, cost, wanted)
    named = known.named(sorted(chosen, key=lambda number: known.tests[number].id))
    covered = BitMap.union(*(lines[number] for number in chosen)) if chosen else BitMap()
    return Quick(named, len(covered), len(everything), sum(cost[number] for number in chosen))


def _without_needless(
    chosen: Sequence[int], lines: dict[int, BitMap], cost: dict[int, float], wanted: float
) -> list[int]:
    """Leave out, the dearest first, what the others make up for."""
    times: Counter[int] = Counter()
    for number in chosen:
        times.update(lines[number])
    covered = len(times)
    kept = set(chosen)
    for number in sorted(chosen, key=lambda number: -cost[number]):
        alone = [line for line in lines[number] if times[line] == 1]
        if covered - len(alone) >= wanted:
            kept.discard(number)
            covered -= len(alone)
            times.subtract(lines[number])
    return [number for number in chosen if number in kept]
