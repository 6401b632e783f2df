# SPDX-License-Identifier: Apache-2.0
"""A file that keeps every report as it comes, so that a process that dies loses one test and no result.

Whoever supervises the session starts pytest again with the same journal: what it holds is replayed, not run,
and the session goes on with the rest. Under xdist the controlling process keeps it, and every worker has a
smaller one beside it that says which test runs.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pytest

from kvmpy.parsing import MalformedError, conform, parse_json
from kvmpy.testing.results import Results, is_lost
from kvmpy.testing.verdicts import Verdict

# What the controlling process hands to its xdist workers.
WORKER_JOURNAL = "kvmpy_journal"
WORKER_DONE = "kvmpy_done"
WORKER_KEPT = "kvmpy_kept"

Location = tuple[str, "int | None", str]
# How the line of a report begins.
_REPORT = b'{"event": "report"'


@dataclass
class History:
    """What a journal holds.

    ``done`` has the reports of each test that came to its end, ``lost`` the reasons of those whose process
    died; ``selected`` is in the order of collection; ``sessions`` counts the processes that wrote; ``limit``
    is in seconds; ``finished`` is True when the last of them ended in order, its reports written; ``kept`` is
    of a journal that outlives the machine, ``command`` the arguments of its run. Of a fleet ``begun`` has the
    test that runs on each host, ``about`` where a lost test ran, ``columns`` what is known of each column.
    """

    done: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    locations: dict[str, Location] = field(default_factory=dict)
    selected: list[str] = field(default_factory=list)
    uncollected: list[dict[str, Any]] = field(default_factory=list)
    running: str | None = None
    begun: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    limit: float = 0.0
    seed: int = 0
    pid: int = 0
    workers: bool = False
    sessions: int = 0
    finished: bool = False
    kept: bool = False
    command: list[str] = field(default_factory=list)

    @property
    def judged(self) -> int:
        """How many tests need not run any more."""
        return len(self.done.keys() | self.lost.keys())

    @property
    def complete(self) -> bool:
        """Whether the run came to its end, with a verdict of every test that was selected."""
        return self.finished and self.done.keys() | self.lost.keys() >= set(self.selected)


@functools.lru_cache(maxsize=1)
def _event() -> type[Any]:
    # Here: test processes write, and do not read.
    import msgspec

    class Event(msgspec.Struct):
        event: str
        nodeid: str = ""
        reason: str = ""
        limit: float = 0.0
        seed: int = 0
        pid: int = 0
        workers: bool = False
        heartbeat: bool = False
        verdict: Verdict | None = None
        location: tuple[str, int | None, str] = ("", None, "")
        host: str = ""
        column: str = ""
        ids: list[str] = []
        data: dict[str, Any] = {}

    return Event


def _parsed(lines: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    import msgspec

    for line in lines:
        try:
            yield msgspec.structs.asdict(conform(parse_json(line), _event()))
        except MalformedError:
            continue  # an empty line, or half a line: the process died while it wrote


def _events(path: Path) -> Iterator[Mapping[str, Any]]:
    # A device is a channel to somebody else: what was written cannot be read again.
    if path.is_file():
        yield from _parsed(path.read_bytes().split(b"\n"))


class Follower:
    """Reads a journal while it is written; reports are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def events(self) -> list[Mapping[str, Any]]:
        """Return what has come since the last call, whole lines only."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._read)
                data = stream.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return list(_parsed(line for line in whole.split(b"\n") if not line.startswith(_REPORT)))


def read(path: Path, column: str = "") -> History:
    """Return what the journal at *path* holds; a missing file, and what is no event, holds nothing.

    Of a fleet's matrix that is what is of *column*, or of none.
    """
    history = History()
    pending: dict[str, list[dict[str, Any]]] = {}
    for event in _events(path):
        kind, nodeid = event["event"], event["nodeid"]
        if kind == "column":
            history.columns[event["column"]] = event["data"]
        elif event["column"] not in ("", column):
            continue
        elif kind == "session":
            history.seed, history.pid, history.workers = event["seed"], event["pid"], event["workers"]
            history.sessions += 1
            history.finished = False
            history.running = None
            history.begun.clear()
            history.uncollected.clear()
            pending.clear()
        elif kind == "selected":
            history.selected = event["ids"]
        elif kind == "uncollected":
            history.uncollected.append(event["data"])
        elif kind == "start":
            history.running, history.limit = nodeid, event["limit"]
            history.begun[event["host"]] = nodeid
            history.locations[nodeid] = event["location"]
        elif kind == "report":
            pending.setdefault(nodeid, []).append(event["data"])
            if event["data"].get("when") == "teardown":
                _judged(history, nodeid, pending)
        elif kind == "finish":
            _judged(history, nodeid, pending)
        elif kind == "lost":
            _ended(history, nodeid)
            history.running = None
            history.lost[nodeid], history.about[nodeid] = event["reason"], event["data"]
        elif kind == "end":
            history.finished = True
        elif kind == "kept":
            history.kept, history.command = True, event["ids"]
    return history


def _judged(history: History, nodeid: str, pending: dict[str, list[dict[str, Any]]]) -> None:
    history.done.setdefault(nodeid, pending.pop(nodeid, []))
    _ended(history, nodeid)


def _ended(history: History, nodeid: str) -> None:
    if history.running == nodeid:
        history.running = None
    for host in [host for host, begun in history.begun.items() if begun == nodeid]:
        del history.begun[host]


def _append(stream: TextIO, event: dict[str, Any]) -> None:
    stream.write(json.dumps(event) + "\n")
    stream.flush()


def create_kept(path: Path, command: Sequence[str] = ()) -> None:
    """Create a journal that is to outlive the machine: it reaches the disk whenever a test begins.

    *command* are the arguments of the run. FileExistsError where there is one.
    """
    with path.open("x", encoding="utf-8") as stream:
        _append(stream, {"event": "kept", "ids": list(command)})
        os.fsync(stream.fileno())


def mark_lost(path: Path, nodeid: str, reason: str) -> None:
    """Write into the journal that the process died in the test *nodeid*."""
    with path.open("a", encoding="utf-8") as stream:
        # A line of its own even if the dying process left half a line.
        stream.write("\n")
        _append(stream, {"event": "lost", "nodeid": nodeid, "reason": reason})


class Running:
    """Plugin object of every test process: notes which test runs, and for how long it may.

    With *kept* it reaches the disk with every test that begins.
    """

    def __init__(
        self, config: pytest.Config, path: Path, about: Mapping[str, Any], *, kept: bool = False
    ) -> None:
        self._config = config
        self._begun: pytest.Item | None = None
        self._on_disk = kept
        self._stream = path.open("a", encoding="utf-8")
        # An earlier process may have left half a line.
        self._stream.write("\n" if path.is_file() else "")
        _append(self._stream, {"event": "session", "pid": os.getpid(), **about})

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def write(self, event: dict[str, Any]) -> None:
        """Write an event of another plugin's own."""
        _append(self._stream, event)

    def write_safely(self, event: dict[str, Any]) -> None:
        """Write an event, and with it all earlier verdicts, where a machine's death leaves them."""
        self.write(event)
        if self._on_disk:
            os.fsync(self._stream.fileno())

    def _limit(self, item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        if marker is not None and marker.args:
            return float(marker.args[0])
        return float(self._config.getini("timeout") or 0)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Note that the test starts."""
        if item is not self._begun:
            self.begin(item)
        self._begun = None

    def begin(self, item: pytest.Item) -> None:
        """Note that the test starts, before its time-out counts."""
        self._begun = item
        location = item.location
        self.write_safely(
            {"event": "start", "nodeid": item.nodeid, "limit": self._limit(item), "location": location}
        )


class WorkerJournal(Running):
    """Plugin object of an xdist worker; *done* are the tests that an earlier controller has reports of."""

    def __init__(self, config: pytest.Config, path: Path, done: list[str], *, kept: bool) -> None:
        super().__init__(config, path, {}, kept=kept)
        self._done = frozenset(done)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what is done: all workers of a session leave out the same."""
        items[:] = [item for item in items if item.nodeid not in self._done]

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note that the test has ended."""
        self.write({"event": "finish", "nodeid": nodeid})


class Journal(Running):
    """Plugin object of the controlling process: keeps all reports, and replays those of an earlier one.

    With *only* nothing runs: reports are made of what the journal holds, and *only* says why the run is over,
    empty for one that came to its end.
    *heartbeat*: who supervises the session is to show how far it is.
    """

    def __init__(
        self,
        config: pytest.Config,
        path: Path,
        seed: int,
        results: Results,
        only: str | None = None,
        *,
        heartbeat: bool = False,
    ) -> None:
        self._path = path
        self._results = results
        self._only = only
        self._replaying = False
        self._judged: set[str] = set()
        history = read(path)
        self._kept = self._reports(config, history)
        self._selected = history.selected
        self._uncollected = history.uncollected
        self._controls = config.getoption("dist", "no") != "no" and only is None
        about = {"seed": seed, "workers": self._controls, "heartbeat": heartbeat and only is None}
        super().__init__(config, path, about, kept=history.kept)

    @staticmethod
    def _reports(config: pytest.Config, history: History) -> dict[str, list[pytest.TestReport]]:
        kept: dict[str, list[pytest.TestReport]] = {}
        for nodeid, data in history.done.items():
            try:
                kept[nodeid] = [report_of(config, entry) for entry in data]
            except MalformedError:
                continue  # it runs once more
        for nodeid, reason in history.lost.items():
            location = history.locations.get(nodeid, (nodeid.partition("::")[0], None, nodeid))
            kept[nodeid] = [lost_report(nodeid, location, reason)]
        return kept

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker where its journal is, and what it need not run."""
        node.workerinput[WORKER_JOURNAL] = str(self._journal_of(node))
        node.workerinput[WORKER_DONE] = list(self._kept)
        node.workerinput[WORKER_KEPT] = self._on_disk

    # ---- what is selected

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool | None:
        """Leave the collection to pytest, unless nothing is to run any more."""
        if self._only is None:
            return None
        session.items = []
        for data in self._uncollected:
            session.config.hook.pytest_collectreport(report=report_of(session.config, data))
        self._replay(session)
        if self._only:
            raise session.Interrupted(self._only)
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note the selection, and leave out what is done."""
        if self._path.is_file() and not self._controls:
            self._select([item.nodeid for item in items])
            items[:] = [item for item in items if item.nodeid not in self._kept]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Note the selection of the first worker."""
        if not self._selected:
            self._select(list(ids))

    def _select(self, nodeids: list[str]) -> None:
        self._selected = nodeids
        self.write({"event": "selected", "ids": nodeids})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what could not be collected."""
        if report.outcome != "passed" and self._only is None and self._path.is_file():
            self.write({"event": "uncollected", "data": self._data(report)})

    # ---- what is done

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Replay what is done, then run the rest."""
        if self._only is None:
            self._replay(session)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        result = yield
        self._count(session)
        return result

    def _replay(self, session: pytest.Session) -> None:
        if self._selected:
            self._results.select(self._selected)
        self._count(session)
        hook = self._config.hook
        self._replaying = True
        try:
            for nodeid, reports in self._kept.items():
                location = reports[0].location if reports else (nodeid, None, nodeid)
                hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
                for report in reports:
                    hook.pytest_runtest_logreport(report=report)
                hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
        finally:
            self._replaying = False

    def _count(self, session: pytest.Session) -> None:
        # Who has nothing left to run has not selected nothing.
        session.testscollected = max(session.testscollected, len(self._selected) if self._kept else 0)

    def _data(self, report: pytest.TestReport | pytest.CollectReport) -> dict[str, Any]:
        data: dict[str, Any] = self._config.hook.pytest_report_to_serializable(
            config=self._config, report=report
        )
        data.pop("node", None)  # of xdist
        return data

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a report down."""
        if not self._replaying:
            self.write({"event": "report", "nodeid": report.nodeid, "data": self._data(report)})
            if report.when == "teardown":
                self._judged.add(report.nodeid)
            if is_lost(report):
                # Nobody else says that it has ended.
                self._finish(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write down that a test has ended."""
        if not self._replaying:
            self._finish(nodeid)

    def _finish(self, nodeid: str) -> None:
        event = {"event": "finish", "nodeid": nodeid}
        if self._path.is_file():
            known = self._results.verdict(nodeid)
            event |= {"verdict": known.verdict.value, "reason": known.reason if known.verdict.bad else ""}
        # Tests begin elsewhere where this process controls others.
        (self.write_safely if self._controls else self.write)(event)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Let run elsewhere what a dead worker had not started: xdist takes it for lost."""
        scheduler: Any = getattr(self._config.pluginmanager.get_plugin("dsession"), "sched", None)
        waiting = getattr(scheduler, "node2pending", {}).get(node)
        if not isinstance(waiting, list):
            return  # another scheduler, or a worker that had nothing
        while waiting and scheduler.collection[waiting[0]] in self._judged:
            del waiting[0]
        worker = self._worker(node)
        if waiting and scheduler.collection[waiting[0]] not in (worker.running, *worker.lost):
            scheduler.pending[:0] = waiting
            waiting.clear()

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: Any) -> None:
        """Say of a test whose worker was killed why that was."""
        report.longrepr = self._worker(report.node).lost.get(crashitem, report.longrepr)

    def _worker(self, node: Any) -> History:
        return read(self._journal_of(node))

    def _journal_of(self, node: Any) -> Path:
        return Path(f"{self._path}.{node.gateway.id}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Tell who listens that there are no more tests."""
        self.write({"event": "summary" if self._path.is_file() else "end"})

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Write down that the session came to its end, with its reports."""
        if self._path.is_file():
            self.write_safely({"event": "end"})


def reports(history: History, died: str) -> Iterator[pytest.TestReport]:
    """Yield every report of a journal, and one for each test that was lost; *died* is why the last was."""
    for nodeid, kept in history.done.items():
        for data in kept if nodeid not in history.lost else ():
            yield pytest.TestReport._from_json(from_json(data))
    lost = dict(history.lost)
    if history.running is not None:
        lost[history.running] = died
    for nodeid, reason in lost.items():
        file, _, name = nodeid.partition("::")
        report = lost_report(nodeid, history.locations.get(nodeid, (file, None, name)), reason)
        report.__dict__["kvmpy"] = history.about.get(nodeid, {})
        yield report


def lost_report(nodeid: str, location: Location, reason: str) -> pytest.TestReport:
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


def report_of(config: pytest.Config, data: dict[str, Any]) -> Any:
    """Return the report that was written as *data*; raises MalformedError for what is none."""
    try:
        return config.hook.pytest_report_from_serializable(config=config, data=from_json(data))
    except Exception as error:  # noqa: BLE001 - pytest trusts what it reads
        raise MalformedError(f"no report of a test: {error!r}") from None
