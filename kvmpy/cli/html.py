# SPDX-License-Identifier: Apache-2.0
"""``kvmpy html``: one HTML page out of JSON reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The page to write.",
)
def html(files: tuple[Path, ...], output: Path) -> None:
    """Turn the JSON reports in FILES into one HTML page with the verdicts of all kernels side by side.

    FILES are what --json of `kvmpy run`, `kvmpy lab run` and `kvmpy lab run --matrix` wrote, or one file
    that --json of `kvmpy compare` wrote.
    """
    from kvmpy.owned import write_atomically
    from kvmpy.testing import html as pages
    from kvmpy.testing.compare import SCHEMA as COMPARISON
    from kvmpy.testing.html import comparison

    reports: list[dict[str, Any]] = []
    text = ""
    for file in files:
        try:
            document = pages.load(file)
            if len(files) == 1 and isinstance(document, dict) and document.get("schema") == COMPARISON:
                text = comparison.render(document, str(file))
            else:
                reports += pages.reports_in(document, str(file))
        except pages.ReportError as error:
            raise click.ClickException(str(error)) from None
    try:
        text = text or pages.render(reports)
    except pages.ReportError as error:
        raise click.ClickException(str(error)) from None
    try:
        write_atomically(output, text)
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from None
