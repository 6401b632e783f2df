# SPDX-License-Identifier: Apache-2.0
"""Several kernels side by side: one table, and reports with a part for each kernel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpy.cli.main import main
from kvmpy.lab import kernels, matrix
from tests.lab.conftest import FAKE, make_image

ROOT = Path(__file__).resolve().parents[2]
PASSES = [["test", "test_a", "passed"], ["end"]]
FAILS = [["test", "test_a", "failed"], ["end"]]
TESTS = ("test", "start")
Plans = dict[str, list[list[list[Any]]]]


def start(
    folder: Path, plans: Plans, *args: str, background: bool = False, matrix: bool = True
) -> subprocess.Popen[str]:
    """Start the command for kernels whose QEMU plays the plan of their release."""
    (folder / "bin").mkdir()
    (folder / "bin" / "qemu-system-x86_64").write_text(
        f'#!/bin/sh\n[ "$1" = -cpu ] && echo "CPUID flags:" vgif && exit\nfor plan in {folder}/plan-*; do\n'
        '\tcase "$*" in *"/kernels/${plan##*plan-}"*) found=$plan/plan.json ;; esac\n'
        f'done\nFAKE_QEMU_PLAN=$found exec {sys.executable} {FAKE} "$@"\n'
    )
    (folder / "bin" / "qemu-system-x86_64").chmod(0o755)
    for release, plan in plans.items():
        (folder / f"plan-{release}").mkdir()
        (folder / f"plan-{release}" / "plan.json").write_text(json.dumps(plan))
        kernels.register(make_image(folder / "image", release), f"file {release}")
    (folder / "area").mkdir()
    names = sorted(
        {step[1] for boots in plans.values() for boot in boots for step in boot if step[0] in TESTS}
    )
    source = "def {}():\n    raise RuntimeError('not on the host')\n"
    (folder / "area" / "test_a.py").write_text("".join(map(source.format, names or ["test_a"])))
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "FAKE_QEMU_TESTS": str(len(names) or 1),
        "FAKE_QEMU_FOLDER": "area",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "kvmpy", "lab", "run", "--accel", "tcg", "--fresh-boot"]
    command += ["--matrix", ",".join(plans)] if matrix else []
    # A shell starts its background jobs with SIGINT ignored.
    interrupts = signal.SIG_IGN if background else signal.default_int_handler
    return subprocess.Popen(
        [*command, "area/test_a.py", *args],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts) and None,  # noqa: PLW1509 - one thread
    )


def run(folder: Path, plans: Plans, *args: str, matrix: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with start(folder, plans, *args, matrix=matrix) as process:
        out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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
    never: list[list[Any]] = [["silent"], ["console", "Kernel panic - not syncing: early"], ["die", 0]]
    result = run(tmp_path, {"6.12.9": [PASSES], "7.2.13": [never]}, "--json", "o.json")
    assert result.returncode == 3, result.stdout + result.stderr
    assert "Kernel panic - not syncing: early" in result.stdout


@pytest.mark.parametrize(
    ("number", "background"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, False)],
)
def test_a_signal_keeps_what_has_come(
    tmp_path: Path, warm: Path, number: signal.Signals, background: bool
) -> None:
    """The first kernel has ended, the second hangs in a test: both are in the reports, and no more begins."""
    two: list[list[Any]] = [["test", "test_a", "passed"], ["test", "test_b", "passed"]]
    passes, hangs = [*two, ["test", "test_c", "passed"], ["end"]], [*two, ["start", "test_c"], ["hang"]]
    plans = {"6.12.9": [passes], "7.1.2": [hangs], "7.2.13": [passes]}
    args = ("--json", "o.json", "--machines", "1", "--", "-v")
    with start(tmp_path, plans, *args, background=background) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("[7.1.2]") and "test_b PASSED" in line)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == matrix.INTERRUPTED
    reports = json.loads((tmp_path / "o.json").read_text())["reports"]
    kept = [report["tests"][0]["verdict"] if report else None for report in reports.values()]
    assert kept == ["pass", "pass", None]


def test_a_report_that_cannot_be_written_costs_no_other(tmp_path: Path, warm: Path) -> None:
    """Each is written on its own, and the last line says which is not there; it is no success."""
    (tmp_path / "o.ktap").write_text("older")
    # A folder that is a file.
    reports = ["--json", "o.ktap/o.json", "--ktap", "o.ktap", "--junit", "o.xml"]
    result = run(tmp_path, {"6.12.9": [PASSES]}, *reports)
    assert result.returncode == matrix.NO_REPORT
    assert "json: o.ktap/o.json is not written: " in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert (tmp_path / "o.ktap").read_text().startswith("KTAP version 1")
    assert ElementTree.parse(tmp_path / "o.xml").getroot().tag == "testsuites"


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


@pytest.mark.parametrize("columns", [("--matrix", "6.12,7.2"), ("--configuration", "default,no-nested")])
def test_what_only_one_column_can_have(columns: tuple[str, str]) -> None:
    """Records of several would have the same names."""
    ended = CliRunner().invoke(main, ["lab", "run", *columns, "--record", "all"])
    assert ended.exit_code == 2
    assert "--record is not for --matrix" in ended.output


MINE = """
[plain]
[npt-off]
parameters = ["kvm_amd.npt=N"]
cpu = ["-vgif"]
cpus = 1
[large]
memory = "999999G"
"""


def test_a_column_for_each_kernel_and_configuration(tmp_path: Path, warm: Path) -> None:
    """One page shows them all; each QEMU got what its column is called after."""
    (tmp_path / "mine.toml").write_text(MINE)
    chosen = ["--configurations", "mine.toml", "--configuration", "plain,npt-off"]
    plans: Plans = {"6.12.9": [PASSES, PASSES], "7.2.13": [FAILS, PASSES]}
    args = [*chosen, "--json", "o.json", "--html", "o.html", "--machines", "1"]
    result = run(tmp_path, plans, *args)
    assert result.returncode == 1, result.stdout + result.stderr
    reports = json.loads((tmp_path / "o.json").read_text())["reports"]
    names = [f"{kernel} {name}" for kernel in ("6.12.9", "7.2.13") for name in ("plain", "npt-off")]
    assert [re.sub(r"-[0-9a-f]{8} ", " ", title) for title in reports] == names
    hosts = [report["host"]["configuration"] for report in reports.values()]
    assert hosts == ["plain", "npt-off (kvm_amd.npt=N, -vgif, 1 CPUs)"] * 2
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("area/test_a.py"))
    assert row.split()[1:] == ["pass", "pass", "fail", "pass"]
    page = (tmp_path / "o.html").read_text()
    assert all(title in page for title in reports)
    for release, _ in plans.items():
        plain, off = (
            json.loads((tmp_path / f"plan-{release}" / f"boot-{number}").read_text())[1] for number in (0, 1)
        )
        assert "kvm_amd.npt=N" in off[off.index("-append") + 1].split()
        assert off[off.index("-cpu") + 1].endswith(",-vgif,enforce")
        assert off[off.index("-smp") + 1].startswith("1,")
        assert "npt" not in plain[plain.index("-append") + 1]


def test_a_configuration_without_effect_is_no_column_that_looks_tested(tmp_path: Path, warm: Path) -> None:
    """The other column is complete, the exit status says that one is missing."""
    (tmp_path / "mine.toml").write_text(MINE)
    chosen = ["--configurations", "mine.toml", "--configuration", "plain,npt-off", "--machines", "1"]
    plans: Plans = {"7.2.13": [PASSES, [["machine", {"parameters": {"kvm_amd.npt": "Y"}}, ""], *PASSES]]}
    result = run(tmp_path, plans, *chosen, "--json", "o.json", matrix=False)
    assert result.returncode == 3, result.stdout + result.stderr
    assert "[npt-off] " in result.stdout
    assert "kvm_amd.npt is Y inside, not N" in result.stdout
    reports = json.loads((tmp_path / "o.json").read_text())["reports"]
    assert [name for name, report in reports.items() if report] == ["plain"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--configurations", "bad.toml"], "bad.toml is no TOML: "),
        (["--configurations", "none.toml"], "none.toml cannot be read: No such file or directory"),
        (["--configuration", "shadow-pagin"], "no configuration shadow-pagin; did you mean shadow-paging?"),
        (["--configuration", "default,shadow-pagin"], "did you mean shadow-paging?"),
        (["--matrix", "7.2,7.2"], "two columns are the same: 7.2.13-"),
    ],
)
def test_what_names_no_column(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], says: str
) -> None:
    (tmp_path / "bad.toml").write_text("[mine\n")
    monkeypatch.chdir(tmp_path)
    kernels.register(make_image(tmp_path / "image", "7.2.13"), "file")
    ended = CliRunner().invoke(main, ["lab", "run", *args])
    assert ended.exit_code == 3
    assert says in ended.output
    assert "Traceback" not in ended.output


def test_the_list_of_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with what it sets and what it is for; the user's, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(MINE)
    ended = CliRunner().invoke(main, ["lab", "configurations", "--configurations", "mine.toml"])
    assert ended.exit_code == 0, ended.output
    assert re.search(r"^shadow-paging +kvm_amd.npt=N\n +KVM's own copies", ended.output, re.MULTILINE)
    assert re.search(r"^npt-off +kvm_amd.npt=N, -vgif, 1 CPUs$", ended.output, re.MULTILINE)
