# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for the host: its tests run inside the lab, their reports come back through QEMU.

The session collects nothing itself. Terminal, table and report files see the reports as if tests ran here.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvmpy.lab import inside
from kvmpy.lab.errors import LabError
from kvmpy.lab.qemu import Job, Machine, Options, excerpt, prepare
from kvmpy.testing.host import ACCELERATOR_VARIABLE, HostSummary
from kvmpy.testing.journal import from_json, lost_report

MAX_BOOTS = 50
FAILED = 3
_POLL = 0.05


@dataclass(frozen=True)
class Limits:
    """Seconds: for a boot up to the first test, beyond a test's own time-out, between tests, and overall."""

    boot: float = 300.0
    grace: float = 60.0
    idle: float = 120.0
    total: float = 4 * 3600.0


@dataclass
class _Running:
    nodeid: str
    location: tuple[str, int | None, str]
    since: float
    limit: float


Say = Callable[[str], None]


class LabSession:
    """Plugin object that boots the lab as often as needed and passes the reports on."""

    def __init__(self, options: Options, job: Job, folder: Path, limits: Limits, say: Say) -> None:
        self._options = options
        self._job = job
        self._folder = folder
        self._limits = limits
        self._say = say
        self._machine: Machine | None = None
        self._running: _Running | None = None
        self._last: _Running | None = None
        self._done: set[str] = set()
        self._selected: list[str] | None = None
        self._host: HostSummary | None = None
        self._uncollected: set[str] = set()
        self._pending: deque[dict[str, Any]] = deque()
        self._ended = False
        self._exit: int | None = None
        self._heard = self._started = time.monotonic()
        self._boots = 0
        self.first_test: float | None = None

    @property
    def host(self) -> HostSummary | None:
        """What the kernel inside says about itself, None before it did."""
        return self._host

    # ---- pytest's hooks

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Boot; the header is about the kernel inside."""
        reporter: Any = session.config.pluginmanager.get_plugin("kvmpy-session")
        options = self._options
        text = f"{options.kernel.release} x86_64"
        reporter.describe(  # until it answers
            HostSummary(text, "", (), "lab", False, "it did not come up", accelerator=options.accel)
        )
        self._boot()
        self._until(session, lambda: self._host is not None)
        if self._host is not None and not self._host.kvm and options.accel == "kvm":
            self._say("there is no usable KVM inside with -accel kvm: booting again with tcg")
            self._options = replace(options, accel="tcg")
            self._host = None
            self._boot()
            self._until(session, lambda: self._host is not None)
        # Without an answer pytest goes on to the collection: it writes no report file if it ends before.
        if self._host is not None:
            reporter.describe(self._host)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool:
        """Wait for what the session inside has selected."""
        session.items = []
        if self._host is not None:
            self._until(session, lambda: self._selected is not None)
        if self._selected is None:
            self._give_up()
        session.testscollected = len(self._selected)
        results: Any = session.config.pluginmanager.get_plugin("kvmpy-results")
        results.select(self._selected)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Pass the reports on; boot again when the kernel is lost."""
        wasted = 0
        while True:
            before = len(self._done)
            reason = self._until(session, lambda: self._ended)
            if self._ended:
                if self._machine is not None:
                    self._machine.wait(self._limits.grace)
                return True
            self._lose(session, reason or "the lab ended")
            if not set(self._selected or []) - self._done:
                return True
            wasted = wasted + 1 if len(self._done) == before else 0
            if wasted > 1 or self._boots >= MAX_BOOTS:
                self._give_up(f"{self._boots} boots, and no way on: ")
            self._say("booting again for the rest")
            self._boot()

    def pytest_unconfigure(self) -> None:
        """Leave no QEMU behind."""
        self.close()

    def close(self) -> None:
        """End the machine, if there is one."""
        if self._machine is not None:
            self._machine.stop()

    # ---- one boot

    def _boot(self) -> None:
        self.close()
        self._boots += 1
        self._pending.clear()
        self._ended, self._exit, self._running, self._last = False, None, None, None
        job = self._job
        done = self._folder / "job" / "done.json"
        environment = {
            **job.environment,
            ACCELERATOR_VARIABLE: self._options.accel,
            inside.DONE_VARIABLE: "/run/kvmpy/job/done.json",
        }
        prepare(self._folder, replace(job, environment=environment))
        done.write_text(json.dumps(sorted(self._done)), encoding="utf-8")
        self._heard = time.monotonic()
        self._machine = Machine(self._options, self._folder)

    def _until(self, session: pytest.Session, satisfied: Callable[[], bool]) -> str | None:
        """Handle events until *satisfied*; otherwise end the machine and return why there is no more."""
        machine = self._machine
        if machine is None:
            return "there is no machine"
        while True:
            over = machine.status is not None
            if self._drain(session, machine, satisfied):
                return None
            reason = self._why_over(machine) if over else self._why_stop(machine)
            if reason:
                machine.stop()
                return None if self._drain(session, machine, satisfied) else reason
            machine.wait(_POLL)

    def _drain(self, session: pytest.Session, machine: Machine, satisfied: Callable[[], bool]) -> bool:
        # One by one: what follows the awaited event belongs to pytest's next phase.
        self._pending.extend(machine.events())
        while not satisfied():
            if not self._pending:
                return False
            self._handle(session, self._pending.popleft())
        return True

    def _why_over(self, machine: Machine) -> str:
        if machine.trouble():
            return machine.trouble()
        if self._exit is not None:
            if self._exit > 128:
                return f"the test process was killed by signal {self._exit - 128}"
            return f"the test process ended itself with status {self._exit}"
        if machine.status:
            return f"QEMU ended with status {machine.status}: {machine.complaints() or 'without a word'}"
        return "the kernel ended without a word"

    def _why_stop(self, machine: Machine) -> str:
        now = time.monotonic()
        if now - self._started > self._limits.total:
            return f"the run took longer than {self._limits.total:.0f} s"
        trouble = machine.trouble()
        if trouble:
            # A panic ends QEMU by itself, with all of its text.
            machine.wait(5.0)
            return trouble
        silence = now - self._heard
        if self._running is not None:
            limit = self._running.limit + self._limits.grace
            if silence > limit:
                return f"hung: no sign of life for {silence:.0f} s; QEMU was ended"
        elif silence > (self._limits.idle if self._last else self._limits.boot):
            return f"no test began for {silence:.0f} s; QEMU was ended"
        return ""

    # ---- events

    def _handle(self, session: pytest.Session, event: dict[str, Any]) -> None:
        self._heard = time.monotonic()
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(session, event)

    def _on_host(self, _session: pytest.Session, event: dict[str, Any]) -> None:
        known = {entry.name for entry in fields(HostSummary)}
        values = {name: value for name, value in event["summary"].items() if name in known}
        for name in ("vendor_modules", "vm_types"):
            values[name] = tuple(values[name])
        self._host = HostSummary(**values)

    def _on_uncollected(self, session: pytest.Session, event: dict[str, Any]) -> None:
        if event["data"]["nodeid"] in self._uncollected:
            return
        self._uncollected.add(event["data"]["nodeid"])
        report = self._report(session, event["data"])
        session.config.hook.pytest_collectreport(report=report)

    def _on_collected(self, _session: pytest.Session, event: dict[str, Any]) -> None:
        if self._selected is None:
            self._selected = list(event["ids"])

    def _on_start(self, session: pytest.Session, event: dict[str, Any]) -> None:
        if self.first_test is None:
            self.first_test = time.monotonic() - self._started
        path, line, domain = event["location"]
        self._running = _Running(event["nodeid"], (path, line, domain), time.monotonic(), event["limit"])
        session.config.hook.pytest_runtest_logstart(nodeid=event["nodeid"], location=self._running.location)

    def _on_report(self, session: pytest.Session, event: dict[str, Any]) -> None:
        session.config.hook.pytest_runtest_logreport(report=self._report(session, event["data"]))

    def _on_finish(self, session: pytest.Session, event: dict[str, Any]) -> None:
        running, self._running = self._running, None
        self._last = running or self._last
        self._done.add(event["nodeid"])
        if running is not None:
            hook = session.config.hook
            hook.pytest_runtest_logfinish(nodeid=running.nodeid, location=running.location)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)

    def _on_end(self, _session: pytest.Session, _event: dict[str, Any]) -> None:
        self._ended = True

    def _on_exit(self, _session: pytest.Session, event: dict[str, Any]) -> None:
        self._exit = int(event["status"])

    @staticmethod
    def _report(session: pytest.Session, data: dict[str, Any]) -> Any:
        hook = session.config.hook
        return hook.pytest_report_from_serializable(config=session.config, data=from_json(data))

    # ---- losses

    def _evidence(self) -> str:
        if self._machine is None:
            return ""
        console = excerpt(self._machine.console())
        return f"console:\n{console}" if console else "the console is empty"

    def _lose(self, session: pytest.Session, reason: str) -> None:
        """Give the verdict "lost" to the test that was running, or to the last one before the kernel died."""
        overall = time.monotonic() - self._started > self._limits.total
        victim = self._running or (None if overall else self._last)
        if victim is not None:
            late = "" if self._running is not None else "right after this test: "
            self._say(f"{late}{reason}, in {victim.nodeid}; that test is lost")
            text = f"{late}{reason}\n{self._evidence()}"
            hook = session.config.hook
            hook.pytest_runtest_logreport(report=lost_report(victim.nodeid, victim.location, text))
            hook.pytest_runtest_logfinish(nodeid=victim.nodeid, location=victim.location)
            self._done.add(victim.nodeid)
            self._running = None
        else:
            self._say(reason)
        if overall:
            raise session.Failed(reason)

    def _give_up(self, before: str = "") -> NoReturn:
        machine = self._machine
        if machine is None:
            raise LabError("there is no machine")
        lines = [f"{before}{self._why_over(machine)}"]
        lines += machine.output().strip().splitlines()[-40:] or [self._evidence()]
        code = self._exit if self._exit in (2, 4, 5) else FAILED
        pytest.exit("\n".join(lines), returncode=code or FAILED)
