# SPDX-License-Identifier: Apache-2.0
"""``kvmpy replay``: replay a record and compare the results."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmpy.debug.record.model import Record
    from kvmpy.debug.record.replay import Played
    from kvmpy.debug.record.script import Script

SAME, DIFFERENT, FAILED, PROCESSES = 0, 1, 2, 3


class OneProcessOnly(click.ClickException):
    """A record that takes more than one process."""

    exit_code = PROCESSES


def load(path: str) -> Record:
    """Return the record at *path*, with a word about what of it could not be read; ClickException."""
    from kvmpy.debug.record.format import RecordError, RecordVersionError
    from kvmpy.debug.record.model import Record

    try:
        record = Record.load(path)
    except RecordVersionError as error:
        about = "".join(f"\n  {key}: {value}" for key, value in error.host.items())
        raise click.ClickException(f"{path}: {error}{about}") from error
    except (RecordError, OSError) as error:
        raise click.ClickException(f"{path}: {error}") from error
    if record.problems or not record.complete:
        click.echo(f"{path}: {record.describe()}", err=True)
    for entry in record.in_flight:
        from kvmpy.debug.record.model import request_name

        click.echo(f"{path}: {request_name(entry.what)} never returned", err=True)
    return record


def script_of(record: Record, path: str) -> Script:
    """Return *record* as a script; ClickException where there is nothing in it or it makes no sense.

    Its exit status is PROCESSES where the record needs more than one process.
    """
    from kvmpy.debug.record.format import RecordError
    from kvmpy.debug.record.script import ProcessesError, build

    if not record.ioctls:
        raise click.ClickException(f"{path}: the record has no ioctl that returned")
    try:
        return build(record)
    except ProcessesError as error:
        raise OneProcessOnly(f"{path}: {error}") from error
    except (RecordError, ValueError, KeyError) as error:
        raise click.ClickException(f"{path}: {error}") from error


def numbered(script: Script) -> dict[int, int]:
    """Return the number of each ioctl, from 1, by the index of its step."""
    steps = [step.index for step in script.steps if step.ioctl is not None]
    return {index: number for number, index in enumerate(steps, 1)}


def step_index(script: Script, number: int) -> int:
    """Return the index of the step that is ioctl *number*; ClickException where there is none."""
    found = next((index for index, each in numbered(script).items() if each == number), None)
    if found is None:
        raise click.ClickException(f"there is no ioctl {number}: the record has {len(numbered(script))}")
    return found


def side_by_side(script: Script, played: Played) -> str:
    """Return what was asked, and what came of it then and now, in columns."""
    from kvmpy.debug.record.csource import make_struct
    from kvmpy.debug.record.model import request_name

    step = played.step
    what = step.ioctl
    owner = script.objects.get(what.object) if what is not None else None
    number = numbered(script).get(step.index, 0)
    lines = [f"ioctl {number}: {request_name(step.entry.what)} on {owner.name if owner else '?'}"]
    node = step.argument.node if step.argument is not None else None
    if node is not None and node.struct is not None:
        try:
            lines.append(f"  argument: {make_struct(node.struct, node.data)!r}"[:2000])
        except ValueError:
            lines.append(f"  argument: {node.data.hex()}"[:2000])
    elif what is not None and what.arg:
        lines.append(f"  argument: {what.arg:#x}")
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
