# SPDX-License-Identifier: Apache-2.0
"""The verdict table at the end of a run: by area and protection, then what the skips lack."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvmpy.testing.verdicts import TestVerdict, Verdict, skips_by_reason, tally

STYLES = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.SKIP: "yellow",
    Verdict.XFAIL: "cyan",
    Verdict.LOST: "bold magenta",
}
MAX_WIDTH = 120
_PIPE_WIDTH = 160


def plain_console() -> Console:
    """Return a console on stdout that takes text as it is; a pipe, which has no width, is a wide one."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _cell(verdict: Verdict, count: int) -> Text:
    return Text(str(count) if count else ".", style=STYLES[verdict] if count else "dim")


def verdict_table(verdicts: Sequence[TestVerdict], title: str, labels: Mapping[str, str]) -> Table:
    """Return the table; *labels* says for a protection what it stands for, such as an emulation."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    total = tally(verdicts)
    table.add_column("area", footer="total", overflow="fold")
    table.add_column("protection", overflow="fold")
    for verdict in Verdict:
        footer = _cell(verdict, total[verdict.value])
        table.add_column(verdict.value, footer=footer, justify="right")
    seconds = sum(entry.duration for entry in verdicts)
    table.add_column("seconds", footer=f"{seconds:.1f}", justify="right")
    groups: dict[tuple[str, str], list[TestVerdict]] = {}
    for entry in verdicts:
        groups.setdefault((entry.area, entry.protection or "-"), []).append(entry)
    last = ""
    for (area, protection), entries in sorted(groups.items()):
        counts = tally(entries)
        mark = " *" if labels.get(protection) else ""
        table.add_row(
            area if area != last else "",
            protection + mark,
            *(_cell(verdict, counts[verdict.value]) for verdict in Verdict),
            f"{sum(entry.duration for entry in entries):.1f}",
        )
        last = area
    return table


def _one_line(text: str) -> str:
    # A reason may not look like a line of the table.
    return " ".join(text.split())


def _bad_lines(verdicts: Sequence[TestVerdict]) -> list[Text]:
    lines = []
    for entry in verdicts:
        if entry.verdict.bad:
            line = Text(f"{entry.verdict.value:<5} ", style=STYLES[entry.verdict])
            line.append(f"{entry.id}: {_one_line(entry.reason)}", style="default")
            lines.append(line)
    return lines


def print_report(
    stream: TextIO,
    verdicts: Sequence[TestVerdict],
    *,
    title: str,
    labels: Mapping[str, str],
    width: int,
    color: bool,
    not_run: int = 0,
) -> None:
    """Print table, failures and skip reasons to *stream*."""
    console = Console(
        file=stream,
        width=min(width, MAX_WIDTH),
        force_terminal=color,
        no_color=not color,
        color_system="standard" if color else None,
        highlight=False,
        emoji=False,
    )
    console.print()
    console.print(verdict_table(verdicts, escape(title), labels))
    shown = {entry.protection for entry in verdicts}
    for name, label in labels.items():
        if label and name in shown:
            console.print(f"* {name}: {label}", markup=False)
    for line in _bad_lines(verdicts):
        console.print(line, soft_wrap=True)
    expected: dict[str, list[str]] = {}
    for entry in verdicts:
        if entry.verdict is Verdict.XFAIL:
            expected.setdefault(entry.reason, []).append(entry.id)
    if expected:
        console.print("failed as expected, by reason:", style=STYLES[Verdict.XFAIL])
    for reason, tests in expected.items():
        console.print(Text(f"{len(tests):5}  {_one_line(reason)}"), soft_wrap=True)
        for identifier in tests:
            console.print(Text(f"       {identifier}", style="dim"), soft_wrap=True)
    groups = skips_by_reason(verdicts)
    if groups:
        console.print("skipped, by what is missing:", style="yellow")
    for what, how, tests in groups:
        console.print(Text(f"{len(tests):5}  {_one_line(what)}"), soft_wrap=True)
        if how:
            console.print(Text(f"       get it: {_one_line(how)}", style="dim"), soft_wrap=True)
    if not_run:
        console.print(f"{not_run} selected tests were not started", style="bold red")
