# SPDX-License-Identifier: Apache-2.0
"""``kvmpy shrink``: minimise a record."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kvmpy.cli.records import interruptible, load, script_of, step_index


@click.command()
@click.argument("record", type=click.Path())
@click.option(
    "--until", metavar="EXPR", help="The condition to preserve, such as 'errno==EINVAL at KVM_SET_SREGS'."
)
@click.option("--test", metavar="CMD", help="A command that exits with 0 while the record still reproduces.")
@click.option("--at", type=int, metavar="N", help="Keep ioctl N and its recorded result.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The minimised record (default: RECORD with .small).",
)
@click.option("--attempts", type=int, default=5000, show_default=True, help="Stop after this many attempts.")
def shrink(
    record: str, until: str | None, test: str | None, at: int | None, output: str | None, attempts: int
) -> None:
    """Minimise RECORD: remove ioctls, pages, bytes of memory and struct fields that are not needed.

    By default the last ioctl that failed or changed state must keep its recorded result.  Ctrl-C or a
    signal that ends it keeps the smallest record so far.
    """
    from kvmpy.debug.record.condition import (
        Condition,
        ConditionError,
        SameOutcome,
        ShellTest,
        UntilExpression,
        parse,
    )
    from kvmpy.debug.record.prune import target_of
    from kvmpy.debug.record.shrink import Shrinker, save, size_text
    from kvmpy.debug.record.worker import Player

    if sum(option is not None for option in (until, test, at)) > 1:
        raise click.UsageError("give only one of --until, --test and --at")
    loaded = load(record)
    script = script_of(loaded, record)
    target = output or str(Path(record).with_suffix(".small.rec"))
    with Player() as player:
        condition: Condition
        if test is not None:
            condition = ShellTest(test)
        elif until is not None:
            try:
                condition = UntilExpression(player, parse(until))
            except ConditionError as error:
                raise click.BadParameter(str(error), param_hint="--until") from error
        else:
            step = script.steps[step_index(script, at)] if at is not None else target_of(script)
            condition = SameOutcome(player, step.entry.order)
        with Shrinker(
            loaded, condition, limit=attempts, progress=lambda text: click.echo(text, err=True)
        ) as shrinker:
            click.echo(f"before: {size_text(loaded)}", err=True)
            if not shrinker.holds():
                raise click.ClickException(f"{record} does not reproduce here, so it cannot be minimised")
            with interruptible() as ended:
                shrinker.run()
            try:
                save(shrinker.best, target)
            except OSError as error:
                raise click.ClickException(f"{target} cannot be written: {error.strerror}") from None
            click.echo(f"{target}: {size_text(shrinker.best)}, {shrinker.attempts} attempts")
            if ended():
                click.echo("interrupted: wrote the smallest record so far", err=True)
                sys.exit(ended())
