# SPDX-License-Identifier: Apache-2.0
"""Children that do not outlive their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from kvmpy.owned import dies_with_parent

_POLL = 0.25
# The kernel tells one process of its parent's death, not that one's children: so this shell passes it on to
# the whole group, with time to remove what is half written.
_WARDEN = """
trap 'trap "" TERM; kill -TERM 0; n=0
while kill -0 "$child" 2>/dev/null && [ $n -lt 20 ]; do sleep 0.1; n=$((n + 1)); done
kill -KILL 0' TERM
"$@" & child=$!
wait "$child"
"""


def end_group(child: subprocess.Popen[bytes], grace: float = 2.0) -> None:
    """End the process group that *child* leads: SIGTERM, and SIGKILL after *grace* seconds."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 30.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def call(
    command: Sequence[str],
    *,
    stdout: IO[bytes],
    stderr: IO[bytes] | int,
    seconds: float,
    environment: Mapping[str, str],
    folder: Path | None = None,
    tick: Callable[[float], None] | None = None,
) -> int:
    """Run *command* and return its exit status; no process that it starts outlives this one, even if killed.

    *tick* is called with the seconds that have passed, some times a second. subprocess.TimeoutExpired after
    *seconds*.
    """
    start = time.monotonic()
    child = subprocess.Popen(
        ["sh", "-c", _WARDEN, "sh", *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=dies_with_parent(signal.SIGTERM),  # noqa: PLW1509 - no other thread is there
    )
    try:
        while True:
            try:
                return child.wait(_POLL)
            except subprocess.TimeoutExpired:
                passed = time.monotonic() - start
                if passed > seconds:
                    raise
                if tick is not None:
                    tick(passed)
    finally:
        # Also what the child has left in its group: the shell may be gone before the rest.
        end_group(child)
