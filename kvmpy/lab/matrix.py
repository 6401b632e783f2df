# SPDX-License-Identifier: Apache-2.0
"""The same tests under several kernels and configurations, side by side: one table, a column for each."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvmpy.lab.kernels import Kernel, Say
from kvmpy.owned import OwnedFolder, dies_with_parent
from kvmpy.signals import handled
from kvmpy.testing.option_table import command_arguments
from kvmpy.testing.reportfiles import ReportFiles
from kvmpy.testing.table import plain_console

SCHEMA = "kvmpy-lab-matrix/1"
INTERRUPTED = 2
NO_REPORT = 3
_REPORTS = ("json", "ktap", "junit")


@dataclass(frozen=True)
class Column:
    """A kernel, in a configuration where one is named; *memory* is what a machine of it takes, in MiB."""

    kernel: Kernel
    configuration: str | None
    memory: int


def titles(columns: Sequence[Column]) -> list[str]:
    """Return the columns' names: as short as tells them apart."""
    kernels = {column.kernel.name for column in columns}
    return [
        column.kernel.name
        if column.configuration is None
        else column.configuration
        if len(kernels) == 1
        else f"{column.kernel.name} {column.configuration}"
        for column in columns
    ]


def merge(reports: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return each test's verdict for each column, in the order of the first report that has the test."""
    verdicts: dict[str, dict[str, str]] = {}
    for title, report in reports.items():
        for test in report.get("tests", []):
            verdicts.setdefault(test["id"], {})[title] = test["verdict"]
    return verdicts


def table(names: Sequence[str], verdicts: Mapping[str, Mapping[str, str]]) -> Table:
    """Return the table: the tests whose verdicts are bad or differ, then the number of each verdict."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("test", overflow="fold")
    for name in names:
        grid.add_column(name)
    for identifier, by_name in verdicts.items():
        row = [by_name.get(name, "-") for name in names]
        if len(set(row)) > 1 or row[0] in ("fail", "lost"):
            grid.add_row(identifier, *row)
    for verdict in ("pass", "fail", "skip", "xfail", "lost"):
        counts = [str(sum(known.get(name) == verdict for known in verdicts.values())) for name in names]
        grid.add_row(f"all tests: {verdict}", *counts)
    return grid


def merged_ktap(texts: Mapping[str, str]) -> str:
    """Return one KTAP document with a nested one for each column; empty: a column without a report."""
    lines = ["KTAP version 1", f"1..{len(texts)}"]
    for number, (title, text) in enumerate(texts.items(), 1):
        head, *rest = text.splitlines() or ["KTAP version 1", "1..0"]
        lines += [f"  {line}" for line in (head, f"# Subtest: {title}", *rest)]
        bad = not text or any(line.startswith("not ok ") for line in rest)
        lines.append(f"{'not ok' if bad else 'ok'} {number} {title}")
    return "\n".join(lines) + "\n"


def merged_junit(texts: Mapping[str, str]) -> str:
    """Return one JUnit document with a test suite for each column; one without a report has an error."""
    root = ElementTree.Element("testsuites")
    for title, text in texts.items():
        # What kvmpy has written itself, moments ago.
        suites = list(ElementTree.fromstring(text)) if text else []  # noqa: S314
        if not suites:
            suites = [ElementTree.Element("testsuite", tests="1", errors="1", failures="0", skipped="0")]
            case = ElementTree.SubElement(suites[0], "testcase", classname=title, name="report")
            ElementTree.SubElement(case, "error", message="no report came back")
        for suite in suites:
            suite.set("name", title)
            root.append(suite)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _page(reports: Mapping[str, dict[str, Any]]) -> str:
    from kvmpy.testing import html

    return html.render(html.reports_in({"schema": SCHEMA, "reports": reports}, "the matrix"))


class _Run:
    """``kvmpy lab run`` for one column, as a process whose lines are marked with the column's name."""

    def __init__(self, title: str, column: Column, args: Sequence[str], folder: Path) -> None:
        self.title = title
        self.folder = folder
        # A release says enough, and the line is short.
        self._mark = column.kernel.release if column.configuration is None else title
        folder.mkdir()
        files = {name: folder / name for name in _REPORTS}
        command = [sys.executable, "-m", "kvmpy", "lab", "run"]
        chosen = {"kernel": column.kernel.name, "configuration": column.configuration}
        command += command_arguments("lab run", {**chosen, **files})
        # A session of its own: Ctrl-C reaches it once, through us.
        self.process = subprocess.Popen(
            [*command, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGTERM),  # noqa: PLW1509 - no other thread is there
        )
        self._rest = b""

    def fileno(self) -> int:
        """Return the file descriptor of what the process prints."""
        return self.process.stdout.fileno() if self.process.stdout is not None else -1

    def pass_on(self) -> bool:
        """Print what has come, line by line; False at the end."""
        data = os.read(self.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n") if data else (self._rest, b"")
        for line in lines:
            print(f"[{self._mark}] {line.decode('utf-8', 'replace')}", flush=True)
        return bool(data)

    def text(self, name: str) -> str:
        """Return one of its reports, empty when it left none."""
        file = self.folder / name
        return file.read_text(encoding="utf-8") if file.exists() else ""


@contextlib.contextmanager
def _interrupts_passed_on(running: Sequence[_Run]) -> Iterator[list[int]]:
    seen: list[int] = []

    def handler(number: int, _frame: object) -> None:
        seen.append(number)
        for entry in running:
            # Not SIGINT, which jobs in a shell's background ignore.
            entry.process.send_signal(signal.SIGTERM)

    with handled(handler, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield seen


def run_matrix(
    columns: Sequence[Column],
    args: Sequence[str],
    extra: Sequence[str],
    targets: Mapping[str, str],
    at_once: int,
    say: Say,
) -> int:
    """Run ``kvmpy lab run`` for each column, print the table, and return the worst exit status.

    INTERRUPTED after SIGINT, SIGTERM or SIGHUP, NO_REPORT where a report could not be written.

    *targets* has the files for the reports ``json``, ``ktap``, ``junit`` and ``html``; *at_once* machines run
    at a time, shared by the columns.
    """
    names = titles(columns)
    waiting = deque(enumerate(zip(names, columns, strict=True)))
    together = max(1, min(at_once, len(columns)))
    share = command_arguments("lab run", {"machines": max(1, at_once // together)})
    each = [*args, *share, *(["--", *extra] if extra else [])]
    say(f"{len(columns)} columns, {together} at a time")
    running: list[_Run] = []
    ended: dict[str, _Run] = {}
    with (
        OwnedFolder("matrix") as folder,
        _interrupts_passed_on(running) as interrupts,
    ):
        while (waiting and not interrupts) or running:
            while waiting and len(running) < together and not interrupts:
                number, (title, column) = waiting.popleft()
                running.append(_Run(title, column, each, folder / str(number)))
            ready, _, _ = select.select(running, [], [])
            for entry in ready:
                if not entry.pass_on():
                    entry.process.wait()
                    running.remove(entry)
                    ended[entry.title] = entry
        texts = {
            report: {name: ended[name].text(report) if name in ended else "" for name in names}
            for report in _REPORTS
        }
    reports = {name: json.loads(text) if text else {} for name, text in texts["json"].items()}
    plain_console().print(table(names, merge(reports)))
    make: dict[str, Callable[[], str]] = {
        "json": lambda: json.dumps({"schema": SCHEMA, "reports": reports}, indent=2) + "\n",
        "ktap": lambda: merged_ktap(texts["ktap"]),
        "junit": lambda: merged_junit(texts["junit"]),
        "html": lambda: _page(reports),
    }
    files = ReportFiles()
    for report, target in targets.items():
        files.write(report, Path(target), make[report])
    for line in files.failures:
        say(line)
    if interrupts:
        return INTERRUPTED
    codes = [entry.process.returncode for entry in ended.values()]
    if files.failures:
        codes.append(NO_REPORT)
    return max((code if code >= 0 else NO_REPORT for code in codes), default=NO_REPORT)
