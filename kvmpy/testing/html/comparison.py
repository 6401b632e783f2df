# SPDX-License-Identifier: Apache-2.0
"""A comparison (:mod:`kvmpy.testing.compare`) as one HTML page, without script and network."""

from __future__ import annotations

from typing import Any

import msgspec

from kvmpy import __version__
from kvmpy.parsing import MalformedError, conform
from kvmpy.testing.compare import KINDS, SCHEMA, column_name
from kvmpy.testing.html import ReportError, asset, environment
from kvmpy.testing.html.schema import Count, Seconds


class Change(msgspec.Struct):
    """What became of a test."""

    test: str
    protection: str | None
    kind: str
    worse: bool
    before: str
    after: str
    reason: str
    how: str
    seconds: tuple[Seconds, Seconds] | None


class Column(msgspec.Struct):
    """The runs of one kernel on both sides."""

    name: str
    drift: Seconds
    times: str
    tests: Count
    changes: list[Change]
    before: list[Count]
    after: list[Count]


class About(msgspec.Struct):
    """A run that was compared."""

    file: str
    name: str
    kernel: str
    platform: str
    accelerator: str
    cpu: str
    kvmpy: str
    seed: Count
    duration: Seconds
    summary: dict[str, Count]
    not_run: Count
    labels: dict[str, str]


class Comparison(msgspec.Struct):
    """The document."""

    schema: str
    kvmpy: str
    worse: dict[str, Count]
    counts: dict[str, Count]
    without: list[str]
    before: list[About]
    after: list[About]
    columns: list[Column]


def _checked(document: object, name: str) -> Comparison:
    try:
        comparison = conform(document, Comparison)
    except MalformedError as error:
        raise ReportError(f"{name} cannot be shown: {error}") from None
    kinds = {*comparison.worse, *comparison.counts}
    kinds |= {change.kind for column in comparison.columns for change in column.changes}
    if unknown := sorted(kinds - KINDS.keys()):
        raise ReportError(f"{name} cannot be shown: {unknown[0]!r} is no kind of change")
    for column in comparison.columns:
        for side, numbers in ((comparison.before, column.before), (comparison.after, column.after)):
            if any(number >= len(side) for number in numbers):
                raise ReportError(
                    f"{name} cannot be shown: column {column.name!r} has a run that is not there"
                )
    return comparison


def render(document: object, name: str = "the comparison") -> str:
    """Return the page of a comparison; ReportError, with the *name* of the file, where it is none."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ReportError(f"{name} is not a comparison of kvmpy ({SCHEMA})")
    comparison = _checked(document, name)
    values: dict[str, Any] = msgspec.to_builtins(comparison)
    return (
        environment()
        .from_string(asset("comparison.html.j2"))
        .render(version=__version__, css=asset("page.css"), kinds=KINDS, column_name=column_name, **values)
    )
