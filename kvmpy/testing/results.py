# SPDX-License-Identifier: Apache-2.0
"""Collects the reports of a session, from every xdist worker, into one verdict for each test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from kvmpy.testing.leaks import steady_growth
from kvmpy.testing.verdicts import TestVerdict, Verdict, area_of, suite_id

# Growth of the resident set with every test, in bytes: what is worth saying, and what fails the session.
GROWTH_NOTED = 128 << 10
GROWTH_FAILS = 1 << 20
FIRST_LINE = 300


def attached(report: pytest.TestReport) -> Mapping[str, Any]:
    """Return what the plugin's report hook attached in the process that ran the test."""
    data: Mapping[str, Any] = getattr(report, "kvmpy", {})
    return data


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A collection error has no crash entry: pytest marks what went wrong by an E.
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E  ")]
    return (marked or lines or ["failed without a message"])[0][:FIRST_LINE]


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(text).removeprefix("Skipped: ")


def is_lost(report: pytest.TestReport) -> bool:
    """Whether *report* stands for a process that died in the test: xdist marks it by an unknown phase."""
    return report.when not in ("setup", "call", "teardown")


def judge(nodeid: str, reports: Sequence[pytest.TestReport], platform: str) -> TestVerdict:
    """Return the verdict of one test from its phases' reports; without one of the teardown it was lost."""
    data: dict[str, Any] = {}
    for report in reports:
        data.update(attached(report))
    lost = next((report for report in reports if is_lost(report)), None)
    failed = [report for report in reports if report.failed]
    skipped = next((report for report in reports if report.skipped), None)
    missing: list[tuple[str, str]] = [(what, how) for what, how in data.get("missing", [])]
    details = ""
    if lost is not None:
        verdict, reason = Verdict.LOST, _message(lost)
        text = str(lost.longrepr)
        details = text if "\n" in text else ""
    elif not reports or reports[-1].when != "teardown":
        verdict, reason = Verdict.LOST, "the session ended in the middle of it"
    elif failed:
        verdict, reason = Verdict.FAIL, _message(failed[0])
        details = "\n\n".join(str(report.longrepr) for report in failed)
        details = without(details, str(data.get("postmortem") or ""))
    elif skipped is not None and hasattr(skipped, "wasxfail"):
        verdict, reason = Verdict.XFAIL, str(skipped.wasxfail).removeprefix("reason: ") or "expected to fail"
    elif skipped is not None:
        verdict, reason = Verdict.SKIP, _skip_reason(skipped)
    else:
        verdict, reason = Verdict.PASS, ""
    identifier = suite_id(nodeid)
    shown = missing if verdict is Verdict.SKIP else []
    return TestVerdict(
        nodeid=nodeid,
        id=identifier,
        area=area_of(identifier),
        verdict=verdict,
        platform=str(data.get("platform", platform)),
        host=str(data.get("host", "")),
        promise=str(data.get("promise", "")),
        protection=data.get("protection"),
        reason=reason,
        missing=tuple(what for what, _ in shown),
        how=tuple(how for _, how in shown),
        duration=sum(report.duration for report in reports),
        postmortem=data.get("postmortem"),
        details=details,
        ioctls=tuple(data.get("ioctls", ())),
        memory_maps=tuple(data.get("memory_maps", ())),
    )


def without(details: str, postmortem: str) -> str:
    """Return *details* without the post-mortem that pytest shows as part of the exception's message."""
    lines, gone = details.split("\n"), postmortem.splitlines()
    # What pytest puts before each line of a message.
    bare = [line.removeprefix("E").strip() for line in lines]
    wanted = [line.strip() for line in gone]
    for first in range(len(lines) - len(gone), -1, -1):
        if gone and bare[first : first + len(gone)] == wanted:
            lines[first : first + len(gone)] = ["E   (post-mortem: see there)"]
    return "\n".join(lines)


def judge_file(report: pytest.CollectReport, platform: str) -> TestVerdict:
    """Return the verdict of a file that was not collected."""
    identifier = suite_id(report.nodeid)
    failed = report.outcome == "failed"
    return TestVerdict(
        nodeid=report.nodeid,
        id=identifier,
        area=area_of(identifier),
        verdict=Verdict.FAIL if failed else Verdict.SKIP,
        platform=platform,
        reason=f"cannot be collected: {_message(report)}" if failed else _skip_reason(report),
        details=str(report.longrepr) if failed else "",
    )


class Results:
    """Plugin object of the controlling process: sees every report, in whatever order workers send them."""

    def __init__(self, platform: str) -> None:
        self.platform = platform
        self._selected: list[str] = []
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._files: dict[str, pytest.CollectReport] = {}
        self._rss: dict[str, list[int]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected fails as a whole; one that skips itself is skipped as a whole."""
        if report.outcome != "passed":
            self._files.setdefault(report.nodeid, report)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Remember which tests were selected, in order."""
        self.select([item.nodeid for item in session.items])

    def select(self, nodeids: Sequence[str]) -> None:
        """Remember which tests were selected, where the session has no items of its own."""
        self._selected = list(nodeids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        """Remember the selection of the first xdist worker; all collect the same."""
        del node
        if not self._selected:
            self._selected = list(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test was started: from here on it has a verdict."""
        self._reports.setdefault(nodeid, [])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a phase's report."""
        self._reports.setdefault(report.nodeid, []).append(report)
        about = attached(report)
        if "rss" in about:
            worker = getattr(getattr(report, "node", None), "gateway", None)
            process = f"{getattr(worker, 'id', 'main')} {about.get('pid')}"
            self._rss.setdefault(process, []).append(int(about["rss"]))

    def verdicts(self) -> list[TestVerdict]:
        """Return the verdicts in the order of collection."""
        order = {nodeid: number for number, nodeid in enumerate(self._selected)}
        known = sorted(self._reports, key=lambda nodeid: order.get(nodeid, len(order)))
        tests = [judge(nodeid, self._reports[nodeid], self.platform) for nodeid in known]
        return self.uncollected() + tests

    @property
    def selected(self) -> list[str]:
        """The tests that were selected, in the order of collection."""
        return self._selected

    def uncollected(self) -> list[TestVerdict]:
        """Return the verdicts of the files that were not collected."""
        return [judge_file(report, self.platform) for report in self._files.values()]

    def verdict(self, nodeid: str) -> TestVerdict:
        """Return the verdict of a test that was started."""
        return judge(nodeid, self._reports.get(nodeid, ()), self.platform)

    def not_run(self) -> list[str]:
        """Return the selected tests that were never started."""
        return [nodeid for nodeid in self._selected if nodeid not in self._reports]

    def unwritten(self) -> list[str]:
        """Return what test processes could not write, each told once."""
        told = [
            text
            for reports in self._reports.values()
            for report in reports
            for text in attached(report).get("unwritten", ())
        ]
        return list(dict.fromkeys(told))

    def growth(self) -> float:
        """Return by how many bytes a test process grew with every test, 0 without steady growth."""
        return max((steady_growth(samples) for samples in self._rss.values()), default=0.0)
