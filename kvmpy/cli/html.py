# SPDX-License-Identifier: Apache-2.0
"""``kvmpy html``: one HTML page out of JSON reports."""

from __future__ import annotations

import json
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

    FILES are what --json of `kvmpy run`, `kvmpy lab run` and `kvmpy lab run --matrix` wrote.
    """
    from kvmpy.owned import write_atomically
    from kvmpy.testing import html as pages

    reports: list[dict[str, Any]] = []
    for file in files:
        try:
            reports += pages.reports_in(json.loads(file.read_text(encoding="utf-8")), str(file))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise click.ClickException(f"{file} cannot be read: {reason}") from None
        except json.JSONDecodeError as error:
            raise click.ClickException(f"{file} is not JSON: {error}") from None
        except pages.ReportError as error:
            raise click.ClickException(str(error)) from None
    try:
        text = pages.render(reports)
    except pages.ReportError as error:
        raise click.ClickException(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise click.ClickException(f"a report lacks what it must have: {error!r}") from None
    try:
        write_atomically(output, text)
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from None
