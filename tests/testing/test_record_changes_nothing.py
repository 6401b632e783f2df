# SPDX-License-Identifier: Apache-2.0
"""An observer changes nothing: what is recorded ends as what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Where a recorder that reads memory would be noticed: views that lose their access, pages that a userfaultfd
# serves, descriptors that run out, slots that come and go.
AREAS = ["demand_paging", "memory", "irq", "private_memory"]


def verdicts(area: str, report: Path, *options: str) -> dict[str, str]:
    """Run *area* on this host and return its verdicts by test."""
    command = [sys.executable, "-m", "kvmpy", "run", area, "--protection", "none,cbit", "--json", str(report)]
    done = subprocess.run(
        [*command, "--seed", "1", *options],
        cwd=report.parent,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert report.is_file(), done.stdout + done.stderr
    tests = json.loads(report.read_text())["tests"]
    assert tests, done.stdout
    return {test["id"]: test["verdict"] for test in tests}


@pytest.mark.timeout(1100)
@pytest.mark.parametrize("area", AREAS)
def test_verdicts_under_record(tmp_path: Path, area: str) -> None:
    """An area that is recorded from its first ioctl to the last has the verdicts that it has without."""
    plain = verdicts(area, tmp_path / "plain.json")
    recorded = verdicts(
        area, tmp_path / "recorded.json", "--record=all", f"--record-dir={tmp_path / 'records'}"
    )
    different = {
        name: (plain.get(name), recorded.get(name))
        for name in {*plain, *recorded}
        if plain.get(name) != recorded.get(name)
    }
    assert not different
