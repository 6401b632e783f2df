# SPDX-License-Identifier: Apache-2.0
"""Another suite than kvmpy's: a command that runs in a machine, and whose exit status tells."""

from __future__ import annotations

import re
import shlex
import threading
import time

from kvmpy.lab import bugs
from kvmpy.lab.bugs.catalogue import Bug
from kvmpy.lab.bugs.measure import Result, command_result, output_of
from kvmpy.lab.kernels import Kernel, Say

# Of timeout(1): the command took longer.
TIMED_OUT = 124
_BOOT_SECONDS = 120.0
_MARK = "kvmpy-suite-status"
_STATUS = re.compile(rf"^{_MARK} (\d+)\s*$", re.MULTILINE)
_LINES = 5
# What a machine that ends without a status stands for.
DIED = 255


class Program:
    """A command, looked at by its exit status without and with a bug; each runs in a machine of its own."""

    def __init__(self, kernel: Kernel, command: str, budget: float, say: Say) -> None:
        self._kernel = kernel
        self._command = command
        self._budget = budget
        self._say = say
        self._lock = threading.Lock()
        self._without: int | None = None

    def _run(self, number: str) -> tuple[int, str]:
        inside = (
            f"echo {number} > {bugs.PARAMETER}; timeout {self._budget:g} sh -c {shlex.quote(self._command)}; "
            f"status=$?; echo; echo {_MARK} $status"
        )
        command = ["lab", "shell", "--kernel", self._kernel.name, "--", "/bin/sh", "-c", inside]
        words = output_of(command, self._budget + _BOOT_SECONDS)
        found = _STATUS.search(words)
        # Behind the mark the machine goes down.
        text = (words[: found.start()] if found else words).strip()
        return (int(found[1]) if found else DIED), " / ".join(text.splitlines()[-_LINES:])

    def look(self, bug: Bug) -> Result:
        """Run the command with *bug* on; without one, too, the first time."""
        with self._lock:
            if self._without is None:
                self._without, _ = self._run(bugs.NONE)
        start = time.monotonic()
        status, words = self._run(str(bug.number))
        about = {
            "seconds": round(time.monotonic() - start, 1),
            "kernel": self._kernel.build_id,
            "budget": self._budget,
            "died": status == DIED,
        }
        return command_result(bug.number, self._command, (self._without, status), words, **about)
