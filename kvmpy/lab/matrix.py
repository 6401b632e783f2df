# SPDX-License-Identifier: Apache-2.0
"""The same tests in several kernels: one run after another, and one table with a column for each kernel."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kvmpy.lab.kernels import Kernel, Say
from kvmpy.lab.process import dies_with_parent

SCHEMA = "kvmpy-lab-matrix/1"
NO_REPORT = 3


def merge(reports: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return each test's verdict for each kernel, in the order of the first report that has the test."""
    verdicts: dict[str, dict[str, str]] = {}
    for kernel, report in reports.items():
        for test in report.get("tests", []):
            verdicts.setdefault(test["id"], {})[kernel] = test["verdict"]
    return verdicts


def table(kernels: Sequence[str], verdicts: Mapping[str, Mapping[str, str]]) -> Table:
    """Return the table: the tests whose verdicts are bad or differ, then the number of each verdict."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("test", overflow="fold")
    for kernel in kernels:
        made.add_column(kernel)
    for identifier, by_kernel in verdicts.items():
        row = [by_kernel.get(kernel, "-") for kernel in kernels]
        if len(set(row)) > 1 or row[0] in ("fail", "lost"):
            made.add_row(identifier, *row)
    for verdict in ("pass", "fail", "skip", "xfail", "lost"):
        counts = [str(sum(found.get(kernel) == verdict for found in verdicts.values())) for kernel in kernels]
        made.add_row(f"all tests: {verdict}", *counts)
    return made


def run_matrix(kernels: Sequence[Kernel], args: Sequence[str], target: str | None, say: Say) -> int:
    """Run ``kvmpy lab run`` for each kernel, print the table, and return the worst exit status."""
    reports: dict[str, dict[str, Any]] = {}
    codes = []
    with tempfile.TemporaryDirectory(prefix="kvmpy-matrix-") as folder:
        for number, kernel in enumerate(kernels):
            say(f"kernel {kernel.name} ({number + 1} of {len(kernels)})")
            file = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", "kvmpy", "lab", "run", "--kernel", kernel.name]
            with subprocess.Popen(
                [*command, "--json", str(file), *args],
                preexec_fn=dies_with_parent(),  # noqa: PLW1509 - no other thread is there
            ) as child:
                codes.append(child.wait())
            reports[kernel.name] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    names = [kernel.name for kernel in kernels]
    Console().print(table(names, merge(reports)))
    if target is not None:
        Path(target).write_text(
            json.dumps({"schema": SCHEMA, "reports": reports}, indent=2) + "\n", encoding="utf-8"
        )
    return max((code if code >= 0 else NO_REPORT for code in codes), default=NO_REPORT)
