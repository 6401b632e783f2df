# SPDX-License-Identifier: Apache-2.0
"""Timelines: tracks, slices and arrows by the rules of the format; nothing while there is none."""

from __future__ import annotations

import gc
import json
import os
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpy.cli.main import main
from kvmpy.core import observe
from kvmpy.debug.decode import timeline as module
from kvmpy.debug.decode.timeline import Timeline, TimelineError, TraceFile, complete
from kvmpy.uapi import ioctls
from tests.debug.trace_rules import load, problems

GUEST = """
#include <kvmpy/guest.h>
void guest_main(void)
{
	GUEST_SYNC(0x11, 0x22);
	outb(0x80, 1);
	for (;;)
		;
}
"""
VM: Any = SimpleNamespace(name="vm0", kind="vm")


def a_vcpu(name: str = "vm0/vcpu0") -> Any:
    return SimpleNamespace(name=name, kind="vcpu", last_exit=lambda: ("HLT", {}))


def events_of(path: Path) -> list[dict[str, Any]]:
    document = load(path.read_text(encoding="utf-8"))
    assert problems(document) == []
    return document


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in events if event.get("name") == name and event["ph"] != "M"]


@pytest.mark.requires("kvm")
def test_a_vm(tmp_path: Path) -> None:
    """A VM's threads and vCPUs have tracks with their ioctls, stays in the guest, exits, ucalls and kicks."""
    from kvmpy import Kvm
    from kvmpy.core.exits import IoExit
    from kvmpy.guest import GuestProgram

    path = tmp_path / "t.json"
    with Timeline(path), Kvm() as kvm, kvm.create_vm(GuestProgram.from_c(GUEST), vcpus=1) as vm:
        vm.launch()
        vcpu = vm.vcpus[0]
        vcpu.sync()
        vcpu.expect(IoExit)
        runner = threading.Thread(target=vcpu.run_until_kicked, name="runner")
        runner.start()
        while not vcpu.running:
            pass
        vcpu.kick()
        runner.join(20)
        name = vcpu.name
    events = events_of(path)
    (track,) = [e for e in events if e["ph"] == "M" and e["args"].get("name") == name]
    mine = [e for e in events if e["ph"] != "M" and (e["pid"], e["tid"]) == (track["pid"], track["tid"])]
    stays = [e for e in mine if e["ph"] == "X"]
    assert {e["name"] for e in stays} == {"in guest"}
    ends = [e["name"] for e in mine if e["ph"] == "i" and e["cat"] != "kick"]
    assert ends == ["ucall SYNC", "IO", "interrupted"]
    assert named(events, "ucall SYNC")[0]["args"] == {"args": ["0x11", "0x22"]}
    assert named(events, "IO")[0]["args"] == {"port": "0x80", "direction": "out", "size": 1}
    (kick,) = [e for e in mine if e["ph"] == "i" and e["cat"] == "kick"]
    assert stays[-1]["ts"] <= kick["ts"] <= stays[-1]["ts"] + stays[-1]["dur"]
    assert [e["ph"] for e in named(events, "kick") if e["ph"] in "sf"] == ["s", "f"]
    (created,) = named(events, "KVM_CREATE_VM")
    assert created["args"]["fd"] == "kvm"
    assert created["pid"] == created["tid"] == os.getpid()
    runs = named(events, "KVM_RUN")
    assert len(runs) == len(stays) == 3
    assert runs[-1]["args"]["errno"] == "EINTR"
    assert runs[-1]["tid"] != runs[0]["tid"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert threads[runs[-1]["tid"]] == "runner"


@pytest.mark.requires("kvm")
def test_of_one_vm(tmp_path: Path) -> None:
    """`with timeline(vm, file)` shows that VM and its vCPUs, and nothing else."""
    from kvmpy import Kvm, timeline
    from kvmpy.guest import GuestProgram

    program = GuestProgram.from_c(GUEST)
    with Kvm() as kvm, kvm.create_vm(program) as vm, kvm.create_vm(program) as other:
        for each in (vm, other):
            each.launch()
        with timeline(vm, tmp_path / "t.json"):
            vm.vcpus[0].sync()
            other.vcpus[0].sync()
            vm.vcpus[0].regs.get()
            kvm.check_extension(1)
    shown = [event["name"] for event in events_of(tmp_path / "t.json") if event.get("cat") == "ioctl"]
    assert shown == ["KVM_RUN", "KVM_GET_REGS"]
    assert observe.active == []
    assert observe.host == []


def test_names_that_begin_alike(tmp_path: Path) -> None:
    """vm1 is not vm10."""
    one: Any = SimpleNamespace(name="vm1", kind="vm")
    ten: Any = SimpleNamespace(name="vm10", kind="vm")
    with Timeline(tmp_path / "t.json", vm=one) as timeline:
        for fd in (one, ten, a_vcpu("vm1/vcpu0"), a_vcpu("vm10/vcpu0")):
            timeline.ioctl_enter(fd, ioctls.KVM_GET_REGS, None)
            timeline.ioctl_exit(fd, ioctls.KVM_GET_REGS, None, 0, 0)
    shown = [e["args"]["fd"] for e in events_of(tmp_path / "t.json") if e.get("cat") == "ioctl"]
    assert shown == ["vm1", "vm1/vcpu0"]


def test_what_does_not_return(tmp_path: Path) -> None:
    """An ioctl that is still running when the timeline ends is shown up to there, and marked."""
    with Timeline(tmp_path / "t.json") as timeline:
        timeline.begin("test_x")
        timeline.ioctl_enter(a_vcpu(), ioctls.KVM_RUN, None)
    events = events_of(tmp_path / "t.json")
    assert named(events, "KVM_RUN")[0]["args"]["unfinished"] is True
    assert named(events, "still in guest")
    assert [event["ph"] for event in events if event["ph"] in "BE"] == ["B", "E"]


def test_an_end_without_a_beginning(tmp_path: Path) -> None:
    """What began before the timeline did is not shown."""
    with Timeline(tmp_path / "t.json") as timeline:
        timeline.ioctl_exit(VM, ioctls.KVM_CREATE_VCPU, 0, 5, 0)
        timeline.end()
    assert [event["ph"] for event in events_of(tmp_path / "t.json") if event["ph"] != "M"] == []


def test_failures(tmp_path: Path) -> None:
    """An ioctl that failed has its errno by name."""
    with Timeline(tmp_path / "t.json") as timeline:
        timeline.ioctl_enter(VM, ioctls.KVM_CREATE_VCPU, 3)
        timeline.ioctl_exit(VM, ioctls.KVM_CREATE_VCPU, 3, -1, 17)
    (event,) = named(events_of(tmp_path / "t.json"), "KVM_CREATE_VCPU")
    assert event["args"] == {"fd": "vm0", "result": -1, "errno": "EEXIST", "arg": "0x3"}


def test_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No event of threads that write at the same time is lost, across flushes."""
    monkeypatch.setattr(module, "BATCH", 50)
    ready = threading.Barrier(4)

    def work(number: int) -> None:
        vcpu = a_vcpu(f"vm0/vcpu{number}")
        ready.wait(20)
        for _ in range(300):
            timeline.ioctl_enter(vcpu, ioctls.KVM_RUN, None)
            timeline.ioctl_exit(vcpu, ioctls.KVM_RUN, None, 0, 0)

    with Timeline(tmp_path / "t.json") as timeline:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    events = events_of(tmp_path / "t.json")
    assert len(named(events, "KVM_RUN")) == len(named(events, "in guest")) == 4 * 300
    assert len({event["tid"] for event in named(events, "in guest")}) == 4


def test_a_timeline_is_freed(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "a.json").start()
    timeline.stop()
    gone = weakref.ref(timeline)
    del timeline
    gc.collect()
    assert gone() is None


def test_a_child_writes_nothing(tmp_path: Path) -> None:
    """A forked child is detached: its ioctls are not its parent's."""
    with Timeline(tmp_path / "t.json") as timeline:
        timeline.begin("parent")
        child = os.fork()
        if not child:
            timeline.begin("child")
            timeline.stop()
            os._exit(len(observe.active))
        assert os.waitpid(child, 0)[1] == 0
        timeline.end()
    assert [event["name"] for event in events_of(tmp_path / "t.json") if event["ph"] == "B"] == ["parent"]


def test_no_folder(tmp_path: Path) -> None:
    """A file that cannot be made is named."""
    with pytest.raises(TimelineError, match=r"no/t\.json: No such file"):
        Timeline(tmp_path / "no" / "t.json")


@pytest.mark.parametrize("rest", ["", '{"ph": "X", "na'], ids=["whole", "half-a-line"])
def test_a_file_that_was_not_finished(tmp_path: Path, rest: str) -> None:
    """What a killed process left is made complete, without its last half line; twice changes nothing."""
    path = tmp_path / "t.json"
    file = TraceFile(path)
    file.write([("M", (1, 1), 0, 0, "process_name", "", {"name": "x"}, None)] * 2)
    file.close(finish=False)
    with path.open("a") as stream:
        stream.write(rest)
    complete(path)
    once = path.read_text()
    assert len(json.loads(once)) == 2
    complete(path)
    assert path.read_text() == once


def test_nothing_happened(tmp_path: Path) -> None:
    """An empty timeline is a complete file, too."""
    TraceFile(tmp_path / "t.json").close()
    assert json.loads((tmp_path / "t.json").read_text()) == []


@pytest.mark.requires("kvm")
def test_of_a_record(tmp_path: Path) -> None:
    """`kvmpy timeline` makes the same tracks out of a record, kicks and in-flight ioctls included."""
    from kvmpy import Kvm
    from kvmpy.debug.record.recorder import Recorder
    from kvmpy.guest import GuestProgram

    record = tmp_path / "r.kvmr"
    with Recorder(record), Kvm() as kvm, kvm.create_vm(GuestProgram.from_c(GUEST)) as vm:
        vm.launch()
        vcpu = vm.vcpus[0]
        vcpu.sync()
        vcpu.next()
        runner = threading.Thread(target=vcpu.run_until_kicked)
        runner.start()
        while not vcpu.running:
            pass
        vcpu.kick()
        runner.join(20)
    result = CliRunner().invoke(main, ["timeline", str(record), "-o", str(tmp_path / "t.json")])
    assert result.exit_code == 0, result.output
    events = events_of(tmp_path / "t.json")
    assert len(named(events, "KVM_RUN")) == len(named(events, "in guest")) == 3
    assert [e["name"] for e in events if e.get("cat") == "exit"] == ["IO", "IO", "INTR"]
    assert [e["ph"] for e in events if e.get("cat") == "kick" and e["ph"] in "sf"] == ["s", "f"]
    assert "nent" in named(events, "KVM_SET_CPUID2")[0]["args"]["before"]


@pytest.mark.parametrize("content", [None, b"", b"nothing of the kind"])
def test_no_record(tmp_path: Path, content: bytes | None) -> None:
    """`kvmpy timeline` says of a file that is no record what is wrong with it."""
    record = tmp_path / "r.kvmr"
    if content is not None:
        record.write_bytes(content)
    result = CliRunner().invoke(main, ["timeline", str(record), "-o", str(tmp_path / "t.json")])
    assert result.exit_code == 1
    assert "r.kvmr" in result.output
    assert not (tmp_path / "t.json").exists()


META = [
    {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "p"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "t"}},
]
SLICE = {"ph": "X", "pid": 1, "tid": 2, "ts": 1.0, "dur": 2.0, "name": "a", "cat": "c"}


@pytest.mark.parametrize(
    "wrong",
    [
        [SLICE | {"ph": "Z"}],
        [SLICE | {"tid": 3}],
        [SLICE | {"pid": 3}],
        [SLICE | {"ts": -1}],
        [SLICE | {"dur": -1}],
        [SLICE | {"name": ""}],
        [SLICE, SLICE | {"ts": 2.0}],
        [SLICE | {"ph": "E"}],
        [SLICE | {"ph": "B"}],
        [SLICE | {"ph": "B", "ts": 5.0}, SLICE | {"ph": "E", "ts": 4.0}],
        [SLICE | {"ph": "f", "id": 1}],
        [SLICE, SLICE | {"ph": "s", "id": 1, "ts": 9.0}],
        [SLICE, SLICE | {"ph": "s", "id": 1}, SLICE | {"ph": "s", "id": 1}],
        [SLICE, {"ph": "M", "name": "thread_name", "pid": 3, "tid": 2, "args": {"name": "t"}}],
    ],
)
def test_the_rules(wrong: list[dict[str, Any]]) -> None:
    """The checker of these tests finds what viewers would refuse or drop."""
    assert problems([*META, SLICE | {"ts": 1.5, "dur": 0.5}, SLICE]) == []
    assert problems([*META, *wrong]) != []
