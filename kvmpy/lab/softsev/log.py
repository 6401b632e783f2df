# SPDX-License-Identifier: Apache-2.0
"""What the software AMD-SP writes to the kernel's log, as a section of each test's report."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from kvmpy.lab.softsev import PARAMETER, PLATFORM

KMSG = Path("/dev/kmsg")
DEVICES = Path("/sys/bus/platform/devices")
_RECORD = re.compile(rb"\d+,\d+,\d+,[^;]*;(softsev: [^\n]*)")
_LARGEST = 8192


def present(devices: Path = DEVICES) -> bool:
    """Whether this kernel runs with the software AMD-SP."""
    return any(devices.glob(f"{PARAMETER}*"))


class KernelLog:
    """Plugin object: reads what was written since the last report."""

    def __init__(self, path: Path = KMSG) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        """Close the log."""
        os.close(self._fd)

    def lines(self) -> list[str]:
        """Return the lines of the software AMD-SP since the last call."""
        results = []
        while True:
            try:
                record = os.read(self._fd, _LARGEST)
            except BlockingIOError:
                break
            except BrokenPipeError:  # the log has overrun the reader, which goes on at its oldest record
                continue
            if not record:
                break
            results += [match.decode(errors="replace") for match in _RECORD.findall(record)]
        return results

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add the section."""
        report = yield
        if text := self.lines():
            report.sections.append((f"{PLATFORM}, {report.when}", "\n".join(text)))
        return report

    def pytest_unconfigure(self) -> None:
        """Close the log with the session."""
        self.close()


def plugin(devices: Path = DEVICES, path: Path = KMSG) -> Any:
    """Return the plugin object; None without the software AMD-SP, or where the log is closed to us."""
    if not present(devices):
        return None
    try:
        return KernelLog(path)
    except OSError:
        return None
