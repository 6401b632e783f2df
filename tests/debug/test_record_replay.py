# SPDX-License-Identifier: Apache-2.0
"""Records carried out again: the same comes of them, and a difference is found and shown where it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvmpy import Kvm
from kvmpy.debug.record.events import Ioctl
from kvmpy.debug.record.format import When
from kvmpy.debug.record.model import Record, request_name
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.replay import Replay
from kvmpy.debug.record.script import build
from kvmpy.debug.record.worker import Player
from kvmpy.uapi import ioctls
from tests.debug.record_scenarios import machine
from tests.debug.scenarios import SCENARIOS, names


def record_of(name: str, folder: Path) -> Record:
    """Record the scenario *name*."""
    path = folder / f"{name}.rec"
    with Recorder(path), Kvm() as own:
        SCENARIOS[name](own)
    return Record.load(path)


@pytest.mark.parametrize("name", names())
def test_same_again(name: str, kvm: Kvm, tmp_path: Path) -> None:
    """Every ioctl of every scenario ends as recorded."""
    record = record_of(name, tmp_path)
    result = Replay(build(record)).run()
    assert result.stopped == ""
    assert len(result.played) == len(record.ioctls)
    assert [each.differences for each in result.played if each.differences] == []


def test_an_answer_that_counts_itself(kvm: Kvm, tmp_path: Path) -> None:
    """What lies behind the entries that KVM_GET_CPUID2 filled is no difference; one that is another is."""
    with Recorder(tmp_path / "a.rec"), Kvm() as own, machine(own, b"\xf4") as vm:
        vm.vcpus[0].cpuid.set(kvm.get_supported_cpuid())
        vm.vcpus[0].cpuid.get()
    record = Record.load(tmp_path / "a.rec")
    assert Replay(build(record)).run().first_difference is None
    number = ioctls.KVM_GET_CPUID2.nr
    for offset in (0, 8 + 40 + 4):  # nent, the index of the second entry
        assert Replay(build(changed(record, number, offset, 0x55))).run().first_difference is not None


def test_saved_and_loaded(kvm: Kvm, tmp_path: Path) -> None:
    """A record that was loaded and saved is the same record."""
    record = record_of("counter", tmp_path)
    record.save(tmp_path / "copy.rec")
    copy = Record.load(tmp_path / "copy.rec")
    assert [e.what for e in copy.ioctls] == [e.what for e in record.ioctls]
    assert Replay(build(copy)).run().first_difference is None


def changed(record: Record, nr: int, offset: int, value: int) -> Record:
    """Return *record* with another byte in what the first ioctl *nr* returned."""
    entries = list(record.entries)
    number = next(n for n, e in enumerate(entries) if isinstance(e.what, Ioctl) and e.what.request == nr)
    payload = entries[number].what
    assert isinstance(payload, Ioctl)
    chunks = tuple(
        replace(c, data=c.data[:offset] + bytes([value]) + c.data[offset + 1 :]) if c.when == When.OUT else c
        for c in payload.chunks
    )
    entries[number] = entries[number].but(replace(payload, chunks=chunks))
    return record.with_entries(entries)


def test_difference_in_a_field(kvm: Kvm, tmp_path: Path) -> None:
    """A register that was recorded with another value is the first difference, by its name."""
    path = tmp_path / "a.rec"
    with Recorder(path), Kvm() as own, machine(own, b"\xb8\x34\x12\xf4") as vm:
        vm.vcpus[0].run(5)
        vm.vcpus[0].regs.get_sregs()
        vm.vcpus[0].regs.get()
    record = Record.load(path)
    entries = list(record.entries)
    last = max(n for n, e in enumerate(entries) if request_name(e.what) == "KVM_GET_REGS")
    event = entries[last].what
    assert isinstance(event, Ioctl)
    chunk = event.chunks[0]
    entries[last] = entries[last].but(replace(event, chunks=(replace(chunk, data=b"\x35" + chunk.data[1:]),)))
    result = Replay(build(record.with_entries(entries))).run()
    first = result.first_difference
    assert first is not None
    assert request_name(first.step.entry.what) == "KVM_GET_REGS"
    assert [(d.name, d.recorded, d.now) for d in first.differences] == [("rax", "0x1235", "0x1234")]


def test_difference_in_an_exit(kvm: Kvm, tmp_path: Path) -> None:
    """Another exit reason is a difference, with both names."""
    record = changed(record_of("hlt", tmp_path), ioctls.KVM_RUN.nr, 8, 8)
    result = Replay(build(record), stop_on_difference=True).run()
    assert result.stopped
    assert result.first_difference is not None
    assert [(d.recorded, d.now) for d in result.first_difference.differences] == [
        ("KVM_EXIT_SHUTDOWN", "KVM_EXIT_HLT")
    ]


def test_until(kvm: Kvm, tmp_path: Path) -> None:
    """A replay ends before the step that it is told."""
    script = build(record_of("counter", tmp_path))
    result = Replay(script, until=6).run()
    assert max(each.step.index for each in result.played) < 6


def test_what_cannot_be_made(kvm: Kvm, tmp_path: Path) -> None:
    """A record that begins in the middle of a VM's life says that it does."""
    path = tmp_path / "a.rec"
    with machine(kvm, b"\xf4") as vm, Recorder(path):
        vm.vcpus[0].regs.get()
    result = Replay(build(Record.load(path))).run()
    assert "existed before recording began" in result.stopped


def test_truncated_record(kvm: Kvm, tmp_path: Path) -> None:
    """What can be read of a record that was cut short can be replayed."""
    record_of("counter", tmp_path)
    data = (tmp_path / "counter.rec").read_bytes()
    record = Record.from_bytes(data[: len(data) * 3 // 4])
    assert record.problems
    result = Replay(build(record)).run()
    assert len(result.played) == len(record.ioctls)
    assert result.first_difference is None


def test_a_child_that_hangs_is_ended(kvm: Kvm, tmp_path: Path) -> None:
    """A replay in a process of its own that takes too long is a failure, and the next one works."""
    record_of("hlt", tmp_path)
    with Player(timeout=0.001) as player:
        assert "no end after" in player.play(str(tmp_path / "hlt.rec")).failure
        player.timeout = 30
        answer = player.play(str(tmp_path / "hlt.rec"))
    assert answer.failure == ""
    assert answer.ioctls[-1].name == "KVM_RUN"
    assert answer.ioctls[-1].exit == 5


def test_bad_record_in_a_child(kvm: Kvm, tmp_path: Path) -> None:
    """A file that is no record is a failure of that replay."""
    (tmp_path / "no.rec").write_bytes(b"nothing")
    with Player() as player:
        assert "not a record" in player.play(str(tmp_path / "no.rec")).failure
