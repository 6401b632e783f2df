# SPDX-License-Identifier: Apache-2.0
"""``kvmpy timeline``: a record as a timeline for Perfetto's viewer."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("record", metavar="REC", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="The timeline to write, in Trace Event JSON."
)
def timeline(record: Path, output: str) -> None:
    """Turn the record REC into a timeline with a track for each thread and each vCPU.

    Open it in the Perfetto UI ("Open trace file") or in chrome://tracing.
    """
    from kvmpy.debug.decode.timeline import TimelineError
    from kvmpy.debug.decode.timeline_record import write_timeline
    from kvmpy.debug.record.format import RecordError
    from kvmpy.debug.record.model import Record

    try:
        loaded = Record.load(record)
    except OSError as error:
        raise click.ClickException(f"{record} cannot be read: {error.strerror}") from None
    except RecordError as error:
        raise click.ClickException(f"{record}: {error}") from None
    try:
        count = write_timeline(loaded, output)
    except TimelineError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from None
    click.echo(f"{output}: {count} events of {loaded.describe()}")
