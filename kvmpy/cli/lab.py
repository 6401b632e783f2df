# SPDX-License-Identifier: Apache-2.0
"""``kvmpy lab``: kernels booted under QEMU, and the selftests inside them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmpy.cli.run import (
    NOTHING_SELECTED,
    SplitCommand,
    extra_arguments,
    pytest_args,
    strict_private,
    suite_folder,
)
from kvmpy.lab.errors import LabError

if TYPE_CHECKING:
    from kvmpy.lab.qemu import Options


def _say(text: str) -> None:
    click.echo(f"kvmpy lab: {text}", err=True)


@contextlib.contextmanager
def lab_errors() -> Iterator[None]:
    """Print a LabError as a message, and end with exit status 3."""
    try:
        yield
    except LabError as error:
        _say(str(error))
        sys.exit(3)


class _Lab(click.Group):
    """Prints every LabError as a message."""

    def invoke(self, ctx: click.Context) -> object:
        with lab_errors():
            return super().invoke(ctx)


@click.group(cls=_Lab)
def lab() -> None:
    """Build kernels, boot them under QEMU and run tests inside; no /dev/kvm is needed."""


@lab.command()
@click.option("--source", metavar="TREE", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--debian", metavar="SUITE", help="A Debian suite with linux-source-X.Y (default: sid).")
@click.option(
    "--kernel", metavar="BZIMAGE", type=click.Path(path_type=Path), help="A kernel that is already built."
)
@click.option("--missing", is_flag=True, help="Build only if no such kernel in the cache is up to date.")
@click.option("--soft-sev", is_flag=True, help="Add the software AMD-SP, for SEV, SEV-ES and SNP.")
@click.option(
    "--config",
    "configs",
    metavar="FILE",
    multiple=True,
    help="A file with additional kernel options, such as CONFIG_KASAN=y; 'debug' stands for kvmpy's own.",
)
def build(
    source: Path | None,
    debian: str | None,
    kernel: Path | None,
    missing: bool,
    soft_sev: bool,
    configs: tuple[str, ...],
) -> None:
    """Put a lab kernel into the cache: from a Debian suite, a tree of your own, or a bzImage."""
    from kvmpy.lab import build as builds
    from kvmpy.lab import places
    from kvmpy.lab.debian import DEFAULT_SUITE

    if configs and (kernel is not None or missing):
        raise click.UsageError("--config is for a kernel that is built now: not with --kernel or --missing")
    extra = [places.extra_fragment(name) for name in configs]
    if sum(given is not None for given in (source, debian, kernel)) > 1:
        raise click.UsageError("--source, --debian and --kernel exclude each other")
    if missing and (present := builds.present(soft_sev)):
        click.echo(present.name)
        return
    if kernel is not None:
        made = builds.from_image(kernel, soft_sev=soft_sev)
    elif source is not None:
        made = builds.from_source(source, _say, soft_sev=soft_sev, extra=extra)
    else:
        made = builds.from_debian(debian or DEFAULT_SUITE, _say, soft_sev=soft_sev, extra=extra)
    click.echo(made.name)


@lab.command("list")
def list_kernels() -> None:
    """List the kernels of the cache, the newest first."""
    from kvmpy.lab import kernels

    for kernel in kernels.cached():
        extra = f", with {kernel.extra}" if kernel.extra else ""
        click.echo(f"{kernel.name:<28} {kernel.origin}{extra}")


@lab.command("rm")
@click.argument("names", nargs=-1)
@click.option(
    "--all", "everything", is_flag=True, help="Remove the whole cache of the lab, including downloads."
)
def remove(names: tuple[str, ...], everything: bool) -> None:
    """Remove kernels from the cache, by name or release."""
    import shutil

    from kvmpy.lab import kernels, places

    if everything == bool(names):
        raise click.UsageError("name kernels (see `kvmpy lab list`), or say --all")
    if everything:
        with kernels.build_lock(_say):
            for folder in places.cache().iterdir():
                if folder.is_dir():
                    shutil.rmtree(folder)
        return
    for kernel in [kernels.find(name) for name in names]:
        if kernel.folder.parent != places.cache() / "kernels":
            raise LabError(f"{kernel.name} is not in the cache")
        kernels.remove(kernel)
        click.echo(f"removed {kernel.name}")


def _parameters(_ctx: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        if not re.fullmatch(r"\w+\.\w+=[\w.,:-]+", word):
            raise click.BadParameter(f"{word!r} is not like kvm_amd.npt=0")
    return words


def _machine_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--kernel", metavar="NAME", help="A cached kernel (name or release), or a bzImage."),
        click.option("--cpus", type=click.IntRange(1, 255), default=2, show_default=True),
        click.option(
            "--memory",
            metavar="SIZE",
            default="4G",
            show_default=True,
            help="Memory of each VM, such as 512M or 6G.",
        ),
        click.option("--accel", type=click.Choice(["auto", "tcg", "kvm"]), default="auto", show_default=True),
        click.option(
            "--soft-sev/--no-soft-sev",
            default=None,
            help="Boot with or without the software AMD-SP (default: as the kernel has it).",
        ),
        click.option(
            "--param",
            "parameters",
            metavar="MODULE.NAME=VALUE",
            multiple=True,
            callback=_parameters,
            help="Set a module parameter, such as kvm_amd.npt=0; another value inside stops the run.",
        ),
    ):
        command = option(command)
    return command


def parse_memory(text: str) -> int:
    """Return a size such as ``512M`` or ``4G`` in MiB; a plain number is MiB."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "M")
    if not number.isdigit() or unit not in ("M", "G") or int(number) == 0:
        raise click.BadParameter(f"{text!r} is no size such as 512M or 4G", param_hint="--memory")
    return int(number) * (1024 if unit == "G" else 1)


def _machine(
    kernel: str | None,
    cpus: int,
    memory: str,
    accel: str,
    soft_sev: bool | None,
    parameters: tuple[str, ...] = (),
) -> Options:
    from kvmpy.lab import kernels, softsev
    from kvmpy.lab.qemu import Options
    from kvmpy.lab.runs import accelerator

    found = kernels.find(kernel, soft_sev=bool(soft_sev))
    if not found.soft_sev or soft_sev is False:
        return Options(found, cpus, parse_memory(memory), accelerator(accel), parameters)
    # It stands for a processor without SEV: it has been tried on an emulated one only.
    chosen = "tcg" if accel == "auto" else accel
    return Options(found, cpus, parse_memory(memory), chosen, (softsev.PARAMETER, *parameters))


@lab.command("run", cls=SplitCommand, epilog="Arguments after -- are passed to pytest.")
@click.argument("paths", nargs=-1)
@_machine_options
@click.option(
    "--matrix", metavar="A,B", help="Run on several kernels; print one table with a column for each."
)
@click.option("-k", "expression", metavar="EXPR", help="Run only tests whose names match, as in pytest -k.")
@click.option(
    "-n",
    "--machines",
    type=click.IntRange(1, 64),
    help="Number of VMs at once (default: one for each CPU, as memory allows).",
)
@click.option("--json", metavar="FILE", help="Write the verdicts as JSON.")
@click.option("--ktap", metavar="FILE", help="Write the verdicts as KTAP version 1.")
@click.option("--junit", metavar="FILE", help="Write the verdicts as JUnit XML.")
@click.option("--html", metavar="FILE", help="Write one HTML page; not with --matrix.")
@click.option("--protection", metavar="P[,P]", help="Run only under these protections.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Repeat the random choices of a run.")
@click.option("--deadline", metavar="SECONDS", help="Time limit for a guest to run without an expected exit.")
@click.option(
    "--record",
    type=click.Choice(["failures", "all"]),
    help="Record the ioctls of each test and keep the records of failed or of all tests; not with --matrix.",
)
@click.option("--record-dir", metavar="DIR", help="Folder for records (default: kvmpy-records).")
@strict_private
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=4 * 3600.0,
    help="Time limit for the whole run, in seconds.",
)
@click.option("--build", "may_build", is_flag=True, help="Build a kernel first if none is up to date.")
@click.pass_context
def run_inside(ctx: click.Context, /, paths: tuple[str, ...], **values: Any) -> None:
    """Run the selftests, or the tests in PATHS, in a kernel under QEMU, including dangerous ones."""
    sys.exit(run_tests(paths, values, extra_arguments(ctx)))


DEFAULTS: Mapping[str, Any] = {
    "kernel": None,
    "cpus": 2,
    "memory": "4G",
    "accel": "auto",
    "soft_sev": None,
    "parameters": (),
    "matrix": None,
    "machines": None,
    "timeout": 4 * 3600.0,
    "may_build": False,
    "record": None,
    "record_dir": None,
    "strict_private": False,
}


def run_tests(paths: tuple[str, ...], values: Mapping[str, Any], extra: list[str]) -> int:
    """Run tests inside as the options *values* say, and return the exit status of the command."""
    from kvmpy.lab.lane import Limits
    from kvmpy.lab.runs import Request, machines, run
    from kvmpy.testing.recording import DEFAULT_FOLDER

    values = {**DEFAULTS, **values}
    if values["record"] and values["matrix"]:
        raise click.UsageError("--record is not for --matrix: the kernels' records would have the same names")
    if values["html"] and values["matrix"]:
        raise click.UsageError("--html is not for --matrix: a page shows one run; --json has them all")
    if values["may_build"] and not values["kernel"] and not values["matrix"]:
        _build_if_none(values["soft_sev"])
    if values["matrix"]:
        from kvmpy.lab import kernels
        from kvmpy.lab.matrix import run_matrix

        names = [name.strip() for name in values["matrix"].split(",") if name.strip()]
        found = [kernels.find(name, soft_sev=bool(values["soft_sev"])) for name in names]
        targets = {name: values[name] for name in ("json", "ktap", "junit") if values[name] is not None}
        at_once = values["machines"] or machines(parse_memory(values["memory"]))
        return run_matrix(found, matrix_arguments(paths, values), extra, targets, at_once, _say)
    inside = {
        name: values[name] for name in ("expression", "protection", "deadline", "record", "strict_private")
    }
    records = Path(values["record_dir"] or DEFAULT_FOLDER).absolute() if values["record"] else None
    inside["record_dir"] = records
    reports = []
    for name, flag in _REPORTS:
        if values.get(name) is not None:
            reports += [flag, values[name]]
    machine = _machine(
        *(values[name] for name in ("kernel", "cpus", "memory", "accel", "soft_sev", "parameters"))
    )
    request = Request(
        machine,
        pytest_args(suite_folder(), inside, paths),
        reports,
        [*extra, *(["--kvmpy-evidence"] if values.get("html") else [])],
        int(values["seed"]) if values["seed"] is not None else None,
        Limits(total=values["timeout"]),
        values["machines"] or machines(machine.memory),
        records,
    )
    code = run(request, _say)
    if code == NOTHING_SELECTED:
        _say("no test matches")
    return code


def _build_if_none(soft_sev: bool | None) -> None:
    """Build a kernel of the wanted kind; when any will do, one that can be both, where the hooks fit."""
    from kvmpy.lab import build as builds
    from kvmpy.lab import kernels
    from kvmpy.lab.debian import DEFAULT_SUITE
    from kvmpy.lab.softsev.hooks import HookError

    if builds.present(bool(soft_sev)):
        return
    if any(kernel.serves(bool(soft_sev)) for kernel in kernels.cached()):
        _say(
            "the lab kernel is outdated: building one, which takes some minutes (without --build it will do)"
        )
    else:
        _say("there is no lab kernel yet: building one, which takes some minutes")
    try:
        builds.from_debian(DEFAULT_SUITE, _say, soft_sev=soft_sev is not False)
    except HookError as error:
        if soft_sev:
            raise
        _say(str(error))
        _say("building it without the software AMD-SP: there will be no SEV inside")
        builds.from_debian(DEFAULT_SUITE, _say, soft_sev=False)


def matrix_arguments(paths: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    """Return the arguments of ``kvmpy lab run`` for one kernel of a matrix, without the kernel."""
    args = [*paths]
    if values["soft_sev"] is not None:
        args.append("--soft-sev" if values["soft_sev"] else "--no-soft-sev")
    for parameter in values["parameters"]:
        args += ["--param", parameter]
    for name, flag in (("expression", "-k"), *((name, f"--{name}") for name in _EACH)):
        if values[name] is not None:
            args += [flag, str(values[name])]
    if values.get("strict_private"):
        args.append("--strict-private")
    return args


_EACH = ("cpus", "memory", "accel", "protection", "seed", "deadline", "timeout")
_REPORTS = (
    ("json", "--kvmpy-json"),
    ("ktap", "--ktap"),
    ("junit", "--junitxml"),
    ("html", "--kvmpy-html"),
)


@lab.command("shell", cls=SplitCommand, epilog="Arguments after -- are a command to run instead of a shell.")
@_machine_options
@click.pass_context
def interactive(ctx: click.Context, /, **values: Any) -> None:
    """Open a shell in the VM; leaving it powers the VM off."""
    from kvmpy.lab.runs import shell

    command = extra_arguments(ctx) or ["/bin/bash" if Path("/bin/bash").exists() else "/bin/sh", "-i"]
    sys.exit(shell(_machine(**values), command))
