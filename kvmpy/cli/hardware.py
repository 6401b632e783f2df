# SPDX-License-Identifier: Apache-2.0
"""``kvmpy hardware``: everything on a machine with SEV, and one archive of it to attach to a report."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmpy.cli import completion
from kvmpy.cli.options import (
    PYTEST_EPILOG,
    SplitCommand,
    extra_arguments,
    options,
    suite_folder,
    targets,
)
from kvmpy.testing.option_table import STEP_LIMITS, command_arguments

if TYPE_CHECKING:
    from kvmpy.testing.runfolder import RunFolder, Step


def _say(text: str) -> None:
    click.echo(f"kvmpy hardware: {text}", err=True)


def _show(data: bytes) -> None:
    click.echo(data, nl=False)


def _hide(data: bytes) -> None:
    del data


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP are what Ctrl-C is."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _steps(
    folder: RunFolder,
    paths: tuple[str, ...],
    extra: list[str],
    require: str,
    bench: bool,
    limit: float | None,
) -> list[tuple[str, Step]]:
    from kvmpy.testing.runfolder import HTML, JOURNAL, KTAP, PLATFORM, RECORDS, VERDICTS, Step, kvmpy_command

    files = {"journal": JOURNAL, "record_dir": RECORDS, "json": VERDICTS, "ktap": KTAP, "html": HTML}
    values = {"lab": "never", "record": "failures"}
    values |= {name: str(folder.path / file) for name, file in files.items()}
    suite = ["run", *command_arguments("run", values)]
    steps = [
        (
            "what the secure processor says",
            "platform",
            [sys.executable, "-m", "kvmpy.testing.machine"],
            PLATFORM,
        ),
        ("what this machine offers", "doctor", kvmpy_command("doctor"), "doctor.txt"),
        (
            f"the suite; {require or 'nothing'} may not be missing",
            "suite",
            kvmpy_command(*suite, *paths, "--", *extra),
            "run.txt",
        ),
    ]
    if bench:
        steps.append(("the benchmark", "bench", kvmpy_command("bench", "--json"), "bench.json"))
    return [
        (about, Step(name, command, output, limit or STEP_LIMITS[name], {"KVMPY_REQUIRE": require}))
        for about, name, command, output in steps
    ]


@click.command(cls=SplitCommand, epilog=PYTEST_EPILOG)
@click.argument("paths", nargs=-1, shell_complete=completion.tests)
@options("hardware")
@click.pass_context
def hardware(
    ctx: click.Context,
    /,
    paths: tuple[str, ...],
    output: Path | None,
    require: str,
    bench: bool,
    limit: float | None,
    pack_only: bool,
) -> None:
    """Run doctor, the whole suite (or PATHS) and the benchmark, and pack the results into one archive.

    Results are written to disk as they come, in a folder beside the archive.  If the machine crashes, the
    next call packs what is left.
    """
    from kvmpy.testing.runfolder import RunFolder, pack_dead

    target = output or Path(f"kvmpy-hardware-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    if not target.name.endswith(".tar.gz"):
        raise click.BadParameter("the archive's name ends in .tar.gz", param_hint="--output")
    if not target.absolute().parent.is_dir():
        raise click.BadParameter(f"no folder {target.parent}", param_hint="--output")
    targets(paths, suite_folder())  # a wrong one is told before it all
    dead = pack_dead(target.absolute().parent, _say)
    if pack_only:
        if not dead:
            _say("there is no crashed run to pack")
        return
    try:
        folder = RunFolder(target.absolute())
    except FileExistsError as error:
        raise click.BadParameter(
            f"{error.filename} belongs to a run in progress", param_hint="--output"
        ) from None
    with folder, _ended_in_order():
        code = 1
        try:
            code = _run(folder, _steps(folder, paths, extra_arguments(ctx), require, bench, limit))
        finally:  # an interrupted run has something to say, too
            inside = folder.pack()
            _say(f"{target}: {len(inside)} files; host, user and network names are removed from the texts")
    sys.exit(code)


def _run(folder: RunFolder, steps: list[tuple[str, Step]]) -> int:
    """Run all steps and return the suite's status; the kernel's messages are kept meanwhile."""
    from kvmpy.testing.machine import KernelLog, KernelLogFollower, boot_log, machine
    from kvmpy.testing.runfolder import run_step

    codes = {}
    log = KernelLog()
    if log.missing:
        _say(f"without the kernel's messages: {log.missing}")
    folder.append("machine.json", json.dumps(machine(), indent=2).encode())
    folder.append("boot.txt", boot_log(log).encode())
    folder.append("dmesg.txt", log.missing.encode())
    with KernelLogFollower(log, lambda data: folder.append("dmesg.txt", data)):
        for about, step in steps:
            _say(about)
            show = _hide if step.name == "platform" else _show
            codes[step.name] = run_step(folder, step, _say, show=show)
    return codes["suite"]
