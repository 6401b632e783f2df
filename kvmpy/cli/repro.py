# SPDX-License-Identifier: Apache-2.0
"""``kvmpy repro``: turn a record into a C reproducer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmpy.cli.records import interruptible, load, script_of, step_index

if TYPE_CHECKING:
    from kvmpy.debug.record.model import Entry, Record
    from kvmpy.debug.record.script import Script


@click.command()
@click.argument("record", type=click.Path())
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    default="-",
    help="The C file (default: standard output).",
)
@click.option(
    "--at", type=int, metavar="N", help="Reproduce ioctl N (default: the last that failed or changed state)."
)
@click.option(
    "--shrink/--no-shrink",
    default=None,
    help="Minimise the record first, by replaying it here (default: if it reproduces).",
)
@click.option(
    "--attempts", type=int, default=300, show_default=True, help="Maximum number of replays while minimising."
)
@click.option("--all", "everything", is_flag=True, help="Keep every ioctl.")
def repro(
    record: str, output: str, at: int | None, shrink: bool | None, attempts: int, everything: bool
) -> None:
    """Turn RECORD into a self-contained C reproducer.

    If the record reproduces on this host's KVM, it is minimised first.
    """
    from kvmpy.debug.record.prune import prune, target_of
    from kvmpy.debug.record.repro import write_c
    from kvmpy.debug.record.script import select

    loaded = load(record)
    script = script_of(loaded, record)
    target = script.steps[step_index(script, at)] if at is not None else target_of(script)
    status = 0
    if everything:
        chosen = select(script, script.steps[: target.index + 1])
    else:
        chosen = prune(script, target)
        loaded = loaded.with_entries(chosen_entries(loaded, chosen))
        if shrink is not False and os.access(
            os.environ.get("KVMPY_DEV_KVM") or "/dev/kvm", os.R_OK | os.W_OK
        ):
            loaded, status = _cut(loaded, target.entry.order, attempts, insist=bool(shrink))
        elif shrink:
            raise click.ClickException("--shrink needs access to /dev/kvm")
        script = script_of(loaded, record)
        target = next(step for step in script.steps if step.entry.order == target.entry.order and step.ioctl)
        chosen = prune(script, target)
    final = next(s for s in chosen.steps if s.entry.order == target.entry.order and s.ioctl is not None)
    text = write_c(chosen, final)
    if output == "-":
        click.echo(text, nl=False)
        sys.exit(status)
    try:
        Path(output).write_text(text)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    name = Path(output).stem
    click.echo(f"gcc -O2 -Wall -Wextra -Werror -o {name} {output} -pthread && ./{name}")
    sys.exit(status)


def chosen_entries(record: Record, chosen: Script) -> list[Entry]:
    """Return the entries of *record* that *chosen*, a script, consists of, with objects and memory."""
    from kvmpy.debug.record.events import Map, Memory, Object

    kept = {id(step.entry) for step in chosen.steps}
    return [e for e in record.entries if id(e) in kept or isinstance(e.what, (Map, Memory, Object))]


def _cut(record: Record, order: int, attempts: int, *, insist: bool) -> tuple[Record, int]:
    """Return the smallest record, and the exit status of the signal that ended the search for it, or 0."""
    from kvmpy.debug.record.condition import SameOutcome
    from kvmpy.debug.record.shrink import Shrinker, consistent
    from kvmpy.debug.record.worker import Player

    record = record.with_entries(consistent(record.entries))
    with (
        Player() as player,
        Shrinker(
            record,
            SameOutcome(player, order),
            limit=attempts,
            progress=lambda text: click.echo(text, err=True),
        ) as shrinker,
    ):
        if not shrinker.holds():
            if insist:
                raise click.ClickException("the record does not reproduce on this host's KVM")
            click.echo("the record does not reproduce on this host's KVM: not minimised", err=True)
            return record, 0
        with interruptible() as ended:
            shrinker.run()
        return shrinker.best, ended()
