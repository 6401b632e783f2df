# SPDX-License-Identifier: Apache-2.0
"""What Hyper-V guests ask of user space: hypercalls, connections, the debugger, a crash, a reset."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET,
    PAGE_SIZE,
    Agent,
    EventFd,
    GuestVm,
    HypervHypercallExit,
    HypervSyndbgExit,
    Kvm,
    Msr,
    SystemEventExit,
    Vm,
    refused,
)
from kvmpy.x86.hyperv import HvBits, HvCall, HvStatus, control
from selftests.conftest import hypercall_instruction

from .conftest import MakeHyperV

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV", "KVM_CAP_SYS_HYPERV_CPUID", "KVM_CAP_HYPERV_SYNIC2"),
]
GUEST = pytest.mark.protections("none", "cbit")
POST, SIGNAL = HvCall.HVCALL_POST_MESSAGE, HvCall.HVCALL_SIGNAL_EVENT
NO_PORT = int(HvStatus.HV_STATUS_INVALID_PORT_ID)
BAD = int(HvStatus.HV_STATUS_INVALID_HYPERCALL_INPUT)


class Caller:
    """Makes hypercalls that user space may answer."""

    def __init__(self, vm: GuestVm, code: bytes) -> None:
        self.vm = vm
        self.room = vm.alloc(PAGE_SIZE, private=False)
        self.gpa = int(vm.gva_to_gpa(self.room))
        self.agent = Agent(vm.vcpus[0])
        self._code = code

    def begin(self, word: int, first: int = 0, second: int = 0) -> None:
        """Order a call."""
        self.agent.begin(self._code, rcx=word, rdx=first, r8=second)

    def answered(self, word: int, first: int = 0, second: int = 0) -> int:
        """Make a call that KVM answers, and return the result."""
        self.begin(word, first, second)
        return self.agent.value()

    def asked(self, word: int, first: int, second: int, result: int) -> HypervHypercallExit:
        """Make a call that exits, answer with *result*, which the guest must get; return the exit."""
        self.begin(word, first, second)
        exit_ = self.vm.vcpus[0].expect(HypervHypercallExit)
        exit_.respond(result)
        assert self.agent.value() == result
        return exit_


@pytest.fixture
def caller(make_hyperv: MakeHyperV, kvm: Kvm) -> Caller:
    """A guest with a SynIC."""
    return Caller(make_hyperv(synic=True), hypercall_instruction(kvm))


@GUEST
@pytest.mark.parametrize("code", [0x8001, 0x8002, 0x8040, 0x8041])
def test_extended_calls(caller: Caller, code: int) -> None:
    """Extended hypercalls exit with the control word and both addresses; the guest gets what is answered.

    Documentation/virt/kvm/api.rst, KVM_EXIT_HYPERV_HCALL; TLFS, HvExtCallQueryCapabilities.
    """
    for result in (0, 5, 1 << 32 | 0xFFFF, (1 << 64) - 1):
        exit_ = caller.asked(control(code), caller.gpa, caller.gpa + 2048, result)
        assert (exit_.input, exit_.params) == (code, (caller.gpa, caller.gpa + 2048))


@GUEST
def test_output_of_an_extended_call(caller: Caller) -> None:
    """What user space writes before it answers is there when the guest goes on.

    TLFS, HvExtCallQueryCapabilities: the output is a word in memory.
    """
    caller.begin(control(HvCall.HV_EXT_CALL_QUERY_CAPABILITIES), 0, caller.gpa)
    exit_ = caller.vm.vcpus[0].expect(HypervHypercallExit)
    assert exit_.code == HvCall.HV_EXT_CALL_QUERY_CAPABILITIES
    caller.vm.write(caller.room, (0xBBEE_F00D).to_bytes(8, "little"))
    exit_.respond(0)
    assert caller.agent.value() == 0
    assert caller.agent.read(caller.room) == 0xBBEE_F00D


@GUEST
def test_messages(caller: Caller) -> None:
    """HvPostMessage is user space's, fast or slow, where there is a SynIC.

    api.rst, KVM_EXIT_HYPERV_HCALL; TLFS, inter-partition communication.
    """
    for fast in (False, True):
        word = control(POST, fast=fast)
        exit_ = caller.asked(word, caller.gpa, 7, int(HvStatus.HV_STATUS_INSUFFICIENT_BUFFERS))
        assert (exit_.input, exit_.params) == (word, (caller.gpa, 7))


@GUEST
def test_without_synic(make_hyperv: MakeHyperV, kvm: Kvm) -> None:
    """Without a SynIC nobody takes messages and events: they are invalid input.

    TLFS, inter-partition communication: messages are the SynIC's.
    """
    caller = Caller(make_hyperv(), hypercall_instruction(kvm))
    assert [caller.answered(control(code, fast=True)) for code in (POST, SIGNAL)] == [BAD, BAD]


@GUEST
@pytest.mark.requires("KVM_CAP_HYPERV_EVENTFD")
def test_eventfd(caller: Caller) -> None:
    """HvSignalEvent for a connection with an eventfd signals that one alone; others are user space's.

    Documentation/virt/kvm/api.rst, 4.113 KVM_HYPERV_EVENTFD.
    """
    vm = caller.vm
    connections = (1, 2, 0x10_0000, 0xFF_FFFF)
    with EventFd() as first, EventFd() as second, EventFd() as third, EventFd() as last:
        fds = dict(zip(connections, (first, second, third, last), strict=True))
        for connection, fd in fds.items():
            vm.hyperv.eventfd(fd, connection)
        for connection in connections:
            # In a register, then in memory.
            assert caller.answered(control(SIGNAL, fast=True), connection) == 0
            vm.write(caller.room, connection.to_bytes(8, "little"))
            assert caller.answered(control(SIGNAL), caller.gpa) == 0
            assert {c: fd.read() for c, fd in fds.items()} == {c: 2 * (c == connection) for c in connections}
        # A flag number, or a connection that nobody has, is another one's; reserved bits are an error.
        for given in (1 | 1 << 32, 1 | 1 << 47, 3):
            exit_ = caller.asked(control(SIGNAL, fast=True), given, 0, NO_PORT)
            assert exit_.params == (given, 0)
        for bit in (24, 31, 48, 63):
            assert caller.answered(control(SIGNAL, fast=True), 1 | 1 << bit) == BAD
        vm.hyperv.eventfd(first, 1, deassign=True)
        caller.asked(control(SIGNAL, fast=True), 1, 0, NO_PORT)
        assert [fd.read() for fd in fds.values()] == [0] * 4


@pytest.mark.requires("KVM_CAP_HYPERV_EVENTFD")
def test_eventfd_errors(vm: Vm, kvm: Kvm) -> None:
    """A connection has one eventfd and 24 bits; what is refused has changed nothing.

    api.rst, 4.113: EINVAL, ENOENT, EEXIST.
    """
    with EventFd() as fd, EventFd() as other:
        with refused(errno.ENOENT):
            vm.hyperv.eventfd(fd, 5, deassign=True)
        with refused(errno.EBADF):
            vm.hyperv.eventfd(1 << 20, 5)
        with refused(errno.EINVAL, about="a descriptor that is no eventfd"):
            vm.hyperv.eventfd(kvm.fd, 5)
        for flags in (2, 1 << 31):
            with refused(errno.EINVAL, about=f"flags {flags:#x}"):
                vm.hyperv.eventfd(fd, 5, flags=flags)
            with refused(errno.EINVAL, about=f"flags {flags:#x} with deassign"):
                vm.hyperv.eventfd(fd, 5, flags=flags, deassign=True)
        with refused(errno.EINVAL, about="a connection of 25 bits"):
            vm.hyperv.eventfd(fd, 1 << 24)
        vm.hyperv.eventfd(fd, 5)
        with refused(errno.EEXIST):
            vm.hyperv.eventfd(other, 5)
        vm.hyperv.eventfd(other, 6)
        # Whatever descriptor is given, the connection is what is taken back.
        vm.hyperv.eventfd(other, 5, deassign=True)
        vm.hyperv.eventfd(other, 5)


@GUEST
def test_debugger(caller: Caller) -> None:
    """Writes to the debugger's control and pending registers exit with all its registers; the answer to the
    first is the status that the guest reads then.

    api.rst, KVM_EXIT_HYPERV_SYNDBG.
    """
    agent, vcpu = caller.agent, caller.vm.vcpus[0]
    assert agent.wrmsr(Msr.HV_X64_MSR_SYNDBG_SEND_BUFFER, 0x1000) is None
    assert agent.wrmsr(Msr.HV_X64_MSR_SYNDBG_RECV_BUFFER, 0x2000) is None
    answers = []
    for turn, (msr, value) in enumerate(
        ((Msr.HV_X64_MSR_SYNDBG_PENDING_BUFFER, 0x3000), (Msr.HV_X64_MSR_SYNDBG_CONTROL, 0x10_0001))
    ):
        agent.begin_wrmsr(msr, value)
        exit_ = vcpu.expect(HypervSyndbgExit)
        assert (exit_.msr, exit_.send_page, exit_.recv_page) == (msr, 0x1000, 0x2000)
        assert exit_.pending_page == 0x3000
        assert exit_.control == (0, 0x10_0001)[turn]
        exit_.respond(0x77 + turn)
        agent.end()
        answers.append(agent.rdmsr(Msr.HV_X64_MSR_SYNDBG_STATUS))
    assert answers == [0, 0x78]


@GUEST
def test_debugger_by_hypercalls(caller: Caller) -> None:
    """Once the guest has chosen hypercalls, those of the debugger exit to user space.

    TLFS, HV_X64_MSR_SYNDBG_OPTIONS: bit 2 asks for hypercalls.
    """
    calls = (
        HvCall.HVCALL_POST_DEBUG_DATA,
        HvCall.HVCALL_RETRIEVE_DEBUG_DATA,
        HvCall.HVCALL_RESET_DEBUG_SESSION,
    )
    denied = int(HvStatus.HV_STATUS_OPERATION_DENIED)
    assert [caller.answered(control(code)) for code in calls] == [denied] * 3
    options = int(HvBits.HV_SYNDBG_OPTION_USE_HCALLS)
    assert caller.agent.wrmsr(Msr.HV_X64_MSR_SYNDBG_OPTIONS, options) is None
    for code in calls:
        exit_ = caller.asked(control(code), caller.gpa, caller.gpa + 64, int(HvStatus.HV_STATUS_SUCCESS))
        assert (exit_.code, exit_.params) == (code, (caller.gpa, caller.gpa + 64))


@GUEST
def test_crash(caller: Caller) -> None:
    """A guest's report of its crash is a system event, and its parameters are the host's to read.

    api.rst, KVM_SYSTEM_EVENT_CRASH; TLFS, HV_X64_MSR_CRASH_CTL bit 63.
    """
    agent, vcpu = caller.agent, caller.vm.vcpus[0]
    values = {Msr.HV_X64_MSR_CRASH_P0 + n: 0x1111_2222_3333_4444 * n + n for n in range(5)}
    for index, value in values.items():
        assert agent.wrmsr(index, value) is None
    notify = int(HvBits.HV_CRASH_CTL_CRASH_NOTIFY)
    # Without the bit it is no report.
    assert agent.wrmsr(Msr.HV_X64_MSR_CRASH_CTL, int(HvBits.HV_CRASH_CTL_CRASH_NOTIFY_MSG)) is None
    agent.begin_wrmsr(Msr.HV_X64_MSR_CRASH_CTL, notify)
    assert vcpu.expect(SystemEventExit).type == KVM_SYSTEM_EVENT_CRASH
    assert vcpu.msrs.get_many(values) == values
    agent.end()
    assert {index: agent.rdmsr(index) for index in values} == values
    # What the host allows is what the guest finds; no more than that one bit.
    vcpu.msrs.set(Msr.HV_X64_MSR_CRASH_CTL, (1 << 64) - 1)
    assert agent.rdmsr(Msr.HV_X64_MSR_CRASH_CTL) == notify


@GUEST
def test_reset(caller: Caller) -> None:
    """A guest that writes 1 asks user space for a reset; other values ask for nothing.

    TLFS, HV_X64_MSR_RESET; api.rst, KVM_SYSTEM_EVENT_RESET.
    """
    agent = caller.agent
    for value in (0, 2, 1 << 63):
        assert agent.wrmsr(Msr.HV_X64_MSR_RESET, value) is None
    agent.begin_wrmsr(Msr.HV_X64_MSR_RESET, 1)
    assert caller.vm.vcpus[0].expect(SystemEventExit).type == KVM_SYSTEM_EVENT_RESET
    agent.end()
    assert agent.rdmsr(Msr.HV_X64_MSR_RESET) == 0
