# SPDX-License-Identifier: Apache-2.0
"""``kvmpy top``: the hottest exits of all VMs, refreshed."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvmpy.debug.watch.processes import Survey

_BAR = 12
_CHROME_LINES = 6


@contextmanager
def keys() -> Iterator[int | None]:
    """Yield the file descriptor to read single keys from, None where standard input is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def wait(fd: int | None, seconds: float) -> str:
    """Wait for a key, at most *seconds*; return it, or nothing when none came."""
    if fd is None:
        time.sleep(seconds)
        return ""
    ready, _, _ = select.select([fd], [], [], seconds)
    return os.read(fd, 1).decode("ascii", "replace") if ready else ""


def render(snapshot: Survey, everything: bool, lines: int | None) -> RenderableType:
    """Return the picture of one moment."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from kvmpy.cli.columns import per_second, shorten
    from kvmpy.debug.watch.hottest import hottest

    total = sum(vm.exits_per_second or 0 for vm in snapshot.vms)
    head = Text(f"{len(snapshot.vms)} VM{'s' if len(snapshot.vms) != 1 else ''}, {per_second(total)} exits/s")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("per second", justify="right", no_wrap=True)
    grid.add_column("of exits", no_wrap=True)
    grid.add_column("counter", no_wrap=True)
    grid.add_column("what", overflow="ellipsis", no_wrap=True)
    grid.add_column("VM pid:fd", no_wrap=True)
    grid.add_column("process", overflow="ellipsis", no_wrap=True)
    grid.add_column("in all", justify="right", no_wrap=True)
    for hot in hottest(snapshot.vms, everything=everything)[:lines]:
        share = ""
        if hot.share is not None:
            filled = round(min(1.0, hot.share) * _BAR)
            share = f"{'━' * filled}{' ' * (_BAR - filled)} {min(999, 100 * hot.share):3.0f}%"
        grid.add_row(
            per_second(hot.per_second),
            share,
            hot.counter,
            hot.meaning,
            f"{hot.vm.pid}:{hot.vm.fd}",
            shorten(hot.vm.command, 32),
            f"{hot.total}",
        )
    rest: Sequence[RenderableType] = [Text(f"not seen: {entry}", style="dim") for entry in snapshot.unseen]
    return Group(head, grid, *rest)


def document(survey: Survey, everything: bool, interval: float) -> dict[str, Any]:
    """Return the same as JSON-ready values."""
    from kvmpy.debug.watch.hottest import hottest

    return {
        "schema": "kvmpy-top/1",
        "interval": interval,
        "vms": [
            {"pid": vm.pid, "fd": vm.fd, "command": vm.command, "exits_per_second": vm.exits_per_second}
            for vm in survey.vms
        ],
        "hottest": [
            {
                "pid": hot.vm.pid,
                "fd": hot.vm.fd,
                "counter": hot.counter,
                "per_second": round(hot.per_second, 1),
                "share": None if hot.share is None else round(hot.share, 4),
                "total": hot.total,
            }
            for hot in hottest(survey.vms, everything=everything)
        ],
        "unseen": [{"what": entry.what, "how": entry.how} for entry in survey.unseen],
    }


@click.command()
@click.option("--once", is_flag=True, help="Print one sample and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each refresh.")
@click.option("--all", "everything", is_flag=True, help="Also show counters that are not exit reasons.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 60),
    default=1.0,
    show_default=True,
    help="Seconds between refreshes.",
)
def top(once: bool, as_json: bool, everything: bool, interval: float) -> None:
    """Show the most frequent exits of all VMs on this machine; press q to quit, a to show all counters.

    Run it as root: the counters come from debugfs, or from statistics files that a VMM has open.
    """
    from kvmpy.cli.columns import explain
    from kvmpy.debug.watch.processes import survey, survey_twice, with_rates
    from kvmpy.testing.table import plain_console

    if once:
        snapshot = survey_twice(interval)
        if as_json:
            click.echo(json.dumps(document(snapshot, everything, interval), indent=2))
        else:
            plain_console().print(render(snapshot, everything, None))
        return
    if not as_json and not sys.stdout.isatty():
        raise click.UsageError("standard output is not a terminal: use --once, --json, or both")
    before = survey()
    if as_json:
        try:
            while True:
                wait(None, interval)
                after = survey()
                click.echo(json.dumps(document(with_rates(before, after), everything, interval)))
                before = after
        except KeyboardInterrupt:
            return
    _live(before, everything, interval)
    explain(before.unseen)


def _live(before: Survey, everything: bool, interval: float) -> None:
    from rich.live import Live

    from kvmpy.debug.watch.processes import survey, with_rates
    from kvmpy.testing.table import plain_console

    screen = plain_console()
    with keys() as fd, Live(console=screen, screen=True, auto_refresh=False) as live:
        shown = before
        try:
            while True:
                live.update(render(shown, everything, max(1, screen.height - _CHROME_LINES)), refresh=True)
                key = wait(fd, interval)
                if key in ("q", "\x1b", "\x03"):
                    return
                if key == "a":
                    everything = not everything
                    continue
                after = survey()
                if after.when - before.when >= interval / 2:
                    shown, before = with_rates(before, after), after
        except KeyboardInterrupt:
            return
