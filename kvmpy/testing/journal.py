# SPDX-License-Identifier: Apache-2.0
"""A file that keeps every report as it comes, so that a test process that dies loses one test and no result.

Whoever supervises the process marks the test that was running as lost and starts pytest again with the same
journal: what it holds is replayed, not run, and the session goes on with the rest.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pytest

SUPERVISED = "KVMPY_SUPERVISED"
"""The variable by which a supervisor says who it is."""
_PR_SET_PDEATHSIG = 1


@dataclass
class History:
    """What a journal holds: reports by test, and the tests that were lost with the reason."""

    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    running: str | None = None
    limit: float = 0.0
    seed: int = 0
    finished: bool = False
    kept: bool = False


def _events(path: Path) -> Iterator[dict[str, Any]]:
    # A device is a channel to somebody else: what was written cannot be read again.
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # half a line: the process died while it wrote


def read(path: Path) -> History:
    """Return what the journal at *path* holds; a missing file holds nothing."""
    history = History()
    for event in _events(path):
        kind = event["event"]
        if kind == "session":
            history.seed = event["seed"]
        elif kind == "start":
            history.running = event["nodeid"]
            history.limit = event["limit"]
        elif kind == "report":
            history.reports.setdefault(event["nodeid"], []).append(event["data"])
        elif kind == "finish":
            history.running = None
        elif kind == "lost":
            history.lost[event["nodeid"]] = event["reason"]
            history.running = None
        elif kind == "end":
            history.finished = True
        elif kind == "kept":
            history.kept = True
    return history


def _append(stream: TextIO, event: dict[str, Any]) -> None:
    stream.write(json.dumps(event) + "\n")
    stream.flush()


def create_kept(path: Path) -> None:
    """Create a journal that is to outlive the machine: it reaches the disk whenever a test begins.

    FileExistsError where there is one.
    """
    with path.open("x", encoding="utf-8") as stream:
        _append(stream, {"event": "kept"})
        os.fsync(stream.fileno())


def mark_lost(path: Path, nodeid: str, reason: str) -> None:
    """Write into the journal that the process died in the test *nodeid*."""
    with path.open("a", encoding="utf-8") as stream:
        # A line of its own even if the dying process left half a line.
        stream.write("\n")
        _append(stream, {"event": "lost", "nodeid": nodeid, "reason": reason})


def die_with_supervisor(number: int) -> None:
    """Get signal *number* when the parent dies, where it says that it supervises this process."""
    # Since Linux 2.1.57; without it a killed supervisor would leave VMs running.
    if os.environ.get(SUPERVISED) == str(os.getppid()):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


class Journal:
    """Plugin object: writes the journal and replays what an earlier process of the same run left in it."""

    def __init__(self, config: pytest.Config, path: Path, seed: int) -> None:
        self._config = config
        self._history = read(path)
        self._stream = path.open("a", encoding="utf-8")
        self._replaying = False
        _append(self._stream, {"event": "session", "seed": seed})
        die_with_supervisor(signal.SIGKILL)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def write(self, event: dict[str, Any]) -> None:
        """Write an event of another plugin's own."""
        _append(self._stream, event)

    def _limit(self, item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        if marker is not None and marker.args:
            return float(marker.args[0])
        return float(self._config.getini("timeout") or 0)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Replay the test's reports when an earlier process has them, otherwise note that it starts."""
        nodeid = item.nodeid
        if nodeid in self._history.lost:
            self._replay(item, [lost_report(nodeid, item.location, self._history.lost[nodeid])])
            return True
        kept = self._history.reports.get(nodeid)
        if kept is not None:
            hook = self._config.hook
            reports = [
                hook.pytest_report_from_serializable(config=self._config, data=from_json(data))
                for data in kept
            ]
            self._replay(item, reports)
            return True
        start = {"event": "start", "nodeid": nodeid, "limit": self._limit(item), "location": item.location}
        self._append_safely(start)
        return None

    def _append_safely(self, event: dict[str, Any]) -> None:
        _append(self._stream, event)
        if self._history.kept:
            # One for each test: with its start, all earlier verdicts are on the disk.
            os.fsync(self._stream.fileno())

    def _replay(self, item: pytest.Item, reports: list[pytest.TestReport]) -> None:
        self._replaying = True
        try:
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            for report in reports:
                item.ihook.pytest_runtest_logreport(report=report)
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        finally:
            self._replaying = False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a report down."""
        if not self._replaying:
            data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
            _append(self._stream, {"event": "report", "nodeid": report.nodeid, "data": data})

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write down that a test has ended."""
        if not self._replaying:
            _append(self._stream, {"event": "finish", "nodeid": nodeid})

    def pytest_sessionfinish(self) -> None:
        """Write down that the session came to its end."""
        self._append_safely({"event": "end"})


def reports(history: History, died: str) -> Iterator[pytest.TestReport]:
    """Yield every report of a journal, and one for each test that was lost; *died* is why the last was."""
    for kept in history.reports.values():
        for data in kept:
            yield pytest.TestReport._from_json(from_json(data))
    lost = dict(history.lost)
    if history.running is not None:
        lost[history.running] = died
    for nodeid, reason in lost.items():
        file, _, name = nodeid.partition("::")
        yield lost_report(nodeid, (file, None, name), reason)


def lost_report(nodeid: str, location: tuple[str, int | None, str], reason: str) -> pytest.TestReport:
    """Return the report of a test whose process died."""
    # The phase that xdist uses for a test whose worker died.
    when: Any = "???"
    return pytest.TestReport(nodeid, location, {}, "failed", reason, when)


def from_json(data: dict[str, Any]) -> dict[str, Any]:
    """Return a report's data with the tuples that JSON lacks; pytest tells a skip by one."""
    values = dict(data)
    if isinstance(values.get("longrepr"), list):
        values["longrepr"] = tuple(values["longrepr"])
    values["user_properties"] = [tuple(pair) for pair in values.get("user_properties", [])]
    return values
