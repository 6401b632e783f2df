# SPDX-License-Identifier: Apache-2.0
"""Trace instances and typed page-fault events: on a folder that looks like tracefs, and on the real one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.debug.watch import tracefs
from kvmpy.debug.watch.faults import (
    AttributesEvent,
    FaultTracer,
    PageFaultEvent,
    RmpFaultEvent,
    threads_of,
)
from kvmpy.debug.watch.tracefs import Tracefs, TracefsError
from kvmpy.x86.pferr import PfErr
from tests.debug import fake_tracefs as fake
from tests.debug.fake_tracefs import FakeTracefs

TID = 4321


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTracefs:
    return FakeTracefs(tmp_path, monkeypatch)


def test_events_are_typed_and_in_order(folder: FakeTracefs) -> None:
    """Records of all CPUs come in the order of time, decoded by this kernel's format files."""
    write = PfErr.W | PfErr.GUEST_FINAL
    folder.pages[0] = [
        fake.page(
            100,
            fake.short(1, fake.fault(TID, 0x8000_1000, int(write), vcpu=3)),
            fake.short(1, fake.other(TID)),
        ),
        fake.page(300, fake.short(0, fake.fault(TID, 0x8000_3000, 1 << 34 | 16))),
    ]
    folder.pages[1] = [fake.page(200, fake.short(5, fake.attributes(TID, 0x80001, 0x80003, 8)))]
    with FaultTracer([TID], kinds=["faults", "attributes"], root=folder.root) as tracer:
        first, second, third = tracer.read()
    assert isinstance(first, PageFaultEvent)
    assert (first.timestamp, first.cpu, first.tid, first.vcpu_id) == (101, 0, TID, 3)
    assert (first.address, first.rip, first.error.flags) == (0x8000_1000, 0x400123, write)
    assert second == AttributesEvent(205, 1, TID, 0x8000_1000, 0x2000, 8)
    assert isinstance(third, PageFaultEvent)
    assert (third.error.access, third.error.words) == ("fetch", "I ENC")
    assert "private" in str(second)
    assert "fetch" in str(third)


def test_rmp_faults(folder: FakeTracefs) -> None:
    """The size of the RMP's entry is in bytes; SIZEM and RMP are told by name, and what PSMASH did."""
    bits = PfErr.P | PfErr.RMP | PfErr.ENC | PfErr.SIZEM
    folder.pages[0] = [
        fake.page(
            0,
            fake.short(1, fake.rmp_fault(TID, 0x8000_5000, int(bits), 2, 0, vcpu=1)),
            fake.short(1, fake.rmp_fault(TID, 0x8000_6000, int(bits), 2, 3)),
            fake.short(1, fake.rmp_fault(TID, 0x8000_7000, int(bits), 1, 0)),
        )
    ]
    with FaultTracer([TID], kinds=["rmp"], root=folder.root) as tracer:
        first, second, third = tracer.read()
    assert isinstance(first, RmpFaultEvent)
    assert (first.address, first.pfn, first.vcpu_id, first.tid) == (0x8000_5000, 0x2B005, 1, TID)
    assert (first.size, first.psmash, first.error.flags) == (2 << 20, 0, bits)
    assert "entry of 2048 KiB, PSMASH 0  [" in str(first)
    assert {"RMP", "SIZEM"} <= set(first.error.words.split())
    assert "PSMASH 3" in str(second)
    assert "entry of 4 KiB, nothing to split" in str(third)


def test_faults_alone(folder: FakeTracefs) -> None:
    """faults() leaves the other kinds out."""
    folder.pages[0] = [
        fake.page(0, fake.short(1, fake.attributes(TID, 1, 2, 0)), fake.short(1, fake.fault(TID, 5, 0)))
    ]
    with FaultTracer([TID], kinds=["faults", "attributes"], root=folder.root) as tracer:
        assert [event.address for event in tracer.faults()] == [5]


def test_events_that_nobody_asked_for(folder: FakeTracefs) -> None:
    """Records of events that were not enabled are passed over."""
    folder.pages[0] = [fake.page(0, fake.short(1, fake.attributes(TID, 1, 2, 0)))]
    with FaultTracer([TID], root=folder.root) as tracer:
        assert tracer.read() == []


def test_how_an_instance_is_set_up(folder: FakeTracefs) -> None:
    """Threads, children, clock, and recording only from start() on until stop()."""
    with FaultTracer([11, 12], children=True, buffer_kib=64, root=folder.root) as tracer:
        (path,) = folder.made
        assert path.name == f"kvmpy-{os.getpid()}-0"
        assert (path / "tracing_on").read_text() == "1"
        tracer.stop()
        assert (path / "tracing_on").read_text() == "0"
    assert folder.settings["set_event_pid"] == "11 12"
    assert folder.settings["options/event-fork"] == "1"
    assert folder.settings["trace_clock"] == "mono"
    assert folder.settings["buffer_size_kb"] == "64"
    assert folder.settings["events/kvm/kvm_page_fault/enable"] == "1"
    assert folder.settings["events/kvm/kvm_vm_set_mem_attributes/enable"] == ""
    assert folder.settings["events/enable"] == "0"


def test_lost_records_are_counted(folder: FakeTracefs) -> None:
    """What the buffers had no room for is told."""
    folder.pages[0] = [fake.page(0, fake.short(1, fake.fault(TID, 0, 0)), lost=40)]
    folder.pages[1] = [fake.page(0, fake.short(1, fake.fault(TID, 0, 0)), lost=2)]
    with FaultTracer([TID], root=folder.root) as tracer:
        assert (len(tracer.read()), tracer.lost) == (2, 42)


def test_instances_of_one_process(folder: FakeTracefs) -> None:
    """Each gets a name of its own, and none is left."""
    with FaultTracer([TID], root=folder.root), FaultTracer([TID], root=folder.root):
        assert folder.left == [f"kvmpy-{os.getpid()}-{number}" for number in (0, 1)]
    assert folder.left == []


def test_removed_after_an_exception(folder: FakeTracefs) -> None:
    """An exception inside the block leaves nothing."""
    with pytest.raises(KeyError), FaultTracer([TID], root=folder.root):
        raise KeyError("x")
    assert (folder.left, len(folder.made)) == ([], 1)


def test_removed_when_it_cannot_be_set_up(folder: FakeTracefs) -> None:
    """An event that is missing is named, and nothing is left."""
    with pytest.raises(TracefsError, match="trace event kvm:kvm_exit") as caught:
        FaultTracer([TID], kinds=["faults", "exits"], root=folder.root)
    assert "kernel whose KVM has it" in caught.value.how
    assert (folder.left, len(folder.made)) == ([], 1)


def test_another_kernels_fields(folder: FakeTracefs) -> None:
    """An event whose fields are not those that are read is refused, and nothing is left."""
    path = folder.root / "events/kvm/kvm_page_fault/format"
    path.write_text(path.read_text().replace("fault_address", "gpa"))
    with pytest.raises(ValueError, match="fault_address"):
        FaultTracer([TID], root=folder.root)
    assert (folder.left, len(folder.made)) == ([], 1)


def test_kinds_that_may_be_missing(folder: FakeTracefs) -> None:
    """An optional kind is traced where the kernel has it."""
    with FaultTracer([TID], optional=["mappings", "attributes"], root=folder.root):
        pass
    assert folder.settings["events/kvm/kvm_vm_set_mem_attributes/enable"] == "1"


def test_kvm_is_not_loaded(folder: FakeTracefs) -> None:
    """Without any event of KVM the way out is to load it."""
    (folder.root / "events/kvm").rename(folder.root / "events/elsewhere")
    with pytest.raises(TracefsError, match="modprobe kvm"):
        FaultTracer([TID], root=folder.root)


def test_stale_instances(folder: FakeTracefs) -> None:
    """What a dead process left is removed; what is another's, or no name of ours, stays."""
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait(30)
    stay = [f"kvmpy-{os.getppid()}-0", "kvmpy-x-1", "perf"]
    for name in [f"kvmpy-{dead.pid}-0", f"kvmpy-{dead.pid}-7", *stay]:
        (folder.root / "instances" / name).mkdir()
    with FaultTracer([TID], root=folder.root):
        pass
    assert folder.left == sorted(stay)


def test_no_tracefs_in_this_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without tracefs: the option that it lacks is named."""
    (tmp_path / "filesystems").write_text("nodev\tsysfs\nnodev\ttmpfs\n")
    monkeypatch.setattr(tracefs, "MOUNTS", (tmp_path / "nowhere",))
    monkeypatch.setattr(tracefs, "FILESYSTEMS", tmp_path / "filesystems")
    with pytest.raises(TracefsError, match="CONFIG_FTRACE"):
        Tracefs()


def test_mounting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission to mount: say so, and what helps."""

    def refuse(kind: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(tracefs, "MOUNTS", (tmp_path / "nowhere",))
    monkeypatch.setattr(tracefs, "mount_detached", refuse)
    with pytest.raises(TracefsError, match="no permission to mount tracefs: run as root"):
        Tracefs()


def test_instances_are_refused(folder: FakeTracefs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission to make an instance: say so."""

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tracefs, "make_instance", refuse)
    with pytest.raises(TracefsError, match="no permission to make a trace instance"):
        FaultTracer([TID], root=folder.root)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    """A folder without events is no tracefs."""
    with pytest.raises(TracefsError, match="holds no tracefs"):
        Tracefs(tmp_path)


def test_threads_of_a_process() -> None:
    """All threads of a process; one that does not exist is an error."""
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, args=(30,))
    thread.start()
    try:
        assert {os.getpid(), thread.native_id} <= set(threads_of(os.getpid()))
    finally:
        gate.set()
        thread.join()
    with pytest.raises(ProcessLookupError):
        threads_of(1 << 30)


# The real one.


@pytest.fixture
def real() -> Iterator[Tracefs]:
    """The kernel's tracefs; skipped where it cannot be used."""
    try:
        fake_tracefs = Tracefs()
        fake_tracefs.instance().close()
    except TracefsError as error:
        pytest.skip(str(error))
    with fake_tracefs:
        yield fake_tracefs


def rename(name: str) -> int:
    """Rename the calling thread, which the kernel has an event for, and return its id."""
    tid = threading.get_native_id()
    Path(f"/proc/self/task/{tid}/comm").write_text(name)
    return tid


def in_a_thread(name: str) -> int:
    tids: list[int] = []
    thread = threading.Thread(target=lambda: tids.append(rename(name)))
    thread.start()
    thread.join()
    return tids[0]


def test_a_mount_of_ones_own(real: Tracefs) -> None:
    """Where tracefs is not mounted, it is not mounted for anybody else afterwards."""
    mounts = Path("/proc/self/mounts").read_text()
    if not real.mounted_here:
        pytest.skip(f"tracefs is mounted at {real.root}")
    assert "tracefs" not in mounts
    assert (real.root / "instances").is_dir()
    root = real.root
    real.close()
    assert not (root / "instances").exists()


def test_only_the_threads_that_were_named(real: Tracefs) -> None:
    """A real event is read with its thread and fields; those of other threads are not."""
    mine = threading.get_native_id()
    old = Path("/proc/self/comm").read_text()
    with real.instance(64) as instance:
        instance.enable("task", "task_rename")
        instance.watch([mine])
        instance.start()
        in_a_thread("another")
        rename("watched")
        instance.stop()
        rename(old.strip())
        records = instance.read()
    assert [(record.tid, record.format.name) for record in records] == [(mine, "task_rename")]
    newcomm = records[0].format.fields["newcomm"].value(records[0].payload)
    assert isinstance(newcomm, bytes)
    assert newcomm.split(b"\0")[0] == b"watched"


@pytest.mark.parametrize("times", [2, 3])
def test_an_instance_taken_away_before_it_is_open(
    folder: FakeTracefs, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """It is made again, as a process that cannot see its owner may have removed it; not for ever."""
    write = tracefs.TraceInstance.write
    taken: list[Path] = []

    def taking(instance: tracefs.TraceInstance, name: str, text: str) -> None:
        if name == "tracing_on" and len(taken) < times:
            assert instance.path is not None
            shutil.rmtree(instance.path)
            taken.append(instance.path)
        write(instance, name, text)

    monkeypatch.setattr(tracefs.TraceInstance, "write", taking)
    with Tracefs(folder.root) as opened:
        if times == 3:
            with pytest.raises(TracefsError, match="set up a trace instance"):
                opened.instance()
        else:
            with opened.instance() as instance:
                assert instance.path is not None
    assert len(taken) == times
    assert folder.left == []


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.EBUSY])
def test_an_instance_that_is_gone_needs_no_removal(
    folder: FakeTracefs, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Whoever removed it: closing succeeds. One that is still in use is told."""

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with Tracefs(folder.root) as opened:
        instance = opened.instance()
        monkeypatch.setattr(tracefs, "remove_instance", refuse)
        if number == errno.EBUSY:
            with pytest.raises(OSError, match="busy"):
                instance.close()
        else:
            instance.close()


def test_threads_that_start_later(real: Tracefs) -> None:
    """With children=True a thread that a watched one starts is watched, too."""
    with real.instance(64) as instance:
        instance.enable("task", "task_rename")
        instance.watch([threading.get_native_id()], children=True)
        instance.start()
        child = in_a_thread("child")
        assert instance.wait(10)
        records = instance.read()
    assert [record.tid for record in records] == [child]


def test_a_real_instance_goes(real: Tracefs) -> None:
    """Nothing of an instance is left after its block."""
    with real.instance(64) as instance:
        path = instance.path
        assert path is not None
        assert path.is_dir()
    assert not path.exists()


CHILD = """
import os, sys
from kvmpy.debug.watch.tracefs import Tracefs
with Tracefs() as t, t.instance(64) as i:
    print(i.path.name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_real_instance_goes_with_its_process(real: Tracefs, number: signal.Signals) -> None:
    """SIGTERM removes the instance at once; what SIGKILL leaves, the next user removes."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        path = real.root / "instances" / name
        assert path.is_dir()
        child.send_signal(number)
        assert child.wait(30) == -number
    if number == signal.SIGKILL:
        assert name in real.remove_stale()
    assert not path.exists()


def test_an_instance_in_use_is_nobodys_to_remove(real: Tracefs, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that is open survives a process that takes its owner for dead (another PID namespace)."""
    monkeypatch.setattr(tracefs, "_alive", lambda _pid: False)
    with real.instance(64) as instance:
        assert instance.path is not None
        assert instance.path.name not in real.remove_stale()
        assert instance.path.is_dir()
