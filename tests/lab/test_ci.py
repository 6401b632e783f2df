# SPDX-License-Identifier: Apache-2.0
"""What continuous integration runs, as far as it can be seen without running it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = (ROOT / ".ci" / "run").read_text()
"""The kernel is there before the tests that boot it; the lab's summary comes last."""
STEPS = ["lint", "kernel", "test", "run", "same_verdicts", "lab", "lab"]


def test_every_step_is_limited_and_all_take_less_than_90_minutes() -> None:
    steps = re.findall(r"^\s*(?:timeout (\d+) make|\S*python ci/)\W*(\w+)\b", RUN, re.MULTILINE)
    assert [target for _, target in steps] == STEPS
    assert sum(int(seconds or 0) for seconds, _ in steps) < 90 * 60


@pytest.mark.parametrize(
    "failing", range(len(STEPS)), ids=[f"{step}{number}" for number, step in enumerate(STEPS)]
)
def test_a_step_that_fails_ends_it_all(tmp_path: Path, failing: int) -> None:
    if STEPS[failing] in ("run", "same_verdicts") and not os.access("/dev/kvm", os.W_OK):
        pytest.skip("needs KVM")
    steps = (
        STEPS if os.access("/dev/kvm", os.W_OK) else [s for s in STEPS if s not in ("run", "same_verdicts")]
    )
    expected = [step for step in STEPS[: failing + 1] if step in steps]
    for folder in (".ci", "ci", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".ci" / "run").write_text(RUN)
    (tmp_path / "ci" / "prerequisites.sh").write_text("")
    # Each step writes its name down; the one after which as many stand there as asked for fails.
    begun, step = tmp_path / "begun", tmp_path / "step"
    step.write_text(f"""#!/bin/sh\necho "$1" >>'{begun}'\n[ "$(wc -l <'{begun}')" -ne {len(expected)} ]\n""")
    step.chmod(0o755)
    (tmp_path / "Makefile").write_text("".join(f"{name}:\n\t@'{step}' {name}\n" for name in {*STEPS}))
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f"#!/bin/sh\nexec '{step}' same_verdicts\n")
    python.chmod(0o755)
    result = subprocess.run(
        ["sh", str(tmp_path / ".ci" / "run")], capture_output=True, text=True, timeout=60, check=False
    )
    assert begun.read_text().split() == expected
    assert result.returncode != 0


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
