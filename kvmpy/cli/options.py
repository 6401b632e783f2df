# SPDX-License-Identifier: Apache-2.0
"""Click options from the one table of them, and the arguments that all commands which run tests take."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

import kvmpy
from kvmpy.cli import completion
from kvmpy.guest import packs
from kvmpy.owned import OwnedFolder
from kvmpy.testing import naming, option_table, selection
from kvmpy.testing.option_table import Between, Option
from kvmpy.testing.verdicts import NOTHING_RAN

NOTHING_SELECTED = 5
NOTHING = {NOTHING_SELECTED: "no test matches", NOTHING_RAN: "no test ran: all were skipped"}
"""What to tell of a run in which no test ran, by its exit status."""
STDOUT = "-"
"""In place of a report's file: standard output."""
PYTEST_EPILOG = "Arguments after -- are passed to pytest."
_EXTRA = "kvmpy.pytest_args"
_COPY_SECONDS = 0.1
_Function = TypeVar("_Function", bound=Callable[..., Any])


class SplitCommand(click.Command):
    """Keeps what follows ``--`` apart: it goes to pytest as it is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split the arguments at the first ``--``."""
        if "--" in args:
            index = args.index("--")
            args, ctx.meta[_EXTRA] = args[:index], args[index + 1 :]
        return super().parse_args(ctx, args)


def extra_arguments(ctx: click.Context) -> list[str]:
    """Return what followed ``--`` on the command line."""
    return list(ctx.meta.get(_EXTRA, []))


def _parsed(parse: Callable[[str], object]) -> Callable[[str], object]:
    def convert(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return convert


def _type(option: Option) -> Any:
    kind = option.kind
    if isinstance(kind, tuple):
        return click.Choice(kind)
    if isinstance(kind, Between):
        return (click.IntRange if kind.whole else click.FloatRange)(kind.low, kind.high)
    if kind == "path":
        return click.Path(path_type=Path)
    return _parsed(kind) if callable(kind) else None


def options(command: str) -> Callable[[_Function], _Function]:
    """Return a decorator that gives a function the options of *command*, in the table's order."""

    def decorate(function: _Function) -> _Function:
        for option in reversed(option_table.of(command)):
            about = option.help
            if command == "lab run" and option.lab_help:
                about = about.removesuffix(".") + option.lab_help + "."
            keywords: dict[str, Any] = {} if option.metavar is None else {"metavar": option.metavar}
            if option.kind == "flag" and "/" not in option.flags:
                keywords["is_flag"] = True
            else:
                keywords |= {"type": _type(option), "multiple": option.repeated, "default": option.default}
            keywords["shell_complete"] = completion.OF_OPTION.get(option.name)
            if option.variable is not None:
                keywords |= {"envvar": option.variable, "show_envvar": True}
            decorator = click.option(
                *option.flags.split(),
                option.name,
                help=about,
                hidden=option.hidden,
                show_default=option.show_default,
                **keywords,
            )
            function = decorator(function)
        return function

    return decorate


@contextlib.contextmanager
def report_on_stdout(values: dict[str, Any]) -> Iterator[None]:
    """Within the block a report for ``-`` goes to a file in *values*, and from there to standard output.

    A report that grows is passed on as it does. Everything else that is printed goes to standard error then.
    """
    names = [name for name in option_table.REPORTS if values.get(name) == STDOUT]
    if not names:
        yield
        return
    if len(names) > 1:
        raise click.UsageError(f"only one report can go to standard output, not {' and '.join(names)}")
    with OwnedFolder("report") as folder:
        path = folder / names[0]
        values[names[0]] = str(path)
        sys.stdout.flush()
        output = os.dup(1)
        over = threading.Event()
        copier = threading.Thread(target=_copy, args=(path, output, over), daemon=True)
        try:
            os.dup2(2, 1)
            copier.start()
            yield
        finally:
            over.set()
            copier.join()
            sys.stdout.flush()
            os.dup2(output, 1)
            os.close(output)


def _copy(path: Path, output: int, over: threading.Event) -> None:
    """Write to *output* what is added to the file *path*, until *over* is set.

    A session that goes on for a dead one writes the same once more: what is there already is passed over.
    """
    done, last = 0, False
    # Nobody may listen any more.
    with contextlib.suppress(OSError):
        while not last:
            last = over.wait(_COPY_SECONDS)
            with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
                stream.seek(done)
                data = stream.read()
                # A report that is written at once, by a rename, comes at its end.
                while data:
                    written = os.write(output, data)
                    data, done = data[written:], done + written


def take_pack(values: dict[str, Any]) -> None:
    """Have guest programs come from the pack that *values* name: here, and in what this process starts.

    Without one it is that of the cache, if there is one. PackError where it cannot be used.
    """
    named = values.pop("pack")
    if named is not None:
        os.environ[packs.VARIABLE] = str(named.absolute())
    packs.verify_chosen()


def suite_folder() -> Path:
    """Return the folder of the selftests: inside the installed package, or the checkout's."""
    folder = naming.suite_folder()
    if folder is None:
        raise click.ClickException("this kvmpy has no selftests: neither in the package nor beside it")
    return folder


def targets(paths: tuple[str, ...], suite: Path) -> naming.Targets:
    """Return what *paths* name (of the suite, or the user's own files); a usage error for what is neither."""
    try:
        return naming.targets(paths, suite, Path.cwd())
    except naming.NamingError as error:
        raise click.BadParameter(str(error), param_hint="PATHS") from None


def selected(
    paths: tuple[str, ...], values: Mapping[str, Any], chosen: Path
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return paths and values for a run of the tests that a file names, within *paths* if given."""
    try:
        ids = selection.read(chosen)
    except selection.SelectionError as error:
        raise click.ClickException(str(error)) from None
    return paths or tuple(selection.files(ids)), {**values, "select": chosen.absolute()}


def quick_file() -> Path:
    """Return the file of the tests that ``--quick`` runs."""
    try:
        file = selection.quick_file()
    except selection.SelectionError as error:
        raise click.ClickException(str(error)) from None
    if not file.exists():
        raise click.ClickException(
            f"the tests were not chosen yet: there is no {file.name} in the suite; kvmpy coverage quick "
            "writes it, from what kvmpy lab run --coverage DIR --coverage-by test has measured"
        )
    return file


def pytest_args(
    paths: tuple[str, ...],
    values: Mapping[str, object],
    say: Callable[[str], None],
    side: option_table.Side | None = None,
) -> list[str]:
    """Return pytest's arguments for *paths* and the options *values*, with *side* those of it alone."""
    chosen = targets(paths, suite_folder())
    for remark in chosen.remarks:
        say(remark)
    settings = Path(kvmpy.__file__).parent / "testing" / "suite.ini"
    args = ["-c", str(settings), "--rootdir", str(chosen.root), *chosen.arguments]
    given = {**values, "ids_from": Path.cwd(), "brief": not values.get("verbose")}
    return args + option_table.pytest_arguments(given, side)
