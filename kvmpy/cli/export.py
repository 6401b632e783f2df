# SPDX-License-Identifier: Apache-2.0
"""``kvmpy export``: JSON reports in the format of a database of results."""

from __future__ import annotations

import json
from pathlib import Path

import click


def _origin(_: click.Context, __: click.Parameter, value: str) -> str:
    from kvmpy.testing.kcidb import ORIGIN

    if not ORIGIN.fullmatch(value):
        raise click.BadParameter(f"{value!r}: an origin has small letters, digits and underscores only")
    return value


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--kcidb", "origin", metavar="ORIGIN", required=True, callback=_origin,
              help="As a submission to KCIDB of the CI system ORIGIN.")  # fmt: skip
@click.option("--build", metavar="ID",
              help="The build's id in KCIDB (default: one of ORIGIN that names the kernel).")  # fmt: skip
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), default="-",
              help="The file to write (default: standard output).")  # fmt: skip
def export(files: tuple[Path, ...], origin: str, build: str | None, output: Path) -> None:
    """Turn the JSON reports in FILES into one document for KCIDB, the kernel CI's common database.

    FILES are what --json of `kvmpy run`, `kvmpy lab run` and `kvmpy fleet run` wrote.
    """
    from kvmpy.owned import write_atomically
    from kvmpy.testing import html, kcidb

    if build is not None and not kcidb.ORIGIN.match(build.partition(":")[0] if ":" in build else ""):
        raise click.BadParameter(f"{build!r}: a build's id is ORIGIN:ID", param_hint="--build")
    submission = kcidb.Submission(origin, build or "")
    try:
        for file in files:
            for report in html.reports_in(html.load(file), str(file)):
                submission.add(report)
    except html.ReportError as error:
        raise click.ClickException(str(error)) from None
    text = json.dumps(submission.document(), indent=2) + "\n"
    if str(output) == "-":
        click.echo(text, nl=False)
        return
    try:
        write_atomically(output, text)
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from None
