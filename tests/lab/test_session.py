# SPDX-License-Identifier: Apache-2.0
"""Runs with a QEMU that replays a plan: results come through, losses are named, nothing is left running."""

from __future__ import annotations

import base64
import json
import os
import signal
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvmpy.lab import records
from kvmpy.lab.coverage.store import Coverage
from kvmpy.lab.events import Record, parse
from tests.ended import Ended
from tests.lab.conftest import FAKE

ROOT = Path(__file__).resolve().parents[2]
PANIC = "---[ cut here ]---\nKernel panic - not syncing: for a test\nCall Trace:\n dummy+0x1/0x2"
DRIVER = """
import os
import sys
from pathlib import Path
from kvmpy.lab.coverage.store import Writer
from kvmpy.lab.kernels import find
from kvmpy.lab.qemu import Options
from kvmpy.lab.lane import Limits
from kvmpy.lab.runs import Request, run

limits = Limits(boot=60, grace=float(sys.argv[2]), idle=20, total=float(sys.argv[3]))
reports = ["--kvmpy-json", "out.json", "--ktap", "out.ktap", "--junitxml", "out.xml"]
folder = Path("records") if "--record" in sys.argv else None
if folder is not None:
    folder.mkdir()
coverage = Writer(Path("coverage"), "kvmpy") if Path("coverage").exists() else None
extra = [word for word in sys.argv[4:] if word != "--snapshots"]
given = os.environ.get("LAB_PARAMETERS", "").split()
options = Options(find(sys.argv[1]), parameters=given, snapshots="--snapshots" in sys.argv)
request = Request(
    options, ["selftests"], reports, extra, 1, limits, records=folder, coverage=coverage
)
sys.exit(run(request, lambda text: print("SAID", text, flush=True)))
"""

Plan = Sequence[Sequence[Sequence[object]]]


class LabEnded(Ended):
    def pids(self) -> list[int]:
        return [json.loads(path.read_text())[0] for path in sorted(self.folder.glob("boot-*"))]


class Lab:
    """Starts a run as a process of its own, with the fake QEMU first in PATH."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self.image = image
        (folder / "bin").mkdir()
        (folder / "bin" / "qemu-system-x86_64").symlink_to(FAKE)
        (folder / "selftests" / "area").mkdir(parents=True)
        self.tests("test_a", "test_b", "test_c")

    def tests(self, *names: str) -> None:
        """Make the file with the tests that the collection on the host finds."""
        text = "\n".join(f"def {name}():\n    raise RuntimeError('not on the host')\n" for name in names)
        (self.folder / "selftests" / "area" / "test_a.py").write_text(text)
        self.count = len(names)

    def start(
        self, plan: Plan, *extra: str, total: float = 100.0, grace: float = 1.0
    ) -> subprocess.Popen[str]:
        (self.folder / "plan.json").write_text(json.dumps(plan))
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_QEMU_PLAN": str(self.folder / "plan.json"),
            "FAKE_QEMU_TESTS": str(self.count),
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(self.image), str(grace), str(total), *extra],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, plan: Plan, *extra: str, total: float = 100.0, grace: float = 1.0) -> LabEnded:
        with self.start(plan, *extra, total=total, grace=grace) as child:
            text, _ = child.communicate(timeout=100)
        ended = LabEnded(child.returncode, text, self.folder)
        assert not any(psutil.pid_exists(pid) for pid in ended.pids())
        return ended


@pytest.fixture
def lab(tmp_path: Path, warm: Path, image: Path) -> Lab:
    return Lab(tmp_path, image)


def test_results_of_all_kinds_come_through_every_report(lab: Lab) -> None:
    ended = lab.run([[["test", "test_a", "passed"], ["test", "test_b", "failed"], ["end"]]])
    assert ended.status == 1, ended.text
    assert ended.verdicts() == {"test_a": "pass", "test_b": "fail"}
    assert ended.report["platform"] == "lab"
    assert ended.report["host"]["kernel"] == "9.9.9 x86_64"
    assert ended.report["host"]["accelerator"] == "tcg"
    assert all(test["platform"] == "lab" for test in ended.report["tests"])
    assert "not ok 2 test_b" in (lab.folder / "out.ktap").read_text()
    suite = ElementTree.parse(lab.folder / "out.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert "platform lab (tcg)" in ended.text


def test_records_come_through_whole(lab: Lab) -> None:
    first: list[list[object]] = [
        ["test", "test_a", "failed", ["one, ", "two, ", "three"]],
        ["test", "test_b", "passed", ["../../four"]],
        ["start", "test_c"],
        ["console", PANIC],
        ["die", 0],
    ]
    ended = lab.run([first], "--record", "all", "--record-dir", "records")
    assert ended.status == 1, ended.text
    texts = {path.name: path.read_text() for path in (lab.folder / "records").iterdir()}
    assert texts == {"test_a.rec": "one, two, three", "test_b.rec": "../../four"}


def test_half_a_record_has_no_name(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(bytes(range(256)) * 4096)
    sent: list[dict[str, Any]] = []
    records.send(sent.append, path)
    assert len(sent) > 2
    assert not path.exists()
    pieces = [parse(json.dumps(event).encode()) for event in sent]
    for event in pieces[:-1]:
        assert isinstance(event, Record)
        records.receive(tmp_path, event, 0)
    assert not path.exists()
    records.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for event in pieces:
        assert isinstance(event, Record)
        records.receive(tmp_path, event, 0)
    assert path.read_bytes() == bytes(range(256)) * 4096


def counted(test: str, data: bytes) -> list[object]:
    return ["say", json.dumps({"event": "counted", "test": test, "data": base64.b64encode(data).decode()})]


def packed(*counters: int) -> bytes:
    """Counters of one function, number 9, of the first object, as a machine packs them."""
    content = bytes([9, len(counters), *(byte for value in counters for byte in (0, value))])
    return zlib.compress(struct.pack("<III", 0, 0xBEEF, len(content)) + content)


FILE = "selftests/area/test_a.py"
OBJECTS: list[object] = ["say", json.dumps({"event": "objects", "names": ["arch/x86/kvm/x86"]})]


@pytest.fixture
def coverage(lab: Lab) -> Path:
    folder = lab.folder / "coverage"
    folder.mkdir()
    (folder / "coverage.json").write_text('{"kernel": "k", "release": "1", "build_id": "b"}')
    with zipfile.ZipFile(folder / "coverage.zip", "w") as archive:
        archive.writestr("folders", "/build\n/tree\n")
    return folder


def test_a_machine_that_dies_costs_the_counters_of_what_ran(lab: Lab, coverage: Path) -> None:
    first: list[list[object]] = [
        OBJECTS,
        ["test", "test_a", "passed"],
        counted(FILE, packed(1, 2)),
        ["start", "test_b"],
        ["console", PANIC],
        ["die", 0],
    ]
    second: list[list[object]] = [OBJECTS, ["test", "test_c", "passed"], counted(FILE, packed(3)), ["end"]]
    ended = lab.run([first, second])
    assert ended.status == 1, ended.text
    entries = list(Coverage(coverage).entries())
    assert [(entry.suite, entry.test) for entry in entries] == [("kvmpy", "area/test_a.py")] * 2
    # The reports of a test take 0.1 s each.
    assert [entry.seconds for entry in entries] == pytest.approx([0.3, 0.3])
    assert [list(entry.counters()) for entry in entries] == [
        [("arch/x86/kvm/x86", 0xBEEF, {9: [(0, 1), (1, 2)]})],
        [("arch/x86/kvm/x86", 0xBEEF, {9: [(0, 3)]})],
    ]


@pytest.mark.parametrize("data", [b"nonsense", zlib.compress(b"\7" * 12), packed(1)[:-3]])
def test_counters_that_are_none_end_the_machine(lab: Lab, coverage: Path, data: bytes) -> None:
    bad: list[list[object]] = [OBJECTS, ["test", "test_a", "passed"], counted(FILE, data), ["hang"]]
    ended = lab.run([bad, [OBJECTS, ["test", "test_b", "passed"], ["end"]]])
    assert ended.status == 1, ended.text
    assert "counters" in ended.test("test_a")["reason"]
    assert list(Coverage(coverage).entries()) == []


def test_all_passed_is_status_0_and_leaves_no_folder(lab: Lab, cache: Path) -> None:
    ended = lab.run([[["test", "test_a", "passed"], ["end"]]])
    assert ended.status == 0, ended.text
    assert list((cache / "runs").iterdir()) == []


def test_a_panic_costs_one_test_and_the_rest_runs_in_a_new_boot(lab: Lab) -> None:
    first: list[list[object]] = [
        ["test", "test_a", "passed"],
        ["start", "test_b"],
        ["console", PANIC],
        ["die", 0],
    ]
    ended = lab.run([first, [["test", "test_c", "passed"], ["end"]]])
    assert ended.verdicts() == {"test_a": "pass", "test_b": "lost", "test_c": "pass"}
    assert ended.status == 1
    lost = ended.test("test_b")
    assert lost["reason"] == "Kernel panic - not syncing: for a test"
    assert "dummy+0x1/0x2" in lost["details"]
    assert len(ended.pids()) == 2


def test_a_warning_after_a_test_is_not_silent(lab: Lab) -> None:
    first: list[list[object]] = [
        ["test", "test_a", "passed"],
        ["console", "WARNING: CPU: 0 at kvm.c:1"],
        ["die", 0],
    ]
    ended = lab.run([first, [["test", "test_b", "passed"], ["end"]]])
    assert ended.verdicts() == {"test_a": "lost", "test_b": "pass"}
    assert ended.test("test_a")["reason"].startswith("right after this test: WARNING")
    assert ended.status == 1


def test_a_hung_kernel_is_ended(lab: Lab) -> None:
    ended = lab.run([[["start", "test_a"], ["hang"]], [["test", "test_b", "passed"], ["end"]]])
    assert ended.verdicts() == {"test_a": "lost", "test_b": "pass"}
    assert ended.test("test_a")["reason"].startswith("hung: no sign of life")


def test_a_test_process_that_dies(lab: Lab) -> None:
    ended = lab.run(
        [[["start", "test_a"], ["exit", 139], ["die", 0]], [["test", "test_b", "passed"], ["end"]]]
    )
    assert ended.verdicts() == {"test_a": "lost", "test_b": "pass"}
    assert ended.test("test_a")["reason"] == "the test process was killed by signal 11"


def test_qemu_that_dies_keeps_the_results_so_far(lab: Lab) -> None:
    dying: list[list[object]] = [["silent"], ["die", 9]]
    lab.tests("test_a", "test_b")
    ended = lab.run([[["test", "test_a", "passed"], ["start", "test_b"], ["die", 9]], dying, dying, dying])
    # The plan's tests are all done or lost after the first boot.
    assert ended.verdicts() == {"test_a": "pass", "test_b": "lost"}
    assert ended.test("test_b")["reason"].startswith("QEMU ended with status 9")
    assert ended.status == 1


def test_a_kernel_that_comes_up_once_only(lab: Lab) -> None:
    dying: list[list[object]] = [["silent"], ["console", PANIC], ["die", 0]]
    tests: list[list[object]] = [["test", "test_a", "passed"], ["start", "test_b"], ["die", 0]]
    never: list[list[object]] = [["silent"], ["test", "test_c", "passed"]]
    ended = lab.run([tests, dying, dying, never])
    assert ended.status == 3, ended.text
    assert ended.verdicts() == {"test_a": "pass", "test_b": "lost"}
    assert [name.rpartition("::")[2] for name in ended.report["not_run"]] == ["test_c"]


def test_a_kernel_that_never_comes_up(lab: Lab) -> None:
    ended = lab.run([[["silent"], ["console", PANIC], ["die", 0]]])
    assert ended.status == 3
    assert "Kernel panic - not syncing: for a test" in ended.text
    assert ended.report["tests"] == []


def test_a_wrong_argument_is_pytests_own_complaint(lab: Lab) -> None:
    ended = lab.run([[["silent"], ["output", "ERROR: no such file"], ["exit", 4], ["die", 0]]])
    assert ended.status == 4
    assert "ERROR: no such file" in ended.text


def test_stop_at_the_first_failure(lab: Lab) -> None:
    ended = lab.run([[["test", "test_a", "failed"], ["test", "test_b", "passed"], ["hang"]]], "-x")
    assert ended.status == 1
    assert ended.verdicts() == {"test_a": "fail"}


def test_the_whole_run_is_limited(lab: Lab) -> None:
    ended = lab.run([[["start", "test_a"], ["hang"]]], total=8.0, grace=60.0)
    assert ended.status == 1
    assert ended.verdicts() == {"test_a": "lost"}
    assert "the run took longer than" in ended.test("test_a")["reason"]


def _interrupted(lab: Lab, act: Callable[[subprocess.Popen[str]], None]) -> int:
    with lab.start(
        [[["test", "test_a", "passed"], ["start", "test_b"], ["hang"]]], "-v", grace=60.0
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if "test_a PASSED" in line:
                break
        (boot,) = lab.folder.glob("boot-*")
        qemu = psutil.Process(json.loads(boot.read_text())[0])
        assert qemu.is_running()
        act(child)
        child.communicate(timeout=60)
    psutil.wait_procs([qemu], timeout=30)
    assert not qemu.is_running() or qemu.status() == psutil.STATUS_ZOMBIE
    return child.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_qemu_and_keeps_the_results(lab: Lab, number: signal.Signals) -> None:
    status = _interrupted(lab, lambda child: child.send_signal(number))
    assert status == 2
    tests = json.loads((lab.folder / "out.json").read_text())["tests"]
    assert tests[0]["verdict"] == "pass"


def test_a_killed_parent_leaves_no_qemu(lab: Lab) -> None:
    assert _interrupted(lab, lambda child: child.kill()) == -signal.SIGKILL


def test_a_brief_run_shows_failures_and_losses_as_they_come(lab: Lab) -> None:
    """The failure is shown before the loss that follows it, each once, and no letters."""
    dies: list[list[object]] = [
        ["test", "test_a", "failed"],
        ["start", "test_b"],
        ["console", PANIC],
        ["die", 0],
    ]
    ended = lab.run([dies, [["test", "test_c", "passed"], ["end"]]], "--kvmpy-brief")
    assert ended.status == 1, ended.text
    assert ended.verdicts() == {"test_a": "fail", "test_b": "lost", "test_c": "pass"}
    lines = ended.text.splitlines()
    failed = lines.index("FAIL  area/test_a.py::test_a: boom")
    lost = next(number for number, line in enumerate(lines) if line.endswith("that test is lost"))
    table = next(number for number, line in enumerate(lines) if line.startswith("verdicts, platform lab"))
    assert failed < lost < table
    assert not any(line.startswith("LOST ") for line in lines)
    assert not any(line.startswith("selftests/area/test_a.py") for line in lines)
