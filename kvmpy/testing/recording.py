# SPDX-License-Identifier: Apache-2.0
"""``--record``: a record of each test's ioctls, kept of all tests or of those that fail."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmpy.testing.leakcheck import uses_kvmpy
from kvmpy.testing.option_table import RECORD_FOLDER
from kvmpy.testing.options import chosen
from kvmpy.testing.reportfiles import UNWRITTEN, why
from kvmpy.testing.verdicts import suite_id

if TYPE_CHECKING:
    from kvmpy.debug.record.recorder import Recorder

SUFFIX = ".rec"
RECORD = pytest.StashKey[Path]()
_KEEP = pytest.StashKey[bool]()
_MISSING = pytest.StashKey[str]()
_RECORDER: pytest.StashKey[Recorder] = pytest.StashKey()
_NAME_LENGTH = 180


def register(config: pytest.Config) -> None:
    """Start recording tests where ``--record`` asks for it."""
    mode = chosen(config, "record")
    if mode is None:
        return
    shown = Path(chosen(config, "record_dir") or RECORD_FOLDER).absolute()
    folder = Path(chosen(config, "record_to") or shown)
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
        try:
            recorder = Recorder(path, test=suite_id(item.nodeid))
        except OSError as error:
            # The test runs all the same.
            item.stash[_MISSING] = why(error)
            path.unlink(missing_ok=True)
            return (yield)
        item.stash[_RECORDER] = recorder
        recorder.start()
        try:
            result = yield
        finally:
            used = recorder.used
            recorder.stop()
            del item.stash[_RECORDER]
        if not used or not item.stash[_KEEP]:
            path.unlink(missing_ok=True)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep the record of a failure and say what to do with it, or why there is none."""
        report = yield
        if RECORD not in item.stash:
            return report
        if report.skipped and not hasattr(report, "wasxfail"):
            item.stash[_KEEP] = False
        path = self._shown / item.stash[RECORD].name
        missing = item.stash.get(_MISSING, "")
        if _RECORDER in item.stash and (lost := item.stash[_RECORDER].writer.lost):
            missing = f"{lost} frames are missing"
        if report.failed:
            item.stash[_KEEP] = True
            text = f"kvmpy replay {path}\nkvmpy repro {path} -o bug.c"
            report.sections.append(("record", f"{path}: {missing}" if missing else text))
        if missing and item.stash[_KEEP] and call.when == "teardown":
            item.stash.setdefault(UNWRITTEN, []).append(f"record: {path} is not complete: {missing}")
        return report
