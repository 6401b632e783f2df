# SPDX-License-Identifier: Apache-2.0
"""``kvmpy coverage``: which lines of KVM the tests execute, and which none does."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvmpy.cli.lab_run import lab_errors

if TYPE_CHECKING:
    from kvmpy.lab.coverage.maps import Map, Test
    from kvmpy.lab.coverage.report import FileSummary, Renderer
    from kvmpy.lab.coverage.store import Coverage

FOLDER = "kvmpy-coverage"
_BLOCKS = 40
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Group(click.Group):
    """Prints every LabError as a message."""

    def invoke(self, ctx: click.Context) -> object:
        with lab_errors():
            return super().invoke(ctx)


_folder = click.option(
    "--coverage",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=FOLDER,
    show_default=True,
    help="The folder that lab run --coverage has filled.",
)
_suites = click.option(
    "--suite", "suites", metavar="NAME", multiple=True, help="Only this suite's tests (default: all)."
)


@click.group(cls=_Group)
def coverage() -> None:
    """Show which lines of KVM the tests execute; lab run --coverage measures."""


def _open(folder: Path) -> Coverage:
    from kvmpy.lab.coverage.store import Coverage

    return Coverage(folder)


def _map(folder: Path) -> Map:
    """Return the map of a folder, or the one in a file of coverage map."""
    from kvmpy.lab.coverage import maps

    return maps.read(folder) if folder.is_file() else maps.of_folder(_open(folder))


def _hidden(known: Map) -> dict[str, set[int]]:
    hidden: dict[str, set[int]] = {}
    for number in known.boot:
        file, line = known.lines[number]
        hidden.setdefault(file, set()).add(line)
    return hidden


def _check_suites(known: Map, suites: tuple[str, ...]) -> list[str]:
    from kvmpy.lab.coverage.store import OWN_SUITE

    there = sorted({test.suite for test in known.tests}, key=lambda suite: (suite != OWN_SUITE, suite))
    for suite in suites:
        if suite not in there:
            raise click.BadParameter(f"there is no suite {suite}, but {', '.join(there) or 'none'}")
    return list(suites) or there


@coverage.command()
@click.argument("files", nargs=-1)
@_folder
@_suites
@click.option("--json", "target", metavar="FILE", help="Write gcovr's summary of all suites together.")
def report(files: tuple[str, ...], folder: Path, suites: tuple[str, ...], target: str | None) -> None:
    """Print lines, branches and functions by file, or of FILES; several suites side by side."""
    from kvmpy.lab.coverage import queries
    from kvmpy.lab.coverage.model import Model
    from kvmpy.lab.coverage.report import Renderer, sums

    measured = _open(folder)
    known = _map(folder)
    chosen = _check_suites(known, suites)
    wanted = {queries.find_file(known, name) for name in files}
    model = Model(measured.kept)
    summaries: dict[str, list[FileSummary]] = {}
    with Renderer(model, _hidden(known)) as renderer:
        for suite in chosen:
            trace = renderer.trace(sums(measured, model, {suite}), suite)
            summaries[suite] = renderer.summary(trace)
        if target is not None:
            trace = renderer.trace(sums(measured, model, chosen), "all-of-them")
            renderer.render(trace, "--json-summary-pretty", "--json-summary", str(Path(target).absolute()))
    _print_report(known, summaries, wanted)


def _print_report(known: Map, summaries: dict[str, list[FileSummary]], wanted: set[str]) -> None:
    from rich import box
    from rich.table import Table

    from kvmpy.lab.coverage import queries
    from kvmpy.testing.table import plain_console

    suites = list(summaries)
    only = _only(known, suites) if len(suites) > 1 else {}
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("file")
    grid.add_column("lines", justify="right")
    for suite in suites:
        head = f"{suite}: " if len(suites) > 1 else ""
        for title in (f"{head}lines %", "branches %", "functions"):
            grid.add_column(title, justify="right")
    for suite in suites if only else ():
        grid.add_column(f"only {suite} %", justify="right")
    by_file = {suite: {each.file: each for each in found} for suite, found in summaries.items()}
    rows = sorted(
        by_file[suites[0]].values(), key=lambda each: (each.file == "*", -each.lines.total, each.file)
    )
    for row in rows:
        if wanted and row.file not in wanted:
            continue
        cells = [row.file if row.file != "*" else "all files", str(row.lines.total)]
        for suite in suites:
            found = by_file[suite][row.file]
            cells += [f"{found.lines.percent:.1f}", f"{found.branches.percent:.1f}"]
            cells.append(f"{found.functions.covered}/{found.functions.total}")
        for suite in suites if only else ():
            share = only[suite].get(row.file, 0)
            cells.append(f"{100 * share / row.lines.total:.1f}" if row.lines.total else "-")
        grid.add_row(*cells)
    plain_console().print(grid)
    for suite in suites:
        click.echo(
            f"{suite}: {len(queries.covered(known, suite))} lines by {_count(known, suite)} tests or files"
        )
    click.echo(f"{known.kernel}, build id {known.build_id}")


def _count(known: Map, suite: str) -> int:
    return sum(test.suite == suite for test in known.tests)


def _only(known: Map, suites: list[str]) -> dict[str, dict[str, int]]:
    """Return how many lines of each file (``*`` all) one suite alone executes."""
    from kvmpy.lab.coverage import queries

    executed = {suite: set(queries.covered(known, suite)) for suite in suites}
    only: dict[str, dict[str, int]] = {}
    for suite in suites:
        others = set().union(*(executed[other] for other in suites if other != suite))
        only[suite] = {}
        for number in executed[suite] - others:
            for file in (known.lines[number][0], "*"):
                only[suite][file] = only[suite].get(file, 0) + 1
    return only


@contextlib.contextmanager
def _rendered(folder: Path, suites: tuple[str, ...]) -> Iterator[tuple[Renderer, Path, Map]]:
    """Yield a renderer, its trace of what *suites* execute together, and the map."""
    from kvmpy.lab.coverage.model import Model
    from kvmpy.lab.coverage.report import Renderer, sums

    measured = _open(folder)
    known = _map(folder)
    chosen = _check_suites(known, suites)
    model = Model(measured.kept)
    with Renderer(model, _hidden(known)) as renderer:
        yield renderer, renderer.trace(sums(measured, model, chosen), "all"), known


@coverage.command()
@_folder
@_suites
@click.option("-o", "--output", metavar="DIR", required=True, type=click.Path(path_type=Path))
def html(folder: Path, suites: tuple[str, ...], output: Path) -> None:
    """Write the annotated source as HTML pages, with the tests that execute each line."""
    from kvmpy.lab.coverage import pages

    with _rendered(folder, suites) as (renderer, trace, known):
        pages.write(renderer, trace, known, output.absolute())
    click.echo(output / pages.INDEX)


@coverage.command()
@_folder
@_suites
@click.option("-o", "--output", metavar="FILE", required=True, type=click.Path(path_type=Path))
def lcov(folder: Path, suites: tuple[str, ...], output: Path) -> None:
    """Write a tracefile of LCOV's format."""
    with _rendered(folder, suites) as (renderer, trace, _):
        renderer.lcov(trace, output)


@coverage.command()
@click.argument("what")
@_folder
def tests(what: str, folder: Path) -> None:
    """Print the tests that execute WHAT: FILE:LINE or a function; exit status 1 if there is none.

    A file may be named by the end of its path, such as svm/sev.c.
    """
    from kvmpy.lab.coverage import queries

    known = _map(folder)
    answers = queries.who_executes(known, what)
    for answer in answers:
        if answer.tests is None:
            click.echo(f"{answer.what} has no code that was compiled")
            continue
        click.echo(f"{answer.what}: {len(answer.tests)} of {len(known.tests)}")
        for test in answer.tests:
            click.echo(f"  {_named(test)}")
    sys.exit(0 if any(answer.tests for answer in answers) else 1)


def _named(test: Test) -> str:
    from kvmpy.lab.coverage.store import OWN_SUITE

    return test.id if test.suite == OWN_SUITE else f"{test.suite}: {test.id}"


@coverage.command()
@click.argument("file", required=False)
@_folder
@click.option("-n", "number", metavar="N", type=click.IntRange(1), default=_BLOCKS, show_default=True)
@click.option("--errors", is_flag=True, help="Only blocks that return an errno.")
def missing(file: str | None, folder: Path, number: int, errors: bool) -> None:
    """Print what no test executes, in all of KVM or in FILE: the largest blocks first, with their errnos."""
    from kvmpy.lab.coverage import queries

    measured = _open(folder)
    known = _map(folder)
    path = queries.find_file(known, file) if file is not None else None
    source = measured.kept.source
    blocks = queries.missing(known, source, path)
    if errors:
        blocks = [block for block in blocks if block.errors]
    for block in blocks[:number]:
        name = f"{block.place.name}()" if block.place is not None else ""
        about = [name] if block.entered or not name else [f"{name}, never entered"]
        about += block.errors
        click.echo(f"{len(block.lines):>4}  {block.file}:{block.span}  {' '.join(about)}")
        text = source(block.file).split("\n")[block.lines[0] - 1].strip()
        click.echo(f"      {text}")
    rest = blocks[number:]
    total = sum(len(block.lines) for block in blocks)
    click.echo(
        f"{total} lines in {len(blocks)} blocks"
        + (
            f"; {len(rest)} blocks with {sum(len(block.lines) for block in rest)} lines are not shown"
            if rest
            else ""
        )
    )


@coverage.command()
@click.argument("change")
@_folder
@click.option(
    "--source", "tree", metavar="TREE", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--json", "target", metavar="FILE", help="Write every added line with its tests.")
@click.option("--summary", "short", is_flag=True, help="Print what goes into a cover letter alone.")
def diff(change: str, folder: Path, tree: Path | None, target: str | None, short: bool) -> None:
    """Print for each line that CHANGE adds which tests execute it: a patch, or REV..REV of --source TREE.

    The coverage must be of the tree with the change in it. Exit status 1 if no test executes some line.
    """
    from kvmpy.lab.coverage import changes

    measured = _open(folder)
    known = _map(folder)
    kept = measured.kept
    changed = changes.change(change, tree)
    lines = changes.judge(known, changed, lambda path: kept.source(path) if path in kept.sources else None)
    if target is not None:
        document = [
            {
                "file": line.file,
                "line": line.number,
                "state": line.state,
                "tests": [_named(test) for test in line.tests or ()],
            }
            for line in lines
        ]
        Path(target).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if not short:
        for text in changes.details(lines):
            click.echo(text)
        click.echo()
    for text in changes.summary(known, changed, lines):
        click.echo(text)
    sys.exit(1 if any(line.state == "not executed" for line in lines) else 0)


@coverage.command("map")
@_folder
@click.option("-o", "--output", metavar="FILE", required=True, type=click.Path(path_type=Path))
def write_map(folder: Path, output: Path) -> None:
    """Write the map from lines to tests to one file, for lab run --coverage-map."""
    known = _map(folder)
    known.write(output)
    click.echo(
        f"{output}: {output.stat().st_size >> 10} KiB, {len(known.lines)} lines, {len(known.tests)} tests"
    )


@coverage.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@_folder
def merge(folders: tuple[Path, ...], folder: Path) -> None:
    """Add what other FOLDERS have measured on the same kernel."""
    from kvmpy.lab.coverage import store

    for other in folders:
        click.echo(f"{other}: {store.merge(folder, _open(other))} runs")


@coverage.command("import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@_folder
@click.option("--suite", metavar="NAME", required=True, help="Whose tests they are, such as upstream.")
@click.option("--test", metavar="NAME", help="Which test it was (default: the name of SOURCE).")
@click.option("--kernel", metavar="NAME", help="The kernel of the cache, if the folder is a new one.")
def import_counters(source: Path, folder: Path, suite: str, test: str | None, kernel: str | None) -> None:
    """Add counters that other programs caused: .gcda files in a folder or a tar archive SOURCE.

    It is what a copy of /sys/kernel/debug/gcov has.
    """
    from kvmpy.lab import kernels
    from kvmpy.lab.coverage import gcda, store

    if kernel is not None:
        store.create(folder, kernels.find(kernel, coverage=True))
    click.echo(gcda.add(_open(folder), source, suite, test or source.name.partition(".")[0]))


@coverage.command()
@click.argument("programs", nargs=-1, required=True)
@click.option("--suite", metavar="NAME", default="other", show_default=True, help="Whose tests they are.")
@click.option("--timeout", metavar="SECONDS", type=float, default=120.0, show_default=True)
def count(programs: tuple[str, ...], suite: str, timeout: float) -> None:
    """Run PROGRAMS one by one in lab shell --coverage DIR, and keep what each makes KVM execute.

    A program with arguments is one word: 'state_test -v'. Exit status 1 if one fails or takes too long.
    """
    from kvmpy.lab.coverage import counting

    sys.exit(counting.count(programs, suite, timeout, click.echo))


@coverage.command()
@_folder
@click.option("--share", metavar="PERCENT", type=click.FloatRange(1, 100), default=90.0, show_default=True)
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="(default: the suite's own)"
)
def quick(folder: Path, share: float, output: Path | None) -> None:
    """Choose the tests of run --quick anew: few that together execute most of what all tests do.

    The coverage must be of each test: lab run --coverage-by test.
    """
    from kvmpy.lab.coverage import choice
    from kvmpy.testing import selection

    known = _map(folder)
    chosen = choice.quick(known, share / 100)
    if any("::" not in test.id for test in chosen.tests):
        raise click.ClickException("this coverage is of whole files: measure with --coverage-by test")
    target = output or selection.quick_file()
    selection.write(target, [test.id for test in chosen.tests], _about_quick(chosen, known))
    click.echo(f"{target}: {_about_quick(chosen, known)}")


def _about_quick(chosen: Any, known: Map) -> str:
    return (
        f"{len(chosen.tests)} of {len(known.tests)} tests, {chosen.covered} of {chosen.lines} lines, "
        f"{chosen.seconds:.0f} s of tests on {known.kernel}"
    )
