# SPDX-License-Identifier: Apache-2.0
"""Programs in ``kvmpy lab shell``, one by one, each with what it makes KVM execute."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvmpy.lab.coverage.counters import BOOT, Counters, CountersError, counted, objects
from kvmpy.lab.errors import LabError

JOURNAL = Path("/dev/kvmpy.journal")
# How a program says that it cannot run here.
_SKIP = 4


def count(programs: Sequence[str], suite: str, timeout: float, say: Callable[[str], None]) -> int:
    """Run *programs*, and send what each makes KVM execute to the host; 1 if one of them failed, else 0.

    LabError outside of ``kvmpy lab shell --coverage DIR``.
    """
    if not JOURNAL.exists():
        raise LabError(
            "there is nobody who keeps what is counted", "run it by: kvmpy lab shell --coverage DIR -- ..."
        )
    try:
        counters = Counters()
    except CountersError as error:
        raise LabError(str(error)) from error
    failed = False
    with JOURNAL.open("w", encoding="utf-8") as journal:

        def write(event: dict[str, Any]) -> None:
            journal.write(json.dumps(event) + "\n")
            journal.flush()

        write(objects(counters, suite))
        write(counted(BOOT, counters.take()))
        for program in programs:
            words = shlex.split(program)
            name = " ".join([Path(words[0]).name, *words[1:]])
            counters.reset()
            start = time.monotonic()
            verdict = _run(words, timeout)
            seconds = time.monotonic() - start
            write(counted(name, counters.take(), seconds))
            failed |= verdict not in ("ok", "skip")
            say(f"{verdict:<8} {seconds:6.1f} s  {name}")
    return int(failed)


def _run(words: Sequence[str], timeout: float) -> str:
    try:
        status = subprocess.run(
            words,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
        ).returncode
    except subprocess.TimeoutExpired:
        return "timeout"
    except OSError as error:
        return str(error.strerror)
    return {0: "ok", _SKIP: "skip"}.get(status, f"status {status}")
