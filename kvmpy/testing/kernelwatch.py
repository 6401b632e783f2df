# SPDX-License-Identifier: Apache-2.0
"""The kernel under the tests: a warning, an oops or a new taint during a test is that test's failure."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import pytest

from kvmpy.testing.leakcheck import FAILED
from kvmpy.testing.machine import KernelLog

TAINTED = Path("/proc/sys/kernel/tainted")
# Documentation/admin-guide/tainted-kernels.rst; a module that is loaded taints it, too, and is no failure.
_TAINTS = {4: "machine check", 5: "bad page", 7: "oops", 9: "warning", 14: "soft lockup"}
TROUBLE = re.compile(
    r"Kernel panic|\bBUG: |\bOops\b|\bWARNING: |general protection fault|\bKASAN: |\bUBSAN: |\bKMSAN: "
    r"|INFO: possible |INFO: suspicious |possible circular locking|self-detected stall|blocked for more than"
)
"""Finds a line of a kernel's log or console that tells of a panic, an oops or a warning."""
_SHOWN = 120


def splats(text: str) -> str:
    """Return *text*, lines as dmesg prints them, from the first that tells of trouble; empty without one."""
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if TROUBLE.search(line)), None)
    if first is None:
        return ""
    shown = lines[first : first + _SHOWN]
    more = len(lines) - first - len(shown)
    return "\n".join([*shown, *([f"({more} more lines)"] if more else [])])


class KernelWatch:
    """Plugin object of every process that runs tests, on a host; the lab looks at its machines' consoles.

    What is told between two tests counts for the second. Of several processes each reads the log itself: all
    tests that ran at that time fail.
    """

    def __init__(self, log: KernelLog, tainted: Path = TAINTED) -> None:
        self._log = log
        self._tainted = tainted
        log.skip()
        self._taint = self._taints()

    @classmethod
    def of_this_host(cls) -> KernelWatch:
        """Watch the log of this kernel."""
        return cls(KernelLog(kernel_only=True))

    def _taints(self) -> int:
        try:
            return int(self._tainted.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    @property
    def missing(self) -> str:
        """Why the log cannot be read, empty where it can."""
        return self._log.missing

    def trouble(self) -> str:
        """Return what the kernel told of trouble since the last call, with the taints that are new."""
        text, before = splats(self._log.read()), self._taint
        self._taint = self._taints()
        new = [name for bit, name in _TAINTS.items() if self._taint & ~before & 1 << bit]
        return "\n".join([*([f"newly tainted: {', '.join(new)}"] if new else []), *([text] if text else [])])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test during which the kernel warned; one that has failed already only says so."""
        result = yield
        if text := self.trouble():
            if not item.stash.get(FAILED, False):
                pytest.fail(f"the kernel warned during the test\n{text}", pytrace=False)
            item.add_report_section("teardown", "the kernel warned", text)
        return result

    def pytest_unconfigure(self) -> None:
        """Close the log with the session."""
        self._log.close()
