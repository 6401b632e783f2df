# SPDX-License-Identifier: Apache-2.0
"""``kvmpy fleet``: tests on many hosts."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmpy.cli.options import (
    NOTHING,
    PYTEST_EPILOG,
    SplitCommand,
    extra_arguments,
    options,
    pytest_args,
    report_on_stdout,
    suite_folder,
    take_pack,
    targets,
)
from kvmpy.fleet import fleetfile, wire
from kvmpy.fleet.errors import FleetError
from kvmpy.guest.packs import PackError
from kvmpy.owned import OwnedFolder
from kvmpy.testing.option_table import SEED_BITS, command_arguments, pytest_arguments

if TYPE_CHECKING:
    from kvmpy.lab.qemu import Options
    from kvmpy.testing.journal import History

_FAILED = 3
_JOURNALS = "fleet-journals"
_REPORTS = ("json", "ktap", "html")
_FILE = click.Path(path_type=Path)
_AT = click.option("--at", metavar="HOST:PORT", help="The fleet's address (default: this user's).")
_CERTIFICATE = click.option(
    "--certificate", metavar="FILE", type=_FILE, help="The fleet's certificate (default: this user's)."
)


def say(text: str) -> None:
    """Tell the user."""
    with contextlib.suppress(OSError):
        click.echo(f"kvmpy fleet: {text}", err=True)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (FleetError, PackError) as error:
        say(str(error))
        sys.exit(_FAILED)


@click.group()
def fleet() -> None:
    """Run tests on many hosts."""


@fleet.command()
@click.option("--listen", metavar="ADDRESS", default="0.0.0.0", show_default=True,  # noqa: S104 - TLS guards it
              help="The address to listen at.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8786, show_default=True,
              help="The port; 0 takes a free one.")  # fmt: skip
@click.option("--folder", type=_FILE, help="Where certificate and address go (default: in the cache).")
def serve(listen: str, port: int, folder: Path | None) -> None:
    """Serve a fleet: hosts join it, and runs use it. Makes a certificate, unless there is one."""
    with _errors():
        wire.need()
        from kvmpy.fleet import desk

        place = folder or wire.folder()
        sys.exit(desk.serve(place, listen, port, say))


@fleet.command()
@click.argument("address", required=False)
@_CERTIFICATE
@click.option("--name", help="What this host is called (default: its host name).")
@click.option("--dangerous", is_flag=True, help="Allow tests that can crash an unfixed host.")
@options("fleet join")
def join(
    address: str | None, certificate: Path | None, name: str | None, dangerous: bool, **values: Any
) -> None:
    """Let this host work for the fleet at ADDRESS, until the fleet ends.

    Without ADDRESS it is that of this user's `kvmpy fleet serve` on this machine.
    """
    with _errors():
        wire.need()
        from kvmpy.fleet import host

        take_pack(values)
        given = wire.full_address(address) if address else wire.known_address(wire.folder())
        known = certificate or wire.folder() / wire.CERTIFICATE
        called = name or host.default_name()
        booted = _machine(values) if values["in_lab"] else None
        sys.exit(host.join(given, known, called, say, booted, dangerous=dangerous))


def _machine(values: Mapping[str, Any]) -> Options:
    """Return the machine of the lab that the options describe."""
    from kvmpy.cli.lab_run import machine
    from kvmpy.lab import tools
    from kvmpy.lab.errors import LabError

    try:
        tools.need(tools.RUN, "the lab")
        booted = machine(values)
        return replace(booted, snapshots=booted.accel == "tcg")
    except LabError as error:
        raise FleetError(str(error)) from None


@contextlib.contextmanager
def _asked(at: str | None, certificate: Path | None) -> Iterator[Any]:
    """Within the block there is a client of distributed."""
    wire.need()
    from kvmpy.fleet.client import connected

    address = wire.full_address(at) if at else wire.known_address(wire.folder())
    with connected(address, certificate or wire.folder() / wire.CERTIFICATE) as client:
        yield client


@fleet.command()
@_AT
@_CERTIFICATE
def hosts(at: str | None, certificate: Path | None) -> None:
    """List the hosts that have joined, and what they offer."""
    from kvmpy.testing.host import HostSummary

    with _errors(), _asked(at, certificate) as client:
        import msgspec

        known = client.sync(client.scheduler.kvmpy_hosts)["hosts"]
        for address, about in known.items():
            summary = msgspec.convert(about["summary"], HostSummary)
            click.echo(f"{about['name']}  ({address}, kvmpy {about['kvmpy']}, Python {about['python']})")
            for line in summary.lines():
                click.echo(f"  {line}")
        if not known:
            click.echo("no host has joined")


@fleet.command()
@_AT
@_CERTIFICATE
def status(at: str | None, certificate: Path | None) -> None:
    """Say whether a fleet is served, how many hosts it has, and whether a run uses it."""
    with _errors(), _asked(at, certificate) as client:
        known = client.sync(client.scheduler.kvmpy_hosts)
        number = len(known["hosts"])
        click.echo(f"{client.scheduler.address}: {number} host{'s' if number != 1 else ''}")
        click.echo("a run uses it" if known["run"] else "no run uses it")


@fleet.command()
@click.argument("name")
@click.argument("action", type=click.Choice(fleetfile.ACTIONS))
@click.option("--hosts", "file", type=_FILE, required=True, help="The hosts file.")
def power(name: str, action: str, file: Path) -> None:
    """Switch the power of the host NAME by its command of the hosts file, and return that one's status."""
    import subprocess

    with _errors():
        known = {entry.name: entry for entry in fleetfile.load(file)}
        if name not in known:
            raise FleetError(f"{file} has no host {name}; there are {', '.join(known)}")
        try:
            done = subprocess.run(known[name].power_command(action), check=False, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FleetError(f"{name}: its power command failed: {error}") from None
        sys.exit(done.returncode if done.returncode >= 0 else _FAILED)


@fleet.command(cls=SplitCommand, epilog=PYTEST_EPILOG)
@click.argument("paths", nargs=-1)
@options("fleet run")
@click.pass_context
def run(ctx: click.Context, /, paths: tuple[str, ...], **values: Any) -> None:
    """Run the selftests, or the tests in PATHS, on the hosts of a fleet.

    Without --local and --hosts those that have joined this user's `kvmpy fleet serve`.
    """
    extra = extra_arguments(ctx)
    command = [*command_arguments("fleet run", values), *paths, *(["--", *extra] if extra else [])]
    with _errors(), report_on_stdout(values):
        wire.need()
        code = _run(ctx, paths, values, extra, command)
    if code in NOTHING:
        say(NOTHING[code])
    sys.exit(code)


def _as_before(
    ctx: click.Context, history: History, paths: tuple[str, ...], values: dict[str, Any], extra: list[str]
) -> tuple[tuple[str, ...], dict[str, Any], list[str]]:
    """Return what the run of the journal was started with, where this command says nothing else."""
    if history.complete:
        raise FleetError("that run came to its end")
    earlier = run.make_context("run", list(history.command))
    for name in values:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            values[name] = earlier.params[name]
    return paths or earlier.params["paths"], values, extra or extra_arguments(earlier)


def _run(
    ctx: click.Context, paths: tuple[str, ...], values: dict[str, Any], extra: list[str], command: list[str]
) -> int:
    from kvmpy.testing import journal, journals

    kept, resume = values["journal"], bool(values["resume"])
    seed = values["seed"]
    try:
        if resume:
            kept = kept or journals.last(unfinished=True, kind=_JOURNALS)
            history = journals.readable(kept)
            paths, values, extra = _as_before(ctx, history, paths, values, extra)
            seed = history.seed
            say(f"going on from {kept}")
            take_pack(values)
        else:
            # Before there is a journal: what it names may be wrong.
            take_pack(values)
            targets(paths, suite_folder())
            _entries(values)
            kept = kept or journals.fresh(_JOURNALS)
            if kept is None:
                raise FleetError("there is no place for a journal: name one with --journal FILE")
            journal.create_kept(kept, command)
        with journals.writing(kept):
            seed = secrets.randbits(SEED_BITS) if seed is None else seed
            return _on_hosts(paths, {**values, "seed": seed}, extra, kept, resume)
    except journals.JournalError as error:
        raise FleetError(str(error)) from None
    except FileExistsError:
        raise FleetError(f"{kept} is there already; --resume goes on from it") from None
    except OSError as error:
        raise FleetError(f"{kept}: {error.strerror or error}") from None


def _entries(values: Mapping[str, Any]) -> list[fleetfile.Entry]:
    from kvmpy.fleet.host import MAX_DEATHS, default_name

    entries = fleetfile.load(values["hosts"]) if values["hosts"] else []
    for number in range(values["local"] or 0):
        entries.append(fleetfile.Entry(f"{default_name()}-{number + 1}", local=True, deaths=MAX_DEATHS))
    return entries


def _on_hosts(
    paths: tuple[str, ...], values: dict[str, Any], extra: list[str], kept: Path, resume: bool
) -> int:
    from kvmpy.fleet.client import connected
    from kvmpy.fleet.launch import Server
    from kvmpy.fleet.run import FleetRun, Request
    from kvmpy.lab.lane import Limits

    if values["local"] and values["at"]:
        raise click.UsageError("--local has a fleet of its own: not with --at")
    entries = _entries(values)
    inside = [*pytest_arguments(values, "inside"), *pytest_arguments({"seed": values["seed"]}), *extra]
    inside += pytest_arguments({"evidence": bool(values["html"])})
    listing = pytest_args(paths, {**values, "verbose": True}, say, "inside")
    plugins = ["-p", "no:xdist", "-p", "no:cacheprovider"]
    with OwnedFolder("fleet") as folder, contextlib.ExitStack() as stack:
        own = values["at"] is None and any(entry.local or entry.ssh for entry in entries)
        place = folder if own else None
        if own:
            listen = "0.0.0.0" if any(entry.ssh for entry in entries) else "127.0.0.1"  # noqa: S104
            server = stack.enter_context(contextlib.closing(Server(folder, listen)))
            address = server.address
        else:
            address = wire.full_address(values["at"]) if values["at"] else wire.known_address(wire.folder())
        certificate = values["certificate"] or (place or wire.folder()) / wire.CERTIFICATE
        client = stack.enter_context(connected(address, certificate))
        request = Request(
            paths=paths,
            listing=[sys.executable, "-m", "pytest", *plugins, *listing, *extra],
            arguments=inside,
            seed=values["seed"],
            matrix=bool(values["matrix_of_hosts"]),
            on=values["on"],
            entries=entries,
            limits=Limits(grace=values["margin"]),
            wait=values["wait"],
            book=kept,
            resumed=resume,
        )
        outcome = FleetRun(request, client, folder, certificate, say).run()
        files = {name: Path(values[name]) for name in _REPORTS if values[name] is not None}
        written = outcome.write(files, say)
        outcome.show()
        code = outcome.exit_status()
        return code if written else code or _FAILED
