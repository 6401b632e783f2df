# SPDX-License-Identifier: Apache-2.0
"""The tests of ``--quick`` exist: one that was renamed would be left out without a word."""

from __future__ import annotations

import subprocess
import sys

from kvmpy.testing import selection


def test_each_test_of_the_quick_run_exists() -> None:
    path = selection.quick_file()
    ids = selection.read(path)
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", *selection.files(ids)],
        cwd=path.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout.splitlines()
    collected = {line.removeprefix(f"{path.parent.name}/") for line in listed}
    assert [each for each in ids if each not in collected] == []
