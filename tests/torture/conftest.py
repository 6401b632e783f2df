# SPDX-License-Identifier: Apache-2.0
"""What torture tests share: a budget of seconds, a seed, and the figures that `make torture` prints.

A torture test repeats seeded random work until its budget is over, counts what went wrong, gives the figures
of both, and asserts then that nothing did. In ``make test`` every one has a second, or as long as its least
number of rounds takes; ``make torture`` sets ``KVMPY_TORTURE_SECONDS``, which is the budget of each test.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest

from kvmpy.testing.options import SETTINGS

SECONDS_VARIABLE = "KVMPY_TORTURE_SECONDS"
SHORT_SECONDS = 1.0
FIGURE = "torture figure"


class Torture:
    """One test's budget, random numbers and figures."""

    def __init__(self, request: pytest.FixtureRequest, seconds: float, seed: int) -> None:
        """Begin: the budget runs from here."""
        self.seconds = seconds
        self.seed = seed
        self.random = random.Random(f"{seed} {request.node.nodeid}")
        self._properties = request.node.user_properties
        self._end = time.monotonic() + seconds

    def rounds(self, least: int = 1) -> Iterator[int]:
        """Count rounds until the budget is over; there are always ``least``."""
        number = 0
        while number < least or time.monotonic() < self._end:
            yield number
            number += 1

    def figure(self, name: str, value: float, unit: str = "") -> None:
        """Show a figure of this test at the end of the run."""
        self._properties.append((FIGURE, f"{name}: {value:g} {unit}".rstrip()))


@pytest.fixture
def torture(request: pytest.FixtureRequest) -> Torture:
    """Give the budget, the seeded random numbers and the place for figures."""
    seconds = float(os.environ.get(SECONDS_VARIABLE) or SHORT_SECONDS)
    return Torture(request, seconds, request.config.stash[SETTINGS].seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each torture test time for its budget and the work that its last round began."""
    seconds = float(os.environ.get(SECONDS_VARIABLE) or SHORT_SECONDS)
    for item in items:
        if "torture" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(seconds * 2 + 120), append=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures of all torture tests of this run."""
    lines = [
        f"  {report.nodeid.rpartition('::')[2]}: {text}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, text in report.user_properties
        if name == FIGURE
    ]
    if lines:
        terminalreporter.section("torture")
        terminalreporter.write_line("\n".join(lines))
