# SPDX-License-Identifier: Apache-2.0
"""``--record``: a record of each test's ioctls, kept of all tests or of those that fail."""

from __future__ import annotations

import argparse
import re
from collections.abc import Generator
from pathlib import Path

import pytest

from kvmpy.testing.leakcheck import uses_kvmpy
from kvmpy.testing.verdicts import suite_id

MODES = ("failures", "all")
DEFAULT_FOLDER = "kvmpy-records"
SUFFIX = ".rec"
RECORD = pytest.StashKey[Path]()
_KEEP = pytest.StashKey[bool]()
_NAME_LENGTH = 180


def add_options(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("kvmpy")
    group.addoption(
        "--record",
        choices=MODES,
        help="record every test's ioctls and keep the records of all tests or of failures",
    )
    group.addoption(
        "--record-dir",
        metavar="DIR",
        default=DEFAULT_FOLDER,
        help=f"where records go, a file for each test (default {DEFAULT_FOLDER})",
    )
    # Where somebody else takes them to --record-dir.
    group.addoption("--kvmpy-record-to", metavar="DIR", help=argparse.SUPPRESS)


def register(config: pytest.Config) -> None:
    """Start recording tests where ``--record`` asks for it."""
    mode = config.getoption("--record")
    if mode is None:
        return
    shown = Path(config.getoption("--record-dir")).absolute()
    folder = Path(config.getoption("--kvmpy-record-to") or shown)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--record-dir: {error}") from error
    config.pluginmanager.register(Recording(folder, mode, shown), "kvmpy-recording")


def file_name(nodeid: str) -> str:
    """Return the name of a test's record."""
    name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", suite_id(nodeid).replace(".py::", "-")).strip("-")
    return name[-_NAME_LENGTH:] + SUFFIX


class Recording:
    """Plugin object of every process that runs tests.

    The record is written while the test runs: where the process dies, it is there.
    Reports name it in *shown*.
    """

    def __init__(self, folder: Path, mode: str, shown: Path) -> None:
        self._folder = folder
        self._shown = shown
        self._mode = mode

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Record from before the first fixture to after the last."""
        if not uses_kvmpy(item):
            return (yield)
        from kvmpy.debug.record.recorder import Recorder

        path = self._folder / file_name(item.nodeid)
        item.stash[RECORD] = path
        item.stash[_KEEP] = self._mode == "all"
        recorder = Recorder(path, test=suite_id(item.nodeid)).start()
        try:
            result = yield
        finally:
            used = recorder.used
            recorder.stop()
        if not used or not item.stash[_KEEP]:
            path.unlink(missing_ok=True)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep the record of a failure and say what to do with it."""
        del call
        report = yield
        if report.skipped and not hasattr(report, "wasxfail") and RECORD in item.stash:
            item.stash[_KEEP] = False
        if report.failed and RECORD in item.stash:
            item.stash[_KEEP] = True
            path = self._shown / item.stash[RECORD].name
            report.sections.append(("record", f"kvmpy replay {path}\nkvmpy repro {path} -o bug.c"))
        return report
