# SPDX-License-Identifier: Apache-2.0
"""``--timeline`` of a session: one complete file, whatever became of its processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvmpy.testing.supervisor import supervise
from kvmpy.testing.timelines import renew
from tests.debug.trace_rules import problems
from tests.testing.support import Suite

TESTS = """
import os

def test_a():
    pass

def test_b():
    assert 0
"""
CRASH = "import os\n\ndef test_dies():\n    os._exit(9)\n"


def slices_of(suite: Suite) -> dict[str, set[int]]:
    """The tests that the file shows, with the processes that they ran in."""
    events: list[dict[str, Any]] = json.loads((suite.folder / "t.json").read_text())
    assert problems(events) == []
    shown: dict[str, set[int]] = {}
    for event in events:
        if event.get("cat") == "test":
            shown.setdefault(event["name"], set()).add(event["pid"])
    return shown


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
def test_every_test_is_a_slice(suite: Suite, workers: list[str]) -> None:
    """Tests that pass and tests that fail are slices of the process that ran them; an older file is gone."""
    suite.add("test_one.py", TESTS)
    (suite.folder / "t.json").write_text("an older file")
    suite.run("--kvmpy-timeline=t.json", *workers)
    assert set(slices_of(suite)) == {"test_one.py::test_a", "test_one.py::test_b"}


def test_a_process_that_dies(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests before and after a crash are in one file, in two processes."""
    suite.add("test_1.py", TESTS)
    suite.add("test_2.py", CRASH)
    suite.add("test_3.py", TESTS)
    monkeypatch.chdir(suite.folder)
    supervise([*suite.arguments(), "--kvmpy-timeline=t.json"], print)
    shown = slices_of(suite)
    before, after = shown["test_1.py::test_a"], shown["test_3.py::test_a"]
    assert len(before) == len(after) == 1
    assert before != after


def test_only_an_older_file_is_removed(tmp_path: Path) -> None:
    """And no device or pipe that somebody names."""
    pipe, older = tmp_path / "pipe", tmp_path / "older"
    os.mkfifo(pipe)
    older.write_text("x")
    for path in (pipe, older, tmp_path, tmp_path / "none"):
        renew(path)
    assert pipe.is_fifo()
    assert tmp_path.is_dir()
    assert not older.exists()
