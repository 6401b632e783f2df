# SPDX-License-Identifier: Apache-2.0
"""``kvmpy replay``: replay a record and compare the results."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kvmpy.cli.records import load, numbered, script_of, step_index

if TYPE_CHECKING:
    from kvmpy.debug.record.replay import Played
    from kvmpy.debug.record.script import Script

SAME, DIFFERENT, FAILED = 0, 1, 2


def side_by_side(script: Script, played: Played) -> str:
    """Return what was asked, and what came of it then and now, in columns."""
    from kvmpy.debug.record.csource import make_struct
    from kvmpy.debug.record.model import request_name

    step = played.step
    ioctl = step.ioctl
    owner = script.objects.get(ioctl.object) if ioctl is not None else None
    number = numbered(script).get(step.index, 0)
    lines = [f"ioctl {number}: {request_name(step.entry.what)} on {owner.name if owner else '?'}"]
    node = step.argument.node if step.argument is not None else None
    if node is not None and node.struct is not None:
        try:
            lines.append(f"  argument: {make_struct(node.struct, node.data)!r}"[:2000])
        except ValueError:
            lines.append(f"  argument: {node.data.hex()}"[:2000])
    elif ioctl is not None and ioctl.arg:
        lines.append(f"  argument: {ioctl.arg:#x}")
    rows = [("", "recorded", "now"), *((d.name, d.recorded, d.now) for d in played.differences)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines += [f"  {a:<{widths[0]}}  {b:<{min(widths[1], 60)}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join(lines)


@click.command()
@click.argument("record", type=click.Path())
@click.option("--until", type=int, metavar="N", help="Stop after the N-th ioctl.")
@click.option("--stop-on-difference", is_flag=True, help="Stop at the first ioctl with a different result.")
@click.option("-v", "--verbose", is_flag=True, help="Show every ioctl.")
def replay(record: str, until: int | None, stop_on_difference: bool, verbose: bool) -> None:
    """Replay the ioctls of RECORD in the same order and threads, and compare the results.

    Exit status: 0 same results, 1 different results, 2 the replay could not run to its end, 3 the record
    needs more than one process.
    """
    from kvmpy.core.kvm import device_path
    from kvmpy.debug.record.compare import result_text
    from kvmpy.debug.record.model import request_name
    from kvmpy.debug.record.replay import Replay

    loaded = load(record)
    script = script_of(loaded, record)
    numbers = numbered(script)

    def show(played: Played) -> None:
        if verbose:
            mark = "!" if played.differences else " "
            name = request_name(played.step.entry.what)
            click.echo(f"{mark}{numbers[played.step.index]:6} {name:<32} {result_text(played.now)}")

    last = None if until is None else step_index(script, until) + 1
    player = Replay(
        script, until=last, stop_on_difference=stop_on_difference, each=show, device=device_path()
    )
    try:
        result = player.run()
    except OSError as error:
        raise click.ClickException(str(error)) from error
    first = result.first_difference
    different = sum(1 for each in result.played if each.differences)
    if first is not None:
        click.echo("first difference, " + side_by_side(script, first))
    click.echo(f"{len(result.played)} ioctls replayed, {different} with a different result")
    if result.stopped:
        click.echo(f"stopped: {result.stopped}", err=True)
    sys.exit(DIFFERENT if different else FAILED if result.stopped else SAME)
