# SPDX-License-Identifier: Apache-2.0
"""The session inside, run here: shares come from a folder, what it says goes to a file."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmpy import Kvm
from kvmpy.debug.record.format import MAGIC
from kvmpy.testing.leaks import steady_growth
from kvmpy.testing.results import GROWTH_NOTED

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import sys
import pytest
from kvmpy.lab import inside

inside.INSIDE = sys.argv[1]
plugins = [f"-p{name}" for name in ("kvmpy.testing.plugin", "pytest_timeout", "kvmpy.lab.inside")]
sys.exit(pytest.main([*plugins, "--kvmpy-journal", "journal", "--rootdir", ".", *sys.argv[2:]]))
"""
CONFTEST = """
import pytest

@pytest.fixture
def where():
    return "{name}"
"""
TEST = """
def test_first(where):
    assert where == "{name}"

def test_second(where):
    assert where == "{name}"
"""


class Inside:
    """A folder with two areas of tests, each with fixtures of its own, and a session that gets shares."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("one", "two"):
            area = folder / "suite" / name
            area.mkdir(parents=True)
            (area / "conftest.py").write_text(CONFTEST.format(name=name))
            (area / f"test_{name}.py").write_text(TEST.format(name=name))

    def run(self, args: Sequence[str], shares: Sequence[tuple[str, str]]) -> dict[str, str]:
        """Run shares (area, test) in a session with *args*; return each test's outcome."""
        files = [(f"suite/{area}/test_{area}.py", test) for area, test in shares]
        return self.run_shares(
            args, [{"args": [str(self.folder / file)], "only": [f"{file}::{test}"]} for file, test in files]
        )

    def run_shares(self, args: Sequence[str], shares: Sequence[dict[str, list[str]]]) -> dict[str, str]:
        """Run *shares* as they are; return each test's outcome."""
        work = self.folder / "job" / "work"
        work.mkdir(parents=True)
        for number, share in enumerate(shares, 1):
            (work / str(number)).write_text(json.dumps(share))
        (work / str(len(shares) + 1)).write_text(json.dumps({"end": True}))
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(self.folder / "job"), *args],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        reports = [event["data"] for event in self.events() if event["event"] == "report"]
        return {
            report["nodeid"].removeprefix("suite/"): report["outcome"]
            for report in reports
            if report["when"] == "call" or report["outcome"] != "passed"
        }

    def resident(self) -> list[int]:
        """Return what the leak check saw after each test, in bytes."""
        reports = [event["data"] for event in self.events() if event["event"] == "report"]
        return [report["kvmpy"]["rss"] for report in reports if report["when"] == "teardown"]

    def events(self) -> list[dict[str, Any]]:
        """Return what the session has said."""
        lines = (self.folder / "journal").read_text().splitlines()
        return [json.loads(line) for line in lines if line]


@pytest.fixture
def inside(tmp_path: Path) -> Inside:
    return Inside(tmp_path)


@pytest.mark.parametrize("args", [["suite"], ["suite/one", "suite/two"], ["suite/two", "suite/one"]])
def test_every_share_has_its_folders_fixtures(inside: Inside, args: list[str]) -> None:
    shares = [("one", "test_first"), ("two", "test_first"), ("one", "test_second"), ("two", "test_second")]
    assert inside.run(args, shares) == {f"{area}/test_{area}.py::{test}": "passed" for area, test in shares}


RECORDED = """
def test_first(kvm):
    kvm.get_api_version()
    raise ValueError

def test_second(kvm):
    kvm.get_api_version()
"""


def test_the_record_of_a_failure_is_sent_before_the_next_test(kvm: Kvm, inside: Inside) -> None:
    del kvm
    (inside.folder / "suite" / "one" / "test_one.py").write_text(RECORDED)
    to = inside.folder / "to"
    args = ["suite", "--record", "failures", "--record-dir", "/nowhere", "--kvmpy-record-to", str(to)]
    outcomes = inside.run(args, [("one", "test_first"), ("one", "test_second")])
    assert list(outcomes.values()) == ["failed", "passed"]
    assert list(to.iterdir()) == []
    events = inside.events()
    kinds = [event["event"] for event in events if event["event"] in ("finish", "record", "over")]
    assert kinds == ["finish", "record", "over", "finish", "over"]
    sent = next(event for event in events if event["event"] == "record")
    assert (sent["first"], sent["last"]) == (True, True)
    assert zlib.decompress(base64.b64decode(sent["data"])).startswith(MAGIC)
    failed = next(e["data"] for e in events if e["event"] == "report" and e["data"]["outcome"] == "failed")
    path = f"/nowhere/{sent['name']}"
    assert ["record", f"kvmpy replay {path}\nkvmpy repro {path} -o bug.c"] in failed["sections"]


GROWING = """
import pytest

KEPT = b"x" * (4 << 20)

@pytest.mark.parametrize("number", range(6))
def test_it(number, request):
    del number
    {leak}
"""


@pytest.mark.parametrize(("leak", "grows"), [("pass", False), ("LEAKED.append(b'x' * (1 << 20))", True)])
def test_growth_is_that_of_tests_not_of_files(inside: Inside, leak: str, grows: bool) -> None:
    files = 12
    shares = []
    for number in range(files):
        name = f"test_{number}"
        text = GROWING.format(leak=leak) + "\nLEAKED = []\n"
        (inside.folder / "suite" / "one" / f"{name}.py").write_text(text)
        file = f"suite/one/{name}.py"
        ids = [f"{file}::test_it[{each}]" for each in range(6)]
        shares.append({"args": [str(inside.folder / file)], "only": ids})
    outcomes = inside.run_shares(["suite", "-o", "kvmpy_leaks=all"], shares)
    assert list(outcomes.values()) == ["passed"] * 6 * files
    assert (steady_growth(inside.resident()) >= GROWTH_NOTED) is grows


IMPORTED = """
import sys
from kvmpy.guest.postmortem import IMPORTED_LATER

def missing():
    return [name for name in IMPORTED_LATER if name not in sys.modules]

def test_first():
    assert missing(), "nothing is left to import: this file would show nothing"

def test_second():
    assert missing() == []
"""


def test_the_second_test_finds_what_a_post_mortem_imports(inside: Inside) -> None:
    """Its failure then takes no 7 to 27 s; that of a boot's first test still does."""
    (inside.folder / "suite" / "one" / "test_one.py").write_text(IMPORTED)
    both = {
        "args": [str(inside.folder / "suite/one/test_one.py")],
        "only": ["suite/one/test_one.py::test_first", "suite/one/test_one.py::test_second"],
    }
    assert list(inside.run_shares(["suite"], [both]).values()) == ["passed", "passed"]


def test_the_first_test_waits_for_no_import_of_later_ones() -> None:
    """Emulated, an import takes 30 times as long: what only a launch or the host's end needs comes later."""
    code = (
        "import sys\nimport kvmpy.testing.plugin, kvmpy.lab.inside, kvmpy.coco.ladder\n"
        "late = ('cryptography', 'concurrent', 'kvmpy.lab.qemu', 'kvmpy.lab.lane', 'kvmpy.coco.idblock')\n"
        "print([name for name in late if name in sys.modules])\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert output.stdout == "[]\n"
