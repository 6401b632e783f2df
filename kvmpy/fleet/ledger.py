# SPDX-License-Identifier: Apache-2.0
"""What becomes of each test of a fleet's run: in the journal first, then in its column, and shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvmpy.fleet.book import Book, columns
from kvmpy.fleet.members import Host
from kvmpy.fleet.reports import Column, HostFacts
from kvmpy.lab import events
from kvmpy.testing import journal
from kvmpy.testing.dealer import Begun, Dealer, File, Needs, Queue
from kvmpy.testing.heartbeat import Heartbeat
from kvmpy.testing.journal import lost_report
from kvmpy.testing.verdicts import Verdict

# Tests that a host gets at once.
MOST, LEAST = 16, 1


class Ledger:
    """The journal at *path*, the ``columns``, and the ``dealers`` of their tests, by the column's title.

    ``needs`` has the labels of each test.
    """

    def __init__(self, path: Path, heartbeat: Heartbeat) -> None:
        self.book = Book(path)
        self.columns: dict[str, Column] = {}
        self.dealers: dict[str, Dealer] = {}
        self.needs: dict[str, list[str]] = {}
        self._files: dict[str, list[str]] = {}
        self._earlier: dict[str, journal.History] = {}
        self._titles: dict[str, str] = {}
        self._heartbeat = heartbeat

    def select(self, files: Mapping[str, Mapping[str, list[str]]]) -> None:
        """Take the tests with their labels, by file."""
        self._files = {name: list(tests) for name, tests in files.items()}
        for tests in files.values():
            self.needs.update(tests)

    def resume(self) -> None:
        """Blame the tests in which an earlier run ended, and take what it knew."""
        self._earlier = columns(self.book.path)
        for title, history in self._earlier.items():
            for host, nodeid in history.begun.items():
                known = history.columns.get(title, {}).get("hosts", {}).get(host, {})
                self.book.lost(
                    nodeid,
                    f"the run ended while it ran on {host}: the run, its scheduler or the machine died",
                    title,
                    {"host": host, **known},
                )
        self.book.sync()
        self._earlier = columns(self.book.path)

    def open_earlier(self, *, matrix: bool) -> None:
        """Begin the columns that there are before a host has joined."""
        if not matrix:
            self._open("", None)
        for title, earlier in self._earlier.items():
            if title and title not in self.columns:
                self._open(title, earlier.columns[title])

    def describe(self, title: str, about: Mapping[str, Any]) -> None:
        """Take what is known of the hosts of a column, which begins with the first."""
        if title not in self.columns:
            self._open(title, about)
        self.columns[title].describe(about)
        self.book.write("column", column=title, data=about)

    def title(self, key: str, facts: HostFacts) -> str:
        """Return what the class of a host is called."""
        return self._titles.setdefault(key, facts.title_among(self._titles.values()))

    def waiting(self) -> bool:
        """Whether there are tests that nobody has."""
        return any(dealer.queue for dealer in self.dealers.values())

    def _open(self, title: str, known: Mapping[str, Any] | None) -> None:
        """Begin a column, with what an earlier run left of it."""
        history = self._earlier.get(title) or journal.History()
        column = self.columns[title] = Column(title, list(self.needs))
        if known is not None:
            column.describe(known)
            self._titles.setdefault(str(known.get("key", "")), title)
        for report in journal.reports(history, ""):
            column.take(report)
        done = history.done.keys() | history.lost.keys()
        files = []
        for name, tests in self._files.items():
            groups: dict[Needs, list[str]] = {}
            for nodeid in tests:
                if nodeid not in done:
                    groups.setdefault(frozenset(self.needs[nodeid]), []).append(nodeid)
            # A file that cannot be collected here is tried there.
            if not tests:
                groups[frozenset()] = []
            files += [File([name], ids, needs, grows=False) for needs, ids in groups.items()]
        self.dealers[title] = Dealer(Queue(files, most=MOST, least=LEAST), done)
        self._heartbeat.selected(len(self.needs) * len(self.columns))

    def begins(self, host: Host, test: Begun) -> None:
        """A test begins; DealError if it is not the host's."""
        self.dealers[host.column].begins(host.hand, test)
        self.book.begins(test, host.column, host.name)
        self._heartbeat.begins(host.name, test.nodeid)

    def lost(self, host: Host, test: Begun, reason: str) -> None:
        """A test is lost with what ran it."""
        column = self.columns[host.column]
        report = lost_report(test.nodeid, test.location, reason)
        report.__dict__["kvmpy"] = host.facts.about()
        column.take(report)
        self._show(host, test.nodeid, told=True)
        self.book.lost(test.nodeid, reason, host.column, host.facts.about())

    def skip(
        self, title: str, ids: Iterable[str], what: str, how: str = "", host: Host | None = None
    ) -> None:
        """Skip tests for want of *what*."""
        column = self.columns[title]
        for nodeid in ids:
            for report in column.skip(nodeid, what, how, host.facts.about() if host is not None else {}):
                data = report._to_json()
                self.book.write(
                    "report", nodeid=nodeid, data={**data, "$report_type": "TestReport"}, column=title
                )
            self.book.write("finish", nodeid=nodeid, column=title, verdict=Verdict.SKIP.value)
            self.dealers[title].done.add(nodeid)
            self._heartbeat.judged(f"{title} {nodeid}", Verdict.SKIP, "")

    def failed(self, host: Host, nodeid: str, place: events.Location, reason: str) -> None:
        """A test failed before it could begin."""
        for when, outcome in (("call", "failed"), ("teardown", "passed")):
            longrepr = reason if outcome == "failed" else None
            report = pytest.TestReport(nodeid, place, {}, outcome, longrepr, when)  # type: ignore[arg-type]
            self.report(host, report)
        self.finish(host, nodeid)

    def report(self, host: Host, report: pytest.TestReport) -> None:
        """Take a report of a test."""
        # Where it ran is not for the session to say.
        report.__dict__["kvmpy"] = {**getattr(report, "kvmpy", {}), **host.facts.about()}
        data = {**report._to_json(), "$report_type": "TestReport"}
        self.book.write("report", nodeid=report.nodeid, data=data, column=host.column, host=host.name)
        self.columns[host.column].take(report)

    def uncollected(self, host: Host, report: pytest.CollectReport, data: Mapping[str, Any]) -> None:
        """Take the report of a file that cannot be collected."""
        self.book.write("uncollected", data=data, column=host.column, host=host.name)
        self.columns[host.column].results.pytest_collectreport(report)

    def finish(self, host: Host, nodeid: str) -> None:
        """A test has come to its end."""
        known = self.columns[host.column].results.verdict(nodeid)
        reason = known.reason if known.verdict.bad else ""
        self.book.write(
            "finish",
            nodeid=nodeid,
            column=host.column,
            host=host.name,
            verdict=known.verdict.value,
            reason=reason,
        )
        self._show(host, nodeid)

    def _show(self, host: Host, nodeid: str, *, told: bool = False) -> None:
        known = self.columns[host.column].results.verdict(nodeid)
        self._heartbeat.idle(host.name)
        name = f"{host.column} {nodeid}" if host.column else nodeid
        self._heartbeat.judged(name, known.verdict, known.reason, told=told)
