# SPDX-License-Identifier: Apache-2.0
"""What continuous integration runs, as far as it can be seen without running it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["lint", "kernel", "test", "run", "lab"]


def test_every_step_is_limited_and_all_take_less_than_90_minutes() -> None:
    steps = re.findall(r"^\s*timeout (\d+) make (\w+)\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    # The kernel is there before the tests that boot it; the lab's summary comes last.
    assert [target for _, target in steps] == STEPS
    assert steps[-1][1] == "lab"
    assert sum(int(seconds) for seconds, _ in steps) < 90 * 60


@pytest.mark.parametrize("step", [*STEPS, "same_verdicts"])
def test_a_step_that_fails_ends_it_all(tmp_path: Path, step: str) -> None:
    if step in ("run", "same_verdicts") and not os.access("/dev/kvm", os.W_OK):
        pytest.skip("needs KVM")
    for folder in (".ci", "ci", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "ci" / "prerequisites.sh").write_text("")
    (tmp_path / "Makefile").write_text(
        "".join(f"{name}:\n\t@echo {name}; exit {3 * (name == step)}\n" for name in STEPS)
    )
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho same_verdicts; exit {3 * (step == 'same_verdicts')}\n")
    python.chmod(0o755)
    result = subprocess.run(
        ["sh", str(tmp_path / ".ci" / "run")], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0
    begun = [line for line in result.stdout.splitlines() if line in {*STEPS, "same_verdicts"}]
    assert begun[-1] == step


def test_the_prerequisites_of_the_lab_are_named(tmp_path: Path) -> None:
    (tmp_path / "id").symlink_to("/usr/bin/id")
    (tmp_path / "sh").symlink_to("/bin/sh")
    result = subprocess.run(
        ["/bin/sh", str(ROOT / "ci" / "prerequisites.sh"), "--packages", "lab"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    packages = result.stdout.split()
    assert {"qemu-system-x86", "flex", "bison", "bc", "xz-utils"} <= set(packages)
    result = subprocess.run(
        ["/bin/sh", str(ROOT / "ci" / "prerequisites.sh"), "nonsense"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2


def test_tests_of_kvmpy_itself_have_ids_of_their_own() -> None:
    """A folder ``selftests`` in tests/ would give them ids of the suite, for ci/same_verdicts.py, too."""
    assert [path for path in (ROOT / "tests").rglob("selftests") if path.is_dir()] == []
