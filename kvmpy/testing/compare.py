# SPDX-License-Identifier: Apache-2.0
"""What is new between the reports of two kernels: verdicts that changed, and tests that became slower.

Pure; docs/compare.md has the rules and the format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from kvmpy import version
from kvmpy.testing.verdicts import Verdict, counted, once, suite_id

SCHEMA = "kvmpy-comparison/1"
FLAKY = "flaky"
# Every kind of change, in the order in which they are told, and its title.
KINDS = {
    "no report": "kernels without a report",
    "failing": "newly failing",
    "lost": "newly lost",
    "flaky": "newly flaky",
    "expected": "newly failing as expected",
    "skipped": "newly skipped",
    "vanished": "vanished",
    "not run": "not run any more",
    "slower": "slower",
    "changed": "bad before and after, in another way",
    "unsteady": "flaky before and after",
    "mended": "mended",
    "steady": "flaky before, steady now",
    "unskipped": "not skipped any more",
    "appeared": "appeared",
    "faster": "faster",
}
# Of times, in seconds; docs/compare.md says where they come from.
FLOOR, SINGLE_FLOOR, SINGLE_FACTOR = 0.05, 2.0, 3.0
# Which tests tell how fast a machine was: those that take so long, if there are so many.
TELLING_SECONDS, TELLING_TESTS = 0.02, 20

_BAD = (Verdict.FAIL.value, Verdict.LOST.value)
_HELD = (Verdict.PASS.value, Verdict.XFAIL.value)
Tests = Sequence[Mapping[str, Any]]


class ComparisonError(ValueError):
    """Reports that cannot be compared."""


@dataclass(frozen=True)
class Change:
    """What became of one test.

    ``before`` and ``after`` are verdicts, ``flaky`` with the number of each, or empty where there is none;
    ``seconds`` are the times of a test that became slower or faster.
    """

    test: str
    protection: str | None
    kind: str
    worse: bool
    before: str
    after: str
    reason: str = ""
    how: str = ""
    seconds: tuple[float, float] | None = None


@dataclass
class _State:
    """All that one side says of a test."""

    verdicts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    told: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def add(self, test: Mapping[str, Any]) -> None:
        verdict = str(test["verdict"])
        self.verdicts[verdict] += 1
        self.seconds.append(float(test.get("duration", 0.0)))
        self.told.setdefault(verdict, test)

    @property
    def kind(self) -> str:
        return FLAKY if len(self.verdicts) > 1 else next(iter(self.verdicts))

    def __str__(self) -> str:
        if len(self.verdicts) == 1:
            return self.kind
        order = [verdict.value for verdict in Verdict if self.verdicts[verdict.value]]
        return f"flaky ({counted({verdict: self.verdicts[verdict] for verdict in order})})"

    def why(self) -> Mapping[str, Any]:
        """Return the entry that explains the state: the worst one."""
        for verdict in (*reversed(_BAD), Verdict.SKIP.value, Verdict.XFAIL.value):
            if verdict in self.told:
                return self.told[verdict]
        return next(iter(self.told.values()))


def _states(reports: Iterable[Tests]) -> dict[str, _State]:
    states: dict[str, _State] = {}
    for tests in reports:
        for test in tests:
            states.setdefault(once(test["id"]), _State()).add(test)
    return states


# ---- verdicts

_AFTER = {Verdict.FAIL.value: "failing", Verdict.LOST.value: "lost", FLAKY: "flaky"}


def _kind(before: str, after: str) -> tuple[str, bool] | None:
    """Return the kind of change between two states, and whether it is one for the worse."""
    was_bad = before in _BAD
    if before == after:
        return ("unsteady", False) if after == FLAKY else None
    if after in _AFTER:
        if was_bad and after == Verdict.FAIL.value:
            return "changed", False
        return _AFTER[after], not was_bad or after == Verdict.LOST.value
    if not before:
        return "appeared", False
    if after == Verdict.SKIP.value:
        return "skipped", before in _HELD
    if after == Verdict.XFAIL.value:
        return "expected", before == Verdict.PASS.value
    if before == FLAKY:
        return "steady", False
    return ("unskipped" if before == Verdict.SKIP.value else "mended"), False


def _gone(test: str, state: _State, not_run: Collection[str]) -> Change:
    kind = "not run" if test in not_run else "vanished"
    return Change(test, state.why().get("protection"), kind, True, str(state), "")


def changes(before: Sequence[Tests], after: Sequence[Tests], not_run: Collection[str] = ()) -> list[Change]:
    """Return the changes of verdicts between the entries of reports; *not_run* are ids of tests of *after*
    that were selected and never started.
    """
    old, new = _states(before), _states(after)
    told = [_gone(test, state, not_run) for test, state in old.items() if test not in new]
    for test, state in new.items():
        earlier = old.get(test)
        kind = _kind(earlier.kind if earlier else "", state.kind)
        if kind is None:
            continue
        why = state.why()
        reason, how = str(why.get("reason", "")), ""
        if why["verdict"] == Verdict.SKIP.value and why.get("missing"):
            reason, how = "; ".join(why["missing"]), "; ".join(text for text in why["how"] if text)
        elif not reason and earlier is not None:
            # Of what is mended: what it was.
            reason = str(earlier.why().get("reason", ""))
        was = str(earlier) if earlier else ""
        told.append(Change(test, why.get("protection"), kind[0], kind[1], was, str(state), reason, how))
    order = list(KINDS)
    return sorted(told, key=lambda change: order.index(change.kind))


# ---- times


def drift(before: Sequence[Tests], after: Sequence[Tests]) -> float:
    """Return how many times as long the tests take *after* as a whole; 1 where too few tell."""
    old, new = _states(before), _states(after)
    ratios = [
        min(new[test].seconds) / min(state.seconds)
        for test, state in old.items()
        if test in new
        and state.kind == new[test].kind == Verdict.PASS.value
        and min(state.seconds) >= TELLING_SECONDS
    ]
    return median(ratios) if len(ratios) >= TELLING_TESTS else 1.0


def _beyond(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the times *after* are longer than those *before*, beyond what the times tell of noise."""
    if len(before) > 1 and len(after) > 1:
        spread = max(max(before) - min(before), max(after) - min(after), FLOOR)
        return min(after) > max(before) + spread
    return min(after) > SINGLE_FACTOR * max(before) + SINGLE_FLOOR


def times(before: Sequence[Tests], after: Sequence[Tests], ratio: float = 1.0) -> list[Change]:
    """Return the tests that passed on both sides and became slower or faster; *ratio* is their drift."""
    old, new = _states(before), _states(after)
    told = []
    for test, state in new.items():
        earlier = old.get(test)
        if earlier is None or not earlier.kind == state.kind == Verdict.PASS.value:
            continue
        # A machine that is slower as a whole makes no test slow, a faster one hides none.
        later = [seconds / max(ratio, 1.0) for seconds in state.seconds]
        sooner = [seconds / min(ratio, 1.0) for seconds in state.seconds] if ratio > 0 else later
        kind = (
            "slower"
            if _beyond(earlier.seconds, later)
            else "faster"
            if _beyond(sooner, earlier.seconds)
            else ""
        )
        if kind:
            pair = (round(median(earlier.seconds), 3), round(median(state.seconds), 3))
            protection = state.why().get("protection")
            told.append(Change(test, protection, kind, kind == "slower", "pass", "pass", seconds=pair))
    return sorted(told, key=lambda change: change.kind != "slower")


# ---- reports


def _about(report: Mapping[str, Any], file: str) -> dict[str, Any]:
    host = report["host"]
    return {
        "file": file,
        "name": report.get("name") or "",
        "kernel": host["kernel"],
        "platform": report["platform"],
        "accelerator": host.get("accelerator", ""),
        "cpu": host["cpu"],
        "kvmpy": report["kvmpy"],
        "seed": report["seed"],
        "duration": report["duration"],
        "summary": report["summary"],
        "not_run": len(report["not_run"]),
        "labels": {name: state["label"] for name, state in host["protections"].items() if state["label"]},
    }


def _identity(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what makes a column: the kernel's name in a matrix, or kernel and platform."""
    if report.get("name"):
        return (str(report["name"]),)
    return (report["host"]["kernel"], report["platform"], report["host"].get("accelerator", ""))


def column_name(about: Mapping[str, Any]) -> str:
    """Return what a run's column is called; one of an emulated platform says so."""
    name = about["name"] or str(about["kernel"]).partition(" ")[0]
    # The parameters that the kernel was given.
    _, bracket, given = str(about["kernel"]).partition("(")
    text = f"{name} ({given}" if bracket else str(name)
    if about["platform"] != "host":
        text += f" on {about['platform']} ({about['accelerator'] or 'emulated'})"
    return text


def _grouped(reports: Sequence[tuple[str, dict[str, Any]]]) -> dict[tuple[str, ...], list[int]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, (_, report) in enumerate(reports):
        groups.setdefault(_identity(report), []).append(number)
    return groups


def _pairs(
    before: Sequence[tuple[str, dict[str, Any]]], after: Sequence[tuple[str, dict[str, Any]]]
) -> list[tuple[list[int], list[int]]]:
    """Return which runs are a column together: the same kernel, or what there is one of."""
    old, new = _grouped(before), _grouped(after)
    if len(old) == 1 and not (len(new) > 1 and set(old) & set(new)):
        (single,) = old.values()
        return [(single, group) for group in new.values()]
    pairs = [(old.pop(key), new.pop(key)) for key in list(old) if key in new]
    if new:
        unknown = ", ".join(" ".join(part for part in key if part) for key in new)
        known = ", ".join(" ".join(part for part in key if part) for key in _grouped(before))
        raise ComparisonError(f"AFTER has {unknown}, BEFORE has {known}: which belong together is not known")
    return pairs + [(group, []) for group in old.values()]


def _column(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], abouts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    old, new = [report["tests"] for report in before], [report["tests"] for report in after]
    not_run = {once(suite_id(nodeid)) for report in after for nodeid in report["not_run"]}
    told = changes(old, new, not_run)
    machines = {(about["platform"], about["accelerator"], about["cpu"]) for about in abouts}
    ratio, why = 1.0, ""
    if len(machines) == 1:
        ratio = drift(old, new)
        told += times(old, new, ratio)
    else:
        why = "platform, accelerator or CPU differ"
    order = list(KINDS)
    return {
        "name": column_name(abouts[-1]),
        "drift": round(ratio, 3),
        "times": why,
        "tests": len(_states(new)),
        "changes": [asdict(change) for change in sorted(told, key=lambda one: order.index(one.kind))],
    }


def document(
    before: Sequence[tuple[str, dict[str, Any]]],
    after: Sequence[tuple[str, dict[str, Any]]],
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the comparison of reports, each with the name of its file, as JSON-ready values.

    *without* names the kernels of matrices *after* that left no report. ComparisonError where it is not
    known which runs belong together.
    """
    abouts = [_about(report, file) for file, report in before]
    later = [_about(report, file) for file, report in after]
    columns = []
    for old, new in _pairs(before, after):
        column = _column(
            [before[number][1] for number in old],
            [after[number][1] for number in new],
            [*(abouts[number] for number in old), *(later[number] for number in new)],
        )
        columns.append({**column, "before": old, "after": new})
    told = [change for column in columns for change in column["changes"]]
    counts = Counter(change["kind"] for change in told) + Counter({"no report": len(without)})
    worse = Counter(change["kind"] for change in told if change["worse"]) + Counter(
        {"no report": len(without)}
    )
    return {
        "schema": SCHEMA,
        "kvmpy": version.exact(),
        "worse": {kind: worse[kind] for kind in KINDS if worse[kind]},
        "counts": {kind: counts[kind] for kind in KINDS if counts[kind]},
        "without": list(without),
        "before": abouts,
        "after": later,
        "columns": columns,
    }
