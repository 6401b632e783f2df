# SPDX-License-Identifier: Apache-2.0
"""Replays in a process of their own: one that hangs or dies takes no more than itself.

``python -m kvmpy.debug.record.worker`` reads paths of records, a line each, and answers each with a line of
JSON.  :class:`Player` is the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from types import TracebackType

from kvmpy.debug.record.command import command_of, status_of
from kvmpy.debug.record.compare import exit_reason
from kvmpy.debug.record.format import RecordError
from kvmpy.debug.record.model import Record, request_name
from kvmpy.debug.record.replay import Replay
from kvmpy.debug.record.script import build

# Seconds by which a vCPU may run longer than it did: of many attempts most end this way.
PATIENCE = 0.2


@dataclass(frozen=True)
class Replayed:
    """What became of one ioctl, and where the guest stood after it.

    *command* is the SEV command that it carried, *firmware* the status that it came back with.
    """

    order: int
    name: str
    result: int
    errno: int
    exit: int | None
    differs: bool
    rip: int | None
    command: str | None = None
    firmware: int | None = None


@dataclass(frozen=True)
class Answer:
    """How a replay went; ``failure`` says why it could not be carried out or ended early."""

    ioctls: tuple[Replayed, ...] = ()
    failure: str = ""


def play(path: str) -> Answer:
    """Replay the record at *path* in this process."""
    try:
        result = Replay(build(Record.load(path)), patience=PATIENCE, probe=True).run()
    except (RecordError, OSError, ValueError, KeyError) as error:
        return Answer((), f"{type(error).__name__}: {error}")
    return Answer(
        tuple(
            Replayed(
                each.step.entry.order,
                request_name(each.step.entry.what),
                each.now.result,
                each.now.errno,
                exit_reason(each.now) if each.now.run else None,
                bool(each.differences),
                each.now.rip,
                str(carried) if (carried := command_of(each.step.entry.what)) is not None else None,
                status_of(each.step.request, each.now.after),
            )
            for each in sorted(result.played, key=lambda each: each.step.index)
        ),
        result.stopped,
    )


class Player:
    """Replays records in a child; *timeout* (seconds) ends one that takes longer."""

    def __init__(self, timeout: float = 20.0) -> None:
        self.timeout = timeout
        self._child: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "kvmpy.debug.record.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return self._child

    def play(self, path: str) -> Answer:
        """Replay the record at *path*; a failure where the child dies or is late."""
        child = self._start()
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the replaying process has no pipes")
        try:
            child.stdin.write(path + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            self.close()
            return Answer((), "the replaying process died")
        ready, _, _ = select.select([child.stdout], [], [], self.timeout)
        line = child.stdout.readline() if ready else ""
        if not line:
            self.close()
            return Answer((), "the replaying process died" if ready else f"no end after {self.timeout:g} s")
        document = json.loads(line)
        return Answer(tuple(Replayed(*each) for each in document["ioctls"]), document["failure"])

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Player:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lines(answers: Iterator[str]) -> Iterator[str]:
    for line in answers:
        answer = play(line.rstrip("\n"))
        rows = [astuple(each) for each in answer.ioctls]
        yield json.dumps({"ioctls": rows, "failure": answer.failure})


if __name__ == "__main__":
    for text in _lines(sys.stdin):
        print(text, flush=True)
