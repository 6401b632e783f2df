# SPDX-License-Identifier: Apache-2.0
"""Records of programs that run a vCPU as VMMs do: replayed, cut down, and written as C that reproduces."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvmpy import Kvm
from kvmpy.cli.main import main
from kvmpy.core.exits import IoExit
from kvmpy.debug.record.events import Ioctl, Memory
from kvmpy.debug.record.format import When
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.script import build
from tests.debug.record_scenarios import machine
from tests.debug.run_scenarios import COUNTING
from tests.debug.test_record_repro import run_c
from tests.debug.tracing import SOURCE, compile_program, kvmpy, need_kvm

MODES = ("complete", "immediate", "interrupted", "coalesced", "synchronised", "cpuid", "again", "fork-own")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, dynamically linked."""
    need_kvm()
    return compile_program(tmp_path_factory.mktemp("vmm"), source=SOURCE.with_name("vmm_runs.c"))


def traced(program: Path, mode: str, folder: Path) -> Path:
    """Record the *mode* of the program."""
    path = folder / f"{mode}.rec"
    done = kvmpy("trace", "-q", "-o", path, "--", program, mode)
    assert (done.returncode, done.stderr) == (0, "")
    return path


def call(*arguments: object) -> Result:
    """Call kvmpy's command line in this process."""
    return CliRunner().invoke(main, [str(each) for each in arguments])


def reproduced(path: Path, folder: Path, *options: str) -> tuple[int, str]:
    """Write the record at *path* as C, compile and run it."""
    done = call("repro", path, *options, "-o", folder / "bug.c")
    assert done.exit_code == 0, done.output
    return run_c((folder / "bug.c").read_text(), folder)


@pytest.mark.parametrize("mode", MODES)
def test_repeats(mode: str, program: Path, tmp_path: Path) -> None:
    """Every ioctl ends as it did, and the C file of all of it says so."""
    path = traced(program, mode, tmp_path)
    done = call("replay", path)
    assert done.exit_code == 0, done.output
    assert " 0 with a different result" in done.output
    assert reproduced(path, tmp_path, "--all") == (0, "reproduced\n")


def test_runs_that_were_interrupted_come_to_no_exit_of_their_own(program: Path, tmp_path: Path) -> None:
    """Each is in the record, and replayed as one that may come to the next run's exit."""
    script = build(Record.load(traced(program, "interrupted", tmp_path)))
    runs = [step for step in script.steps if step.interrupted]
    assert len(runs) >= 3
    # The program ends with an exit or, now and then, with its third interruption.
    assert all(step.unsteady for step in runs[:-1])


@pytest.mark.timeout(600)
def test_completing_runs_are_cut_down(program: Path, tmp_path: Path) -> None:
    """The last exit of forty remains, and its C file is about it and not about the run that completes it."""
    path = traced(program, "complete", tmp_path)
    small = tmp_path / "small.rec"
    done = call("shrink", path, "--attempts", "120", "-o", small)
    assert done.exit_code == 0, done.output
    assert len(Record.load(path).ioctls) == 87
    assert len(Record.load(small).ioctls) < 10
    status, said = reproduced(small, tmp_path, "--no-shrink")
    assert (status, said) == (0, "reproduced\n")
    assert "What it shows: KVM_RUN on vcpu0 ends with KVM_EXIT_IO" in (tmp_path / "bug.c").read_text()


def test_the_flag_is_shown_for_every_run(program: Path) -> None:
    """A flag that the program set once holds for the runs behind it, too."""
    done = kvmpy("trace", "-f", "run", "--", program, "immediate")
    runs = re.findall(r"KVM_RUN( \[immediate_exit\])? = (-1 EINTR|0 KVM_EXIT_IO)", done.stderr)
    assert runs == [(" [immediate_exit]", "-1 EINTR")] * 3 + [("", "0 KVM_EXIT_IO")]


def test_processes_that_share_a_vm_are_refused(program: Path, tmp_path: Path) -> None:
    """What KVM refuses to another process would be granted in one: every command says so, status 3."""
    path = traced(program, "fork-shared", tmp_path)
    for command in ("replay", "shrink", "repro"):
        done = call(command, path)
        assert done.exit_code == 3, done.output
        assert re.search(r"process \d+ issued KVM_GET_REGS on vm0/vcpu0, which process \d+ made", done.output)


@pytest.fixture
def counted(kvm: Kvm, tmp_path: Path) -> Path:
    """A record of two runs to an exit."""
    path = tmp_path / "counted.rec"
    with Recorder(path), Kvm() as own, machine(own, COUNTING) as vm:
        for _ in range(2):
            assert isinstance(vm.vcpus[0].run(5), IoExit)
    return path


def test_replay_says_why_it_stopped_behind_a_difference(counted: Path) -> None:
    """A record that cannot be carried out to its end says so, whatever differed before."""
    record = Record.load(counted)
    entries = list(record.entries)
    first, last = (n for n, e in enumerate(entries) if isinstance(e.what, Ioctl) and e.what.request == 0xAE80)
    payload = entries[first].what
    assert isinstance(payload, Ioctl)
    entries[first] = entries[first].but(replace(payload, result=-1, errno=22))
    lost = entries[last].what
    assert isinstance(lost, Ioctl)
    entries[last] = entries[last].but(replace(lost, object=99, request=0x8090AE81))
    record.with_entries(entries).save(counted)
    done = call("replay", counted)
    assert done.exit_code == 1
    assert "1 with a different result" in done.output
    assert re.search(r"stopped: step \d+: its file descriptor does not exist here", done.output)


def test_another_exit_is_a_difference_and_no_crash(counted: Path, tmp_path: Path) -> None:
    """Of an exit that is none of a port, nothing is followed to its data."""
    record = Record.load(counted)
    # mov $0x66ffffff, %ecx; mov $0xf000, %ax; mov %ax, %ds; mov %ecx, 0x2000; hlt: the data of an MMIO exit
    # lies where the offset of the other one's data does.
    code = bytes.fromhex("66b9ffffff66b800f08ed866890e0020f4")
    memory = next(e.what for e in record.entries if isinstance(e.what, Memory))
    ident = next(i for i in memory.ids if record.page(i).startswith(COUNTING))
    page = code + record.page(ident)[len(code) :]
    changed = replace(record, pages={**record.pages, ident: page})
    changed.save(counted)
    status, said = reproduced(counted, tmp_path, "--all")
    assert status == 1, said
    assert "exit_reason: recorded 0x2, now 0x6" in said
    assert said.endswith("not reproduced\n")


def test_a_difference_is_told_with_both_results(counted: Path, tmp_path: Path) -> None:
    """What failed when it was recorded, and what it returns now."""
    record = Record.load(counted)
    entries = list(record.entries)
    last = max(n for n, e in enumerate(entries) if isinstance(e.what, Ioctl))
    event = entries[last].what
    assert isinstance(event, Ioctl)
    chunks = tuple(c for c in event.chunks if c.when != When.OUT)
    entries[last] = entries[last].but(replace(event, result=-1, errno=22, chunks=chunks))
    record.with_entries(entries).save(counted)
    status, said = reproduced(counted, tmp_path, "--all")
    assert status == 1
    assert "KVM_RUN: recorded failure: Invalid argument, now result 0\n" in said


def test_qemu_compiles(tmp_path: Path) -> None:
    """All that QEMU asks of KVM before its machine starts is C without a warning, and reproduces."""
    need_kvm()
    record = tmp_path / "qemu.rec"
    machine_ = ("-accel", "kvm", "-M", "microvm", "-m", "32M", "-nodefaults", "-display", "none", "-S")
    try:
        kvmpy("trace", "-q", "-o", record, "--", "timeout", "5", "qemu-system-x86_64", *machine_)
    except subprocess.TimeoutExpired:
        pytest.skip("QEMU did not start in time")
    if not record.exists() or not Record.load(record).ioctls:
        pytest.skip("qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)")
    assert reproduced(record, tmp_path, "--all") == (0, "reproduced\n")
