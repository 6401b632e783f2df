# SPDX-License-Identifier: Apache-2.0
"""``kvmpy abi``: what kvmpy knows of the kernel's interface, and whether kernel headers agree."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvmpy.uapi.abi import Report


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def abi(ctx: click.Context, as_json: bool) -> None:
    """Show the ioctls, structs and constants that kvmpy knows.

    Without a command, print a table of the ioctls; with --json, print everything.
    """
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError(f"put --json after the command: kvmpy abi {ctx.invoked_subcommand} --json")
        return
    from kvmpy.uapi.abi import content

    if as_json:
        click.echo(json.dumps(content(), indent=2))
    else:
        _summary(content())


def _summary(everything: dict[str, Any]) -> None:
    from rich.table import Table

    from kvmpy.testing.table import plain_console

    table = Table(title=f"KVM ioctls of x86 Linux {everything['linux']}")
    for title in ("ioctl", "number", "on", "argument", "struct", "capability"):
        table.add_column(title, no_wrap=True)
    for name, row in everything["ioctls"].items():
        table.add_row(
            name,
            f"{row['nr']:#010x}",
            " ".join((row["fd"], *row["also"])),
            row["arg"],
            row["struct"] or row["scalar"] or "",
            row["cap"] or "",
        )
    console = plain_console()
    console.print(table)
    console.print(
        f"{len(everything['ioctls'])} ioctls, {len(everything['structs'])} structs, "
        f"{len(everything['constants'])} constants, {len(everything['sev_commands'])} SEV commands; "
        "`kvmpy abi show NAME` shows one, `kvmpy abi --json` all."
    )


@abi.command()
@click.argument("names", nargs=-1, required=True)
def show(names: tuple[str, ...]) -> None:
    """Show ioctls, structs, commands or constants by NAME."""
    from kvmpy.uapi.abi import content

    everything = content()
    for name in names:
        text = "\n".join(_describe(name, everything))
        if not text:
            import difflib

            known = [key for part in everything.values() if isinstance(part, dict) for key in part]
            close = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise click.ClickException(
                f"{name} is not an ioctl, struct, command or constant that kvmpy knows{hint}"
            )
        click.echo(text)


def _describe(name: str, everything: dict[str, Any]) -> list[str]:
    from kvmpy.uapi.ioctls import IOCTLS

    lines = []
    if name in IOCTLS:
        entry = IOCTLS[name]
        kinds = ", ".join(f"{kind} ({entry.cap_on(kind) or 'always there'})" for kind in entry.fds)
        pointee = f"struct {entry.struct}" if entry.struct else entry.scalar
        lines += [f"{name} = {entry.nr:#x}", f"  {entry.doc}", f"  issued on: {kinds}"]
        lines.append(f"  argument: {entry.arg}{f', {pointee}' if pointee else ''}")
    if name in everything["structs"]:
        layout = everything["structs"][name]
        lines.append(f"struct {name}: {layout['size']} bytes")
        lines += [f"  {place[0]:#6x} {place[1]:5} {path}" for path, place in layout["fields"].items()]
        lines += [
            f"  bit {place[0]}, {place[1]} wide: {path}" for path, place in layout.get("bits", {}).items()
        ]
    if name in everything["constants"]:
        number = everything["constants"][name]
        lines.append(f"{name} = {number} ({number:#x})")
    for part in ("sev_commands", "sev_platform_commands", "tdx_commands"):
        if name in everything[part]:
            row = everything[part][name]
            pointee = f", struct {row['struct']}" if row["struct"] else ""
            lines.append(f"  command of {', '.join(row['families'])}: {row['arg']}{pointee}")
    return lines


@abi.command()
@click.option(
    "--headers",
    "directory",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A `make headers_install` tree, an unpacked linux-libc-dev, or an include directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option(
    "--fail-on-drift",
    is_flag=True,
    help="Also exit 1 when the headers have more than kvmpy, unless the reason is known.",
)
def check(directory: Path, as_json: bool, fail_on_drift: bool) -> None:
    """Compare with kernel headers: exit 1 when a number, size or offset differs.

    Compiles a probe against the headers.  What they have and kvmpy lacks is listed apart, as drift.
    """
    from kvmpy.uapi import abi as tables
    from kvmpy.uapi.headers import HeaderError

    try:
        report = tables.check(directory)
    except HeaderError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        _print_report(report, directory)
    if report.differences or (fail_on_drift and report.unexplained):
        sys.exit(1)


def _print_report(report: Report, directory: Path) -> None:
    from kvmpy.uapi.abi import LINUX

    click.echo(f"kvmpy (Linux {LINUX}) against {directory}: {report.compared} numbers compared")
    click.echo(f"differences: {len(report.differences) or 'none'}")
    for difference in report.differences:
        click.echo(f"  {difference}")
    unexplained = report.unexplained
    explained = len(report.drift) - len(unexplained)
    click.echo(
        f"drift (only in the headers): {len(unexplained)} unexplained, {explained} ignored (reason known)"
    )
    for drift in unexplained:
        click.echo(f"  {drift}")
    left_out: dict[str, list[str]] = {}
    for drift in report.drift:
        if drift.reason:
            left_out.setdefault(drift.reason, []).append(f"{drift.kind} {drift.name}")
    for reason, names in left_out.items():
        click.echo(f"ignored, {reason}: {len(names)}")
        for name in names:
            click.echo(f"  {name}")
    if report.absent:
        click.echo(f"only in kvmpy (the headers are of another kernel): {len(report.absent)}")
        for name in report.absent:
            click.echo(f"  {name}")
