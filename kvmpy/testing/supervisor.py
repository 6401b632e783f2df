# SPDX-License-Identifier: Apache-2.0
"""Runs pytest as a child and survives its death: the test that was running is lost, the others are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvmpy.testing import ending, journal

MAX_DEATHS = 50
# Beyond a test's own time-out, before the child counts as hung.
HANG_GRACE = 60.0
_POLL = 0.2

Say = Callable[[str], None]


def _death(code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"the test process was killed by {name}"
    return f"the test process ended itself with status {code}"


def _wait(child: subprocess.Popen[bytes], path: Path, grace: float, patience: float) -> str | None:
    """Wait for the child; kill it, and return why, when its test is long past its time-out.

    One that SIGKILL does not end within *patience* seconds is left behind.
    """
    size, since = -1, time.monotonic()
    while True:
        try:
            child.wait(_POLL)
            return None
        except subprocess.TimeoutExpired:
            pass
        now = time.monotonic()
        current = path.stat().st_size if path.exists() else 0
        if current != size:
            size, since = current, now
            continue
        if now - since < grace:
            continue
        history = journal.read(path)
        if history.running is None or not history.limit or now - since < history.limit + grace:
            continue
        left = ending.end(child, patience=patience)
        reason = f"the test process hung: no end {now - since:.0f} s after the test began; "
        return reason + (f"left behind: {'; '.join(left)}" if left else "it was killed")


@contextmanager
def _interrupts_go_to_child() -> Iterator[None]:
    # The child is in the terminal's process group: Ctrl-C ends its session, and we wait for its reports.
    # A handler, unlike SIG_IGN, is not inherited.
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _run_child(args: Sequence[str], path: Path, grace: float, patience: float) -> tuple[int, str | None]:
    environment = os.environ | {journal.SUPERVISED: str(os.getpid())}
    command = [sys.executable, "-m", "pytest", *args, "--kvmpy-journal", str(path)]
    with _interrupts_go_to_child():
        # No context manager: that would wait for one that is left behind.
        child = subprocess.Popen(command, env=environment)
        terminated = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGINT))
        try:
            reason = _wait(child, path, grace, patience)
        finally:
            signal.signal(signal.SIGTERM, terminated)
        return -signal.SIGKILL if child.returncode is None else child.returncode, reason


def run_unsupervised(args: Sequence[str]) -> int:
    """Run ``pytest args`` in a child and return its exit status; for sessions that xdist watches over."""
    with _interrupts_go_to_child():
        return subprocess.run([sys.executable, "-m", "pytest", *args], check=False).returncode


def supervise(
    args: Sequence[str],
    say: Say,
    grace: float = HANG_GRACE,
    *,
    patience: float = ending.PATIENCE,
    kept: Path | None = None,
) -> int:
    """Run ``pytest args`` and return its exit status.

    When the process dies or hangs in a test, that test gets the verdict ``lost`` and the session goes on in a
    new process; the reports cover both. A process that dies outside of a test ends the run; one that SIGKILL
    does not end within *patience* seconds is left behind. *kept* is a new journal that outlives the run, and
    the machine's death.
    """
    journal.die_with_supervisor(signal.SIGTERM)
    with tempfile.TemporaryDirectory(prefix="kvmpy-run-") as folder:
        path = Path(folder) / "journal"
        if kept is not None:
            path = kept
            journal.create_kept(path)
        extra: list[str] = []
        for _ in range(MAX_DEATHS):
            code, reason = _run_child([*args, *extra], path, grace, patience)
            history = journal.read(path)
            if code >= 0 and (history.finished or history.running is None):
                return code
            reason = reason or _death(code)
            if history.running is None:
                where = "after the last test" if history.finished else "outside of any test"
                say(f"kvmpy run: {reason}, {where}")
                return 128 - code
            say(f"kvmpy run: {reason}, in {history.running}; that test is lost, the rest goes on")
            journal.mark_lost(path, history.running, reason)
            extra = ["--kvmpy-seed", str(history.seed)]
        say(f"kvmpy run: the test process died {MAX_DEATHS} times; giving up")
        return 3
