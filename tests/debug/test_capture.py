# SPDX-License-Identifier: Apache-2.0
"""The engine that copies what ioctls read and write: sizes, pointers, the run area, and its three doors."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.debug.record.capture import Capture, Known, Source
from kvmpy.debug.record.events import Ioctl, Object
from kvmpy.debug.record.format import CUT, ObjectKind, What, When
from kvmpy.debug.record.model import Record, request_name
from kvmpy.debug.record.tracker import address_of
from kvmpy.uapi import ioctls, lib
from kvmpy.uapi.buffers import BUFFERS
from kvmpy.uapi.constants import KVM_CREATE_DEVICE_TEST, KVM_EXIT_IO, SevCmd, TdxCmd, VmType
from kvmpy.uapi.ioctls import Ioctl as Op
from kvmpy.uapi.structs import (
    kvm_cpuid2,
    kvm_create_device,
    kvm_create_guest_memfd,
    kvm_dirty_log,
    kvm_one_reg,
    kvm_regs,
    kvm_run,
    kvm_sev_cmd,
    kvm_sev_launch_measure,
    kvm_sev_launch_start,
    kvm_tdx_cmd,
    kvm_tdx_init_vm,
    kvm_userspace_memory_region,
)
from tests.debug.scenario import NEEDS
from tests.debug.scenarios import SCENARIOS
from tests.debug.tracing import kvmpy, need_kvm

PAGE = 4096
MOST = lib.KVMPY_CAPTURE_MOST
IN, OUT = int(When.IN), int(When.OUT)
ARGUMENT, NESTED, RUN = int(What.ARGUMENT), int(What.NESTED), int(What.RUN)


def captured(
    op: Op, arg: Any, known: Known | None = None, result: int = 0, source: Source | None = None
) -> Ioctl:
    """What the engine says of one ioctl, which is not issued."""
    capture = Capture() if source is None else Capture(source)
    capture.enter(known, 3, op.nr, arg)
    capture.exit(result)
    event = Ioctl.unpack(capture.payload(result, 0, 1))
    capture.end()
    return event


def shape(event: Ioctl) -> list[tuple[int, int, int]]:
    """Of each chunk: when, what, how many bytes."""
    return [(chunk.when, chunk.what, len(chunk.data)) for chunk in event.chunks]


def vm_with(slot: int, pages: int) -> Known:
    """A VM that has a memory slot."""
    vm = Known(1, ObjectKind.VM)
    learned(
        vm,
        ioctls.KVM_SET_USER_MEMORY_REGION,
        kvm_userspace_memory_region(slot=slot, memory_size=pages * PAGE),
    )
    return vm


def learned(known: Known, op: Op, arg: Any, result: int = 0) -> Any:
    """Let the engine learn from an ioctl that succeeded; return what it made."""
    capture = Capture()
    capture.enter(known, 3, op.nr, arg)
    capture.exit(result)
    made = capture.made(result)
    capture.end()
    return made


@pytest.fixture
def edge() -> Iterator[int]:
    """The address behind two pages that can be read, where nothing is mapped."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    start = libc.mmap(
        None, 3 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    ctypes.memmove(start, bytes(range(1, 256)) * 32, 255 * 32)
    assert libc.munmap(start + 2 * PAGE, PAGE) == 0
    yield start + 2 * PAGE
    libc.munmap(start, 2 * PAGE)


@pytest.fixture(params=["this process", "a descriptor"])
def source(request: pytest.FixtureRequest) -> Iterator[Source]:
    """Both ways to read memory."""
    if request.param == "this process":
        yield Source()
        return
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    yield Source(fd)
    os.close(fd)


def test_what_cannot_be_read_is_left_out(source: Source, edge: int) -> None:
    """Wrong addresses are no crash; what lies before the first bad page is there."""
    for address in (0, 4, 8):
        assert source.read(address, 16) == b""
    assert source.read(1 << 63, 16) == b""
    assert source.read((1 << 64) - 8, 16) == b""
    assert source.read(edge, 1) == b""
    assert source.read(edge - 4, 16) == ctypes.string_at(edge - 4, 4)
    assert source.read(edge - PAGE - 1, PAGE) == ctypes.string_at(edge - PAGE - 1, PAGE)


def test_arguments_by_address(source: Source, edge: int) -> None:
    """An argument that is a number is read as far as it can be; a null pointer leads nowhere."""
    size = kvm_regs.SIZE
    whole = captured(ioctls.KVM_SET_REGS, edge - size, source=source)
    assert [(c.data, c.flags) for c in whole.chunks] == [(ctypes.string_at(edge - size, size), 0)]
    part = captured(ioctls.KVM_SET_REGS, edge - 13, source=source)
    assert [(c.data, c.flags) for c in part.chunks] == [(ctypes.string_at(edge - 13, 13), CUT)]
    nowhere = captured(ioctls.KVM_SET_REGS, 8, source=source)
    assert [(c.data, c.flags) for c in nowhere.chunks] == [(b"", CUT)]
    assert captured(ioctls.KVM_SET_REGS, 0, source=source).chunks == ()


def test_directions() -> None:
    """In is told before, out after, where it succeeded; in and out both."""
    size = kvm_regs.SIZE
    assert shape(captured(ioctls.KVM_SET_REGS, kvm_regs())) == [(IN, ARGUMENT, size)]
    assert shape(captured(ioctls.KVM_GET_REGS, kvm_regs())) == [(OUT, ARGUMENT, size)]
    assert shape(captured(ioctls.KVM_GET_REGS, kvm_regs(), result=-1)) == []
    both = captured(ioctls.KVM_CREATE_DEVICE, kvm_create_device(type=3))
    assert shape(both) == [(IN, ARGUMENT, 12), (OUT, ARGUMENT, 12)]


def test_counts() -> None:
    """Of a table that the kernel fills its count is read, then what was filled; never more than there is."""
    table = kvm_cpuid2.with_entries(4)
    entry = kvm_cpuid2.ENTRY_SIZE
    assert shape(captured(ioctls.KVM_GET_SUPPORTED_CPUID, table)) == [
        (IN, ARGUMENT, 8), (OUT, ARGUMENT, 8 + 4 * entry),
    ]  # fmt: skip
    assert shape(captured(ioctls.KVM_GET_SUPPORTED_CPUID, table, result=-1))[1] == (OUT, ARGUMENT, 8)
    assert shape(captured(ioctls.KVM_SET_CPUID2, table)) == [(IN, ARGUMENT, 8 + 4 * entry)]
    table.nent = 1 << 31
    assert shape(captured(ioctls.KVM_SET_CPUID2, table)) == [(IN, ARGUMENT, 8 + 4 * entry)]


def test_sizes_that_the_struct_does_not_tell() -> None:
    """A register is as long as its id says; a table of 1 MiB is cut."""
    value = (ctypes.c_uint8 * 256)(*range(256))
    for power in (0, 3, 8):
        reg = kvm_one_reg(id=power << 52, addr=ctypes.addressof(value))
        event = captured(ioctls.KVM_SET_ONE_REG, reg)
        assert shape(event) == [(IN, ARGUMENT, 16), (IN, NESTED, 1 << power)]
        assert event.chunks[1].data == bytes(range(256))[: 1 << power]
    big = bytearray(MOST + 4 * PAGE)
    address = address_of(memoryview(big))
    ctypes.c_uint32.from_address(address).value = MOST
    (chunk,) = captured(ioctls.KVM_SET_CPUID2, address).chunks
    assert (len(chunk.data), chunk.flags) == (MOST, CUT)


@pytest.mark.parametrize(("pages", "size"), [(1, 8), (64, 8), (65, 16), (1000, 128)])
@pytest.mark.parametrize("slot", [0, 5, 32763, 1 << 16 | 5])
def test_dirty_bitmaps(slot: int, pages: int, size: int) -> None:
    """As long as the slot says, in whole quadwords; of a slot that is not known, or went, nothing."""
    bitmap = (ctypes.c_uint8 * 4096)()
    log = kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
    vm = vm_with(slot, pages)
    vcpu = Known(2, ObjectKind.VCPU, vm)
    for known in (vm, vcpu):
        assert shape(captured(ioctls.KVM_GET_DIRTY_LOG, log, known))[1:] == [(OUT, NESTED, size)]
    for log.slot in (slot ^ 1, slot ^ 1 << 16):
        assert [n for *_, n in shape(captured(ioctls.KVM_GET_DIRTY_LOG, log, vm))[1:]] == [0]
    log.slot = slot
    learned(vm, ioctls.KVM_SET_USER_MEMORY_REGION, kvm_userspace_memory_region(slot=slot))
    assert [n for *_, n in shape(captured(ioctls.KVM_GET_DIRTY_LOG, log, vm))[1:]] == [0]


def test_pointers_to_pointers(edge: int) -> None:
    """A command's struct, and what that leads to, in both directions; wrong pointers are told as such."""
    owner = (ctypes.c_uint8 * 9)(*b"123456789")
    start = kvm_sev_launch_start(
        dh_uaddr=ctypes.addressof(owner), dh_len=9, session_uaddr=edge, session_len=7
    )
    command = kvm_sev_cmd(id=SevCmd.KVM_SEV_LAUNCH_START, data=start.host_address)
    event = captured(ioctls.KVM_MEMORY_ENCRYPT_OP, command)
    assert [(c.when, c.address, len(c.data), c.flags) for c in event.chunks] == [
        (IN, event.arg, kvm_sev_cmd.SIZE, 0),
        (IN, start.host_address, kvm_sev_launch_start.SIZE, 0),
        (IN, ctypes.addressof(owner), 9, 0),
        (IN, edge, 0, CUT),
        (OUT, event.arg, kvm_sev_cmd.SIZE, 0),
        (OUT, start.host_address, kvm_sev_launch_start.SIZE, 0),
    ]
    assert event.chunks[2].data == b"123456789"
    measure = kvm_sev_launch_measure(uaddr=ctypes.addressof(owner), len=5)
    command = kvm_sev_cmd(id=SevCmd.KVM_SEV_LAUNCH_MEASURE, data=measure.host_address)
    event = captured(ioctls.KVM_MEMORY_ENCRYPT_OP, command)
    assert (event.chunks[-1].when, event.chunks[-1].data) == (OUT, b"12345")
    command = kvm_sev_cmd(id=9999, data=measure.host_address)
    assert len(captured(ioctls.KVM_MEMORY_ENCRYPT_OP, command).chunks) == 2


def test_a_trust_domains_commands_are_others() -> None:
    """The same request means another struct on a VM of type TDX, and on its vCPUs."""
    init = kvm_tdx_init_vm()
    command = kvm_tdx_cmd(id=TdxCmd.KVM_TDX_INIT_VM, data=init.host_address)
    vm = Known(1, ObjectKind.VM, vm_type=VmType.KVM_X86_TDX_VM)
    for known in (vm, Known(2, ObjectKind.VCPU, vm)):
        event = captured(ioctls.KVM_MEMORY_ENCRYPT_OP, command, known)
        assert event.chunks[1].address == init.host_address
    event = captured(ioctls.KVM_MEMORY_ENCRYPT_OP, command, Known(1, ObjectKind.VM))
    assert len(event.chunks[0].data) == kvm_sev_cmd.SIZE


@given(st.integers(0, 1 << 64))
@settings(max_examples=60)
def test_any_content_of_any_argument(seed: int) -> None:
    """Whatever a program passes: the frame can be read, is no longer than said, and is what lies there."""
    random = Random(seed)
    area = (ctypes.c_uint8 * 8192)()
    address = ctypes.addressof(area)
    for nr in random.sample(sorted(BUFFERS), 40):
        words = [random.choice([0, 1, random.getrandbits(3), random.getrandbits(64)]) for _ in range(64)]
        words = [address + word % 8000 if random.random() < 0.3 else word for word in words]
        ctypes.memmove(area, b"".join(word.to_bytes(8, "little") for word in words), 512)
        selects = [command.id for command in ioctls.BY_NR[nr].commands]
        if selects:
            ctypes.memmove(area, random.choice(selects).to_bytes(4, "little"), 4)
        capture = Capture()
        capture.enter(vm_with(random.getrandbits(3), random.getrandbits(12)), 3, nr, address)
        capture.exit(random.choice([0, -1]))
        most = lib.kvmpy_capture_size(capture.native)
        payload = capture.payload(0, 0, 1)
        capture.end()
        assert len(payload) <= most
        for chunk in Ioctl.unpack(payload).chunks:
            assert len(chunk.data) <= MOST
            if address <= chunk.address and chunk.address + len(chunk.data) <= address + 8192:
                assert chunk.data == ctypes.string_at(chunk.address, len(chunk.data))


def test_what_is_in_the_record_already() -> None:
    """What a pointer leads to in memory that is told otherwise is not copied."""
    owner = (ctypes.c_uint8 * 16)()
    start = kvm_sev_launch_start(dh_uaddr=ctypes.addressof(owner) + 8, dh_len=8)
    command = kvm_sev_cmd(id=SevCmd.KVM_SEV_LAUNCH_START, data=start.host_address)
    for held, number in (((0, 8), 5), ((8, 8), 4), ((0, 16), 4)):
        ranges = [(1, 1), (ctypes.addressof(owner) + held[0], held[1])]
        event = captured(ioctls.KVM_MEMORY_ENCRYPT_OP, command, source=Source(held=ranges))
        assert len(event.chunks) == number


def test_room_of_a_closed_vm_that_was_used_again() -> None:
    """A preloaded recorder may keep the statistics of a vCPU where its VM was: the search for one ends."""
    vcpu = Known(2, ObjectKind.VCPU)
    stats = Known(3, ObjectKind.STATS, vcpu)
    vcpu.native.vm = stats.native
    assert shape(captured(ioctls.KVM_GET_REGS, kvm_regs(), vcpu)) == [(OUT, ARGUMENT, kvm_regs.SIZE)]
    log = kvm_dirty_log(dirty_bitmap=1)
    assert len(captured(ioctls.KVM_GET_DIRTY_LOG, log, vcpu).chunks) == 2


def test_names_and_descriptors_of_what_is_made() -> None:
    """As the table of ioctls says: by the argument, by a field, by their number, or alone."""
    kvm = Known(1, ObjectKind.SYSTEM, name="kvm")
    assert learned(kvm, ioctls.KVM_CREATE_VM, 0, 7) == (ObjectKind.VM, 7, "vm0")
    assert learned(kvm, ioctls.KVM_CREATE_VM, 0, 8) == (ObjectKind.VM, 8, "vm1")
    vm = Known(2, ObjectKind.VM, kvm, name="vm3")
    assert learned(vm, ioctls.KVM_CREATE_VCPU, 4, 9) == (ObjectKind.VCPU, 9, "vm3/vcpu4")
    for number in range(2):
        memory = kvm_create_guest_memfd(size=PAGE)
        made = learned(vm, ioctls.KVM_CREATE_GUEST_MEMFD, memory, 10)
        assert made == (ObjectKind.GMEM, 10, f"vm3/gmem{number}")
    device = kvm_create_device(type=5, fd=11)
    assert learned(vm, ioctls.KVM_CREATE_DEVICE, device) == (ObjectKind.DEVICE, 11, "vm3/device5")
    device.flags = KVM_CREATE_DEVICE_TEST
    assert learned(vm, ioctls.KVM_CREATE_DEVICE, device) is None
    vcpu = Known(3, ObjectKind.VCPU, vm, name="vm3/vcpu4")
    assert learned(vcpu, ioctls.KVM_GET_STATS_FD, None, 12) == (ObjectKind.STATS, 12, "vm3/vcpu4/stats")
    assert learned(vcpu, ioctls.KVM_GET_REGS, kvm_regs()) is None


class Running:
    """A vCPU whose run area is ordinary memory."""

    def __init__(self) -> None:
        self.area = mmap.mmap(-1, 3 * PAGE)
        self.vcpu = Known(2, ObjectKind.VCPU, Known(1, ObjectKind.VM))
        self.address = address_of(memoryview(self.area))
        self.vcpu.mapped(self.address, len(self.area))

    def put(self, offset: int, data: bytes) -> None:
        self.area[offset : offset + len(data)] = data

    def before(self) -> list[tuple[int, bytes]]:
        """What one run says that the host changed; it leaves what :meth:`put` put."""
        event = captured(ioctls.KVM_RUN, None, self.vcpu)
        assert all(chunk.what == RUN for chunk in event.chunks)
        return [(c.address - self.address, c.data) for c in event.chunks if c.when == IN]

    def after(self) -> list[tuple[int, int]]:
        """Where and how much is told of what a run left."""
        event = captured(ioctls.KVM_RUN, None, self.vcpu)
        return [(c.address - self.address, len(c.data)) for c in event.chunks if c.when == OUT]


_AT = {name: offset for name, (offset, *_) in kvm_run.fields().items()}
_SYNC = _AT["kvm_valid_regs"]


def test_run_area() -> None:
    """Of the run area what the host changed is told before, what the run left after."""
    running = Running()
    assert running.before() == []
    running.put(_AT["immediate_exit"], b"\1")
    assert [(at, len(data)) for at, data in running.before()] == [(0, _SYNC)]
    assert running.before() == []
    assert running.after() == [(0, _SYNC)]


def test_run_area_answers() -> None:
    """The data of a port access is told after the run, and the answer to an `in` before the next."""
    running = Running()
    io = _AT["io"]
    running.put(_AT["exit_reason"], KVM_EXIT_IO.to_bytes(4, "little"))
    running.put(io, bytes([0, 2, 0, 0, 3, 0, 0, 0]) + PAGE.to_bytes(8, "little"))
    assert running.after() == [(0, _SYNC), (PAGE, 6)]
    running.put(PAGE, b"answer")
    assert running.before() == [(PAGE, b"answer")]
    running.put(io, b"\1")
    running.before()
    assert running.before() == []
    # Data that reaches beyond the area is none.
    running.put(io + 8, (3 * PAGE - 5).to_bytes(8, "little"))
    assert running.after() == [(0, _SYNC)]


def test_run_area_registers() -> None:
    """Synchronised registers are told where the host asks for other ones, or gives some."""
    running = Running()
    running.put(_SYNC, b"\1")
    assert [(at, len(data)) for at, data in running.before()] == [(_SYNC, kvm_run.SIZE - _SYNC)]
    assert running.after() == [(0, _SYNC), (_SYNC, kvm_run.SIZE - _SYNC)]
    assert running.before() == []
    running.put(_SYNC + 8, b"\1")
    assert len(running.before()) == 1


def test_run_area_ring() -> None:
    """What the host takes out of the ring of coalesced writes is told: its first index."""
    running = Running()
    running.put(2 * PAGE, b"\3\0\0\0\5\0\0\0")
    running.before()
    running.put(2 * PAGE, b"\5")
    assert running.before() == [(2 * PAGE, b"\5\0\0\0")]
    assert running.before() == []


def test_a_run_that_was_not_issued() -> None:
    """A vCPU that was about to run and did not is not taken for one that runs."""
    running = Running()
    capture = Capture()
    capture.enter(running.vcpu, 3, ioctls.KVM_RUN.nr, None)
    assert running.vcpu.maker is not None
    assert running.vcpu.maker.native.entered == 1
    capture.end()
    assert running.vcpu.maker.native.entered == 0


PROGRAM = """
import sys
from kvmpy import Kvm
from kvmpy.debug.record.recorder import Recorder
from kvmpy.uapi import ffi, ioctls, structs
from tests.debug.scenarios import SCENARIOS

def pointers(kvm):
    # What no plain VM does: that the recorders follow the pointers is what counts here.
    data = ffi.new("uint8_t[4096]", b"0123456789")
    at = int(ffi.cast("uintptr_t", data))
    with kvm.create_vm() as vm:
        for name, *members in (
            ("LAUNCH_START", "dh_uaddr", at, "dh_len", 9, "session_uaddr", 8, "session_len", 7),
            ("LAUNCH_MEASURE", "uaddr", at + 1, "len", 5),
            ("SEND_START", "pdh_cert_uaddr", at, "pdh_cert_len", 2, "session_uaddr", at, "session_len", 4),
        ):
            arg = getattr(structs, f"kvm_sev_{name.lower()}")(**dict(zip(members[::2], members[1::2])))
            vm.sev.command_raw(name, arg)
        for op in (ioctls.KVM_IRQFD, ioctls.KVM_SET_USER_MEMORY_REGION2, ioctls.KVM_GET_DIRTY_LOG):
            for address in (0, 8, at):
                vm.ioctl_raw(op, address)

SCENARIOS["pointers"] = pointers
for name in sys.argv[2:]:
    with Recorder(f"{sys.argv[1]}/{name}.rec"), Kvm() as kvm:
        SCENARIOS[name](kvm)
"""
# Signals interrupt these anywhere, and what a kick leaves in the run area is there after observers looked.
ELSEWHERE = {"signalled", "deadline", "kicked", "kicked_before"}


def told(path: Path) -> dict[int, list[tuple[object, ...]]]:
    """The ioctls of each thread in a record, with what was read and written."""
    results: dict[int, list[tuple[object, ...]]] = {}
    for entry in Record.load(path).ioctls:
        event = entry.what
        assert isinstance(event, Ioctl)
        if event.request not in ioctls.BY_NR:
            continue  # such as FIOCLEX on a guest_memfd: no observer inside kvmpy hears of it
        chunks = [(c.address, c.when, c.what, c.flags, c.data) for c in event.chunks]
        row = (request_name(event), event.fd, event.arg, event.result, event.errno, chunks)
        results.setdefault(entry.frame.tid, []).append(row)
    return results


def made(path: Path) -> list[tuple[int, int, str]]:
    """Kind, descriptor and name of what KVM made, in order; kvmpy counts guest_memfds in another way."""
    opened = (e.what for e in Record.load(path).entries if isinstance(e.what, Object) and e.what.made_by)
    return [(e.kind, e.fd, e.name if e.kind != ObjectKind.GMEM else "") for e in opened]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("door", ["preload", "ptrace"])
def test_three_doors(door: str, tmp_path: Path) -> None:
    """The recorder inside a process and the one outside say the same of every ioctl, byte for byte."""
    need_kvm()
    names = ["pointers", *sorted(SCENARIOS.keys() - NEEDS.keys() - ELSEWHERE)]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *names]
    options = ["--ptrace"] if door == "ptrace" else []
    done = kvmpy("trace", "-q", *options, "-o", tmp_path / "outside", "--", *command, timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    outside = told(tmp_path / "outside")
    count = 0
    for name in names:
        for tid, inside in told(tmp_path / f"{name}.rec").items():
            seen, outside[tid] = outside[tid][: len(inside)], outside[tid][len(inside) :]
            assert [row[0] for row in seen] == [row[0] for row in inside], name
            assert seen == inside, name
            count += len(inside)
    assert count > 300
    assert not any(outside.values())
    assert made(tmp_path / "outside") == [each for name in names for each in made(tmp_path / f"{name}.rec")]
