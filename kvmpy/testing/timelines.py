# SPDX-License-Identifier: Apache-2.0
"""``--timeline``: what every test process did, in one file for Perfetto's viewer."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from kvmpy.debug.timeline import Timeline, complete
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
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """The test ends."""
        try:
            return (yield)
        finally:
            self.timeline.end()
            # A later test may kill the process.
            self.timeline.flush()


def attach(config: pytest.Config, path: Path) -> None:
    """Begin the file, or go on with that of the session's other processes, until the end of this process."""
    worker = hasattr(config, "workerinput")
    if not worker:
        # Whoever supervises this process has removed an older file, and may start a second process.
        if os.environ.get("KVMPY_SUPERVISED") != str(os.getppid()):
            path.unlink(missing_ok=True)
        config.add_cleanup(lambda: complete(path))
    plugin = Timelines(path)
    config.add_cleanup(plugin.timeline.stop)
    config.pluginmanager.register(plugin, "kvmpy-timeline")
