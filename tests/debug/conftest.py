# SPDX-License-Identifier: Apache-2.0
"""Whatever a test of records records can be written as C that compiles."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.debug.record.events import Ioctl
from kvmpy.debug.record.format import RecordError
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.prune import target_of
from kvmpy.debug.record.repro import write_c
from kvmpy.debug.record.script import ProcessesError, build

GCC = ("gcc", "-O0", "-Wall", "-Wextra", "-Werror", "-pthread", "-fsyntax-only", "-x", "c", "-")
# What was compiled already: the same ioctls with the same results are the same scenario.
_seen: set[tuple[tuple[int, int, int], ...]] = set()


def complaints(record: Record) -> str:
    """Return what gcc says about the C file of all of *record*, "" where there is nothing to write."""
    calls = tuple(
        (e.what.object, e.what.request, e.what.errno) for e in record.ioctls if isinstance(e.what, Ioctl)
    )
    if not calls or calls in _seen:
        return ""
    try:
        script = build(record)
    except ProcessesError:  # it is refused, which tests of their own look at
        return ""
    text = write_c(script, target_of(script))
    done = subprocess.run(GCC, input=text, capture_output=True, text=True, timeout=60, check=False)
    if not done.returncode:
        _seen.add(calls)
    return done.stderr


@pytest.fixture(autouse=True)
def reproducers_compile(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile ``repro --all`` of every record that the test left in its folder."""
    yield
    folder = (request.node.funcargs or {}).get("tmp_path")
    if not isinstance(folder, Path) or shutil.which("gcc") is None:
        return
    for path in sorted(folder.rglob("*.rec")):
        try:
            record = Record.load(path)
        except RecordError:
            continue
        assert not complaints(record), f"the reproducer of all of {path.name} does not compile"
