# SPDX-License-Identifier: Apache-2.0
"""``kvmpy bugs``: the catalogue of re-created bugs, their proofs, and which of them a suite notices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmpy.cli.lab_run import lab_errors, say

if TYPE_CHECKING:
    from kvmpy.lab.bugs.catalogue import Bug
    from kvmpy.lab.bugs.measure import Result
    from kvmpy.lab.kernels import Kernel

JOURNAL = "kvmpy-bugs.jsonl"
BUDGET = 60.0


class _Group(click.Group):
    """Prints every LabError as a message."""

    def invoke(self, ctx: click.Context) -> object:
        with lab_errors():
            return super().invoke(ctx)


_wanted = click.argument("wanted", nargs=-1, metavar="[N|NAME|AREA]...")
_kernel = click.option(
    "--kernel", metavar="NAME", help="A kernel of lab build --bugs (default: the newest in the cache)."
)


@click.group(cls=_Group)
def bugs() -> None:
    """List re-created KVM bugs, prove them, and tell which of them a suite notices."""


@bugs.command("list")
@_wanted
def list_bugs(wanted: tuple[str, ...]) -> None:
    """List the bugs, or those that are named by number, range (3-7), name or area."""
    from kvmpy.lab.bugs import catalogue

    for bug in catalogue.chosen(wanted):
        click.echo(f"{bug.number:>3}  {bug.area:<10} {bug.name}")


@bugs.command()
@_wanted
def show(wanted: tuple[str, ...]) -> None:
    """Print all that the catalogue knows of bugs."""
    from kvmpy.lab.bugs import catalogue

    for bug in catalogue.chosen(wanted):
        click.echo(f"{bug.title} ({bug.area})\n  wrong: {bug.wrong}\n  visible: {bug.visible}")
        if bug.conditions:
            click.echo(f"  conditions: {', '.join([bug.conditions, *bug.parameters])}")
        commit = f"{bug.commit} " if bug.commit else ""
        click.echo(f"  fixed by: {commit}{bug.fix}{f' ({bug.cve})' if bug.cve else ''}")
        click.echo(f"  kernels: before {bug.since}")
        for file, function in bug.functions:
            click.echo(f"  in: {file} {function}()")


def _of_kernel(wanted: tuple[str, ...], name: str | None) -> tuple[Kernel, list[Bug]]:
    """Return the kernel, and the bugs named that it has; tell which it lacks."""
    from kvmpy.lab import kernels
    from kvmpy.lab.bugs import catalogue

    chosen = catalogue.chosen(wanted)
    kernel = kernels.find(name, bugs=True)
    for bug in chosen:
        if bug.number not in kernel.bugs:
            say(f"bug {bug.title} is not in {kernel.name}")
    return kernel, [bug for bug in chosen if bug.number in kernel.bugs]


@bugs.command()
@_wanted
@_kernel
@click.option("--json", "target", metavar="FILE", help="Write the verdicts as JSON.")
@click.option("-n", "--machines", type=click.IntRange(1, 64), help="Number of VMs at once.")
def prove(wanted: tuple[str, ...], kernel: str | None, target: str | None, machines: int | None) -> None:
    """Run the bugs' proofs in the lab: each must pass with its bug off, and fail with it on."""
    from kvmpy.cli.lab_run import run_tests
    from kvmpy.lab.bugs import NONE, catalogue, proving

    booted, chosen = _of_kernel(wanted, kernel)
    numbers = ",".join(str(bug.number) for bug in chosen)
    files = sorted({str(catalogue.PROOFS / f"test_{bug.area}.py") for bug in chosen})
    if not files:
        raise click.ClickException("there is nothing to prove")
    values: dict[str, Any] = {"kernel": booted.name, "bugs": NONE, "json": target, "machines": machines}
    sys.exit(run_tests(tuple(files), values, ["-p", proving.__name__, proving.OPTION, numbers]))


@bugs.command()
@_wanted
@_kernel
@click.option(
    "--budget", metavar="SECONDS", type=click.FloatRange(1), default=BUDGET, show_default=True,
    help="How long the tests for one bug may take.",
)  # fmt: skip
@click.option(
    "--coverage-map", metavar="FILE", type=click.Path(exists=True, path_type=Path),
    help="Which tests enter what, of kvmpy coverage map; they come first.",
)  # fmt: skip
@click.option(
    "--suite", metavar="CMD",
    help="Another suite: a command that runs in the VM, whose exit status tells (default: the selftests).",
)  # fmt: skip
@click.option(
    "-n", "--at-once", type=click.IntRange(1, 16), default=2, show_default=True, help="Bugs at once."
)
@click.option(
    "--journal", metavar="FILE", type=click.Path(path_type=Path), default=JOURNAL, show_default=True,
    help="Results so far; a bug in it is not run again.",
)  # fmt: skip
@click.option("--json", "target", metavar="FILE", help="Write the results of all suites in the journal.")
def run(
    wanted: tuple[str, ...],
    kernel: str | None,
    budget: float,
    coverage_map: Path | None,
    suite: str | None,
    at_once: int,
    journal: Path,
    target: str | None,
) -> None:
    """Run a suite with each bug on, and tell which test notices it; exit status 1 if a bug is not noticed."""
    from kvmpy.cli.options import suite_folder
    from kvmpy.lab.bugs import measure, others
    from kvmpy.lab.coverage import maps
    from kvmpy.lab.coverage.store import OWN_SUITE

    booted, chosen = _of_kernel(wanted, kernel)
    known = maps.read(coverage_map) if coverage_map is not None else None
    kept = measure.Journal(journal)
    name = suite or OWN_SUITE
    left = [bug for bug in chosen if not kept.has(bug, name, booted, budget)]
    if suite is not None:
        program = others.Program(booted, suite, budget, say)
        look = program.look
    else:
        files = measure.suite_files(suite_folder())
        own = measure.Suite(booted, say)

        def look(bug: Bug) -> Result:
            return own.look(bug, measure.within(measure.order(bug, known, files), budget), budget)

    for result in measure.look_for(left, name, at_once, look, kept, say):
        say(_line(result, {bug.number: bug for bug in chosen}))
    numbers = {bug.number for bug in chosen}
    results = [entry for (number, _), entry in sorted(kept.results.items()) if number in numbers]
    if target is not None:
        text = json.dumps(measure.document(results, booted), indent=2)
        Path(target).write_text(text + "\n", encoding="utf-8")
    _table(results, chosen)
    mine = [entry for entry in results if entry.suite == name]
    sys.exit(1 if any(entry.state == measure.MISSED for entry in mine) else 0)


def _line(result: Result, known: dict[int, Bug]) -> str:
    text = f"bug {known[result.number].title}: {result.state}"
    if result.test:
        text += f" by {result.test}{' (the kernel died)' if result.died else ''} after {result.seconds:.0f} s"
    elif result.tests:
        text += f" by {result.tests} tests in {result.seconds:.0f} s"
    return text + (f": {result.why.splitlines()[0]}" if result.why else "")


def _table(results: list[Result], chosen: list[Bug]) -> None:
    from rich import box
    from rich.table import Table

    from kvmpy.lab.bugs import measure
    from kvmpy.testing.table import plain_console

    areas = {bug.number: bug.area for bug in chosen}
    suites = sorted({result.suite for result in results})
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("area")
    for suite in suites:
        grid.add_column(suite, justify="right")
    for area in [*sorted(set(areas.values())), ""]:
        cells = []
        for suite in suites:
            found = [each for each in results if each.suite == suite and area in ("", areas[each.number])]
            ran = [each for each in found if each.state != measure.NOT_RUN]
            missing = f", {len(found) - len(ran)} not run" if len(found) > len(ran) else ""
            cells.append(f"{sum(each.state == measure.NOTICED for each in ran)} of {len(ran)}{missing}")
        grid.add_row(area or "all", *cells)
    plain_console().print(grid)
