# SPDX-License-Identifier: Apache-2.0
"""``kvmpy run``: the selftests on this host."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from kvmpy import caches
from kvmpy.cli import completion
from kvmpy.cli.options import (
    NOTHING,
    PYTEST_EPILOG,
    STDOUT,
    SplitCommand,
    extra_arguments,
    options,
    pytest_args,
    quick_file,
    report_on_stdout,
    selected,
    take_pack,
)
from kvmpy.guest.packs import PackError
from kvmpy.testing.option_table import command_arguments
from kvmpy.testing.verdicts import NOTHING_RAN, suite_id

if TYPE_CHECKING:
    from kvmpy.testing.journal import History

INTERNAL = 3
# Exit statuses of the kernel's selftests; everything else is a failure (1).
_KSELFTEST = {0: 0, NOTHING_RAN: 4}


def _say(text: str) -> None:
    # Nobody may listen any more.
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def _list(args: list[str]) -> int:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *args], check=False, stdout=subprocess.PIPE, text=True
    )
    for line in result.stdout.splitlines():
        # Names as in every report, and as this command takes them.
        click.echo(suite_id(line) if "::" in line else line)
    return result.returncode


def why_lab(choice: str) -> str:
    """Return why tests run in the lab and not here, empty where they run here."""
    from kvmpy.testing import gate, host

    if choice == "always":
        return "as asked for"
    # Who insists on KVM wants to hear that it is missing; inside the lab there is no other one.
    if choice == "never" or host.platform_name() != "host" or {"all", "kvm"} & gate.required_names():
        return ""
    missing = host.kvm_missing()
    return f"KVM cannot be used here ({missing.what})" if missing is not None else ""


def _in_lab(paths: tuple[str, ...], values: Mapping[str, object], extra: list[str]) -> int:
    from kvmpy.cli.lab_run import lab_errors, run_tests

    workers = str(values["workers"] or "")
    machines = int(workers) if workers.isdigit() else None
    with lab_errors():
        return run_tests(paths, {**values, "machines": machines, "may_build": True}, extra)


def _with_parameters(words: Sequence[str], reload: bool, work: Callable[[], int]) -> int:
    """Return what *work* returns, done while KVM's modules have the parameters *words*."""
    from kvmpy.testing.guardian import Guardian
    from kvmpy.testing.host import CONFIGURATION_VARIABLE
    from kvmpy.testing.module_settings import SettingError

    guardian = Guardian()
    try:
        guardian.recover(lambda text: _say(f"kvmpy run: {text}"))
        if not words:
            return work()
        with guardian.parameters(words, reload=reload):
            os.environ[CONFIGURATION_VARIABLE] = ", ".join(words)
            return work()
    except SettingError as error:
        _say(f"kvmpy run: {error}")
        return INTERNAL


def _supervised(args: Sequence[str], kept: Path | None, command: Sequence[str], resume: bool) -> int:
    from kvmpy.testing.journals import JournalError
    from kvmpy.testing.supervisor import supervise

    try:
        return supervise(args, _say, kept=kept, command=command, resume=resume)
    except JournalError as error:
        _say(f"kvmpy run: {error}")
        return INTERNAL


def _as_before(
    ctx: click.Context, history: History, paths: tuple[str, ...], values: dict[str, object], extra: list[str]
) -> tuple[tuple[str, ...], dict[str, object], list[str]]:
    """Return what the run of the journal was started with, where this command says nothing else."""
    from kvmpy.testing import journals

    if history.complete:
        raise journals.JournalError("that run came to its end; kvmpy results makes its reports")
    earlier = run.make_context("run", list(history.command))
    for name in values:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            values[name] = earlier.params[name]
    return paths or earlier.params["paths"], values, extra or extra_arguments(earlier)


@click.command(cls=SplitCommand, epilog=PYTEST_EPILOG)
@click.argument("paths", nargs=-1, shell_complete=completion.tests)
@options("run")
@click.pass_context
def run(ctx: click.Context, /, paths: tuple[str, ...], **values: object) -> None:
    """Run the selftests, or the tests in PATHS (of the suite, or files of your own)."""
    extra = extra_arguments(ctx)
    command = [*command_arguments("run", values), *paths, *(["--", *extra] if extra else [])]
    kselftest = bool(values.pop("kselftest"))
    if kselftest:
        values["ktap"] = values["ktap"] or STDOUT
    with report_on_stdout(values):
        code = _run(ctx, paths, values, extra, command)
    sys.exit(_KSELFTEST.get(code, 1) if kselftest else code)


def _run(
    ctx: click.Context,
    paths: tuple[str, ...],
    values: dict[str, object],
    extra: list[str],
    command: Sequence[str],
) -> int:
    from kvmpy.testing import journals
    from kvmpy.testing.supervisor import guarded

    kept, resume = cast("Path | None", values.pop("journal")), bool(values.pop("resume"))
    if resume:
        try:
            kept = kept or journals.last(unfinished=True)
            paths, values, extra = _as_before(ctx, journals.readable(kept), paths, values, extra)
        except journals.JournalError as error:
            raise click.ClickException(str(error)) from None
        _say(f"kvmpy run: going on from {kept}")
    try:
        take_pack(values)
    except PackError as error:
        _say(f"kvmpy run: {error}")
        return INTERNAL
    if not values["listing"] and (why := why_lab(str(values["lab"]))):
        if values["timeline"] is not None:
            # Each VM has a clock of its own.
            raise click.UsageError(f"--timeline cannot be written in the lab, and {why}")
        _say(f"kvmpy run: {why}: the selftests run in the lab")
        if kept is not None:
            raise click.UsageError(f"--journal and --resume are of runs on this host, and {why}")
        return _in_lab(paths, values, extra)
    if values["quick"]:
        paths, values = selected(paths, values, quick_file())
    parameters = cast(tuple[str, ...], values["parameters"])
    args = [*pytest_args(paths, values, lambda remark: _say(f"kvmpy run: {remark}")), *extra]
    # Compiled tests are kept out of the installed package.
    if (cache := caches.own("pycache")) is not None:
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(cache))
    else:
        os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    if values["timeline"] is not None:
        from kvmpy.testing.timelines import renew

        # Test processes add to it, one after another.
        renew(Path(str(values["timeline"])))
    if values["listing"]:
        code = _list([*args, "--collect-only", "-q"])
    else:
        kept = kept or journals.fresh()
        work = partial(_supervised, args, kept, command, resume)
        code = _with_parameters(parameters, bool(values["reload"]), lambda: guarded(work))
    if code in NOTHING:
        _say(f"kvmpy run: {NOTHING[code]}")
    return code
