# SPDX-License-Identifier: Apache-2.0
"""Files with names of tests, one a line: only these run. The suite's own is that of ``--quick``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmpy.testing import naming
from kvmpy.testing.verdicts import suite_id

QUICK = "quick.txt"


class SelectionError(ValueError):
    """A file that names no tests."""


def quick_file() -> Path:
    """Return the suite's file of the tests that ``--quick`` runs; SelectionError without a suite."""
    folder = naming.suite_folder()
    if folder is None:
        raise SelectionError("this kvmpy has no selftests: neither in the package nor beside it")
    return folder / QUICK


def write(path: Path, ids: Sequence[str], about: str) -> None:
    """Write a file with these *ids*, and a comment that says what they are."""
    path.write_text("".join([f"# {about}\n", *(f"{each}\n" for each in ids)]), encoding="utf-8")


def read(path: Path) -> list[str]:
    """Return the ids in a file; SelectionError where there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SelectionError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    ids = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not ids:
        raise SelectionError(f"{path} names no tests")
    return ids


def files(ids: Sequence[str]) -> list[str]:
    """Return the files that the tests *ids* are in."""
    return list(dict.fromkeys(each.partition("::")[0] for each in ids))


def deselect_others(config: pytest.Config, items: list[pytest.Item], wanted: Sequence[str]) -> None:
    """Drop the items that are not *wanted*: tests, or files of tests."""
    names = set(wanted)
    others = []
    for item in items:
        name = suite_id(item.nodeid)
        if name not in names and name.partition("::")[0] not in names:
            others.append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        dropped = set(others)
        items[:] = [item for item in items if item not in dropped]
