# SPDX-License-Identifier: Apache-2.0
"""What a suite notices: for each bug the tests that may, in a machine with the bug on, until one fails."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvmpy.lab import bugs
from kvmpy.lab.bugs.catalogue import Bug
from kvmpy.lab.coverage.maps import Map
from kvmpy.lab.coverage.store import OWN_SUITE
from kvmpy.lab.errors import LabError
from kvmpy.lab.kernels import Kernel, Say
from kvmpy.owned import OwnedFolder, dies_with_parent
from kvmpy.testing import selection
from kvmpy.testing.verdicts import area_of

SCHEMA = "kvmpy-bugs/1"
NOTICED, MISSED, NOT_RUN = "noticed", "not noticed", "not run"
# Folders of selftests, the nearest first, for a bug whose functions no test is known to enter.
AREAS: Mapping[str, tuple[str, ...]] = {
    "apic": ("apic", "irq", "regs"),
    "cpuid": ("cpuid", "regs"),
    "dirty": ("dirty",),
    "emulator": ("emulator", "vcpu", "io", "regs", "dirty"),
    "events": ("events", "vcpu", "save_restore"),
    "hyperv": ("hyperv", "msr", "cpuid"),
    "io": ("io",),
    "irq": ("irq", "apic"),
    "memory": ("memory", "guest_memfd", "private_memory", "sev", "nested"),
    "msr": ("msr", "machine_check", "time"),
    "nested": ("nested", "cpuid", "regs", "msr"),
    "sev": ("sev", "private_memory"),
    "stats": ("stats", "nested", "vcpu"),
    "time": ("time", "xen", "nested", "msr"),
    "vcpu": ("vcpu", "regs", "msr"),
    "xen": ("xen", "msr", "time"),
}
_UNKNOWN_SECONDS = 1.0
_LOAD = "/test_load"
_FEW = 100
# A machine that hangs ends by its own limits; this one is for a run that does not end at all.
_SPARE_SECONDS = 240.0
_RETRIES = 3
_MESSAGE = 400
_TOOK_LONGER = "the run took longer"
_LABELS = ("fail", "lost")


@dataclass(frozen=True)
class Result:
    """What came of one bug: *state* is NOTICED, MISSED or NOT_RUN, *why* the failure, or why it did not run.

    *tests* is how many were run, *seconds* how long the bug was looked for, with the machine's start.
    *died*: the kernel did not survive the test.  *kernel* is its build id, *budget* in seconds.
    """

    number: int
    suite: str
    state: str
    test: str = ""
    why: str = ""
    seconds: float = 0.0
    tests: int = 0
    died: bool = False
    kernel: str = ""
    budget: float = 0.0


def order(bug: Bug, known: Map | None, files: Iterable[str]) -> list[tuple[str, float]]:
    """Return the tests that may notice *bug*, or whole files of tests, with their seconds: the best first.

    First the tests of the bug's own area that enter a function that changes, by *known*, the fast ones first,
    and then all files of that area: a test that is newer than the map is in none of it.  Then the tests of
    other areas that enter one, and the files of the areas beside.  Files of tests under load come last.
    Where few tests enter a function, they all come first.
    """
    areas = AREAS.get(bug.area, (bug.area,))
    near = {area: place for place, area in enumerate(areas)}
    ranked: list[tuple[bool, bool, int, float, str]] = []
    seconds: dict[str, float] = {}
    if known is not None:
        numbers: set[int] = set()
        for file, function in bug.functions:
            for place, tests in zip(known.functions, known.function_tests, strict=True):
                if (place.file, place.name) == (file, function):
                    numbers |= set(tests)
        for test in known.tests:
            if test.suite == OWN_SUITE:
                name = test.id.partition("::")[0]
                seconds[name] = seconds.get(name, 0.0) + test.seconds
        entering = [test for number in numbers if (test := known.tests[number]).suite == OWN_SUITE]
        for test in entering:
            place_of_area = near.get(area_of(test.id), len(near))
            later = place_of_area > 0 and len(entering) > _FEW
            ranked.append((later, False, place_of_area, test.seconds, test.id))
            seconds[test.id] = test.seconds
    for name in files:
        if area_of(name) in near:
            place_of_area = near[area_of(name)]
            ranked.append((place_of_area > 0, True, place_of_area, float(_LOAD in name), name))
    return [(test, seconds.get(test, _UNKNOWN_SECONDS)) for *_, test in sorted(ranked)]


def within(tests: Sequence[tuple[str, float]], budget: float) -> list[str]:
    """Return the first of *tests* that together take about *budget* seconds; one at least."""
    chosen: list[str] = []
    total = 0.0
    for test, seconds in tests:
        total += seconds + 0.2
        if chosen and total > budget:
            break
        chosen.append(test)
    return chosen


def _notice(report: Mapping[str, Any], ignored: set[str]) -> Mapping[str, Any] | None:
    for test in report.get("tests", []):
        bad = test["verdict"] in _LABELS and test["id"] not in ignored
        if bad and not str(test.get("reason", "")).startswith(_TOOK_LONGER):
            found: Mapping[str, Any] = test
            return found
    return None


def output_of(words: Sequence[str], seconds: float) -> str:
    """Run a command of kvmpy, end it after *seconds*, and return what it printed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmpy", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=dies_with_parent(),  # noqa: PLW1509 - the child only execs
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(_SPARE_SECONDS)
        output.seek(0)
        return output.read()


class Suite:
    """kvmpy's selftests, run in a machine with one bug on."""

    def __init__(self, kernel: Kernel, say: Say) -> None:
        self._kernel = kernel
        self._say = say
        # Tests that fail with no bug, as far as that had to be known.
        self.baseline: dict[str, bool] = {}
        self._lock = threading.Lock()

    def _run(
        self, number: str, tests: Sequence[str], seconds: float, parameters: Sequence[str] = ()
    ) -> dict[str, Any]:
        with OwnedFolder("bugs") as folder:
            chosen = folder / "tests"
            selection.write(chosen, tests, f"bug {number}")
            report = folder / "report.json"
            command = ["lab", "run", "--kernel", self._kernel.name]
            command += ["--bugs", number, "--select", str(chosen), "-n", "1", "--json", str(report)]
            for parameter in parameters:
                command += ["--param", parameter]
            command += ["--timeout", str(seconds), "--", "-x"]
            words = output_of(command, seconds + _SPARE_SECONDS)
            if not report.is_file():
                last = " / ".join(words.strip().splitlines()[-3:])
                raise LabError(f"the run with bug {number} left no report: {last}")
            values: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
            return values

    def fails_anyway(self, test: str, seconds: float, parameters: Sequence[str] = ()) -> bool:
        """Whether *test* fails with no bug on, too; asked once."""
        with self._lock:
            if test in self.baseline:
                return self.baseline[test]
        fails = _notice(self._run(bugs.NONE, [test], seconds, parameters), set()) is not None
        with self._lock:
            self.baseline[test] = fails
        if fails:
            self._say(f"{test} fails with no bug on: it does not count")
        return fails

    def look(self, bug: Bug, tests: Sequence[str], budget: float) -> Result:
        """Run *tests* with *bug* on until one fails that passes without it."""
        start = time.monotonic()
        ignored: set[str] = {test for test, fails in self.baseline.items() if fails}
        ran = 0
        about = {"kernel": self._kernel.build_id, "budget": budget}
        for _ in range(_RETRIES):
            chosen = [test for test in tests if test not in ignored]
            report = self._run(str(bug.number), chosen, 2 * budget + 60, bug.parameters)
            ran += sum(test["verdict"] != "skip" for test in report["tests"])
            found = _notice(report, ignored)
            if found is None:
                break
            if self.fails_anyway(found["id"], 2 * budget + 60, bug.parameters):
                ignored.add(found["id"])
                continue
            seconds = round(time.monotonic() - start, 1)
            why = str(found.get("reason") or "")[:_MESSAGE]
            return Result(
                bug.number, OWN_SUITE, NOTICED, found["id"], why, seconds, ran, found["verdict"] == "lost",
                **about,  # type: ignore[arg-type]
            )  # fmt: skip
        seconds = round(time.monotonic() - start, 1)
        if not ran:
            why = "no test ran: none is known to enter the function, or all were skipped"
            return Result(bug.number, OWN_SUITE, NOT_RUN, "", why, seconds, **about)  # type: ignore[arg-type]
        return Result(bug.number, OWN_SUITE, MISSED, "", "", seconds, ran, **about)  # type: ignore[arg-type]


def command_result(number: int, suite: str, statuses: tuple[int, int], words: str, **more: Any) -> Result:
    """Return the result of a command of another suite, whose exit *statuses* are without and with the bug."""
    without, with_bug = statuses
    if without != 0:
        return Result(number, suite, NOT_RUN, why=f"it ends with {without} without the bug", **more)
    if with_bug == 0:
        return Result(number, suite, MISSED, tests=1, **more)
    return Result(number, suite, NOTICED, suite, words[:_MESSAGE], tests=1, **more)


class Journal:
    """The results so far, in a file of one JSON object a line; written as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.results: dict[tuple[int, str], Result] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    result = Result(**json.loads(line))
                except (ValueError, TypeError):
                    why = f"{path} is no journal of kvmpy bugs run"
                    raise LabError(why, "name another --journal") from None
                self.results[result.number, result.suite] = result

    def add(self, result: Result) -> None:
        """Keep a result."""
        with self._lock:
            self.results[result.number, result.suite] = result
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(result)) + "\n")

    def has(self, bug: Bug, suite: str, kernel: Kernel, budget: float) -> bool:
        """Whether *bug* needs no other run: it was looked for in this kernel, as long as this or found."""
        known = self.results.get((bug.number, suite))
        if known is None or known.state == NOT_RUN or known.kernel != kernel.build_id:
            return False
        return known.state == NOTICED or known.budget >= budget


def look_for(
    chosen: Sequence[Bug], suite: str, workers: int, look: Callable[[Bug], Result], journal: Journal, say: Say
) -> Iterator[Result]:
    """Look for the bugs, *workers* at once, and yield what comes of each; a failed run is one of them.

    The journal has each result as soon as it is there, whatever the order.
    """

    def one(bug: Bug) -> Result:
        try:
            result = look(bug)
        except LabError as error:
            say(f"bug {bug.title}: {error.what}")
            result = Result(bug.number, suite, NOT_RUN, why=error.what[:_MESSAGE])
        journal.add(result)
        return result

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, chosen)


def suite_files(folder: Path) -> list[str]:
    """Return the files of tests below *folder*, as suite ids begin."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("test_*.py"))


def document(results: Iterable[Result], kernel: Kernel) -> dict[str, Any]:
    """Return what --json writes."""
    return {
        "schema": SCHEMA,
        "kernel": {"name": kernel.name, "build_id": kernel.build_id, "origin": kernel.origin},
        "results": [asdict(result) for result in results],
    }
