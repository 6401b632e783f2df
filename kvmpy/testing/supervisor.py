# SPDX-License-Identifier: Apache-2.0
"""Runs pytest as a child and survives its death: the test that was running is lost, the others are not."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmpy.owned import OwnedFolder, adopt_orphans, die_with_parent, dies_with_parent, end_descendants
from kvmpy.signals import SAME_SECONDS, handled
from kvmpy.testing import ending, journal, journals
from kvmpy.testing.heartbeat import Heartbeat
from kvmpy.testing.option_table import pytest_arguments
from kvmpy.testing.reportfiles import SteadyStream
from kvmpy.testing.testprocess import (
    STACK_SIGNAL,
    STACK_SUFFIX,
    SUPERVISOR_VARIABLE,
    stack_file,
    supervised,
)
from kvmpy.testing.verdicts import Verdict

MAX_DEATHS = 50
# Beyond a test's own time-out, before the child counts as hung.
HANG_GRACE = 60.0
# For a session that was told to end.
END_GRACE = 30.0
_POLL = 0.2
_STACK_SECONDS = 2.0
# Deaths in a row without a single verdict between them.
_VAIN = 2
# Passed on, in this order; one more kills.
_SIGNALS = 2
# Exit statuses of pytest.
INTERRUPTED, INTERNAL = 2, 3

Say = Callable[[str], None]


def _death(code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"the test process was killed by {name}"
    return f"the test process ended itself with status {code}"


# ---- hangs


def _kernel_words(pid: int) -> str:
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            waits = (task / "wchan").read_text().strip("0 \n") or "-"
            lines.append(f"  thread {task.name}: state {state}, in the kernel at {waits}")
    return "\n".join(["no stack: it takes no signal", *lines])


def stack_of(pid: int, path: Path) -> str:
    """Ask the test process *pid* of the journal *path* for the stacks of its threads.

    What the kernel says of the threads when it does not answer within two seconds.
    """
    answer = stack_file(path)
    with contextlib.suppress(OSError):
        before = answer.stat().st_size
        os.kill(pid, STACK_SIGNAL)
        size, deadline = before, time.monotonic() + _STACK_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL / 4)
            now = answer.stat().st_size
            if now > before and now == size:
                return answer.read_bytes()[before:].decode("utf-8", "replace").rstrip()
            size = now
    return _kernel_words(pid)


class _Watch:
    """Whether a test process still does something, by its journal."""

    def __init__(self, path: Path, grace: float) -> None:
        self.path = path
        self._grace = grace
        self._size = -1
        self._since = time.monotonic()
        self._history = journal.History()

    def stuck(self) -> journal.History | None:
        """Return the history where a test is long past its time-out."""
        now = time.monotonic()
        size = self.path.stat().st_size
        if size != self._size:
            self._size, self._since = size, now
            self._history = journal.History()
        waited = now - self._since
        if waited < self._grace:
            return None
        if not self._history.sessions:
            self._history = journal.read(self.path)
        history = self._history
        if history.running is None or not history.limit or waited < history.limit + self._grace:
            return None
        return history

    def end(self, history: journal.History, kill: Callable[[int], list[str]]) -> None:
        """Kill the process, and write down why, with its stack; *kill* returns who cannot be killed."""
        waited = time.monotonic() - self._since
        stack = stack_of(history.pid, self.path)
        left = kill(history.pid)
        reason = f"the test process hung: no end {waited:.0f} s after the test began; "
        reason += f"left behind: {'; '.join(left)}" if left else "it was killed"
        journal.mark_lost(self.path, str(history.running), f"{reason}\n\n{stack}")
        self._size = -1


# ---- progress


class _Progress:
    """Shows how far the run is, by the journals of its processes: none of them has to stop for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = SteadyStream(sys.stdout)
        columns = (lambda: shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
        self._heartbeat = Heartbeat(self._stream, columns)
        self._followers: dict[Path, journal.Follower] = {}
        self._shown = False

    def read(self, paths: Iterable[Path]) -> None:
        """Read what has come."""
        for path in sorted(paths):
            events = self._followers.setdefault(path, journal.Follower(path)).events()
            # The session itself is telling what it knows by now.
            over = any(event["event"] == "summary" for event in events)
            for event in events:
                self._take(path.name.removeprefix(self._path.name), event, told=over)

    def tick(self, paths: Iterable[Path]) -> None:
        """Read what has come, and show it when it is time."""
        self.read(paths)
        if self._shown:
            self._heartbeat.tick()

    def _take(self, lane: str, event: Mapping[str, Any], *, told: bool) -> None:
        kind, nodeid, heartbeat = event["event"], event["nodeid"], self._heartbeat
        if kind == "session" and not lane:
            self._shown = event["heartbeat"]
            heartbeat.idle()
        elif kind == "selected":
            heartbeat.selected(len(event["ids"]))
        elif kind == "start":
            heartbeat.begins(lane, nodeid)
        elif kind == "finish":
            heartbeat.idle(lane)
            if event["verdict"] is not None:
                heartbeat.judged(nodeid, event["verdict"], event["reason"], told=told or not self._shown)
        elif kind == "lost" and not lane:
            # Whoever found it dead says so.
            heartbeat.idle(lane)
            heartbeat.judged(nodeid, Verdict.LOST, event["reason"], told=True)
        elif kind == "summary":
            self._shown = False
            heartbeat.gone()

    def clear(self) -> None:
        """Make way for somebody else's text."""
        self._heartbeat.clear()

    def close(self) -> None:
        """Show nothing any more."""
        self.clear()
        self._stream.finish()


# ---- one child


def _dead_processor(lost: str) -> str:
    """Return why no other test can say anything after *lost*: its command was the secure processor's last."""
    # Here: runs in which nothing is lost need none of it.
    from kvmpy.core.errors import DeadProcessorError
    from kvmpy.core.sev_device import check_processor

    try:
        check_processor(f"{lost} did not end")
    except DeadProcessorError as error:
        return str(error).partition("\n")[0]
    return ""


class _Child:
    """One process that runs pytest; the signals that this one gets end its session in order."""

    def __init__(
        self, args: Sequence[str], path: Path, grace: float, patience: float, progress: _Progress
    ) -> None:
        self._path = path
        self._progress = progress
        self._grace = grace
        self._patience = patience
        self._watches: dict[Path, _Watch] = {}
        self._parent = os.getppid()
        self._signals = 0
        self._signalled = -SAME_SECONDS
        self._until: float | None = None
        self.orphaned = False
        # The test in which it hung.
        self.hung: str | None = None
        # Why nothing can be said after the test in which a worker of it hung.
        self.dead = ""
        environment = os.environ | {SUPERVISOR_VARIABLE: str(os.getpid())}
        command = [sys.executable, "-m", "pytest", *args, *pytest_arguments({"journal": path})]
        self._process = subprocess.Popen(
            command,
            env=environment,
            preexec_fn=dies_with_parent(),  # noqa: PLW1509 - no other thread is there
        )

    @property
    def interrupted(self) -> bool:
        """Whether somebody wanted the end of it."""
        return self._signals > 0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within the block, this process's signals end the child."""
        # Handlers, unlike SIG_IGN, are not inherited.
        with handled(self._signal, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            yield

    def _signal(self, *_: object) -> None:
        now = time.monotonic()
        self.orphaned = os.getppid() != self._parent
        if not self.orphaned and now - self._signalled < SAME_SECONDS:
            return
        self._signals, self._signalled = self._signals + 1, now
        if self.orphaned or self._signals > _SIGNALS:
            self._process.kill()
        else:
            self._end()

    def _end(self) -> None:
        self._until = time.monotonic() + END_GRACE
        # Not SIGINT, which jobs in a shell's background ignore.
        self._process.send_signal(signal.SIGTERM)

    def _journals(self) -> list[Path]:
        beside = self._path.parent.glob(f"{self._path.name}*")
        return [path for path in beside if path.suffix != STACK_SUFFIX]

    def _kill(self, pid: int) -> list[str]:
        if pid == self._process.pid:
            return ending.end(self._process, patience=self._patience)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return []

    def wait(self) -> int:
        """Wait for its end, and bring it about where a test, or the end itself, takes too long.

        One that SIGKILL does not end is left behind: its status is that of one that is dead.
        """
        while True:
            try:
                status = self._process.wait(_POLL)
            except subprocess.TimeoutExpired:
                pass
            else:
                # It may have taken the live line away since the last look: its summary stands there now.
                self._progress.read(self._journals())
                return status
            if self._until is not None and time.monotonic() > self._until:
                self._kill(self._process.pid)
                return self._process.poll() or -signal.SIGKILL
            paths = self._journals()
            self._progress.tick(paths)
            for path in paths:
                watch = self._watches.setdefault(path, _Watch(path, self._grace))
                if (history := watch.stuck()) is not None:
                    watch.end(history, self._kill)
                    if path == self._path:
                        self.hung = history.running
                        return self._process.poll() or -signal.SIGKILL
                    self.dead = self.dead or _dead_processor(str(history.running))
                    if self.dead and self._until is None:
                        self._end()


# ---- the run


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


class _Run:
    def __init__(self, args: Sequence[str], path: Path, say: Say, grace: float, patience: float) -> None:
        self._args = args
        self._path = path
        self._say = say
        self._grace = grace
        self._patience = patience
        self._progress = _Progress(path)
        self._orphaned = False

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.close()

    def done(self, *, resume: bool) -> int:
        """Run, or go on with what an earlier process began, and leave nothing beside the journal."""
        try:
            history = self._blame() if resume else journal.History()
            return self.run(pytest_arguments({"seed": history.seed}) if history.sessions else [])
        finally:
            self.close()
            if not self._orphaned:
                _remove(journals.beside(self._path))

    def _child(self, *extra: str) -> tuple[_Child, int]:
        child = _Child([*self._args, *extra], self._path, self._grace, self._patience, self._progress)
        try:
            with child.signals():
                return child, child.wait()
        finally:
            self._progress.clear()

    def _report(self, history: journal.History, reason: str) -> None:
        """Write the reports of what there is, where the process that should have done so is dead."""
        if history.sessions:
            extra = pytest_arguments({"seed": history.seed, "only_report": reason})
            self._child(*extra, *(["-n0"] if history.workers else []))

    def _died(self, child: _Child, reason: str) -> journal.History:
        """Say what a death costs, and write it down; return what is known then."""
        history = journal.read(self._path)
        lost = child.hung or history.running
        if child.hung:
            reason = history.lost[child.hung].partition("\n")[0]
        elif lost is not None:
            journal.mark_lost(self._path, lost, reason)
        where = "outside of any test" if lost is None else f"in {lost}; that test is lost, the rest goes on"
        if history.finished:
            where = "after the last test"
        self._say(f"kvmpy run: {reason}, {where}")
        return journal.read(self._path)

    def _blame(self) -> journal.History:
        """Write down as lost the tests in which a run ended that nobody supervises any more."""
        # Here: who supervises a run that is alive needs none of it.
        from kvmpy.testing.machine import PSTORE, last_words

        history = journal.read(self._path)
        reason = "the run ended in it: killed, or with the machine"
        for name, text in last_words(self._path.stat().st_mtime).items():
            reason += f"\n\n{PSTORE / name}:\n{text.decode('utf-8', 'replace')}"
        for path in (self._path, *journals.beside(self._path)):
            running = journal.read(path).running
            if running is not None and running not in history.done:
                journal.mark_lost(self._path, running, reason)
        _remove(journals.beside(self._path))
        return journal.read(self._path)

    def report(self, *, ended: bool) -> int:
        """Write the reports of what there is, and return pytest's exit status."""
        history = self._blame() if ended else journal.read(self._path)
        why = "the run did not come to its end" if ended else "the run goes on"
        extra = {"seed": history.seed, "only_report": "" if history.complete else why}
        return self._child(*pytest_arguments(extra), *(["-n0"] if history.workers else []))[1]

    def run(self, extra: list[str]) -> int:
        known = journal.History()
        vain = 0
        for _ in range(MAX_DEATHS):
            child, code = self._child(*extra)
            history = journal.read(self._path)
            if child.orphaned:
                # Who goes on from it sees in which tests it ended.
                self._orphaned = True
                return INTERRUPTED
            if child.dead:
                self._say(f"kvmpy run: {child.dead}")
            if code >= 0 and (history.finished or history.sessions == known.sessions):
                return code
            reason = _death(code)
            if child.interrupted:
                if history.running is not None:
                    journal.mark_lost(
                        self._path, history.running, "told to end, its session was killed in it"
                    )
                self._report(history, "interrupted, and did not end by itself")
                return INTERRUPTED
            history = self._died(child, reason)
            status = 128 - code if code < 0 else INTERNAL
            if history.finished:
                return status
            if dead := _dead_processor(next(reversed(history.lost), "a test")):
                self._say(f"kvmpy run: {dead}")
                self._report(history, dead)
                return status
            vain = vain + 1 if history.judged == known.judged else 0
            if vain == _VAIN:
                self._report(history, reason)
                return status
            known = history
            extra = pytest_arguments({"seed": history.seed}) if history.sessions else []
        reason = f"the test process died {MAX_DEATHS} times; giving up"
        self._say(f"kvmpy run: {reason}")
        self._report(known, reason)
        return INTERNAL


def supervise(
    args: Sequence[str],
    say: Say,
    grace: float = HANG_GRACE,
    *,
    patience: float = ending.PATIENCE,
    kept: Path | None = None,
    command: Sequence[str] = (),
    resume: bool = False,
) -> int:
    """Run ``pytest args`` and return its exit status, 2 where a signal ended it.

    When a process dies or hangs in a test, that test gets the verdict ``lost``; the session goes on in a new
    process, and the reports cover both. Where one dies twice without a verdict, reports are made of what
    there is. One that SIGKILL does not end within *patience* seconds is left behind. *kept* is a new journal
    that outlives the run, and the machine's death; *command* are the arguments that it notes. With *resume*
    it is that of an earlier run, which goes on behind its last verdict.

    JournalError where the journal is there already, is not there to go on from, or is somebody's who writes.
    """
    with OwnedFolder("run") as folder:
        path = folder / "journal"
        if kept is None:
            return _Run(args, path, say, grace, patience).done(resume=False)
        path = kept
        try:
            if not resume:
                journal.create_kept(path, command)
            with journals.writing(path):
                return _Run(args, path, say, grace, patience).done(resume=resume)
        except OSError as error:
            raise journals.JournalError(f"{path}: {error.strerror}") from error


def report(args: Sequence[str], path: Path, say: Say) -> int:
    """Make the reports that pytest's *args* ask for of the journal at *path*, which stays as it is."""
    with OwnedFolder("run") as folder:
        ended = not journals.in_use(path)
        for each in (path, *journals.beside(path)):
            shutil.copy(each, folder / f"journal{each.name.removeprefix(path.name)}")
        run = _Run(args, folder / "journal", say, HANG_GRACE, ending.PATIENCE)
        try:
            return run.report(ended=ended)
        finally:
            run.close()


def guarded(work: Callable[[], int]) -> int:
    """Return what *work* returns, done in a child, of which nothing survives: even if this one is killed.

    Signals are passed on; what descendants leave running is killed at the end.
    """
    adopt_orphans()
    if supervised():
        die_with_parent(signal.SIGTERM)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = INTERNAL
        try:
            die_with_parent(signal.SIGTERM)
            adopt_orphans()
            if os.getppid() == parent:
                code = work()
        except BaseException:  # noqa: BLE001 - nothing may return into the copy of the caller
            traceback.print_exc()
        finally:
            end_descendants()
            os._exit(code)
    with handled(lambda number, _: os.kill(pid, number), signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        _, status = os.waitpid(pid, 0)
    end_descendants()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
