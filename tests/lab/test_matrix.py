# SPDX-License-Identifier: Apache-2.0
"""Several kernels side by side: one table, and reports with a part for each kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmpy.cli.main import main
from kvmpy.lab import kernels, matrix
from tests.lab.conftest import FAKE, make_image

ROOT = Path(__file__).resolve().parents[2]
PASSES = [["test", "test_a", "passed"], ["end"]]
FAILS = [["test", "test_a", "failed"], ["end"]]


def run(folder: Path, plans: dict[str, object], *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command for kernels whose QEMU plays the plan of their release."""
    (folder / "bin").mkdir()
    (folder / "bin" / "qemu-system-x86_64").write_text(
        f"#!/bin/sh\nfor plan in {folder}/plan-*; do\n"
        '\tcase "$*" in *"/kernels/${plan##*plan-}"*) found=$plan/plan.json ;; esac\n'
        f'done\nFAKE_QEMU_PLAN=$found exec {sys.executable} {FAKE} "$@"\n'
    )
    (folder / "bin" / "qemu-system-x86_64").chmod(0o755)
    for release, plan in plans.items():
        (folder / f"plan-{release}").mkdir()
        (folder / f"plan-{release}" / "plan.json").write_text(json.dumps(plan))
        kernels.register(make_image(folder / "image", release), f"file {release}")
    (folder / "area").mkdir()
    (folder / "area" / "test_a.py").write_text("def test_a():\n    raise RuntimeError('not on the host')\n")
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "FAKE_QEMU_TESTS": "1",
        "FAKE_QEMU_FOLDER": "area",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "kvmpy", "lab", "run", "--matrix", ",".join(plans), "--accel", "tcg"]
    return subprocess.run(
        [*command, "area/test_a.py", *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("at_once", ["1", "2"])
def test_one_table_and_reports_with_a_part_for_each_kernel(tmp_path: Path, warm: Path, at_once: str) -> None:
    reports = ["--json", "o.json", "--ktap", "o.ktap", "--junit", "o.xml", "--machines", at_once]
    result = run(tmp_path, {"6.12.9": [PASSES], "7.2.13": [FAILS]}, *reports)
    assert result.returncode == 1, result.stdout + result.stderr
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("area/test_a.py"))
    assert row.split()[1:] == ["pass", "fail"]
    assert "[6.12.9] " in result.stdout
    values = json.loads((tmp_path / "o.json").read_text())
    assert values["schema"] == matrix.SCHEMA
    assert [report["tests"][0]["verdict"] for report in values["reports"].values()] == ["pass", "fail"]
    ktap = (tmp_path / "o.ktap").read_text().splitlines()
    assert ktap[:2] == ["KTAP version 1", "1..2"]
    assert [line[:4] for line in ktap if not line.startswith(" ")][2:] == ["ok 1", "not "]
    suites = ElementTree.parse(tmp_path / "o.xml").getroot()
    assert [suite.get("failures") for suite in suites] == ["0", "1"]


def test_a_kernel_without_a_report_is_no_success(tmp_path: Path, warm: Path) -> None:
    never = [["silent"], ["console", "Kernel panic - not syncing: early"], ["die", 0]]
    result = run(tmp_path, {"6.12.9": [PASSES], "7.2.13": [never]}, "--json", "o.json")
    assert result.returncode == 3, result.stdout + result.stderr
    assert "Kernel panic - not syncing: early" in result.stdout


def test_reports_of_kernels_are_put_together() -> None:
    one = "KTAP version 1\n1..1\nok 1 a\n"
    merged = matrix.merged_ktap({"k1": one, "k2": ""})
    assert merged.splitlines() == [
        "KTAP version 1",
        "1..2",
        "  KTAP version 1",
        "  # Subtest: k1",
        "  1..1",
        "  ok 1 a",
        "ok 1 k1",
        "  KTAP version 1",
        "  # Subtest: k2",
        "  1..0",
        "not ok 2 k2",
    ]
    junit = matrix.merged_junit({"k1": '<testsuites><testsuite name="x" tests="1"/></testsuites>', "k2": ""})
    suites = ElementTree.fromstring(junit.partition("?>")[2])
    assert [(suite.get("name"), suite.get("errors")) for suite in suites] == [("k1", None), ("k2", "1")]


@pytest.mark.parametrize("option", [("--html", "page.html"), ("--record", "all")])
def test_what_only_one_kernel_can_have(option: tuple[str, str]) -> None:
    """Reports that show one run are refused for several, with what to ask for instead or why."""
    ended = CliRunner().invoke(main, ["lab", "run", "--matrix", "6.12,7.2", *option])
    assert ended.exit_code == 2
    assert f"{option[0]} is not for --matrix" in ended.output
