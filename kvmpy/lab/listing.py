# SPDX-License-Identifier: Apache-2.0
"""Which tests there are, found out on the host while the kernel boots; also the pytest plugin that tells it.

The collection leaves the bytecode of all test modules behind, as the sessions inside need it.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmpy.lab import bytecode
from kvmpy.lab.process import end_group
from kvmpy.owned import dies_with_parent
from kvmpy.testing import labels
from kvmpy.testing.dealer import File

FILE_VARIABLE = "KVMPY_LAB_LISTING"
_SECONDS = 300.0
_SHOWN_LINES = 40


class _Writer:
    def __init__(self, target: Path) -> None:
        self._target = target
        self._broken: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Remember the files that cannot be collected here; perhaps they can inside."""
        report = yield
        if report.outcome != "passed" and isinstance(collector, pytest.File):
            self._broken.append(str(collector.path))
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write the arguments and the tests by file."""
        tests: dict[str, list[str]] = {}
        needs: dict[str, list[str]] = {}
        for item in session.items:
            tests.setdefault(str(item.path), []).append(item.nodeid)
            needs[item.nodeid] = labels.of_item(item)
        for name in self._broken:
            tests.setdefault(name, [])
        text = json.dumps({"args": list(session.config.args), "tests": tests, "needs": needs})
        self._target.write_text(text, encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin object."""
    config.pluginmanager.register(_Writer(Path(os.environ[FILE_VARIABLE])), "kvmpy-listing")


class Listing:
    """A collection in a process of its own. *command* is pytest's, as for the session inside."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._file = folder / "listing.json"
        self._output = folder / "listing.out"
        self._deadline = time.monotonic() + _SECONDS
        folder.mkdir(parents=True, exist_ok=True)
        self._file.unlink(missing_ok=True)
        own = {**environment, **bytecode.environment(writing=True), FILE_VARIABLE: str(self._file)}
        with self._output.open("wb") as stream:
            self._process = subprocess.Popen(
                [*command, "-p", __name__, "--collect-only", "-q", "--no-header"],
                env=os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=dies_with_parent(),  # noqa: PLW1509 - no other thread is there
            )

    def close(self) -> None:
        """End the process, if it still runs."""
        if self._process.poll() is None:
            end_group(self._process)

    def poll(self) -> bool:
        """Whether the collection is over."""
        if self._process.poll() is None and time.monotonic() > self._deadline:
            self.close()
        return self._process.poll() is not None

    def failure(self) -> tuple[str, int] | None:
        """Return pytest's words and exit status when it could not collect; None while all is well."""
        if not self.poll() or self._file.exists():
            return None
        lines = self._output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(lines[-_SHOWN_LINES:]), self._process.returncode

    def files(self) -> list[File]:
        """Return the files with their tests; only after an end without a failure."""
        values = self._values()
        return by_file(values["args"], values["tests"])

    def needs(self) -> dict[str, dict[str, list[str]]]:
        """Return the labels of each test by the file that it lies in; only after an end without a failure."""
        values = self._values()
        return {
            file: {nodeid: values["needs"][nodeid] for nodeid in ids} for file, ids in values["tests"].items()
        }

    def _values(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
        return values


def by_file(args: Sequence[str], tests: Mapping[str, Sequence[str]]) -> list[File]:
    """Return each file with pytest's arguments for it, and its tests.

    *args* are the session's arguments, *tests* the selected tests of each file by its absolute path. A file
    is asked for as a whole unless the arguments only name tests in it.
    """
    results = []
    for file, ids in tests.items():
        own = [arg for arg in args if "::" in arg and Path(arg.partition("::")[0]).absolute() == Path(file)]
        whole = any("::" not in arg and Path(file).is_relative_to(Path(arg).absolute()) for arg in args)
        results.append(File([file] if whole or not own else own, ids))
    return results
