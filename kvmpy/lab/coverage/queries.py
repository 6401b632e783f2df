# SPDX-License-Identifier: Apache-2.0
"""Questions to a map: which tests execute this, and what does none. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pyroaring import BitMap

from kvmpy.lab.coverage.maps import Map, Test
from kvmpy.lab.coverage.model import Place
from kvmpy.lab.errors import LabError

_LINE = re.compile(r"(.+):(\d+)")
_ERRNO = re.compile(r"-(E[A-Z0-9]{2,})\b")
_SHOWN = 5


def files(known: Map) -> list[str]:
    """Return the files that have code, in order."""
    return sorted({file for file, _ in known.lines})


def find_file(known: Map, name: str) -> str:
    """Return the path in the kernel's tree of the file that *name*, such as ``sev.c``, ends; LabError."""
    wanted = name.removeprefix("./")
    everything = files(known)
    found = [file for file in everything if file == wanted or file.endswith(f"/{wanted}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise LabError(f"{name} is one of several files", f"name more of the path: {', '.join(found)}")
    raise LabError(
        f"KVM has no code in a file {name}", f"it has some in {len(everything)} files: kvmpy coverage report"
    )


@dataclass(frozen=True)
class Answer:
    """What was asked for, and which tests execute it; None for a line without code."""

    what: str
    tests: Sequence[Test] | None


def who_executes(known: Map, what: str) -> list[Answer]:
    """Return the tests that execute ``FILE:LINE`` or a function; one answer for each function of the name."""
    if match := _LINE.fullmatch(what):
        file, line = find_file(known, match[1]), int(match[2])
        return [Answer(f"{file}:{line}", known.of_line(file, line))]
    found = [
        Answer(f"{place.file}:{place.line} {place.name}()", known.named(tests))
        for place, tests in zip(known.functions, known.function_tests, strict=True)
        if place.name == what
    ]
    if not found:
        near = sorted({place.name for place in known.functions if what.lower() in place.name.lower()})[
            :_SHOWN
        ]
        hint = f"there are: {', '.join(near)}" if near else "say FILE:LINE, or the name of a function"
        raise LabError(f"KVM has no function {what}, as far as it was compiled", hint)
    return found


@dataclass(frozen=True)
class Block:
    """Lines of a function, one after the other, that no test executes; *errors* are the errnos in them."""

    place: Place | None
    file: str
    lines: tuple[int, ...]
    errors: tuple[str, ...]
    entered: bool

    @property
    def span(self) -> str:
        """The first and the last line."""
        first, last = self.lines[0], self.lines[-1]
        return str(first) if first == last else f"{first}-{last}"


class Functions:
    """Which function a line is in."""

    def __init__(self, known: Map) -> None:
        self._by_file: dict[str, list[tuple[Place, bool]]] = {}
        for place, tests in zip(known.functions, known.function_tests, strict=True):
            self._by_file.setdefault(place.file, []).append((place, bool(tests)))

    def at(self, file: str, line: int) -> tuple[Place, bool] | None:
        """Return the function and whether a test enters it, None outside of functions that were compiled."""
        around = [each for each in self._by_file.get(file, ()) if each[0].line <= line <= each[0].end]
        return max(around, key=lambda each: each[0].line, default=None)


def missing(known: Map, source: Callable[[str], str], file: str | None = None) -> list[Block]:
    """Return the blocks of lines that no test executes, the largest first; *source* gives a file's text."""
    functions = Functions(known)
    blocks = []
    for path in [file] if file is not None else files(known):
        text = source(path).split("\n")
        for lines in _runs(known, path, functions):
            place = functions.at(path, lines[0])
            errors = _errors(text[lines[0] - 1 : lines[-1]])
            blocks.append(Block(place[0] if place else None, path, lines, errors, bool(place and place[1])))
    return sorted(blocks, key=lambda block: (-len(block.lines), block.file, block.lines))


def _runs(known: Map, file: str, functions: Functions) -> Iterator[tuple[int, ...]]:
    run: list[int] = []
    before: Place | None = None
    for number, (path, line) in enumerate(known.lines):
        if path != file or number in known.boot:
            continue
        found = functions.at(path, line)
        place = found[0] if found else None
        if run and (known.line_tests[number] or place != before):
            yield tuple(run)
            run = []
        if not known.line_tests[number]:
            run.append(line)
        before = place
    if run:
        yield tuple(run)


def _errors(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for line in lines for name in _ERRNO.findall(line)))


def covered(known: Map, suite: str | None = None) -> list[int]:
    """Return the numbers of the lines that tests, or those of one suite, execute."""
    own = BitMap(number for number, test in enumerate(known.tests) if suite in (None, test.suite))
    return [number for number, tests in enumerate(known.line_tests) if tests.intersect(own)]
