# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for the host: its tests run inside the lab, their reports come back through QEMU.

The session collects nothing itself. Terminal, table and report files see the reports as if tests ran here.
"""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from kvmpy.lab import bytecode, events, programs, records
from kvmpy.lab.bisect import Ended
from kvmpy.lab.coverage.store import Writer
from kvmpy.lab.errors import LabError
from kvmpy.lab.events import BadEventError
from kvmpy.lab.kernels import Say
from kvmpy.lab.lane import Lane, Limits
from kvmpy.lab.listing import Listing
from kvmpy.lab.qemu import Job, Options
from kvmpy.testing import brief
from kvmpy.testing.dealer import MIN_SHARE, Begun, Dealer, DealError, Queue
from kvmpy.testing.heartbeat import Heartbeat
from kvmpy.testing.host import HostSummary, platform_name
from kvmpy.testing.journal import lost_report
from kvmpy.testing.results import Results
from kvmpy.testing.verdicts import Verdict, suite_id

MAX_BOOTS = 50
FAILED = 3
# Exit statuses of pytest after which nobody wants to see a console.
WITHOUT_TRACE = (0, 5)
_POLL = 0.02
# Below that another machine's boot takes longer than what it would save.
_WORTH_A_MACHINE = 4 * MIN_SHARE


@contextlib.contextmanager
def _bad_counters() -> Iterator[None]:
    try:
        yield
    except (LabError, ValueError) as error:
        raise BadEventError(str(error)) from None


@dataclass(frozen=True)
class Setup:
    """What a run needs: machines and how many at most, what runs inside, how the host lists the tests.

    *records* is where records of tests go, *coverage* takes what KVM executes.
    """

    options: Options
    machines: int
    job: Job
    listing: Callable[[], Listing]
    folder: Path
    limits: Limits
    records: Path | None = None
    coverage: Writer | None = None


class LabSession:
    """Plugin object that boots machines as often as needed and passes their reports on."""

    def __init__(self, setup: Setup, say: Say) -> None:
        self._setup = setup
        self._tell = say
        self._heartbeat: Heartbeat | None = None
        self._options = setup.options
        self._lanes: list[Lane] = []
        self._dealer = Dealer(Queue([]))
        self._listing: Listing | None = None
        self._selected: list[str] = []
        self._host: HostSummary | None = None
        self._uncollected: set[str] = set()
        self._uncompiled: set[str] = set()
        # What each test took since it was last counted.
        self._seconds: dict[str, float] = {}
        self._session: Any = None
        self._started = time.monotonic()
        self._why = ""
        # Whether it never came to a test, and QEMU itself was well.
        self.kernel_failed = False
        self.first_test: float | None = None
        # Whether the terminal's summary says where the consoles are.
        self.told = False

    def _say(self, text: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.clear()
        self._tell(text)

    @property
    def host(self) -> HostSummary | None:
        """What the kernel inside says about itself, None before it did."""
        return self._host

    def ended(self, status: int) -> Ended:
        """Return how the session came to its end, with *status*."""
        verdicts = {entry.verdict for entry in self._results().verdicts()} if self._session else set()
        return Ended(
            status,
            begun=self.first_test is not None,
            passed=Verdict.PASS in verdicts,
            bad=any(verdict.bad for verdict in verdicts),
            kernel_failed=self.kernel_failed,
            stopped=bool(self._session and self._session.shouldstop),
        )

    # ---- pytest's hooks

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Boot the first machine, and collect meanwhile; the header is about the kernel inside."""
        self._session = session
        options = self._options
        reporter: Any = session.config.pluginmanager.get_plugin("kvmpy-session")
        text = f"{options.kernel.release} x86_64"
        reporter.describe(  # until it answers
            HostSummary(
                text,
                "",
                (),
                platform_name(),
                False,
                "it did not come up",
                accelerator=options.accel,
                configuration=options.configuration,
            )
        )
        about = [options.accel, f"{options.cpus} CPUs", f"{options.memory} MiB", options.configuration]
        self._say(f"booting {options.kernel.name} ({', '.join(about)})")
        lane = self._add_lane()
        self._listing = self._setup.listing()
        self._until(lane, lambda: self._host is not None)
        if lane.resumed_in_vain:
            lane.boot()
            self._until(lane, lambda: self._host is not None)
        if self._host is not None and not self._host.kvm and options.accel == "kvm":
            self._say("there is no usable KVM inside with -accel kvm: booting again with tcg")
            self._options = lane.options = replace(options, accel="tcg")
            self._host = None
            lane.boot()
            self._until(lane, lambda: self._host is not None)
        # Without an answer pytest goes on to the collection: it writes no report file if it ends before.
        if self._host is not None:
            reporter.describe(self._host)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool:
        """Wait for what the collection on the host has found."""
        session.items = []
        listing = self._listing
        if listing is None:
            raise RuntimeError("there is no collection to wait for")
        # A wrong argument is known at once, whatever became of the kernel.
        self._until(self._lanes[0], listing.poll, whatever=True)
        if (failure := listing.failure()) is not None:
            text, status = failure
            pytest.exit(text, returncode=status if status in (2, 4, 5) else FAILED)
        if self._host is None:
            self._give_up(self._lanes[0])
        files = listing.files()
        self._selected = [nodeid for file in files for nodeid in file.ids]
        self._dealer = Dealer(Queue(files))
        self._count()
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Pass the reports on; boot again when a kernel is lost."""
        self._heartbeat = brief.heartbeat(session.config)
        self._count()
        while True:
            for lane in list(self._lanes):
                if not lane.retired:
                    self._step(lane)
            if all(lane.retired for lane in self._lanes):
                return True
            self._grow()
            if self._heartbeat is not None:
                self._heartbeat.tick()
            time.sleep(_POLL)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        """Say how long it took to begin, and where the consoles of a run that failed are."""
        about = f"{len(self._lanes)} machines, {sum(lane.boots for lane in self._lanes)} boots"
        if self.first_test is not None:
            about += f", boot to first test {self.first_test:.1f} s"
        terminalreporter.write_line(f"kvmpy lab: {self._options.accel}, {about}")
        if int(exitstatus) not in WITHOUT_TRACE:
            terminalreporter.write_line(f"kvmpy lab: consoles and output: {self._setup.folder}")
            self.told = True

    def pytest_unconfigure(self) -> None:
        """Leave no QEMU behind."""
        self.close()

    def close(self) -> None:
        """End every machine, and keep what the sessions inside have taught."""
        for lane in self._lanes:
            lane.stop()
        if self._listing is not None:
            self._listing.close()
        if self._setup.records is not None:
            records.clean(self._setup.records)
        # What the lab is not shown stays the host's.
        shown = self._setup.job.root.shows
        bytecode.compile_files(sorted(name for name in self._uncompiled if shown(Path(name))))
        self._uncompiled.clear()

    # ---- machines

    def _add_lane(self) -> Lane:
        number = len(self._lanes)
        folder = self._setup.folder / f"machine{number}"
        lane = Lane(number, self._options, self._setup.job, folder, self._setup.limits, self._say)
        self._lanes.append(lane)
        lane.boot()
        return lane

    def _grow(self) -> None:
        # The first machine has its first test before another one takes CPU time away.
        if self.first_test is None or len(self._lanes) >= self._setup.machines:
            return
        if self._dealer.queue.waiting() >= _WORTH_A_MACHINE:
            self._add_lane()

    def _active(self) -> int:
        return sum(not lane.retired for lane in self._lanes)

    def _until(self, lane: Lane, satisfied: Callable[[], bool], *, whatever: bool = False) -> None:
        """Handle events of *lane* until *satisfied* or, unless *whatever*, until it comes to an end."""
        while not satisfied():
            over = "" if whatever else lane.why() or self._overall()
            self._drain(lane)
            if satisfied():
                return
            failed = self._listing.failure() if self._listing is not None else None
            if over or failed is not None:
                self._why = over
                self.kernel_failed = failed is None and not (lane.machine and lane.machine.status)
                lane.stop()
                self._drain(lane)
                return
            time.sleep(_POLL)

    def _drain(self, lane: Lane) -> None:
        try:
            for event in lane.events():
                getattr(self, f"_on_{type(event).__name__.lower()}")(lane, event)
        except DealError as error:
            lane.nonsense = str(error)

    def _step(self, lane: Lane) -> None:
        over = lane.why()
        self._drain(lane)
        if overall := self._overall():
            self._stop_all(overall)
        if over:
            by_itself = lane.machine is not None and lane.machine.status is not None
            lane.stop()
            self._drain(lane)
            # Its last words may explain more than what was known before them.
            self._ended(lane, lane.why() if by_itself else over)
        elif lane.hand.wants is not None and not lane.finished:
            share = self._dealer.deal(lane.hand, max(self._setup.machines, self._active()))
            if share is None:
                lane.dismiss()
            else:
                lane.give(share, self._dealer.done)

    def _ended(self, lane: Lane, reason: str) -> None:
        """The machine of *lane* is gone: it was done, or its tests go on in a fresh boot."""
        clean = lane.ended and not lane.hand.shares and lane.machine is not None
        if clean and not (lane.machine and (lane.machine.trouble() or lane.machine.status)):
            lane.retired = True
            return
        self._lose(lane, reason)
        again = self._dealer.take_back(lane.hand)
        if not self._dealer.queue:
            lane.retired = True
            return
        if not again and self._active() > 1:
            self._say(f"machine {lane.number} does not come up: {reason}; the others go on")
            lane.retired = True
            return
        if not again or sum(entry.boots for entry in self._lanes) >= MAX_BOOTS:
            self._why = f"{lane.boots} boots, and no way on: {reason}"
            self._give_up(lane)
        self._say("booting again for the rest")
        lane.boot()

    # ---- events

    def _on_host(self, lane: Lane, event: events.Host) -> None:
        options = self._options
        if refused := event.refused(options):
            self.kernel_failed = True
            names = [word.partition("=")[0] for word in (*options.parameters, *options.optional)]
            pytest.exit("\n".join([*refused, *lane.console_about(names)]), returncode=FAILED)
        # Where the tests run is not for the inside to say.
        self._host = replace(
            event.summary,
            platform=platform_name(),
            accelerator=options.accel,
            configuration=options.configuration,
        )

    def _on_frozen(self, lane: Lane, _event: events.Frozen) -> None:
        lane.freeze()

    def _on_labels(self, _lane: Lane, _event: events.Labels) -> None:
        raise BadEventError("it was not asked for labels")

    def _on_ready(self, lane: Lane, event: events.Ready) -> None:
        lane.hand.ask(event.number)

    def _on_uncollected(self, _lane: Lane, event: events.Uncollected) -> None:
        report = events.deserialize(event.data, "CollectReport")
        if report.nodeid not in self._uncollected:
            self._uncollected.add(report.nodeid)
            self._session.config.hook.pytest_collectreport(report=report)

    def _on_collected(self, lane: Lane, event: events.Collected) -> None:
        """The selection as the machine sees it is the one that counts."""
        gone = self._dealer.collected(lane.hand, event.number, event.ids)
        known = set(self._selected)
        new = [nodeid for nodeid in event.ids if nodeid not in known]
        if gone or new:
            self._selected = [nodeid for nodeid in self._selected if nodeid not in set(gone)] + new
            self._count()

    def _on_done(self, lane: Lane, event: events.Done) -> None:
        self._dealer.over(lane.hand, event.number)

    def _on_program(self, lane: Lane, event: events.Program) -> None:
        programs.answer(lane.folder / "job" / "programs", event.key, event.recipe)

    def _on_uncompiled(self, _lane: Lane, event: events.Uncompiled) -> None:
        self._uncompiled.update(event.files)

    def _on_start(self, lane: Lane, event: events.Start) -> None:
        self._dealer.begins(lane.hand, Begun(event.nodeid, event.place, event.limit))
        if self.first_test is None:
            self.first_test = time.monotonic() - self._started
        if self._heartbeat is not None:
            self._heartbeat.begins(str(lane.number), event.nodeid)
        if self._setup.machines == 1:
            hook = self._session.config.hook
            hook.pytest_runtest_logstart(nodeid=event.nodeid, location=event.place)

    def _on_report(self, lane: Lane, event: events.Report) -> None:
        report = events.deserialize(event.data, "TestReport")
        if lane.hand.running is None or report.nodeid != lane.hand.running.nodeid:
            raise BadEventError(f"a report of {report.nodeid}, which does not run")
        if self._setup.machines > 1:
            # What the terminal looks for when reports of several processes come in one stream.
            name = f"machine{lane.number}"
            report.node = SimpleNamespace(
                gateway=SimpleNamespace(id=name), _workerinfocache=f"[{name}]", workerinfo={}
            )
        if self._setup.coverage is not None:
            self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        self._session.config.hook.pytest_runtest_logreport(report=report)

    def _on_objects(self, _lane: Lane, event: events.Objects) -> None:
        if self._setup.coverage is not None:
            with _bad_counters():
                self._setup.coverage.objects(event.names)

    def _on_counted(self, _lane: Lane, event: events.Counted) -> None:
        if self._setup.coverage is None:
            return
        file = event.test.partition("::")[0]
        whole = file == event.test
        tests = [
            test for test in self._seconds if test == event.test or (whole and test.startswith(f"{file}::"))
        ]
        seconds = sum(self._seconds.pop(test) for test in tests)
        before = self._setup.coverage.failure
        with _bad_counters():
            data = base64.b64decode(event.data, validate=True)
            self._setup.coverage.add(suite_id(event.test), seconds, data)
        if not before and (failure := self._setup.coverage.failure):
            self._say(f"coverage: {failure}; what was kept before stays")

    def _on_finish(self, lane: Lane, event: events.Finish) -> None:
        test = self._dealer.ends(lane.hand, event.nodeid)
        self._session.config.hook.pytest_runtest_logfinish(nodeid=test.nodeid, location=test.location)
        self._show(lane, test.nodeid)

    def _on_record(self, lane: Lane, event: events.Record) -> None:
        if self._setup.records is None:
            return
        try:
            records.receive(self._setup.records, event, lane.number)
        except OSError as error:
            self._say(f"record {event.name}: {error}")

    def _on_over(self, _lane: Lane, _event: events.Over) -> None:
        """A test and all that belongs to it has come through."""
        if self._session.shouldfail:
            raise self._session.Failed(self._session.shouldfail)
        if self._session.shouldstop:
            raise self._session.Interrupted(self._session.shouldstop)

    def _on_end(self, lane: Lane, _event: events.End) -> None:
        lane.ended = True

    def _on_exit(self, lane: Lane, event: events.Exit) -> None:
        lane.exit = event.status

    def _count(self) -> None:
        self._session.testscollected = len(self._selected)
        self._results().select(self._selected)
        if self._heartbeat is not None:
            self._heartbeat.selected(len(self._selected))

    def _results(self) -> Results:
        results: Results = self._session.config.pluginmanager.get_plugin("kvmpy-results")
        return results

    def _show(self, lane: Lane, nodeid: str, *, told: bool = False) -> None:
        """Let the heartbeat know a verdict, if there is one; *told* where the user does already."""
        if self._heartbeat is not None:
            known = self._results().verdict(nodeid)
            self._heartbeat.idle(str(lane.number))
            self._heartbeat.judged(nodeid, known.verdict, known.reason, told=told)

    # ---- losses

    def _overall(self) -> str:
        total = self._setup.limits.total
        return f"the run took longer than {total:.0f} s" if time.monotonic() - self._started > total else ""

    def _stop_all(self, reason: str) -> NoReturn:
        for lane in self._lanes:
            if not lane.retired and lane.hand.running is not None:
                self._lose(lane, reason)
        raise self._session.Failed(reason)

    def _lose(self, lane: Lane, reason: str) -> None:
        """Give the verdict "lost" to the test that was running, or to the last one before the kernel died."""
        victim = self._dealer.lose(lane.hand)
        if victim is None:
            self._say(reason)
            return
        test, why = victim.test, victim.blame(reason)
        self._say(f"{why}, in {test.nodeid}; that test is lost")
        hook = self._session.config.hook
        report = lost_report(test.nodeid, test.location, f"{why}\n{lane.evidence()}")
        hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=test.nodeid, location=test.location)
        self._show(lane, test.nodeid, told=True)

    def _give_up(self, lane: Lane) -> NoReturn:
        lines = [self._why or "the kernel did not come up"]
        lines += lane.output().strip().splitlines()[-40:] or [lane.evidence()]
        code = lane.exit if lane.exit in (2, 4, 5) else FAILED
        pytest.exit("\n".join(lines), returncode=code or FAILED)
