# SPDX-License-Identifier: Apache-2.0
"""The map from KVM's lines and functions to the tests that execute them, in one compact file.

Lines that the same tests execute share one set of tests: there are far fewer sets than lines.
"""

from __future__ import annotations

import contextlib
import lzma
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import msgspec
from pyroaring import BitMap

from kvmpy.lab.coverage.counters import BOOT
from kvmpy.lab.coverage.functions import functions_of
from kvmpy.lab.coverage.model import Model, Place
from kvmpy.lab.coverage.store import Coverage
from kvmpy.lab.errors import LabError

SCHEMA = "kvmpy-coverage-map/2"
FILE = "coverage.map"
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]


class Test(msgspec.Struct, frozen=True, array_like=True):
    """A test, or a file of tests, of a suite; *seconds* is how long it took."""

    __test__ = False

    suite: str
    id: str
    seconds: float


class _Function(msgspec.Struct, frozen=True, array_like=True):
    file: int
    line: int
    end: int
    name: str
    tests: int


class _File(msgspec.Struct, frozen=True):
    """What the file has: *lines* are by file the number and the number of its set of tests."""

    kernel: str
    build_id: str
    source: list[tuple[str, int]]
    tests: list[Test]
    files: list[str]
    lines: list[list[tuple[int, int]]]
    functions: list[_Function]
    boot: bytes
    sets: list[bytes]
    schema: str = SCHEMA


class Map:
    """Which tests execute which lines and functions.

    *lines* are ``(file, number)``, in order; *line_tests* the numbers of the tests of each, and
    *function_tests* those of each function. *boot* are the numbers of the lines that the kernel executes
    before any test, and no test.
    """

    def __init__(
        self,
        kernel: str,
        build_id: str,
        tests: Sequence[Test],
        lines: Sequence[tuple[str, int]],
        functions: Sequence[Place],
        line_tests: Sequence[BitMap],
        function_tests: Sequence[BitMap],
        boot: BitMap,
    ) -> None:
        self.kernel = kernel
        self.build_id = build_id
        self.tests = tests
        self.lines = lines
        self.functions = functions
        self.line_tests = line_tests
        self.function_tests = function_tests
        self.boot = boot

    @cached_property
    def number(self) -> dict[tuple[str, int], int]:
        """The number of each line."""
        return {line: number for number, line in enumerate(self.lines)}

    def of_line(self, file: str, line: int) -> list[Test] | None:
        """Return the tests that execute a line, None for a line that has no code."""
        number = self.number.get((file, line))
        return None if number is None else self.named(self.line_tests[number])

    def named(self, numbers: Iterable[int]) -> list[Test]:
        """Return the tests of these numbers."""
        return [self.tests[number] for number in numbers]

    # ---- the file

    def write(self, path: Path, source: Sequence[tuple[str, int]] = ()) -> None:
        """Write the map; *source* tells what it was made from."""
        files = sorted({file for file, _ in self.lines} | {place.file for place in self.functions})
        index = {file: number for number, file in enumerate(files)}
        sets: dict[bytes, int] = {}
        lines: list[list[tuple[int, int]]] = [[] for _ in files]
        for (file, line), tests in zip(self.lines, self.line_tests, strict=True):
            lines[index[file]].append((line, sets.setdefault(tests.serialize(), len(sets))))
        functions = [
            _Function(
                index[place.file],
                place.line,
                place.end,
                place.name,
                sets.setdefault(tests.serialize(), len(sets)),
            )
            for place, tests in zip(self.functions, self.function_tests, strict=True)
        ]
        content = _File(
            self.kernel,
            self.build_id,
            list(source),
            list(self.tests),
            files,
            lines,
            functions,
            self.boot.serialize(),
            list(sets),
        )
        data = lzma.compress(msgspec.msgpack.encode(content), format=lzma.FORMAT_XZ, filters=_FILTERS)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read(path: Path) -> Map:
    """Return the map in the file *path*; LabError where there is none."""
    return _loaded(path)[0]


def _loaded(path: Path) -> tuple[Map, list[tuple[str, int]]]:
    try:
        content = msgspec.msgpack.decode(lzma.decompress(path.read_bytes()), type=_File)
        if content.schema != SCHEMA:
            raise LabError(f"{path} is a map of the schema {content.schema}, not {SCHEMA}")
        sets = [BitMap.deserialize(data) for data in content.sets]
        lines = [
            (file, line, tests)
            for file, entries in zip(content.files, content.lines, strict=True)
            for line, tests in entries
        ]
        found = Map(
            content.kernel,
            content.build_id,
            content.tests,
            [(file, line) for file, line, _ in lines],
            [Place(content.files[each.file], each.line, each.end, each.name) for each in content.functions],
            [sets[tests] for _, _, tests in lines],
            [sets[each.tests] for each in content.functions],
            BitMap.deserialize(content.boot),
        )
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}") from error
    except (ValueError, IndexError, lzma.LZMAError, msgspec.DecodeError) as error:
        raise LabError(f"{path} is no map of coverage: {error}") from error
    return found, content.source


def of_folder(coverage: Coverage) -> Map:
    """Return the map of a folder; made anew when there is more in it than the last time."""
    path = coverage.folder / FILE
    source = [(file.name, file.stat().st_size) for file in coverage.files]
    with contextlib.suppress(LabError):
        known, made_from = _loaded(path)
        if made_from == source:
            return known
    made = make(coverage)
    # A folder that cannot be written to can be asked all the same.
    with contextlib.suppress(OSError):
        made.write(path, source)
    return made


def make(coverage: Coverage, model: Model | None = None) -> Map:
    """Return the map of what a folder has counted."""
    model = model or Model(coverage.kept)
    seconds: dict[tuple[str, str], float] = {}
    numbers: dict[tuple[str, str], int] = {}
    line_tests = [BitMap() for _ in model.lines]
    function_tests = [BitMap() for _ in model.functions]
    boot = BitMap()
    for counted in coverage.entries():
        lines, functions = model.executed(counted)
        if counted.test == BOOT:
            boot |= lines
            continue
        key = counted.suite, counted.test
        number = numbers.setdefault(key, len(numbers))
        seconds[key] = seconds.get(key, 0.0) + counted.seconds
        for line in lines:
            line_tests[line].add(number)
        for function in functions:
            function_tests[function].add(number)
    boot = BitMap(line for line in boot if not line_tests[line])
    inlined = _inlined(model, line_tests)
    tests = [Test(suite, test, round(seconds[suite, test], 3)) for suite, test in numbers]
    facts = coverage.facts
    return Map(
        facts.kernel,
        facts.build_id,
        tests,
        model.lines,
        [*model.functions, *inlined],
        line_tests,
        [*function_tests, *inlined.values()],
        boot,
    )


def _inlined(model: Model, line_tests: Sequence[BitMap]) -> dict[Place, BitMap]:
    """Return the functions that gcc has put into their callers only, and the tests of their lines."""
    numbers: dict[str, dict[int, int]] = {}
    for number, (file, line) in enumerate(model.lines):
        numbers.setdefault(file, {})[line] = number
    compiled: dict[str, set[int]] = {}
    for place in model.functions:
        compiled.setdefault(place.file, set()).update(range(place.line, place.end + 1))
    found = {}
    for file, by_line in numbers.items():
        taken = compiled.get(file, set())
        for first, last, name in functions_of(model.kept.source(file)):
            inside = range(first, last + 1)
            lines = [line_tests[by_line[line]] for line in inside if line in by_line]
            if lines and taken.isdisjoint(inside):
                found[Place(file, first, last, name)] = BitMap.union(*lines)
    return found
