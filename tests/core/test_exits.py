# SPDX-License-Identifier: Apache-2.0
"""Exits are read from a kvm_run that the test fills in, so every reason is covered on every host."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kvmpy.core import exits
from kvmpy.uapi import ffi
from kvmpy.uapi.constants import ExitReason

# Reasons that x86 KVM never gives.
OTHER_ARCHITECTURES = ("S390", "ARM", "RISCV", "LOONGARCH", "DCR", "OSI", "PAPR", "WATCHDOG", "EPR")


@pytest.fixture
def area() -> Any:
    return ffi.new("char[8192]")


def as_run(area: Any) -> Any:
    return ffi.cast("struct kvm_run *", area)


def test_every_reason_of_x86_has_a_class() -> None:
    missing = [
        reason.name
        for reason in ExitReason
        if int(reason) not in exits.BY_REASON
        and not reason.name.removeprefix("KVM_EXIT_").startswith(OTHER_ARCHITECTURES)
    ]
    assert missing == []


@pytest.mark.parametrize("reason", sorted(exits.BY_REASON))
def test_every_reason_is_read_as_its_class(area: Any, reason: int) -> None:
    as_run(area).exit_reason = reason
    vm_exit = exits.read_exit(as_run(area), 0)
    assert int(vm_exit.reason) == reason
    assert repr(vm_exit).startswith(type(vm_exit).__name__)


def test_an_unknown_reason_keeps_number_and_payload(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = 4242
    run.io.port = 0x1234
    got = exits.read_exit(run, 0)
    assert isinstance(got, exits.UnknownExit)
    assert got.number == 4242
    assert got.payload[2:4] == b"\x34\x12"


def test_io_out(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_IO
    run.io.direction, run.io.size, run.io.port, run.io.count, run.io.data_offset = 1, 2, 0x3F8, 3, 4096
    ffi.memmove(area + 4096, b"\x01\x02\x03\x04\x05\x06", 6)
    vm_exit = exits.read_exit(run, 0)
    assert isinstance(vm_exit, exits.IoExit)
    assert (vm_exit.port, vm_exit.direction, vm_exit.size, vm_exit.count) == (0x3F8, "out", 2, 3)
    assert vm_exit.data == b"\x01\x02\x03\x04\x05\x06"
    assert vm_exit.value == 0x0201
    with pytest.raises(ValueError, match="no answer"):
        vm_exit.respond(1)


def test_io_in_takes_its_answer(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_IO
    run.io.direction, run.io.size, run.io.port, run.io.count, run.io.data_offset = 0, 4, 0xCF8, 2, 4096
    vm_exit = exits.read_exit(run, 0)
    assert isinstance(vm_exit, exits.IoExit)
    vm_exit.respond(b"abcdefgh")
    assert bytes(ffi.buffer(area + 4096, 8)) == b"abcdefgh"
    vm_exit.respond(0x01020304)
    assert bytes(ffi.buffer(area + 4096, 8)) == b"\x04\x03\x02\x01" * 2
    with pytest.raises(ValueError, match="3 bytes given, the guest reads 8"):
        vm_exit.respond(b"abc")


def test_mmio_read_takes_its_answer(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_MMIO
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0xD0000000, 4, 0
    vm_exit = exits.read_exit(run, 0)
    assert isinstance(vm_exit, exits.MmioExit)
    vm_exit.respond(0xAABBCCDD)
    assert bytes(run.mmio.data[0:4]) == b"\xdd\xcc\xbb\xaa"
    with pytest.raises(ValueError, match="8 bytes given"):
        vm_exit.respond(b"12345678")


def test_memory_fault_has_its_errno_and_privacy(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_MEMORY_FAULT
    run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size = 8, 0x100000, 0x1000
    vm_exit = exits.read_exit(run, errno.EFAULT)
    assert isinstance(vm_exit, exits.MemoryFaultExit)
    assert (vm_exit.gpa, vm_exit.size, vm_exit.private, vm_exit.errno) == (
        0x100000,
        0x1000,
        True,
        errno.EFAULT,
    )


def test_emulation_failure_shows_the_instruction(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_INTERNAL_ERROR
    failure = run.emulation_failure
    failure.suberror, failure.ndata, failure.flags, failure.insn_size = 1, 4, 1, 3
    for number, byte in enumerate(b"\x0f\x01\xc8"):
        failure.insn_bytes[number] = byte
    vm_exit = exits.read_exit(run, 0)
    assert isinstance(vm_exit, exits.InternalErrorExit)
    assert vm_exit.instruction == b"\x0f\x01\xc8"


def test_msr_exit_answers_with_data_or_fault(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_X86_RDMSR
    run.msr.index, run.msr.reason = 0x1234, 2
    vm_exit = exits.read_exit(run, 0)
    assert isinstance(vm_exit, exits.RdmsrExit)
    assert (vm_exit.index, vm_exit.msr_reason) == (0x1234, 2)
    vm_exit.respond(0xCAFE)
    assert (run.msr.data, run.msr.error) == (0xCAFE, 0)
    vm_exit.respond(fault=True)
    assert run.msr.error == 1


def test_hypercall_result_may_be_negative(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_HYPERCALL
    run.hypercall.nr = 12
    run.hypercall.args[0] = 0x100000
    vm_exit = exits.read_exit(run, 0)
    assert isinstance(vm_exit, exits.HypercallExit)
    assert (vm_exit.nr, vm_exit.args[0]) == (12, 0x100000)
    vm_exit.respond(-22)
    assert run.hypercall.ret == (1 << 64) - 22


def test_hyperv_exits_by_type(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_HYPERV
    run.hyperv.type = 1
    run.hyperv.u.synic.msr, run.hyperv.u.synic.evt_page, run.hyperv.u.synic.msg_page = 0x40000080, 2, 3
    assert exits.read_exit(run, 0) == exits.HypervSynicExit(0x40000080, 0, 2, 3)
    run.hyperv.type = 2
    run.hyperv.u.hcall.input, run.hyperv.u.hcall.params = 0x1_005C, [7, 8]
    call = exits.read_exit(run, 0)
    assert isinstance(call, exits.HypervHypercallExit)
    assert (call.code, call.params) == (0x5C, (7, 8))
    call.respond(3 << 32 | 5)
    assert run.hyperv.u.hcall.result == 3 << 32 | 5
    run.hyperv.type = 3
    debug = exits.read_exit(run, 0)
    assert isinstance(debug, exits.HypervSyndbgExit)
    debug.respond(9)
    assert run.hyperv.u.syndbg.status == 9
    run.hyperv.type = 77
    other = exits.read_exit(run, 0)
    assert isinstance(other, exits.HypervUnknownExit)
    assert isinstance(other, exits.HypervExit)
    assert other.type == 77


def test_xen_hypercall_has_six_arguments(area: Any) -> None:
    run = as_run(area)
    run.exit_reason = ExitReason.KVM_EXIT_XEN
    run.xen.type = 1
    call = run.xen.u.hcall
    call.longmode, call.cpl, call.input, call.params = 1, 3, 17, [1, 2, 3, 4, 5, 6]
    vm_exit = exits.read_exit(run, 0)
    assert vm_exit == exits.XenHypercallExit(True, 3, 17, (1, 2, 3, 4, 5, 6))
    assert isinstance(vm_exit, exits.XenHypercallExit)
    vm_exit.respond(-38)
    assert call.result == (1 << 64) - 38
    run.xen.type = 2
    assert isinstance(exits.read_exit(run, 0), exits.XenUnknownExit)
