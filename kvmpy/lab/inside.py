# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for the session inside: runs the shares of tests that the host hands out, one by one."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kvmpy.guest import postmortem, program
from kvmpy.lab import bugs, bytecode, programs, readback, records
from kvmpy.lab.coverage.counters import Collector
from kvmpy.lab.places import COVERAGE_VARIABLE, INSIDE
from kvmpy.lab.softsev import log
from kvmpy.testing import host, labels
from kvmpy.testing.journal import Journal
from kvmpy.testing.recording import RECORD

_POLL = 0.01
_FIRST_POLL = 0.0005
# Nobody answers: the host's end would have ended this machine.
_PATIENCE = 3600.0
# What the answer to a test that begins is called, before its number.
BEGUN = "begun-"


class Worker:
    """Plugin object of the session inside; *folder* is where the host puts its answers.

    With *compiles* guest programs are compiled here, and not by the host.
    """

    def __init__(self, journal: Journal, folder: Path, *, compiles: bool = False) -> None:
        self._journal = journal
        self._folder = folder
        self._compiles = compiles
        # The arguments of the last collection, and what it found.
        self._args: list[str] | None = None
        self._items: Sequence[pytest.Item] = ()
        # How many tests have begun, where the host wants to know before they do.
        self._begun: int | None = None
        self._nodes: dict[Path, pytest.Collector] = {}
        self._conftests: dict[Path, object] = {}
        self._collected: set[Path] = set()
        self._uncollected: list[pytest.CollectReport] = []
        self._collector: Collector | None = None
        self._later = [*postmortem.IMPORTED_LATER, "kvmpy.testing.evidence"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Describe this machine."""
        if not self._compiles:
            program.elsewhere = lambda key, recipe: programs.ask(
                self._journal.write, self._folder / "programs", key, recipe
            )
        if numbers := os.environ.get(bugs.VARIABLE):
            bugs.switch(numbers)
        if counted := os.environ.get(COVERAGE_VARIABLE):
            self._collector = Collector(self._journal.write, by_test=counted == "test")
        self._journal.write({"event": "host", "summary": asdict(host.summarize()), **readback.read()})

    def pytest_sessionfinish(self) -> None:
        """Tell what took long for want of bytecode."""
        program.elsewhere = None
        if missed := bytecode.uncompiled():
            self._journal.write({"event": "uncompiled", "files": missed})

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_directory(
        self, path: Path
    ) -> Generator[None, pytest.Collector | None, pytest.Collector | None]:
        """Keep one node for a folder: the fixtures of its conftest belong to that one."""
        outcome = yield
        if outcome is None:
            return None
        kept = self._nodes.get(path)
        if kept is not None and kept.parent is outcome.parent:
            return kept
        self._nodes[path] = outcome
        return outcome

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool:
        """Collect nothing yet: the first test need not wait for the last file."""
        session.items = []
        return True

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        """Note which folders have their conftest's fixtures."""
        if isinstance(collector, pytest.Directory):
            self._collected.add(collector.path)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what could not be collected until the share is complete."""
        if report.outcome != "passed":
            self._uncollected.append(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run share after share until there are no more."""
        number = 1
        self._ask(number)
        while True:
            share = self._answer(number)
            if share.get("end"):
                return True
            # Asked for in time, so that nobody waits.
            self._ask(number + 1)
            if "labels" in share:
                self._begun = 0
                self._journal.write(
                    {"event": "labels", "labels": labels.answers(session.config, share["labels"])}
                )
                number += 1
                continue
            leak_check: Any = session.config.pluginmanager.get_plugin("kvmpy-leaks")
            with leak_check.collecting():
                items = self._collect(session, share)
            if self._collector is not None:
                self._collector.begin()
            self._journal.write({"event": "collected", "number": number, "ids": [i.nodeid for i in items]})
            for index, item in enumerate(items):
                following = items[index + 1] if index + 1 < len(items) else None
                if not self._may_begin(item):
                    return True
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if RECORD in item.stash:
                    records.send(self._journal.write, item.stash[RECORD])
                if self._collector is not None:
                    self._collector.over(item.nodeid)
                self._journal.write({"event": "over"})
                while self._import_one():
                    pass
                if self._collector is not None and (session.shouldfail or session.shouldstop):
                    self._collector.done()
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
            if self._collector is not None:
                self._collector.done()
            self._journal.write({"event": "done", "number": number})
            number += 1

    def _import_one(self) -> bool:
        """Import the next of what a post-mortem needs, while nobody waits: here that takes seconds."""
        if self._later:
            importlib.import_module(self._later.pop(0))
        return bool(self._later)

    def _ask(self, number: int) -> None:
        self._journal.write({"event": "ready", "number": number})

    def _may_begin(self, item: pytest.Item) -> bool:
        """Wait until the host knows that the test begins, where it wants to: then its loss has a name."""
        if self._begun is None:
            return True
        self._begun += 1
        self._journal.begin(item)
        return "end" not in self._answer(f"{BEGUN}{self._begun}")

    def _answer(self, name: int | str) -> dict[str, Any]:
        file = self._folder / "work" / str(name)
        end = time.monotonic() + _PATIENCE
        pause = _FIRST_POLL
        while time.monotonic() < end:
            try:
                share: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            except FileNotFoundError:
                if not self._import_one():
                    time.sleep(pause)
                    pause = min(2 * pause, _POLL)
            else:
                return share
        return {"end": True}

    def _remember_conftests(self, session: pytest.Session) -> None:
        # pytest binds the fixtures of a conftest that it loaded for an argument when it collects the folder,
        # and forgets those whose folder is not in the first collection: here it may be in a later share.
        fixtures: Any = session.config.pluginmanager.get_plugin("funcmanage")
        waiting: dict[Path, object] = getattr(fixtures, "_pending_conftests", {})
        self._conftests.update(waiting)
        for path in self._conftests.keys() - self._collected:
            waiting[path] = self._conftests[path]

    def _collect(self, session: pytest.Session, share: dict[str, Any]) -> list[pytest.Item]:
        if share["args"] != self._args:
            self._args = None
            self._uncollected.clear()
            self._remember_conftests(session)
            self._items = session.perform_collect(share["args"])
            for report in self._uncollected:
                data = session.config.hook.pytest_report_to_serializable(config=session.config, report=report)
                self._journal.write({"event": "uncollected", "data": data})
            self._args = share["args"] if not self._uncollected else None
        if "only" in share:
            wanted = set(share["only"])
            return [item for item in self._items if item.nodeid in wanted]
        skipped = set(share["skip"])
        return [item for item in self._items if item.nodeid not in skipped]


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin object; the journal is the channel to the host."""
    journal = config.pluginmanager.get_plugin("kvmpy-journal")
    if not isinstance(journal, Journal):
        raise pytest.UsageError("kvmpy.lab.inside needs --kvmpy-journal")
    config.pluginmanager.register(Worker(journal, Path(INSIDE)), "kvmpy-lab-inside")
    if (kernel_log := log.plugin()) is not None:
        config.pluginmanager.register(kernel_log, "kvmpy-lab-softsev")
