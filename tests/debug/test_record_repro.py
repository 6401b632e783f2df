# SPDX-License-Identifier: Apache-2.0
"""C files made of records: they compile without a warning, run here, and end as the record did."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kvmpy import Kvm
from kvmpy.debug.record.events import Ioctl
from kvmpy.debug.record.format import When
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.prune import prune, target_of
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.repro import write_c
from kvmpy.debug.record.script import Script, Step, build
from kvmpy.uapi import ioctls
from tests.debug.scenarios import SCENARIOS, SHOWS, names

GCC = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
ABOUT_A_QUESTION = {"registers": "KVM_GET_REGS"}


def record_of(name: str, kvm: Kvm, folder: Path) -> Record:
    """Record the scenario *name*."""
    path = folder / f"{name}.rec"
    with Recorder(path, test=name), Kvm() as own:
        SCENARIOS[name](own)
    del kvm
    return Record.load(path)


def target_in(script: Script, name: str) -> Step:
    """Return the step that the scenario is about."""
    if name in ABOUT_A_QUESTION:
        number = ioctls.IOCTLS[ABOUT_A_QUESTION[name]].nr
        return [step for step in script.steps if step.request == number][-1]
    return target_of(script)


def c_file(record: Record, name: str) -> str:
    """Return the C file of *record*."""
    script = build(record)
    target = target_in(script, name)
    pruned = prune(script, target)
    return write_c(pruned, next(s for s in pruned.steps if s.entry is target.entry), limit=5)


def run_c(text: str, folder: Path) -> tuple[int, str]:
    """Compile and run a C file; return its exit status and what it printed."""
    source, program = folder / "bug.c", folder / "bug"
    source.write_text(text)
    process = subprocess.run(
        [*GCC, "-o", str(program), str(source)], capture_output=True, text=True, timeout=60, check=False
    )
    assert not process.stderr
    assert process.returncode == 0
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def falsified(record: Record, name: str) -> Record:
    """Return *record* with another outcome of the ioctl that it is about."""
    order = target_in(build(record), name).entry.order
    entries = []
    for entry in record.entries:
        payload = entry.what
        if entry.order != order or not isinstance(payload, Ioctl):
            entries.append(entry)
        elif payload.request == ioctls.KVM_RUN.nr and payload.result >= 0:
            chunks = tuple(
                replace(c, data=c.data[:8] + b"\x1f" + c.data[9:])
                if c.when == When.OUT and len(c.data) > 40
                else c
                for c in payload.chunks
            )
            entries.append(entry.but(replace(payload, chunks=chunks)))
        elif payload.result < 0:
            entries.append(entry.but(replace(payload, errno=payload.errno + 1)))
        else:
            entries.append(entry.but(replace(payload, result=-1, errno=22)))
    return record.with_entries(entries)


@pytest.mark.parametrize("name", names())
def test_reproduces(name: str, kvm: Kvm, tmp_path: Path) -> None:
    """The C file of a scenario says what it shows, compiles cleanly and reproduces."""
    text = c_file(record_of(name, kvm, tmp_path), name)
    shown = re.search(r"What it shows: (.*)", text)
    assert shown is not None
    assert shown[1].endswith(SHOWS[name])
    status, said = run_c(text, tmp_path)
    assert said == "reproduced\n"
    assert status == 0


@pytest.mark.parametrize("name", names())
def test_a_false_record_is_not_reproduced(name: str, kvm: Kvm, tmp_path: Path) -> None:
    """The C file of a record with another outcome says "not reproduced"."""
    text = c_file(falsified(record_of(name, kvm, tmp_path), name), name)
    status, said = run_c(text, tmp_path)
    assert status == 1
    assert "not reproduced" in said


def test_payload_counts(kvm: Kvm, tmp_path: Path) -> None:
    """A byte that the guest put on a port is part of the outcome."""
    record = record_of("pio_out", kvm, tmp_path)
    entries = list(record.entries)
    index = max(n for n, e in enumerate(entries) if isinstance(e.what, Ioctl))
    event = entries[index].what
    assert isinstance(event, Ioctl)
    chunks = tuple(replace(c, data=b"\x43") if c.data == b"\x42" else c for c in event.chunks)
    assert chunks != event.chunks
    entries[index] = entries[index].but(replace(event, chunks=chunks))
    status, said = run_c(c_file(record.with_entries(entries), "pio_out"), tmp_path)
    assert status == 1
    assert "io.data differs" in said


def test_readable(kvm: Kvm, tmp_path: Path) -> None:
    """Fields by name, flags in words, code with its disassembly, and where the record comes from."""
    text = c_file(record_of("dirty_log", kvm, tmp_path), "dirty_log")
    assert ".flags = KVM_MEM_LOG_DIRTY_PAGES," in text
    assert "/* 0x1000: mov byte ptr [0x3000], al */" in text
    assert ".rip = 0x1000," in text
    header = text[: text.index("*/")]
    for label in ("Kernel:", "CPU:", "KVM module:", "Written by:", "Compile:", "Recorded from:"):
        assert label in header


def test_threads_are_threads(kvm: Kvm, tmp_path: Path) -> None:
    """What ran in another thread is in a thread of its own, which waits for what came before."""
    text = c_file(record_of("two_vcpus", kvm, tmp_path), "two_vcpus")
    assert "static void *thread1(void *arg)" in text
    assert re.search(r"thread1.*await\(&ended\[\d+\]\);.*KVM_RUN", text, re.DOTALL)


@pytest.mark.requires("kvm")
def test_statistics_that_a_post_mortem_reads_are_nobodys_subject(tmp_path: Path) -> None:
    """A guest that fails an assertion ends with an exit; what is asked of KVM afterwards explains, and is
    not shown.
    """
    path = tmp_path / "asked.rec"
    with Recorder(path), Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.regs.set(vcpu.regs.get())
        vcpu.stats.get_fd().close()
        vcpu.regs.get_sregs()
    assert target_of(build(Record.load(path))).request == ioctls.KVM_SET_REGS.nr


@pytest.mark.requires("protection:snp")
def test_code_that_a_launch_copies(kvm: Kvm, tmp_path: Path) -> None:
    """Code of an SNP guest is disassembled where KVM copies it from, and commands have their names."""
    text = c_file(record_of("snp_program", kvm, tmp_path), "snp_program")
    assert re.search(r"mem\d+_code_[0-9a-f]+\[\] = \{", text)
    assert len(re.findall(r"/\* 0x400[0-9a-f]{3}: ", text)) > 100
    assert '"KVM_SEV_SNP_LAUNCH_FINISH", ioctl(vm, KVM_MEMORY_ENCRYPT_OP' in text
    assert text.count('open("/dev/sev"') == 1
