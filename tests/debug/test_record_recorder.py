# SPDX-License-Identifier: Apache-2.0
"""What the recorder writes: every ioctl with its bytes, memory, order; what it survives and what it costs."""

from __future__ import annotations

import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
import zlib
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvmpy
from kvmpy import Kvm
from kvmpy.core import observe
from kvmpy.core.address import Gpa
from kvmpy.core.backing import Anonymous
from kvmpy.core.errors import KvmError
from kvmpy.core.eventfd import EventFd
from kvmpy.core.exits import IoExit, MsrExit
from kvmpy.core.msr_filter import MsrFilter
from kvmpy.core.vcpu import Vcpu, VcpuKickedError
from kvmpy.debug.record.events import Ioctl, Kick, Memory, Object, Write
from kvmpy.debug.record.format import MEMORY_INITIAL, FrameReader, When
from kvmpy.debug.record.model import Record, request_name
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.replay import Replay
from kvmpy.debug.record.script import build
from kvmpy.debug.record.tracker import MemoryTracker
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import MsrExitReason
from kvmpy.uapi.structs import kvm_sev_snp_launch_update
from tests.core.test_attributes import Watcher
from tests.debug.record_scenarios import machine
from tests.debug.scenarios import SCENARIOS

PAGE = 4096


def names(record: Record) -> list[str]:
    """Return the names of the ioctls in *record*."""
    return [request_name(each.what) for each in record.ioctls]


def test_every_ioctl_with_its_bytes(kvm: Kvm, tmp_path: Path) -> None:
    """Name, result, errno, input and output of each ioctl are there, objects by their names."""
    path = tmp_path / "a.rec"
    with Recorder(path, test="this one"), Kvm() as own, own.create_vm() as vm:
        vcpu = vm.create_vcpu()
        regs = vcpu.regs.get()
        regs.rax = 0x1122
        vcpu.regs.set(regs)
        with pytest.raises(KvmError):
            vm.create_vcpu(0)
    record = Record.load(path)
    assert record.complete
    assert not record.problems
    assert record.host["test"] == "this one"
    assert record.host["kernel"] == os.uname().release
    assert names(record) == [
        "KVM_GET_API_VERSION", "KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_GET_VCPU_MMAP_SIZE", "KVM_GET_REGS",
        "KVM_SET_REGS", "KVM_CREATE_VCPU",
    ]  # fmt: skip
    get, put, again = (each.what for each in record.ioctls[-3:])
    assert isinstance(get, Ioctl)
    assert isinstance(put, Ioctl)
    assert isinstance(again, Ioctl)
    assert get.argument_in is None
    assert len(get.argument_out or b"") == 144
    assert (put.argument_in or b"")[:8] == (0x1122).to_bytes(8, "little")
    assert (again.result, again.errno) == (-1, 17)
    kinds = {each.name.partition("/")[2] or each.name[:2]: each.parent for each in record.objects.values()}
    assert kinds == {"kv": 0, "vm": 1, "vcpu0": 2}


def test_nested_pointers(kvm: Kvm, tmp_path: Path) -> None:
    """What a pointer in an argument leads to is there, under the pointer's value."""
    path = tmp_path / "a.rec"
    with Recorder(path), Kvm() as own:
        SCENARIOS["dirty_log"](own)
    last = [e.what for e in Record.load(path).ioctls if request_name(e.what) == "KVM_GET_DIRTY_LOG"][-1]
    assert isinstance(last, Ioctl)
    pointer = int.from_bytes((last.argument_in or b"")[8:16], "little")
    bitmap = last.chunk(pointer, When.OUT)
    assert bitmap is not None
    assert int.from_bytes(bitmap, "little") & 0b101000 == 0b101000


def test_memory_is_sparse_and_told_once(kvm: Kvm, tmp_path: Path) -> None:
    """Initial content: the pages that hold something, equal ones once, large empty memory for nothing."""
    path = tmp_path / "a.rec"
    with Recorder(path), Kvm() as own, machine(own, b"\xf4", size=256 << 20) as vm:
        for page in range(64):
            vm.memory.write(Gpa(0x10_0000 + page * PAGE), b"\xab" * PAGE)
        vm.vcpus[0].run(5)
    record = Record.load(path)
    initial = [e.what for e in record.entries if isinstance(e.what, Memory)]
    assert all(each.flags & MEMORY_INITIAL for each in initial)
    assert sum(len(each.ids) for each in initial) < 80
    assert len(record.pages) == 2
    assert path.stat().st_size < 20000


def test_later_writes(kvm: Kvm, tmp_path: Path) -> None:
    """What the host writes after the first run stands where it was written, nothing before it does."""
    path = tmp_path / "a.rec"
    with Recorder(path), Kvm() as own:
        SCENARIOS["host_writes"](own)
    record = Record.load(path)
    runs = [e.order for e in record.ioctls if request_name(e.what) == "KVM_RUN"]
    writes = [e for e in record.entries if isinstance(e.what, Write)]
    assert [e.what.data for e in writes if isinstance(e.what, Write)] == [b"\x5a"]
    assert runs[0] < writes[0].order < runs[1]


def test_order_between_threads(kvm: Kvm, tmp_path: Path) -> None:
    """A kick from another thread lies within the run that it ends."""
    path = tmp_path / "a.rec"
    with Recorder(path), Kvm() as own:
        SCENARIOS["kicked"](own)
    record = Record.load(path)
    run = next(e for e in record.ioctls if request_name(e.what) == "KVM_RUN")
    kick = next(e for e in record.entries if isinstance(e.what, Kick))
    assert isinstance(run.what, Ioctl)
    assert run.order < kick.order < run.what.end_order
    assert run.frame.tid != kick.frame.tid


def test_no_vcpu_runs_while_memory_is_read(kvm: Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the content that a VM begins with is in the record, a vCPU in another thread waits."""
    seen = []
    read = MemoryTracker._read

    def spied(tracker: MemoryTracker, address: int, size: int, flags: int, tid: int) -> None:
        seen.append(tracker.unread)  # what another thread looks at before it runs a vCPU
        read(tracker, address, size, flags, tid)

    monkeypatch.setattr(MemoryTracker, "_read", spied)
    with Recorder(tmp_path / "a.rec") as recorder, Kvm() as own, machine(own, b"\xf4") as vm:
        vm.vcpus[0].run(5)
        assert not recorder.memory.unread
    assert seen
    assert all(seen)


def test_nothing_when_off(kvm: Kvm, tmp_path: Path) -> None:
    """A recorder that was stopped leaves no observer behind."""
    before = list(observe.active), list(observe.host)
    recorder = Recorder(tmp_path / "a.rec").start()
    assert (observe.active, observe.host) != before
    recorder.stop()
    recorder.stop()
    assert (observe.active, observe.host) == before


def test_objects_from_before(kvm: Kvm, tmp_path: Path) -> None:
    """Objects that existed before are told of, as such."""
    path = tmp_path / "a.rec"
    with machine(kvm, b"\xf4") as vm, Recorder(path):
        vm.vcpus[0].run(5)
        vm.vcpus[0].regs.get()
    record = Record.load(path)
    assert names(record) == ["KVM_RUN", "KVM_GET_REGS"]
    opened = [e for e in record.entries if isinstance(e.what, Object)]
    assert len(opened) == 3
    assert all(each.frame.synthetic for each in opened)


def test_what_kvm_was_not_asked_is_not_recorded(kvm: Kvm, tmp_path: Path) -> None:
    """A run of a vCPU that was stopped never comes to KVM_RUN; a record and other observers say so."""
    path = tmp_path / "a.rec"
    watcher = Watcher()
    with Recorder(path), machine(kvm, b"\xf4") as vm, observe.observing(watcher):
        vm.vcpus[0].run(5)
        vm.vcpus[0].stop()
        watcher.seen.clear()
        with pytest.raises(VcpuKickedError, match="was stopped"):
            vm.vcpus[0].run(5)
        seen = [kind for kind, _ in watcher.seen]
        vm.vcpus[0].regs.get()
    assert seen == [f"{vm.name}/vcpu0 KVM_RUN", f"{vm.name}/vcpu0 KVM_RUN dropped"]
    assert names(Record.load(path))[-2:] == ["KVM_RUN", "KVM_GET_REGS"]


def test_recorded_beside_another_observer(kvm: Kvm, tmp_path: Path) -> None:
    """Who else observes changes nothing: the funnel issues every ioctl, whoever looks."""
    shapes = []
    for beside in (0, 1, 2):
        path = tmp_path / f"{beside}.rec"
        with ExitStack() as stack:
            if beside:
                stack.enter_context(observe.observing(Watcher()))
            if beside > 1:
                stack.enter_context(Recorder(tmp_path / "other.rec"))
            stack.enter_context(Recorder(path))
            own = stack.enter_context(Kvm())
            for name in ("registers", "bad_pointer", "dirty_log", "pio_in", "ioeventfd_twice"):
                SCENARIOS[name](own)
        calls = (each.what for each in Record.load(path).ioctls)
        shapes.append([
            (request_name(e), e.result, e.errno, [(c.when, c.what, len(c.data)) for c in e.chunks])
            for e in calls if isinstance(e, Ioctl)
        ])  # fmt: skip
    assert len(shapes[0]) > 30
    assert shapes[0] == shapes[1] == shapes[2]


KILLED = """
import os, signal, sys
from kvmpy import Kvm
from kvmpy.debug.record.recorder import Recorder
Recorder(sys.argv[1], eager=sys.argv[2] == "eager").start()
with Kvm() as kvm, kvm.create_vm() as vm:
    vcpu = vm.create_vcpu()
    for number in range(500):
        vcpu.regs.set(vcpu.regs.get())
    vm.check_extension(0x4b56)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["plain", "eager"])
def test_sigkill(how: str, kvm: Kvm, tmp_path: Path) -> None:
    """A process that is killed leaves a record with every ioctl that had returned."""
    path = tmp_path / "a.rec"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), how], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    record = Record.load(path)
    assert not record.complete
    assert not record.problems
    assert names(record).count("KVM_SET_REGS") == 500
    assert names(record)[-1] == "KVM_CHECK_EXTENSION"
    assert not record.in_flight


IN_FLIGHT = """
import os, signal, sys, threading
from kvmpy import Kvm
from kvmpy.debug.record.recorder import Recorder
from tests.debug.record_scenarios import machine
Recorder(sys.argv[1], eager=True).start()
with Kvm() as kvm, machine(kvm, b"\\xeb\\xfe") as vm:
    vcpu = vm.vcpus[0]
    threading.Thread(target=vcpu.run, daemon=True).start()
    while not vcpu.running:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_in_flight(kvm: Kvm, tmp_path: Path) -> None:
    """An eager recorder tells which ioctl had not returned when the process was killed."""
    path = tmp_path / "a.rec"
    subprocess.run([sys.executable, "-c", IN_FLIGHT, str(path)], timeout=60, check=False)
    record = Record.load(path)
    assert [request_name(each.what) for each in record.in_flight] == ["KVM_RUN"]
    assert "KVM_RUN in flight" in record.describe()


def test_a_recorder_is_freed(tmp_path: Path) -> None:
    """What it holds, every page of guest memory it has written among it, goes with the last who knows it."""
    recorder = Recorder(tmp_path / "a.rec").start()
    recorder.stop()
    gone = weakref.ref(recorder)
    del recorder
    gc.collect()
    assert gone() is None


def test_fork(kvm: Kvm, tmp_path: Path) -> None:
    """A child of a recorded process writes nothing into the record."""
    path = tmp_path / "a.rec"
    code = (
        "import os, sys\nfrom kvmpy import Kvm\nfrom kvmpy.debug.record.recorder import Recorder\n"
        "with Recorder(sys.argv[1]):\n    child = os.fork()\n    with Kvm() as kvm:\n"
        "        [kvm.check_extension(1) for _ in range(50)]\n"
        "    if child == 0:\n        os._exit(0)\n    os.waitpid(child, 0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=True)
    record = Record.load(path)
    assert names(record).count("KVM_CHECK_EXTENSION") == 50
    assert not record.problems


FULL = """
import resource, signal, sys
from kvmpy import Kvm
from kvmpy.debug.record.recorder import Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
with Recorder(sys.argv[1]), Kvm() as kvm:
    print(sum(kvm.check_extension(0) for _ in range(500)))
"""


def test_no_space(kvm: Kvm, tmp_path: Path) -> None:
    """A full disk stops the record, not the recorded program; what was written can be read."""
    path = tmp_path / "a.rec"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], timeout=60, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip().isdigit()
    record = Record.load(path)
    assert 10 < names(record).count("KVM_CHECK_EXTENSION") < 200
    assert not record.complete


def _cost(vcpu: Vcpu, count: int, frames: int = -1) -> float:
    """Seconds of this thread for an ioctl; with *frames*, a descriptor, and for the least of recording it."""
    pack = struct.Struct("<IiQQqIHHQQ").pack
    regs = vcpu.regs.get()
    # The thread's own time: what else the machine does is no cost of recording.
    begin = time.thread_time()
    for number in range(count):
        vcpu.regs.set(regs)
        if frames >= 0:
            body = pack(1, 3, 4, number, 0, 0, 1, 0, 0, time.monotonic_ns()) + regs.to_bytes()
            os.write(frames, zlib.crc32(body).to_bytes(4, "little") + body)
    return (time.thread_time() - begin) / count


def test_cost(kvm: Kvm, tmp_path: Path) -> None:
    """Recording costs at most 5 us an ioctl, or what a copy, a checksum and a write cost in Python here.

    The best of several rounds counts.  Hosts whose ioctls flush caches make all code behind them slow.
    """
    with kvm.create_vm() as vm, (tmp_path / "least").open("wb") as file:
        vcpu = vm.create_vcpu()
        plain = least = recorded = 1.0
        for _ in range(30):
            plain = min(plain, _cost(vcpu, 300))
            least = min(least, _cost(vcpu, 300, file.fileno()))
            with Recorder(tmp_path / "a.rec"):
                recorded = min(recorded, _cost(vcpu, 300))
            if recorded - plain < 4.5e-6:
                break
        assert recorded - plain < max(5e-6, least - plain)


def test_threads_at_once(kvm: Kvm, tmp_path: Path) -> None:
    """Many threads write one record without damage, each frame with the thread that did it."""
    path = tmp_path / "a.rec"

    def work(device: Kvm) -> None:
        for _ in range(200):
            device.check_extension(1)

    with Recorder(path), Kvm() as own:
        threads = [threading.Thread(target=work, args=(own,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reader = FrameReader(path.read_bytes())
    frames = list(reader)
    assert reader.problem is None
    record = Record.load(path)
    by_thread = [e.frame.tid for e in record.ioctls if request_name(e.what) == "KVM_CHECK_EXTENSION"]
    assert sorted(by_thread.count(tid) for tid in set(by_thread)) == [200] * 4
    orders = [frame.order for frame in frames]
    assert len(set(orders)) == len(orders)
    assert ioctls.KVM_CHECK_EXTENSION.nr


def test_record_of_a_vm_that_exists(kvm: Kvm, tmp_path: Path) -> None:
    """kvmpy.record() begins with what makes the VM as it is, and can be replayed from there."""
    path = tmp_path / "a.rec"
    with machine(kvm, b"\xe4\x20\x04\x01\xe6\x21\xf4") as vm:
        first = vm.vcpus[0].run(5)
        assert isinstance(first, IoExit)
        first.respond(b"\x37")
        with kvmpy.record(vm, path):
            vm.vcpus[0].run(5)
            vm.memory.write(Gpa(0x3000), b"\x01")
            vm.vcpus[0].run(5)
    record = Record.load(path)
    synthetic = [request_name(e.what) for e in record.ioctls if e.frame.synthetic]
    assert synthetic[0] == "KVM_CREATE_VM"
    assert {"KVM_CREATE_VCPU", "KVM_SET_REGS", "KVM_SET_SREGS"} < set(synthetic)
    real = [request_name(e.what) for e in record.ioctls if not e.frame.synthetic]
    assert real == ["KVM_RUN", "KVM_RUN"]
    result = Replay(build(record)).run()
    assert result.stopped == ""
    assert result.first_difference is None


def test_a_record_of_a_vm_that_exists_has_what_kvm_cannot_be_asked(kvm: Kvm, tmp_path: Path) -> None:
    """Capabilities, routes, eventfds, zones and filters set before are told, and can be replayed."""
    path = tmp_path / "a.rec"
    # mov $0x10, %ecx; rdmsr; out %al, $0x21
    with machine(kvm, b"\x66\xb9\x10\0\0\0\x0f\x32\xe6\x21") as vm, EventFd() as event, EventFd() as gone:
        vm.msrs.set_filter(MsrFilter.denying(reads=[0x10]))
        vm.msrs.enable_user_space(MsrExitReason.KVM_MSR_EXIT_REASON_FILTER)
        vm.io.ioeventfd(event, 0x80, 1, pio=True)
        vm.io.ioeventfd(gone, 0x81, 1, pio=True)
        vm.io.ioeventfd(gone, 0x81, 1, pio=True, deassign=True)
        with kvmpy.record(vm, path):
            exit_ = vm.vcpus[0].run(5)
            assert isinstance(exit_, MsrExit)
    record = Record.load(path)
    told = [request_name(e.what) for e in record.ioctls if e.frame.synthetic]
    assert told.count("KVM_ENABLE_CAP") == 1
    assert told.count("KVM_IOEVENTFD") == 1
    assert told.count("KVM_X86_SET_MSR_FILTER") == 1
    result = Replay(build(record)).run()
    assert result.stopped == ""
    assert result.first_difference is None


def test_what_a_launch_copies_is_memory(kvm: Kvm, tmp_path: Path) -> None:
    """The source of KVM_SEV_SNP_LAUNCH_UPDATE is told once as memory, not again with every argument."""
    path = tmp_path / "a.rec"
    source = Anonymous().map(4 * PAGE)
    source.view(0, 4 * PAGE)[:] = b"\x11" * PAGE + bytes(PAGE) + b"\x33" * PAGE + b"\x44" * PAGE
    with Recorder(path), Kvm() as own, own.create_vm() as vm:
        vm.add_slot(Gpa(0), 16 * PAGE)
        for first, pages in ((0, 2), (2, 2), (0, 4)):
            arg = kvm_sev_snp_launch_update(
                gfn_start=first, uaddr=source.hva + first * PAGE, len=pages * PAGE, type=1
            )
            # A plain VM refuses it; that the bytes are in the record is what counts here.
            vm.sev.command_raw("SNP_LAUNCH_UPDATE", arg)
        source.view(0, 1)[0] = 0x12
        vm.sev.command_raw("SNP_LAUNCH_UPDATE", kvm_sev_snp_launch_update(
            uaddr=source.hva, len=PAGE, type=1
        ))  # fmt: skip
    source.close()
    record = Record.load(path)
    told = [
        e.what for e in record.entries if isinstance(e.what, Memory) and e.what.address >= source_at(record)
    ]
    assert [(m.flags & 1, record.content(m)[0]) for m in told] == [(1, 0x11), (1, 0x33), (1, 0x44), (0, 0x12)]
    updates = [e.what for e in record.ioctls if request_name(e.what) == "KVM_MEMORY_ENCRYPT_OP"]
    assert all(len(chunk.data) <= 64 for pair in updates if isinstance(pair, Ioctl) for chunk in pair.chunks)


def source_at(record: Record) -> int:
    """Return where the first source lies."""
    payload = next(e.what for e in record.ioctls if request_name(e.what) == "KVM_MEMORY_ENCRYPT_OP")
    assert isinstance(payload, Ioctl)
    update = next(chunk for chunk in payload.chunks if len(chunk.data) == 64)
    return int.from_bytes(update.data[8:16], "little")
