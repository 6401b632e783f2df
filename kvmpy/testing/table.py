# SPDX-License-Identifier: Apache-2.0
"""The verdict table at the end of a run: by area and protection, then what the skips lack."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvmpy.testing.verdicts import (
    TestVerdict,
    Verdict,
    counted,
    expected_by_reason,
    flaky,
    skips_by_reason,
    tally,
)

STYLES = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.SKIP: "yellow",
    Verdict.XFAIL: "cyan",
    Verdict.LOST: "bold magenta",
}
MAX_WIDTH = 120
# Of a brief summary: so many reasons of one kind.
_REASONS = 5
_PIPE_WIDTH = 160


def plain_console() -> Console:
    """Return a console on stdout that takes text as it is; a pipe, which has no width, is a wide one."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _cell(verdict: Verdict, count: int) -> Text:
    return Text(str(count) if count else ".", style=STYLES[verdict] if count else "dim")


def verdict_table(verdicts: Sequence[TestVerdict], labels: Mapping[str, str], *, areas: bool = True) -> Table:
    """Return the table; *labels* says for a protection what it stands for, such as an emulation.

    Without *areas* it has one row for each protection.
    """
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    total = tally(verdicts)
    if areas:
        table.add_column("area", footer="total", overflow="fold")
    table.add_column("protection", footer="" if areas else "total", overflow="fold")
    for verdict in Verdict:
        footer = _cell(verdict, total[verdict.value])
        table.add_column(verdict.value, footer=footer, justify="right")
    seconds = sum(entry.duration for entry in verdicts)
    table.add_column("seconds", footer=f"{seconds:.1f}", justify="right")
    groups: dict[tuple[str, str], list[TestVerdict]] = {}
    for entry in verdicts:
        groups.setdefault((entry.area if areas else "", entry.protection or "-"), []).append(entry)
    last = ""
    for (area, protection), entries in sorted(groups.items()):
        counts = tally(entries)
        mark = " *" if labels.get(protection) else ""
        table.add_row(
            *([area if area != last else ""] if areas else []),
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


def _lines_of_reasons(
    style: str, title: str, groups: Sequence[tuple[str, str, Sequence[str]]], most: int | None
) -> Iterator[Text]:
    """Yield a title and, for each reason, how many tests it is of; beyond *most* reasons a sum."""
    if groups:
        yield Text(title, style=style)
    shown = list(groups) if most is None or len(groups) <= most else list(groups[: most - 1])
    for what, how, tests in shown:
        yield Text(f"{len(tests):5}  {_one_line(what)}")
        if how:
            yield Text(f"       get it: {_one_line(how)}", style="dim")
    if rest := groups[len(shown) :]:
        count = len({test for _, _, tests in rest for test in tests})
        yield Text(
            f"{count:5}  for {len(rest)} other reasons: --verbose, or a report, names them", style="dim"
        )


def print_report(
    stream: TextIO,
    verdicts: Sequence[TestVerdict],
    *,
    title: str,
    labels: Mapping[str, str],
    width: int,
    color: bool,
    not_run: int = 0,
    brief: bool = False,
) -> None:
    """Print table, failures and skip reasons to *stream*, *brief* as much as fits on a screen."""
    console = Console(
        file=stream,
        width=width if brief else min(width, MAX_WIDTH),
        force_terminal=color,
        no_color=not color,
        color_system="standard" if color else None,
        highlight=False,
        emoji=False,
    )

    def show(line: Text) -> None:
        if brief and stream.isatty():
            line.truncate(max(width - 1, 20), overflow="ellipsis")
        console.print(line, soft_wrap=True)

    console.print()
    # Not as the table's title: that wraps where the table is narrow.
    console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(verdict_table(verdicts, labels, areas=not brief))
    used = {entry.protection for entry in verdicts}
    for name, label in labels.items():
        if label and name in used:
            console.print(f"* {name}: {label}", markup=False)
    for line in _bad_lines(verdicts):
        console.print(line, soft_wrap=True)
    if unsteady := flaky(verdicts):
        console.print("flaky, by the verdicts of their repetitions:", style=STYLES[Verdict.FAIL])
    for test, counts in unsteady.items():
        console.print(Text(f"       {test}: {counted(counts)}"), soft_wrap=True)
    expected = expected_by_reason(verdicts)
    style = STYLES[Verdict.XFAIL]
    if brief:
        groups = [(reason, "", tests) for reason, tests in expected]
        for line in _lines_of_reasons(style, "failed as expected, by reason:", groups, _REASONS):
            show(line)
    elif expected:
        console.print("failed as expected, by reason:", style=style)
        for reason, tests in expected:
            show(Text(f"{len(tests):5}  {_one_line(reason)}"))
            for identifier in tests:
                show(Text(f"       {identifier}", style="dim"))
    most = _REASONS if brief else None
    for line in _lines_of_reasons("yellow", "skipped, by what is missing:", skips_by_reason(verdicts), most):
        show(line)
    if not_run:
        console.print(f"{not_run} selected tests were not started", style="bold red")
