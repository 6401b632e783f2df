# SPDX-License-Identifier: Apache-2.0
"""``kvmpy results``: the reports of a run, from its journal."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click

from kvmpy.cli.options import options, pytest_args, report_on_stdout


@click.command()
@click.argument("journal", type=click.Path(path_type=Path), required=False)
@options("results")
def results(journal: Path | None, **values: object) -> None:
    """Make the reports of the run whose JOURNAL this is (default: the last one on this host).

    The exit status is that of the run; 2 if it did not come to its end. A test in which it was killed is
    reported as lost. `kvmpy run --resume` goes on behind it.
    """
    from kvmpy.testing import journals
    from kvmpy.testing.supervisor import guarded, report

    try:
        path = journal or journals.last()
        journals.readable(path)
    except journals.JournalError as error:
        raise click.ClickException(str(error)) from None
    say = partial(click.echo, err=True)
    with report_on_stdout(values):
        code = guarded(partial(report, pytest_args((), values, say), path, say))
    sys.exit(code)
