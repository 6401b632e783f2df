# SPDX-License-Identifier: Apache-2.0
"""``@pytest.mark.protections(...)``: one test body, one item for each protection."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

MARKER = "protections"
FIXTURE = "protection"
ALL = "all"


def names_of(marker: pytest.Mark, ladder: Sequence[str]) -> list[str]:
    """Return the protections that a marker asks for, strongest first; UsageError for an unknown name."""
    if marker.kwargs or not marker.args:
        raise pytest.UsageError('write protections("all") or name them: protections("snp", "cbit")')
    wanted = [str(arg) for arg in marker.args]
    if wanted == [ALL]:
        return list(ladder)
    unknown = [name for name in wanted if name not in ladder]
    if unknown:
        raise pytest.UsageError(
            f"unknown protection {', '.join(unknown)}; there are {', '.join(ladder)}, and {ALL}"
        )
    return [name for name in ladder if name in wanted]


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Make one item for each protection of the test's marker."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        return
    if FIXTURE not in metafunc.fixturenames:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: the protections marker needs the fixture make_vm or {FIXTURE}"
        )
    from kvmpy.coco import ladder

    metafunc.parametrize(FIXTURE, names_of(marker, ladder.protections()), indirect=True, scope="function")


def of_item(item: pytest.Item) -> str | None:
    """Return the protection that *item* runs under; None for a test that makes no VM through the fixtures."""
    callspec = getattr(item, "callspec", None)
    chosen = callspec.params.get(FIXTURE) if callspec is not None else None
    if chosen is not None:
        # A test may parametrize an argument of this name for a purpose of its own.
        return str(chosen) if item.get_closest_marker(MARKER) else None
    return "none" if FIXTURE in getattr(item, "fixturenames", ()) else None


def parse_option(text: str, ladder: Sequence[str]) -> list[str]:
    """Return the protections named by ``--protection A,B``; UsageError for an unknown one."""
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ladder]
    if unknown or not wanted:
        raise pytest.UsageError(f"--protection {text}: choose from {', '.join(ladder)}")
    return wanted


def deselect_others(config: pytest.Config, items: list[pytest.Item], wanted: Sequence[str]) -> None:
    """Keep the items that run under one of the *wanted* protections."""
    kept = [item for item in items if of_item(item) in wanted]
    if len(kept) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if of_item(item) not in wanted])
        items[:] = kept
