# SPDX-License-Identifier: Apache-2.0
"""A real kernel under a real QEMU, where one is in the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy.lab import kernels, tools

pytestmark = pytest.mark.timeout(600)


def test_one_selftest_inside_a_real_kernel(tmp_path: Path) -> None:
    if shutil.which(tools.QEMU) is None:
        pytest.skip(f"needs {tools.QEMU}: {tools.install_command(tools.RUN)}")
    if not kernels.cached():
        pytest.skip("needs a lab kernel in the cache: kvmpy lab build")
    kernel = kernels.cached()[0]
    report = tmp_path / "out.json"
    command = [sys.executable, "-m", "kvmpy", "lab", "run", "--accel", "tcg", "--json", str(report)]
    result = subprocess.run(
        [*command, "harness/test_counter.py"], capture_output=True, text=True, timeout=550, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    values = json.loads(report.read_text())
    assert values["platform"] == "lab"
    assert values["host"]["accelerator"] == "tcg"
    assert values["host"]["kernel"].split()[0] == kernel.release
    assert "kvm_amd" in values["host"]["vendor_modules"]
    assert {test["verdict"] for test in values["tests"]} <= {"pass", "skip"}
    assert "pass" in {test["verdict"] for test in values["tests"]}
