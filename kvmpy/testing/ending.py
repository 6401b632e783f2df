# SPDX-License-Identifier: Apache-2.0
"""Ends a process and what it started, and says who cannot be ended.

In uninterruptible sleep a process takes no signal, SIGKILL included, until the kernel wakes it: so ccp waits
for the secure processor, up to 100 s a command (Linux: psp_timeout of drivers/crypto/ccp/sev-dev.c).
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PATIENCE = 120.0
"""Seconds after SIGKILL before a process is left behind: a command of the secure processor takes less."""

_PROC = Path("/proc")
# What is left behind is waited for by nobody; dropped, it would warn of that.
_left: list[subprocess.Popen[bytes]] = []


def sleeps_in(pid: int) -> str | None:
    """Return where a thread of process *pid* sleeps uninterruptibly, such as ``sev_do_cmd``.

    None where none does (/proc/PID/task/TID/stat, state D; the place is "an unknown place" to those who may
    not look).
    """
    for task in sorted((_PROC / str(pid) / "task").glob("*")):
        try:
            # The name before it may hold anything, a parenthesis too.
            state = (
                (task / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            )
            if state != "D":
                continue
            place = (task / "wchan").read_text(encoding="ascii", errors="replace").strip()
        except (OSError, IndexError):
            continue
        return place if place not in ("", "0") else "an unknown place"
    return None


def describe(pid: int, name: str) -> str:
    """Return one line about a process that could not be ended: who it is, and where it sleeps."""
    place = sleeps_in(pid)
    why = f"in uninterruptible sleep in {place}" if place is not None else "SIGKILL did not end it"
    return f"process {pid} ({name}): {why}"


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _wait(
    child: subprocess.Popen[bytes], family: list[psutil.Process], seconds: float
) -> list[psutil.Process]:
    """Wait for all of them; return those of *family* that are still there."""
    until = time.monotonic() + seconds
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    return psutil.wait_procs(family, timeout=max(0.0, until - time.monotonic()))[1]


def _each(family: list[psutil.Process], send: Callable[[psutil.Process], None]) -> None:
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            send(process)


def end(child: subprocess.Popen[bytes], *, grace: float = 0.0, patience: float = PATIENCE) -> list[str]:
    """End *child* and its descendants; return a line about each that is left behind.

    SIGTERM to the child and *grace* seconds for all of them to end in order, SIGKILL to who is still there,
    and *patience* seconds until that has worked. What is left behind is not waited for: ``child.poll()`` is
    None.
    """
    family = _family(child.pid)
    if grace:
        child.terminate()
        family = _wait(child, [*family, *_family(child.pid)], grace)
    family = [*family, *(process for process in _family(child.pid) if process not in family)]
    if child.poll() is None:
        child.kill()
    _each(family, psutil.Process.kill)
    family = _wait(child, family, patience)
    left = [(process.pid, _name(process)) for process in family]
    if child.poll() is None:
        _left.append(child)
        left.insert(0, (child.pid, _name(psutil.Process(child.pid))))
    return [describe(pid, name) for pid, name in left]


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return "?"
