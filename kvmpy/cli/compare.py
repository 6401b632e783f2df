# SPDX-License-Identifier: Apache-2.0
"""``kvmpy compare``: what is new between the JSON reports of two runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

WORSE, UNREADABLE = 1, 3
# Of one kind; the JSON and the page have all.
_SHOWN = 20


class _UnreadableError(click.ClickException):
    exit_code = UNREADABLE


def _read(files: Sequence[Path]) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Return the reports in *files*, and the kernels of matrices that left none."""
    from kvmpy.testing import html

    reports, without = [], []
    for file in files:
        try:
            document = html.load(file)
            found = html.reports_in(document, str(file))
        except html.ReportError as error:
            raise _UnreadableError(str(error)) from None
        if not any(report["tests"] for report in found):
            raise _UnreadableError(f"{file} has no test that ran")
        reports += [(str(file), report) for report in found]
        there = {report.get("name") for report in found}
        without += [kernel for kernel in document.get("reports", ()) if kernel not in there]
    return reports, without


def _write(path: Path, text: str) -> None:
    from kvmpy.owned import write_atomically

    try:
        write_atomically(path, text)
    except OSError as error:
        raise _UnreadableError(f"{path} cannot be written: {error.strerror}") from None


def _one_line(text: str) -> str:
    from kvmpy.testing.verdicts import printable

    return " ".join(printable(text).splitlines())


def _about(side: str, about: Mapping[str, Any]) -> str:
    from kvmpy.testing.compare import column_name

    counts = ", ".join(f"{count} {verdict}" for verdict, count in about["summary"].items() if count)
    emulated = "" if about["platform"] == "host" else ", an emulated platform"
    not_run = f", {about['not_run']} not run" if about["not_run"] else ""
    return f"{side} {about['file']}: {column_name(about)}{emulated}: {counts}{not_run}"


def _skipped(changes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield skips by reason: one missing thing may skip hundreds."""
    groups: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        groups.setdefault((change["reason"], change["how"]), []).append(change["test"])
    for (reason, how), tests in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield f"{len(tests):5}  {reason}"
        if how:
            yield f"       get it: {how}"
        names = ", ".join(tests[:3]) + (", ..." if len(tests) > 3 else "")
        yield f"       {names}"


def _lines(changes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for change in changes[:_SHOWN]:
        text = f"  {change['test']}"
        if change["seconds"]:
            before, after = change["seconds"]
            yield f"{text}: {before:.3f} s, then {after:.3f} s"
            continue
        text += f": {change['before'] or 'not there'}, then {change['after'] or 'not there'}"
        yield text + (f": {change['reason']}" if change["reason"] else "")
    if len(changes) > _SHOWN:
        yield f"  ... and {len(changes) - _SHOWN} more; --json and --html have all"


def _text(document: Mapping[str, Any]) -> Iterator[str]:
    from kvmpy.testing.compare import KINDS

    for side in ("before", "after"):
        for about in document[side]:
            yield _about(side, about)
    for kernel in document["without"]:
        yield f"after {kernel}: no report: it did not come to its tests"
    labels: dict[str, str] = {}
    for about in (*document["before"], *document["after"]):
        labels |= about["labels"]
    for column in document["columns"]:
        yield ""
        yield f"{column['name']}: {column['tests']} tests"
        if column["times"]:
            yield f"times are not compared: {column['times']}"
        elif column["drift"] != 1:
            yield f"as a whole the tests take {column['drift']:.2f} times as long"
        for kind, title in KINDS.items():
            told = [change for change in column["changes"] if change["kind"] == kind]
            if told:
                yield f"{title}: {len(told)}"
                yield from _skipped(told) if kind == "skipped" else _lines(told)
    shown = {change["protection"] for column in document["columns"] for change in column["changes"]}
    for name, label in labels.items():
        if name in shown:
            yield f"* {name}: {label}"
    yield ""
    if document["worse"]:
        counts = ", ".join(f"{count} {KINDS[kind]}" for kind, count in document["worse"].items())
        yield f"worse: {counts}"
    else:
        yield "nothing got worse"


@click.command()
@click.argument("before", metavar="BEFORE.json", type=click.Path(path_type=Path))
@click.argument("after", metavar="AFTER.json...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--before",
    "more",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="One more run of before: the times of several tell what is noise.",
)
@click.option(
    "--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="Write it as JSON."
)
@click.option(
    "--html", "html_file", metavar="FILE", type=click.Path(path_type=Path), help="Write it as an HTML page."
)
def compare(
    before: Path,
    after: tuple[Path, ...],
    more: tuple[Path, ...],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Tell what is new between JSON reports: verdicts that changed, tests that became slower.

    The reports are what --json of `kvmpy run`, `kvmpy lab run` and `kvmpy lab run --matrix` wrote. Exit
    status: 0 nothing got worse, 1 something did, 2 a wrong argument, 3 a file is no report, or reports
    cannot be compared.
    """
    from kvmpy.testing import compare as comparison

    earlier, _ = _read((before, *more))
    later, without = _read(after)
    try:
        document = comparison.document(earlier, later, without)
    except comparison.ComparisonError as error:
        raise _UnreadableError(str(error)) from None
    for line in _text(document):
        # What a test or a file name has in it is no line of its own.
        click.echo(_one_line(line))
    if json_file is not None:
        _write(json_file, json.dumps(document, indent=2) + "\n")
    if html_file is not None:
        from kvmpy.testing.html.comparison import render

        _write(html_file, render(document))
    sys.exit(WORSE if document["worse"] else 0)
