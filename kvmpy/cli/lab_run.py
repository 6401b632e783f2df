# SPDX-License-Identifier: Apache-2.0
"""Tests in the lab, as ``kvmpy lab run`` and, without a usable KVM, ``kvmpy run`` run them."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmpy.cli.options import NOTHING, NOTHING_SELECTED, pytest_args, quick_file, selected, take_pack
from kvmpy.guest.packs import PackError
from kvmpy.lab.errors import BuildError, LabError
from kvmpy.owned import OwnedFolder
from kvmpy.testing import option_table, selection
from kvmpy.testing.option_table import RECORD_FOLDER, command_arguments, pytest_arguments

# Its own files and functions; not the copy of a tree, whose name ends in -softsev.
_SOFT_SEV = re.compile(r"(?<!-)softsev[/_.]")

if TYPE_CHECKING:
    from kvmpy.lab.bisect import Ended
    from kvmpy.lab.coverage.store import Writer
    from kvmpy.lab.kernels import Kernel
    from kvmpy.lab.qemu import Options
    from kvmpy.lab.runs import Request
    from kvmpy.testing.configurations import Configuration

DEFAULT_CPUS = 2
DEFAULT_MEMORY = 4096


def say(text: str) -> None:
    """Tell the user."""
    click.echo(f"kvmpy lab: {text}", err=True)


@contextlib.contextmanager
def lab_errors() -> Iterator[None]:
    """Print a LabError as a message, and end with exit status 3."""
    try:
        yield
    except LabError as error:
        say(str(error))
        sys.exit(3)


def machine(values: Mapping[str, Any], built: Kernel | None = None) -> Options:
    """Return the VM that the options of ``kvmpy lab shell`` describe; they go before its configuration.

    *built* is booted in place of a kernel of the cache.
    """
    from kvmpy.lab import kernels, qemu, softsev
    from kvmpy.lab.runs import accelerator

    base, *others = named(values)
    if others:
        raise click.UsageError("--configuration: one is expected here")
    wanted = replace(
        base,
        parameters=(*base.parameters, *values["parameters"]),
        cpu=(*base.cpu, *values["cpu"]),
        cpus=values["cpus"] or base.cpus,
        memory=values["memory"] or base.memory,
        nodes=values["nodes"] or base.nodes,
    )
    for word in wanted.cpu:
        qemu.check_flag(word)
    chosen, first = values["accel"], list[str]()
    soft_sev = base.soft_sev if values["soft_sev"] is None else values["soft_sev"]
    counts = values.get("coverage") is not None
    bugs = values.get("bugs") or ""
    booted = built or kernels.find(
        values["kernel"], soft_sev=bool(soft_sev), coverage=counts, bugs=bool(bugs)
    )
    if booted.soft_sev and soft_sev is not False:
        # It stands for a processor without SEV: it has been tried on an emulated one only.
        chosen, first = "tcg" if chosen == "auto" else chosen, [*softsev.PARAMETERS]
    settings = wanted.settings()
    about = wanted.name if values["configuration"] or not settings else ""
    return qemu.Options(
        booted,
        wanted.cpus or DEFAULT_CPUS,
        wanted.memory or DEFAULT_MEMORY,
        accelerator(chosen),
        (*first, *wanted.parameters),
        wanted.optional,
        wanted.cpu,
        wanted.nodes,
        f"{about} ({settings})" if about and settings else about or settings,
        bugs=bugs,
    )


def named(values: Mapping[str, Any]) -> list[Configuration]:
    """Return the configurations that the options name; the default where they name none."""
    from kvmpy.testing import configurations

    try:
        known = configurations.load(Path(name) for name in values["configurations"])
        return configurations.chosen(values["configuration"] or configurations.DEFAULT, known)
    except configurations.ConfigurationError as error:
        raise LabError(str(error)) from None


def run_tests(paths: tuple[str, ...], values: Mapping[str, Any], extra: list[str]) -> int:
    """Run tests inside as the options *values* say, and return the exit status of the command."""
    values = {**option_table.defaults("lab run"), **values}
    try:
        take_pack(values)
    except PackError as error:
        raise LabError(str(error)) from None
    values["configurations"] = tuple(str(Path(name).absolute()) for name in values["configurations"])
    if values["quick"] and values["touching"]:
        raise click.UsageError("--quick and --touching exclude each other")
    if values["select"]:
        if values["quick"] or values["touching"]:
            raise click.UsageError("--select excludes --quick and --touching")
        paths, values = selected(paths, values, Path(values["select"]))
    if values["quick"]:
        paths, values = selected(paths, values, quick_file())
    with OwnedFolder("selection") as folder:
        if values["touching"]:
            chosen = _reach(values, folder)
            if chosen is None:
                return NOTHING_SELECTED
            paths, values = selected(paths, values, chosen)
        return _run_selected(paths, values, extra)


def _reach(values: Mapping[str, Any], folder: Path) -> Path | None:
    """Return a file in *folder* with the tests that reach a change, None if there are none; tell about it."""
    from kvmpy.lab.coverage import changes, choice, maps
    from kvmpy.lab.coverage.store import Coverage

    source = values["coverage_map"]
    if source is None:
        raise click.UsageError("--touching needs --coverage-map: which tests reach what")
    known = maps.of_folder(Coverage(source)) if source.is_dir() else maps.read(source)
    changed = changes.change(values["touching"], Path(values["source"] or "."))
    found = choice.touching(known, changes.touched(changed))
    for line in found.lines():
        say(line)
    if not found.tests:
        return None
    target = folder / "tests"
    selection.write(target, [test.id for test in found.tests], values["touching"])
    return target


def _run_selected(paths: tuple[str, ...], values: Mapping[str, Any], extra: list[str]) -> int:
    from kvmpy.lab.runs import run

    if values["source"] is not None:
        return _run_source(paths, values, extra)
    wanted = named(values)
    several = bool(values["matrix"]) or len(wanted) > 1
    if values["record"] and several:
        raise click.UsageError("--record is not for --matrix: the columns' records would have the same names")
    if values["coverage"] and several:
        raise click.UsageError("--coverage is not for --matrix: a folder has the coverage of one kernel")
    if values["bugs"] and several:
        raise click.UsageError("--bugs is not for --matrix")
    if values["may_build"] and not values["kernel"] and not values["bugs"] and not values["matrix"]:
        _build_if_none(values["soft_sev"], coverage=values["coverage"] is not None)
    if several:
        return _run_matrix(paths, values, wanted, extra)
    code = run(_request(machine(values), paths, values, extra), say)
    if code in NOTHING:
        say(NOTHING[code])
    return code


def _request(vm: Options, paths: tuple[str, ...], values: Mapping[str, Any], extra: list[str]) -> Request:
    from kvmpy.lab.lane import Limits
    from kvmpy.lab.runs import Request, machines

    records = Path(values["record_dir"] or RECORD_FOLDER).absolute() if values["record"] else None
    inside = pytest_args(paths, {**values, "record_dir": records}, say, "inside")
    return Request(
        replace(vm, snapshots=vm.accel == "tcg" and not values["fresh_boot"]),
        inside,
        pytest_arguments({**values, "brief": not values["verbose"]}, "host"),
        [*extra, *pytest_arguments({"evidence": bool(values["html"])})],
        values["seed"],
        Limits(total=values["timeout"]),
        values["machines"] or machines(vm.memory),
        records,
        coverage_writer(values["coverage"], vm),
        values["coverage_by"] == "test",
    )


def _run_source(paths: tuple[str, ...], values: Mapping[str, Any], extra: list[str]) -> int:
    """Build and run the tree of ``--source``; the status is what :mod:`kvmpy.lab.bisect` says."""
    from kvmpy.lab import bisect
    from kvmpy.lab.runs import run

    others = [f"--{name}" for name in ("kernel", "matrix", "bugs") if values[name]]
    others += ["--build"] if values["may_build"] else []
    if others:
        raise click.UsageError(f"--source builds the kernel that is booted: not with {' and '.join(others)}")

    def judge(ended: Ended) -> int:
        status, words = bisect.judge(ended)
        say(f"{values['source']}: {words}")
        return status

    try:
        # Before a build that takes minutes.
        if len(named(values)) > 1:
            raise click.UsageError("--source runs one configuration: not with several")
        pytest_args(paths, values, lambda _: None, "inside")
        with OwnedFolder("kernel") as folder:
            booted = _built_apart(values["source"], values["soft_sev"], folder)
            return run(_request(machine(values, booted), paths, values, extra), say, judge)
    except BuildError as error:
        say(str(error))
        say(f"{values['source']}: cannot be tested: it does not build")
        return bisect.UNTESTABLE
    except LabError as error:
        say(str(error))
        return bisect.INTERNAL
    except (KeyboardInterrupt, click.Abort):
        return bisect.INTERRUPTED
    except (click.ClickException, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - Python's own status for a traceback would call the tree bad
        traceback.print_exc()
        return bisect.INTERNAL


def _built_apart(tree: Path, soft_sev: bool | None, folder: Path) -> Kernel:
    from kvmpy.lab import build as builds

    return _as_it_fits(soft_sev, lambda wanted: builds.from_source(tree, say, soft_sev=wanted, apart=folder))


def _as_it_fits(soft_sev: bool | None, build: Callable[[bool], Kernel]) -> Kernel:
    """Return what *build* makes: with the software AMD-SP, unless it is not wanted or does not fit."""
    from kvmpy.lab.hooks import HookError

    try:
        return build(soft_sev is not False)
    except BuildError as error:
        # A hook that does not fit, an option that it needs, or a file of its own that does not compile.
        if soft_sev is not None or not (isinstance(error, HookError) or _SOFT_SEV.search(error.what)):
            raise
        say(str(error))
        say("building it without the software AMD-SP: there will be no SEV inside")
        return build(False)


def _run_matrix(
    paths: tuple[str, ...], values: Mapping[str, Any], wanted: list[Configuration], extra: list[str]
) -> int:
    from kvmpy.lab import kernels
    from kvmpy.lab.matrix import Column, run_matrix, titles
    from kvmpy.lab.runs import machines

    names = [name.strip() for name in (values["matrix"] or "").split(",") if name.strip()]
    found = [kernels.find(name, soft_sev=bool(values["soft_sev"])) for name in names or [values["kernel"]]]
    columns = [
        Column(
            kernel,
            configuration.name if values["configuration"] else None,
            values["memory"] or configuration.memory or DEFAULT_MEMORY,
        )
        for kernel in found
        for configuration in wanted
    ]
    known = titles(columns)
    if twice := [title for title in known if known.count(title) > 1]:
        raise LabError(f"two columns are the same: {twice[0]}")
    reports = ("json", "ktap", "junit", "html")
    targets = {name: values[name] for name in reports if values[name] is not None}
    at_once = values["machines"] or machines(max(column.memory for column in columns))
    if values["html"]:
        extra = [*extra, *pytest_arguments({"evidence": True})]
    return run_matrix(columns, matrix_arguments(paths, values), extra, targets, at_once, say)


def coverage_writer(folder: Path | None, vm: Options) -> Writer | None:
    """Return what adds to *folder* what is counted in *vm*, None without a folder."""
    if folder is None:
        return None
    from kvmpy.lab.coverage import store

    store.create(folder, vm.kernel)
    return store.Writer(folder, store.OWN_SUITE, vm.parameters)


def _build_if_none(soft_sev: bool | None, *, coverage: bool = False) -> None:
    """Build a kernel of the wanted kind; when any will do, one that can be both, where the hooks fit."""
    from kvmpy.lab import build as builds
    from kvmpy.lab import kernels
    from kvmpy.lab.debian import DEFAULT_SUITE

    if coverage:
        if any(kernel.coverage and (kernel.soft_sev or not soft_sev) for kernel in kernels.cached()):
            return
    elif builds.present(bool(soft_sev)):
        return
    if not coverage and any(kernel.serves(bool(soft_sev)) for kernel in kernels.cached()):
        say("the lab kernel is outdated: building one, which takes some minutes (without --build it will do)")
    else:
        say("there is no lab kernel yet: building one, which takes some minutes")
    _as_it_fits(
        soft_sev,
        lambda wanted: builds.from_debian(DEFAULT_SUITE, say, soft_sev=wanted, coverage=coverage),
    )


def matrix_arguments(paths: tuple[str, ...], values: Mapping[str, Any]) -> list[str]:
    """Return the arguments of ``kvmpy lab run`` for one column of a matrix, without what makes the column."""
    each = {option.name: values[option.name] for option in option_table.of("lab run") if option.each}
    return [*paths, *command_arguments("lab run", each)]
