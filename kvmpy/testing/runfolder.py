# SPDX-License-Identifier: Apache-2.0
"""The folder of a run on a machine that may crash: all of it is on the disk as it comes, and packed later.

Whoever finds a folder whose run has died (its lock is free) packs what is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmpy.testing import archive, ending, host, journal, json_report, machine
from kvmpy.testing.scrub import Scrubber
from kvmpy.testing.testprocess import SUPERVISOR_VARIABLE

SUFFIX = ".running"
LOCK, STEPS, PLATFORM, JOURNAL, RECORDS = "lock", "steps.jsonl", "platform.json", "journal", "records"
VERDICTS, KTAP, HTML = "verdicts.json", "verdicts.ktap", "report.html"
# Seconds a step has to end in order after SIGTERM.
GRACE = 60.0
_POLL_MS = 500
_CHUNK = 65536

Say = Callable[[str], None]


class RunFolder:
    """A new folder beside the archive *target*, for this user alone; a context manager holds its lock."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name.removesuffix(".tar.gz") + SUFFIX)
        self.path.mkdir(mode=0o700)
        self._lock = _locked(self.path)
        _sync_folder(self.path)
        _sync_folder(self.path.parent)
        self._writing = threading.Lock()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append(self, name: str, data: bytes) -> None:
        """Append *data* to the file *name* and wait until it is on the disk; safe for several threads."""
        with self._writing:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            fd = os.open(self.path / name, flags, 0o600)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            finally:
                os.close(fd)

    def note(self, event: str, **values: object) -> None:
        """Write a line about the run itself."""
        line = {"time": round(time.time(), 3), "event": event, **values}
        self.append(STEPS, json.dumps(line).encode() + b"\n")

    def pack(self) -> list[str]:
        """Write the archive, remove the folder, and return what went in."""
        return pack(self.path, self.target)


@dataclass(frozen=True)
class Step:
    """One command of a run: what it prints goes to the file *output*; *seconds* is its limit."""

    name: str
    command: Sequence[str]
    output: str
    seconds: float
    environment: Mapping[str, str] | None = None


def run_step(
    folder: RunFolder,
    step: Step,
    say: Say,
    *,
    show: Callable[[bytes], None],
    grace: float = GRACE,
    patience: float = ending.PATIENCE,
) -> int:
    """Run a step and return its exit status; what it prints is kept, and given to *show*, as it comes.

    Past its limit it is ended (:func:`~kvmpy.testing.ending.end`); whoever cannot be is reported and left
    behind, and the status is -SIGKILL.
    """
    folder.note("begin", step=step.name)
    ends = time.monotonic() + step.seconds
    child = subprocess.Popen(
        step.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(step.environment or {}), SUPERVISOR_VARIABLE: str(os.getpid())},
    )
    left: list[str] = []
    ended = ""

    def take(chunk: bytes) -> None:
        folder.append(step.output, chunk)
        show(chunk)

    try:
        for chunk in _printed(child, ends):
            take(chunk)
        if child.poll() is None:
            ended = f"step {step.name}: no end after {step.seconds:g} s"
            say(f"{ended}; it is ended now")
            left = ending.end(child, grace=grace, patience=patience)
    except BaseException:
        folder.note("interrupted", step=step.name)
        ending.end(child, grace=grace, patience=patience)
        raise
    finally:
        for chunk in _rest(child):
            take(chunk)
    for line in left:
        say(f"left behind: {line}")
    code = -signal.SIGKILL if child.returncode is None else child.returncode
    folder.note("end", step=step.name, status=code, ended=ended, left_behind=left)
    return code


def _printed(child: subprocess.Popen[bytes], ends: float) -> Iterator[bytes]:
    """Yield what *child* prints until it has ended, or its time has.

    Not until its output is closed: what it left behind may hold that.
    """
    if child.stdout is None:
        return
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    while time.monotonic() < ends:
        ready = poll.poll(min(_POLL_MS, max(1, int(1000 * (ends - time.monotonic())))))
        if ready:
            chunk = os.read(child.stdout.fileno(), _CHUNK)
            if chunk:
                yield chunk
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, ends - time.monotonic()))
            return
        if child.poll() is not None:
            return


def _rest(child: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield what can be read without waiting, and close the pipe."""
    if child.stdout is None:
        return
    with child.stdout, contextlib.suppress(BlockingIOError):
        os.set_blocking(child.stdout.fileno(), False)
        while chunk := os.read(child.stdout.fileno(), _CHUNK):
            yield chunk


def _locked(folder: Path) -> int | None:
    """Lock *folder* for its owner, and return the descriptor; None where somebody else has it."""
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def pack_dead(parent: Path, say: Say) -> list[Path]:
    """Pack the folders in *parent* whose runs have died, and return their archives."""
    rows = []
    for folder in sorted(parent.glob(f"*{SUFFIX}")):
        # Only one's own: what others lay here may hold anything.
        if not (folder / LOCK).is_file() or folder.stat().st_uid != os.geteuid():
            continue
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            target = folder.with_name(folder.name.removesuffix(SUFFIX) + ".tar.gz")
            names = pack(folder, target)
        finally:
            os.close(lock)
        say(f"{target}: {len(names)} files of a run that died")
        rows.append(target)
    return rows


def pack(folder: Path, target: Path) -> list[str]:
    """Write what is in *folder* to the archive *target*, and remove the folder; return what went in.

    Where the run died before its reports were written, they are made from the journal, and what pstore kept
    of the kernel's last messages goes in.
    """
    files = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in (LOCK, JOURNAL)
    }
    if VERDICTS not in files and (folder / JOURNAL).exists():
        files |= reports(folder / JOURNAL, _told(folder))
        for name, data in machine.last_words((folder / LOCK).stat().st_mtime).items():
            files[f"pstore/{name}"] = data
    if (folder / JOURNAL).exists():
        files["journal.jsonl"] = (folder / JOURNAL).read_bytes()
    names = archive.write(target, files, [(RECORDS, folder / RECORDS)], Scrubber())
    shutil.rmtree(folder)
    return names


def _told(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / PLATFORM).read_text(encoding="utf-8"))["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return values if isinstance(values, dict) else {}


DIED = "the machine or the run died in this test: its journal has no end of it"


def reports(path: Path, told: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the report files that the journal at *path* gives: JSON, KTAP and HTML.

    *told* is what the run told of its host. The test that was running when all died is lost; what had not
    begun is not in them.
    """
    from kvmpy import version
    from kvmpy.testing import html, ktap
    from kvmpy.testing.results import Results

    history = journal.read(path)
    results = Results(host.platform_name())
    for report in journal.reports(history, DIED):
        results.pytest_runtest_logreport(report)
    values = json_report.document(
        results.verdicts(), host.summary_of(told), seed=history.seed, duration=0.0, exit_status=3
    )
    about = [f"kvmpy {version.exact()}: seed {history.seed}, made from the journal of a run that died"]
    return {
        VERDICTS: json.dumps(values, indent=2).encode() + b"\n",
        KTAP: ktap.render(results.verdicts(), about).encode(),
        HTML: html.render([values]).encode(),
    }


def kvmpy_command(*arguments: str) -> list[str]:
    """Return the command that runs kvmpy with *arguments* in this Python."""
    return [sys.executable, "-m", "kvmpy", *arguments]
