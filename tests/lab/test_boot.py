# SPDX-License-Identifier: Apache-2.0
"""A real kernel under a real QEMU, where one is in the cache: what works there, and every way to die."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvmpy.lab import kernels, tools
from kvmpy.lab.coverage import maps, queries
from kvmpy.lab.coverage.store import Coverage
from kvmpy.lab.kernels import Kernel

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("lab")]
ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import sys
from kvmpy.lab.kernels import find
from kvmpy.lab.lane import Limits
from kvmpy.lab.qemu import Options
from kvmpy.lab.runs import Request, run

reports = ["--kvmpy-json", "out.json", "--ktap", "out.ktap", "--junitxml", "out.xml"]
inside = ["-c", "own.ini", "--rootdir", ".", "test_own.py"]
request = Request(Options(find(), memory=1024), inside, reports, ["-v"], 1, Limits(grace=8))
sys.exit(run(request, lambda text: print("SAID", text, flush=True)))
"""
SETTINGS = "[pytest]\ntimeout = 100\naddopts = -p no:cacheprovider\n"
WAYS_TO_DIE = """
import os, signal, time
from pathlib import Path

import pytest


def test_a_good():
    assert os.environ["KVMPY_PLATFORM"] == "lab"


def test_b_panics():
    Path("/proc/sysrq-trigger").write_text("c")
    time.sleep(60)


def test_c_fails():
    assert 1 == 2


def test_d_warns():
    # What a WARN prints; the kernel offers no way to have a real one.
    Path("/dev/kmsg").write_text("<4>WARNING: CPU: 0 PID: 1 at kernel/own.c:1 own+0x1/0x2\\n")
    time.sleep(60)


def test_e_process_dies():
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.timeout(0)
def test_f_good():
    pass


@pytest.mark.timeout(1)
def test_g_hangs():
    os.kill(os.getpid(), signal.SIGSTOP)


def test_h_loses_the_channel():
    port = Path("/sys/class/virtio-ports")
    device = next(entry.resolve() for entry in port.iterdir())
    while not (device / "remove").exists():
        device = device.parent
    (device / "remove").write_text("1")


def test_i_good():
    pass
"""
SLOW = """

def test_a_good():
    pass

def test_b_waits():
    time.sleep(90)

def test_c_good():
    pass
"""


@pytest.fixture
def kernel() -> Kernel:
    if shutil.which(tools.QEMU) is None:
        pytest.skip(f"needs {tools.QEMU}: {tools.install_command(tools.RUN)}")
    if not kernels.cached():
        pytest.skip("needs a lab kernel in the cache: kvmpy lab build")
    return kernels.find()


@contextmanager
def started(folder: Path, tests: str) -> Iterator[subprocess.Popen[str]]:
    (folder / "own.ini").write_text(SETTINGS)
    (folder / "test_own.py").write_text(tests)
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def report(folder: Path) -> dict[str, dict[str, Any]]:
    tests = json.loads((folder / "out.json").read_text())["tests"]
    return {test["id"].rpartition("::")[2].removeprefix("test_")[:1]: test for test in tests}


def qemu_of(child: subprocess.Popen[str]) -> psutil.Process:
    processes = [one for one in psutil.Process(child.pid).children(recursive=True) if "qemu" in one.name()]
    assert len(processes) == 1
    return processes[0]


def until(child: subprocess.Popen[str], text: str) -> str:
    """Read what *child* prints up to *text*, which must come."""
    seen = ""
    assert child.stdout is not None
    while text not in seen:
        letter = child.stdout.read(1)
        assert letter, seen
        seen += letter
    return seen


def test_one_selftest_inside_a_real_kernel(tmp_path: Path, kernel: Kernel) -> None:
    command = [sys.executable, "-m", "kvmpy", "lab", "run", "--accel", "tcg", "--no-soft-sev"]
    command += ["--kernel", kernel.name]
    target = tmp_path / "out.json"
    result = subprocess.run(
        [*command, "--json", str(target), "harness/test_counter.py"],
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    values = json.loads(target.read_text())
    assert values["platform"] == "lab"
    assert values["host"]["accelerator"] == "tcg"
    assert values["host"]["kernel"].split()[0] == kernel.release
    assert "kvm_amd" in values["host"]["vendor_modules"]
    assert {test["verdict"] for test in values["tests"]} <= {"pass", "skip"}
    assert {"cbit", "none", "sw-protected"} <= {
        test["protection"] for test in values["tests"] if test["verdict"] == "pass"
    }
    # What came last is the test runner's own summary.
    assert "passed" in result.stdout.strip().splitlines()[-1]


def test_every_way_to_die_costs_one_test(tmp_path: Path, kernel: Kernel) -> None:
    with started(tmp_path, WAYS_TO_DIE) as child:
        text, _ = child.communicate(timeout=850)
    assert child.returncode == 1, text
    tests = report(tmp_path)
    verdicts = {letter: test["verdict"] for letter, test in tests.items()}
    good, lost = dict.fromkeys("afi", "pass"), dict.fromkeys("bdegh", "lost")
    assert verdicts == {**good, **lost, "c": "fail"}, text
    assert tests["b"]["reason"].startswith("Kernel panic - not syncing: sysrq triggered crash")
    assert "Call Trace" in tests["b"]["details"]
    assert tests["d"]["reason"].startswith("WARNING: CPU: 0 PID: 1 at kernel/own.c:1")
    assert tests["e"]["reason"] == "the test process was killed by signal 11"
    assert tests["g"]["reason"].startswith("hung: no sign of life for")
    assert "console does not say why" in tests["h"]["reason"] or "no sign of life" in tests["h"]["reason"]
    ktap = (tmp_path / "out.ktap").read_text()
    assert "not ok 2 test_b_panics # ERROR lost: Kernel panic" in ktap
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("9", "1")


def test_qemu_killed_in_mid_run(tmp_path: Path, kernel: Kernel) -> None:
    with started(tmp_path, SLOW) as child:
        until(child, "test_b_waits")
        qemu_of(child).kill()
        text, _ = child.communicate(timeout=850)
    assert child.returncode == 1, text
    tests = report(tmp_path)
    assert {letter: test["verdict"] for letter, test in tests.items()} == {
        "a": "pass",
        "b": "lost",
        "c": "pass",
    }
    assert tests["b"]["reason"].startswith("QEMU ended with status -9")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_end_from_outside_leaves_no_qemu(tmp_path: Path, kernel: Kernel, number: signal.Signals) -> None:
    with started(tmp_path, SLOW) as child:
        until(child, "test_b_waits")
        qemu = qemu_of(child)
        child.send_signal(number)
        text, _ = child.communicate(timeout=120)
    _, alive = psutil.wait_procs([qemu], timeout=30)
    assert alive == []
    if number is signal.SIGINT:
        assert child.returncode == 2, text
        assert report(tmp_path)["a"]["verdict"] == "pass"


def test_commands_in_the_shell(kernel: Kernel) -> None:
    commands = "cat /proc/version; kvmpy run harness/test_counter.py --protection none"
    result = subprocess.run(
        [sys.executable, "-m", "kvmpy", "lab", "shell", "--kernel", kernel.name, "--", "sh", "-c", commands],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert f"Linux version {kernel.release}" in result.stdout, result.stderr
    assert re.search(r"[1-9]\d* passed", result.stdout), result.stdout


def lab_run(kernel: Kernel, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmpy", "lab", "run", "--kernel", kernel.name, "--accel", "tcg", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)


def test_settings_are_so_inside(tmp_path: Path, kernel: Kernel) -> None:
    """CPUs, nodes, memory, flags and parameters of every kind at once."""
    (tmp_path / "mine.toml").write_text(
        '[mine]\nparameters = ["kvm.tdp_mmu=N", "kvm.nx_huge_pages=force", "transparent_hugepage=never"]\n'
        'optional = ["kvm.nonesuch=1"]\ncpu = ["-vgif", "-umip", "+la57"]\n'
        'cpus = 3\nnodes = 3\nmemory = "1G"\nsoft-sev = false\n'
    )
    chosen = ["--configurations", str(tmp_path / "mine.toml"), "--configuration", "mine"]
    target = tmp_path / "out.json"
    result = lab_run(
        kernel, *chosen, "--protection", "none", "--json", str(target), "harness/test_counter.py"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = json.loads(target.read_text())["host"]["configuration"]
    assert said.startswith("mine (kvm.tdp_mmu=N, kvm.nx_huge_pages=force, ")


def test_settings_without_effect_are_named(kernel: Kernel) -> None:
    """All of them, the nearest name, and the kernel's own words."""
    words = ["kvm.halt_poll_ns=abc", "kvm.tdp_mu=N", "no5lv", "nr_cpus=1"]
    result = lab_run(
        kernel, *(word for text in words for word in ("--param", text)), "harness/test_counter.py"
    )
    assert result.returncode == 3, result.stdout + result.stderr
    for says in (
        "kvm.halt_poll_ns is 200000 inside, not abc",
        "the kernel inside has no parameter kvm.tdp_mu; did you mean kvm.tdp_mmu?",
        "the kernel does not know no5lv",
        "there are 1 CPUs inside, not 2",
        "the kernel says: ",
        "invalid for parameter",
    ):
        assert says in result.stdout
    assert "passed" not in result.stdout


def test_parameters_of_a_real_kernel_are_set_for_a_run(tmp_path: Path, kernel: Kernel) -> None:
    """What `kvmpy run` does on a host, on one that may be touched; a built-in module is not loaded anew."""
    (tmp_path / "test_own.py").write_text(
        "from pathlib import Path\n\ndef test_value():\n"
        "    assert Path('/sys/module/kvm/parameters/halt_poll_ns').read_text() == '7\\n'\n"
    )
    run = f"kvmpy run {tmp_path / 'test_own.py'} --param"
    show = "cat /sys/module/kvm/parameters/halt_poll_ns; ls /run/kvmpy"
    commands = f"{show}; {run} kvm.halt_poll_ns=7; {show}; {run} kvm.tdp_mmu=N --reload; "
    commands += f"{run} kvm.halt_poll_ns=abc; {show}"
    result = subprocess.run(
        [sys.executable, "-m", "kvmpy", "lab", "shell", "--kernel", kernel.name, "--", "sh", "-c", commands],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    output = result.stdout.replace("\r", "")
    assert "1 passed" in output, output
    assert output.count("\n200000\n") == 3, output
    assert "parameters.json" not in output
    assert "configuration kvm.halt_poll_ns=7" in output
    assert "kvm.tdp_mmu can be set on the kernel's command line only: kvm is built in" in output
    assert "kvm.halt_poll_ns=abc is refused: Invalid argument" in output


@pytest.fixture
def counting() -> Kernel:
    if shutil.which(tools.QEMU) is None:
        pytest.skip(f"needs {tools.QEMU}: {tools.install_command(tools.RUN)}")
    if not any(each.coverage for each in kernels.cached()):
        pytest.skip("needs a lab kernel that counts: kvmpy lab build --coverage")
    return kernels.find(coverage=True)


def test_what_kvm_executes_is_counted(tmp_path: Path, counting: Kernel) -> None:
    folder = tmp_path / "coverage"
    kvmpy = [sys.executable, "-m", "kvmpy"]
    own = ["harness/test_counter.py", "--protection", "none", "--coverage-by", "test"]
    other = ["shell", "--", "kvmpy", "coverage", "count", "--suite", "other", "true", "false"]
    for command in (["run", *own], other):
        command.insert(1, "--coverage")
        command.insert(2, str(folder))
        result = subprocess.run(
            [*kvmpy, "lab", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        print(result.stdout, result.stderr)
        assert result.returncode == 0
    known = maps.of_folder(Coverage(folder))
    assert known.build_id == counting.build_id
    tests = {test.id: test.seconds for test in known.tests if test.suite == "kvmpy"}
    assert {name.partition("::")[0] for name in tests} == {"harness/test_counter.py"}
    assert min(tests.values()) > 0
    assert {test.id for test in known.tests if test.suite == "other"} == {"true", "false"}
    for name, expected in (
        ("kvm_vm_ioctl_create_vcpu", True),
        ("sev_mem_enc_ioctl", False),
        ("kvm_x86_init", False),
    ):
        reached = {test.suite for answer in queries.who_executes(known, name) for test in answer.tests or ()}
        assert ("kvmpy" in reached) is expected, name
        assert "other" not in reached
    # The kernel's own start is nobody's.
    assert {known.lines[number][0] for number in known.boot} >= {"arch/x86/kvm/x86.c", "virt/kvm/kvm_main.c"}
