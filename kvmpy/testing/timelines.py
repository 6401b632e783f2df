# SPDX-License-Identifier: Apache-2.0
"""``--timeline``: what every test process did, in one file for Perfetto's viewer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from kvmpy.debug.decode.timeline import Timeline, complete
from kvmpy.testing.reportfiles import UNWRITTEN, why
from kvmpy.testing.testprocess import supervised
from kvmpy.testing.verdicts import suite_id


class Timelines:
    """Plugin object of every test process: adds its ioctls and tests to the session's file."""

    def __init__(self, path: Path) -> None:
        self.timeline = Timeline(path, append=True).start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """The test begins; one that is replayed from a journal has no set-up."""
        self.timeline.begin(suite_id(item.nodeid))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """The test ends."""
        try:
            return (yield)
        finally:
            try:
                self.timeline.end()
                # A later test may kill the process.
                self.timeline.flush()
            except OSError as error:
                item.stash.setdefault(UNWRITTEN, []).append(f"timeline: it is not complete: {why(error)}")

    def stop(self) -> None:
        """End it; where the disk is full, the tests have said so."""
        with contextlib.suppress(OSError):
            self.timeline.stop()


def _complete(path: Path) -> None:
    try:
        complete(path)
    except OSError as error:
        print(f"kvmpy: timeline: {path} is not complete: {why(error)}", file=sys.stderr)


def renew(path: Path) -> None:
    """Remove an older timeline; what is no regular file stays."""
    if path.is_file():
        path.unlink()


def attach(config: pytest.Config, path: Path) -> None:
    """Begin the file, or go on with that of the session's other processes, until the end of this process."""
    worker = hasattr(config, "workerinput")
    if not worker:
        config.add_cleanup(lambda: _complete(path))
    try:
        # Whoever supervises this process has removed an older file, and may start a second process.
        if not worker and not supervised():
            renew(path)
        plugin = Timelines(path)
    except OSError as error:
        raise pytest.UsageError(f"--timeline: {error}") from error
    config.add_cleanup(plugin.stop)
    config.pluginmanager.register(plugin, "kvmpy-timeline")
