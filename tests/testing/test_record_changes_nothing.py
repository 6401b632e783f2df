# SPDX-License-Identifier: Apache-2.0
"""An observer changes nothing: what is recorded ends as what is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy.debug.record.model import Record
from tests.debug.conftest import complaints

# Where a recorder that reads memory would be noticed: views that lose their access, pages that a userfaultfd
# serves, descriptors that run out, slots that come and go.
AREAS = ["demand_paging", "memory", "irq", "private_memory"]
# Records of each area whose reproducers are compiled, spread over all.
COMPILED = 12

SAME_VERDICTS = Path(__file__).resolve().parents[2] / "ci" / "same_verdicts.py"


def run(area: str, report: Path, *options: str) -> None:
    """Run *area* on this host and write its *report*."""
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
    assert json.loads(report.read_text())["tests"], done.stdout


def compared(*reports: Path) -> subprocess.CompletedProcess[str]:
    """Compare two reports as CI does."""
    command = [sys.executable, str(SAME_VERDICTS), *map(str, reports)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.timeout(1100)
@pytest.mark.parametrize("area", AREAS)
def test_verdicts_under_record(tmp_path: Path, area: str) -> None:
    """An area that is recorded from its first ioctl to the last has the verdicts that it has without."""
    plain, recorded = tmp_path / "plain.json", tmp_path / "recorded.json"
    run(area, plain)
    run(area, recorded, "--record=all", f"--record-dir={tmp_path / 'records'}")
    done = compared(plain, recorded)
    assert done.returncode == 0, done.stdout + done.stderr
    records = sorted((tmp_path / "records").rglob("*.rec"))
    assert records
    for path in records[:: -(-len(records) // COMPILED)] if shutil.which("gcc") else ():
        assert not complaints(Record.load(path)), f"the reproducer of all of {path.name} does not compile"


def test_a_verdict_that_differs_or_is_missing_is_told(tmp_path: Path) -> None:
    """Of kvmpy's own tests only those count that both reports have."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"

    def write(report: Path, **verdicts: str) -> None:
        names = {
            "own": "tests/core/test_fd.py::test",
            "one": "regs/test_one.py::test",
            "two": "irq/test_two.py::test",
        }
        tests = [{"id": names[name], "verdict": verdict} for name, verdict in verdicts.items()]
        report.write_text(json.dumps({"tests": tests}))

    write(first, own="pass", one="pass", two="skip")
    for verdicts, line in (
        ({"one": "pass", "two": "skip"}, "2 tests compared, 0 ended otherwise"),
        ({"one": "fail", "two": "skip"}, "regs/test_one.py::test: pass, then fail"),
        ({"one": "pass"}, "irq/test_two.py::test: skip, then not run"),
        ({"own": "fail", "one": "pass", "two": "skip"}, "tests/core/test_fd.py::test: pass, then fail"),
    ):
        write(second, **verdicts)
        done = compared(first, second)
        assert line in done.stdout
        assert done.returncode == ("0 ended" not in line)
    write(first)
    write(second)
    assert compared(first, second).returncode == 1
