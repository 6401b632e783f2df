# SPDX-License-Identifier: Apache-2.0
"""What became of each test: the one record that the table, KTAP and JSON are all written from.

Pure: no KVM, no pytest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

SUITE_FOLDER = "selftests"


NOTHING_RAN = 6
"""Exit status of a run in which every test was skipped, beside pytest's."""


class Verdict(str, Enum):
    """The five things that can become of a test that was started."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    SKIP = "skip"
    XFAIL = "xfail"
    LOST = "lost"

    @property
    def bad(self) -> bool:
        """Whether a run with this verdict in it has failed."""
        return self in (Verdict.FAIL, Verdict.LOST)


@dataclass(frozen=True)
class TestVerdict:
    """One test's verdict.

    ``id`` is the test's name inside its suite, the same for a checkout and an installed kvmpy; ``promise`` is
    the first line of its docstring; ``protection`` is None for a test that creates no VM through ``make_vm``;
    ``platform`` is ``host`` or the name of the emulated platform; ``host`` names the host of a fleet that ran
    it; ``duration`` is in seconds.  ``ioctls`` and ``memory_maps`` are what :mod:`kvmpy.testing.evidence`
    kept.
    """

    __test__ = False

    nodeid: str
    id: str
    area: str
    verdict: Verdict
    platform: str
    host: str = ""
    promise: str = ""
    protection: str | None = None
    reason: str = ""
    missing: tuple[str, ...] = ()
    how: tuple[str, ...] = ()
    duration: float = 0.0
    postmortem: str | None = None
    details: str = field(default="", repr=False)
    ioctls: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    memory_maps: tuple[dict[str, Any], ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        values = asdict(self)
        values["verdict"] = self.verdict.value
        values["missing"] = list(self.missing)
        values["how"] = list(self.how)
        values["ioctls"] = list(self.ioctls)
        values["memory_maps"] = list(self.memory_maps)
        values["duration"] = round(self.duration, 6)
        return values

    @property
    def file(self) -> str:
        """The test file's path inside its suite."""
        return self.id.partition("::")[0]

    @property
    def name(self) -> str:
        """The test's name inside its file, parameters included."""
        return self.id.partition("::")[2] or self.id


# Control characters but tab and newline, what reorders or breaks lines, and what no encoding has.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """Return text that can be shown and stored anywhere: what a terminal would obey is escaped."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def suite_id(nodeid: str) -> str:
    """Return the test's name inside its suite: the node id without what leads to ``selftests/``."""
    path, separator, rest = nodeid.partition("::")
    parts = PurePosixPath(path).parts
    if SUITE_FOLDER in parts:
        parts = parts[parts.index(SUITE_FOLDER) + 1 :]
    return "/".join(parts) + separator + rest


def area_of(identifier: str) -> str:
    """Return the area of a suite id: its folder, or the file's own topic when it lies at the top."""
    path = PurePosixPath(identifier.partition("::")[0])
    folder = path.parent.as_posix()
    return folder if folder != "." else path.stem.removeprefix("test_")


def tally(verdicts: Iterable[TestVerdict]) -> dict[str, int]:
    """Count the verdicts; every kind is present, also with 0."""
    counts = Counter(entry.verdict.value for entry in verdicts)
    return {kind.value: counts[kind.value] for kind in Verdict}


_REPETITION = re.compile(r"~\d+\Z")


def repetition(name: str, number: int) -> str:
    """Return what the *number*-th repetition of the test function *name* is called."""
    return f"{name}~{number}"


def once(identifier: str) -> str:
    """Return the id (or node id) of the test that the id *identifier* is a repetition of, or itself."""
    path, separator, test = identifier.partition("::")
    function, bracket, parameters = test.partition("[")
    return path + separator + _REPETITION.sub("", function) + bracket + parameters


def flaky(verdicts: Iterable[TestVerdict]) -> dict[str, dict[str, int]]:
    """Return the tests whose repetitions have different verdicts, with the number of each."""
    counts: dict[str, Counter[str]] = {}
    for entry in verdicts:
        counts.setdefault(once(entry.id), Counter())[entry.verdict.value] += 1
    order = [kind.value for kind in Verdict]
    return {
        test: {verdict: known[verdict] for verdict in order if known[verdict]}
        for test, known in counts.items()
        if len(known) > 1
    }


def counted(counts: Mapping[str, int]) -> str:
    """Return numbers of verdicts in words, such as ``2 pass, 1 fail``."""
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


@dataclass(frozen=True)
class Missing:
    """What this host lacks for a test, how to get it, and the names that KVMPY_REQUIRE knows it by."""

    what: str
    how: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}: {self.how}" if self.how else self.what


def skips_by_reason(verdicts: Iterable[TestVerdict]) -> list[tuple[str, str, list[str]]]:
    """Group the skipped tests by what is missing: ``(what, how, ids)``, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in verdicts:
        if entry.verdict is Verdict.SKIP:
            pairs = list(zip(entry.missing, entry.how, strict=True)) or [(entry.reason, "")]
            for pair in pairs:
                groups.setdefault(pair, []).append(entry.id)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    return [(what, how, ids) for (what, how), ids in ordered]


def expected_by_reason(verdicts: Iterable[TestVerdict]) -> list[tuple[str, list[str]]]:
    """Group the tests that failed as expected: ``(reason, ids)``, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for entry in verdicts:
        if entry.verdict is Verdict.XFAIL:
            groups.setdefault(entry.reason, []).append(entry.id)
    return sorted(groups.items(), key=lambda group: -len(group[1]))
