# SPDX-License-Identifier: Apache-2.0
"""Reports by gcov, which computes lines and branches from the counters, and gcovr, which renders them.

Both see KVM's own code alone: without the lines that the software AMD-SP adds, and without those that the
kernel executes before the first test and no test can reach again.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kvmpy.lab.coverage import notes
from kvmpy.lab.coverage.counters import BOOT
from kvmpy.lab.coverage.model import Model
from kvmpy.lab.coverage.store import Coverage
from kvmpy.lab.errors import LabError
from kvmpy.lab.process import call

_SECONDS = 600.0
# The format of gcov that gcovr reads. Before gcc 14 gcov names no blocks: its format is 1.
_FORMAT = "2"
# By object and ident, the sums of the counters.
Sums = dict[str, dict[int, dict[int, int]]]


@dataclass(frozen=True)
class Count:
    """How many there are, and how many of them were executed."""

    covered: int
    total: int

    @property
    def percent(self) -> float:
        """Of them executed; 0 where there is none."""
        return 100 * self.covered / self.total if self.total else 0.0


@dataclass(frozen=True)
class FileSummary:
    """A file's lines, branches and functions; ``*`` stands for all files."""

    file: str
    lines: Count
    branches: Count
    functions: Count


def sums(coverage: Coverage, model: Model, suites: Collection[str] = ()) -> Sums:
    """Return the sums of what the tests of *suites*, or of all suites, have counted."""
    total: Sums = {}
    for counted in coverage.entries():
        if counted.test == BOOT or (suites and counted.suite not in suites):
            continue
        for name, stamp, functions in counted.counters():
            model.check(name, stamp)
            known = total.setdefault(name, {})
            for ident, pairs in functions.items():
                counters = known.setdefault(ident, {})
                for number, value in pairs:
                    counters[number] = counters.get(number, 0) + value
    return total


class Renderer:
    """gcov's and gcovr's work on one folder of coverage; a context manager with a folder of its own.

    *hidden* are the lines that do not count, by file.
    """

    def __init__(self, model: Model, hidden: Mapping[str, Collection[int]]) -> None:
        self._model = model
        self._hidden = hidden
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Renderer:
        if shutil.which("gcov") is None:
            raise LabError("gcov is missing", "it comes with gcc: apt-get install gcc")
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmpy-coverage-")))
        self._source = self._folder / "source"
        self._model.kept.unpack(self._source)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # ---- gcov

    def trace(self, total: Sums, name: str) -> Path:
        """Return gcovr's own file about the counters *total*."""
        folder = self._folder / name
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(
                pool.map(lambda each: self._gcov(each, total.get(each, {}), folder), self._model.kept.objects)
            )
        trace = self._folder / f"{name}.json"
        self._gcovr(["--gcov-use-existing-files", str(folder), "--json", str(trace)])
        return trace

    def _gcov(self, name: str, counters: Mapping[int, Mapping[int, int]], folder: Path) -> None:
        data = self._model.kept.notes(name)
        _, functions = notes.read_notes(data, f"{name}.gcno")
        place = folder / name
        place.mkdir(parents=True)
        (place / "object.gcno").write_bytes(data)
        (place / "object.gcda").write_bytes(notes.write_counters(data, functions, counters))
        result = subprocess.run(
            ["gcov", "--branch-probabilities", "--json-format", "--stdout", "object.gcda"],
            cwd=place,
            check=False,
            capture_output=True,
            timeout=_SECONDS,
        )
        try:
            document = json.loads(result.stdout)
        except ValueError:
            lines = result.stderr.decode("utf-8", "replace").strip().splitlines()[:3]
            raise LabError(
                f"gcov cannot read {name}: {'; '.join(lines)}", "it must be of the gcc that built the kernel"
            ) from None
        document["files"] = list(self._own(document["files"]))
        document["format_version"] = _FORMAT
        document["current_working_directory"] = str(self._source)
        with gzip.open(place / "object.gcov.json.gz", "wt", compresslevel=1, encoding="utf-8") as stream:
            json.dump(document, stream)

    def _own(self, files: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield what gcov says of KVM's own lines."""
        for file in files:
            path = self._model.kept.within(file["file"])
            if path is None:
                continue
            lines = self._numbered(file["file"], file["lines"], "line_number")
            for line in lines:
                _add_blocks(line)
            functions = self._numbered(file["file"], file["functions"], "start_line", "end_line")
            if lines:
                yield {**file, "file": path, "lines": lines, "functions": functions}

    def _numbered(self, file: str, entries: Sequence[dict[str, Any]], *fields: str) -> list[dict[str, Any]]:
        """Return the entries that count, with the lines' numbers in the tree."""
        found = []
        for entry in entries:
            places = [self._model.kept.place(file, entry[field]) for field in fields]
            if places[0] is None or places[0][1] in self._hidden.get(places[0][0], ()):
                continue
            numbers = [place[1] if place is not None else places[0][1] for place in places]
            found.append({**entry, **dict(zip(fields, numbers, strict=True))})
        return found

    # ---- gcovr

    def _gcovr(self, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "gcovr", "--root", str(self._source), *arguments]
        # In the kernel "__" at the start of a name is not the compiler's.
        command += ["--gcov-ignore-parse-errors=all", "--include-internal-functions"]
        command += ["--merge-mode-functions=separate"]
        with tempfile.TemporaryFile() as log:
            try:
                status = call(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    seconds=_SECONDS,
                    environment=os.environ,
                    folder=self._source,
                )
            except subprocess.TimeoutExpired:
                raise LabError(f"gcovr took longer than {_SECONDS:.0f} s") from None
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
        if status:
            raise LabError(f"gcovr failed: {'; '.join(lines[-3:])}")

    def render(self, trace: Path, *options: str) -> None:
        """Have gcovr render a trace file with its own *options*."""
        self._gcovr(["--add-tracefile", str(trace), *options])

    def lcov(self, trace: Path, target: Path) -> None:
        """Write a tracefile of LCOV's, with the paths in the kernel's tree."""
        found = self._folder / "found.lcov"
        self.render(trace, "--lcov-format-version", "1.x", "--lcov", str(found))
        target.write_text(
            found.read_text(encoding="utf-8").replace(f"SF:{self._source}/", "SF:"), encoding="utf-8"
        )

    def summary(self, trace: Path) -> list[FileSummary]:
        """Return the figures of each file, and of all."""
        target = self._folder / "summary.json"
        self.render(trace, "--json-summary", str(target))
        document = msgspec.json.decode(target.read_bytes())
        return [_summary("*", document), *(_summary(each["filename"], each) for each in document["files"])]


def _add_blocks(line: dict[str, Any]) -> None:
    # A line of a header that several functions are made of is one line.
    line.pop("function_name", None)
    line.setdefault("block_ids", [])
    for number, branch in enumerate(line["branches"]):
        branch.setdefault("source_block_id", 0)
        branch.setdefault("destination_block_id", number)


def _summary(name: str, values: Mapping[str, Any]) -> FileSummary:
    counts = (
        Count(values[f"{kind}_covered"], values[f"{kind}_total"]) for kind in ("line", "branch", "function")
    )
    return FileSummary(name, *counts)
