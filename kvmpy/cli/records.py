# SPDX-License-Identifier: Apache-2.0
"""Records as commands take them: loaded, made into a script, an ioctl named by its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmpy.debug.record.model import Record
    from kvmpy.debug.record.script import Script

PROCESSES = 3


class OneProcessOnly(click.ClickException):
    """A record that takes more than one process."""

    exit_code = PROCESSES


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the block alone: what it came to so far can be written.

    Yields what returns the exit status of that signal once the block is over, 0 where none came.
    """
    status = 0
    try:
        yield lambda: status
    except KeyboardInterrupt:
        status = 130
    except SystemExit as ended:
        status = int(ended.code or 0)


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
    first = next((index for index, each in numbered(script).items() if each == number), None)
    if first is None:
        raise click.ClickException(f"there is no ioctl {number}: the record has {len(numbered(script))}")
    return first
