# SPDX-License-Identifier: Apache-2.0
"""What pytest itself shows of a run with a heartbeat: no letter for each test, no list of failures."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from kvmpy.testing.heartbeat import ERASE, Heartbeat

_Status = tuple[str, str, Any]
# What pytest lists at its end unless told otherwise; the verdict table does that.
_LISTED = "fE"


def wanted(config: pytest.Config) -> bool:
    """Whether the session is to be brief: it was asked for, and nobody watches or talks to its tests."""
    from kvmpy.testing.options import chosen

    option = config.option
    talks = option.usepdb or option.trace or option.capture == "no"
    shows = option.collectonly or option.setuponly or option.setupshow or option.setupplan
    return bool(chosen(config, "brief")) and option.verbose <= 0 and not talks and not shows


def heartbeat(config: pytest.Config) -> Heartbeat | None:
    """Return a heartbeat beside the reporter's own output, for a session that is its own supervisor."""
    plugin = config.pluginmanager.get_plugin("kvmpy-brief")
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if plugin is None or reporter is None or not plugin.heartbeat:
        return None
    return Heartbeat(reporter._tw._file, (lambda: int(reporter._tw.fullwidth)) if reporter.isatty() else None)


class Brief:
    """Plugin object of the controlling process."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @property
    def heartbeat(self) -> bool:
        """Whether there is to be a heartbeat, too."""
        return bool(self._config.option.verbose == 0)

    def _reporter(self) -> Any:
        return self._config.pluginmanager.get_plugin("terminalreporter")

    def pytest_sessionstart(self) -> None:
        """Let pytest name no files as they begin, and count nothing."""
        reporter = self._reporter()
        if reporter is not None:
            reporter.showfspath = False
            reporter._show_progress_info = False
            if self._config.option.reportchars == _LISTED:
                reporter.reportchars = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Generator[None, _Status | None, _Status | None]:
        """Count a verdict, and show nothing for it."""
        status = yield
        return (status[0], "", "") if status else status

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Take the heartbeat's line away: the summary follows."""
        reporter = self._reporter()
        if reporter is not None and self.heartbeat and reporter.isatty():
            reporter.write(ERASE, flush=True)
