# SPDX-License-Identifier: Apache-2.0
"""System management interrupts, and triple faults."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_X86_SMM,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_RUN_X86_SMM,
    KVM_VCPUEVENT_VALID_SMM,
    PAGE_SIZE,
    Agent,
    IoExit,
    MakeVm,
    ShutdownExit,
    Vm,
    refused,
)
from selftests.events.conftest import SMM_PORT, SMM_VALUE, EventGuestMaker, with_smm_handler

registers = pytest.mark.usefixtures("open_registers")
smm = pytest.mark.requires("KVM_CAP_X86_SMM", "KVM_CAP_MULTI_ADDRESS_SPACE>=2")
triple = pytest.mark.requires("KVM_CAP_X86_TRIPLE_FAULT_EVENT")


@registers
@smm
def test_smi(event_guest: EventGuestMaker) -> None:
    """KVM_SMI takes the guest to its SMM handler and RSM takes it back, with its registers as they were.

    Documentation/virt/kvm/api.rst, 4.96 KVM_SMI; 5 The kvm_run structure, KVM_RUN_X86_SMM.
    """
    guest = with_smm_handler(event_guest)
    before = guest.vcpu.regs.get()
    guest.vcpu.events.smi()
    got = guest.vcpu.expect(IoExit)
    assert (got.port, got.value) == (SMM_PORT, SMM_VALUE)
    assert guest.vcpu.run_area.flags & KVM_RUN_X86_SMM
    assert guest.vcpu.events.get().smi.smm == 1
    guest.vcpu.complete_io()
    assert guest.vcpu.regs.get_sregs().cs.base == 0x3_0000
    assert guest.go_on() == 1
    assert not guest.vcpu.run_area.flags & KVM_RUN_X86_SMM
    assert guest.vcpu.events.get().smi.smm == 0
    after = guest.vcpu.regs.get()
    assert (after.rsp, after.rbp, after.rip) == (before.rsp, before.rbp, before.rip)


@smm
def test_smi_is_pending(vm: Vm) -> None:
    """KVM_SMI makes an SMI pending, which KVM_SET_VCPU_EVENTS can take back.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS and 4.32 KVM_SET_VCPU_EVENTS (smi).
    """
    vcpu = vm.create_vcpu()
    vcpu.events.smi()
    events = vcpu.events.get()
    assert events.smi.pending == 1
    events.smi.pending = 0
    events.flags = 0
    vcpu.events.set(events)
    assert vcpu.events.get().smi.pending == 1
    events.flags = int(KVM_VCPUEVENT_VALID_SMM)
    vcpu.events.set(events)
    assert vcpu.events.get().smi.pending == 0


@registers
@smm
def test_smi_in_smm(event_guest: EventGuestMaker) -> None:
    """An SMI that comes in SMM waits until the handler resumes, and is then taken.

    Intel SDM volume 3, 32.3.1 Entering SMM ("a second SMI is latched").
    """
    guest = with_smm_handler(event_guest)
    guest.vcpu.events.smi()
    guest.vcpu.expect(IoExit)
    guest.vcpu.events.smi()
    assert guest.vcpu.events.get().smi.pending == 1
    assert guest.vcpu.expect(IoExit).value == SMM_VALUE
    assert guest.vcpu.events.get().smi.pending == 0
    guest.vcpu.complete_io()
    assert guest.go_on() == 1


def test_without_smm(vm: Vm) -> None:
    """Where KVM has no SMM, KVM_SMI fails with ENOTTY.

    Documentation/virt/kvm/api.rst, 4.96 KVM_SMI (KVM_CAP_X86_SMM); kvm_inject_smi() without CONFIG_KVM_SMM.
    """
    if vm.check_extension(KVM_CAP_X86_SMM):
        pytest.skip("this KVM has SMM")
    vcpu = vm.create_vcpu()
    with refused(errno.ENOTTY):
        vcpu.events.smi()


@pytest.mark.parametrize("cap", [False, True], ids=["plain", "event"])
def test_triple_fault(make_vm: MakeVm, cap: bool) -> None:
    """A guest that cannot deliver its double fault ends in KVM_EXIT_SHUTDOWN.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure; Intel SDM volume 3, 6.15, Interrupt 8 (shutdown).
    """
    vm = make_vm(AGENT)
    if cap:
        vm.need_cap(KVM_CAP_X86_TRIPLE_FAULT_EVENT)
        vm.enable_cap(KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    no_table = vm.alloc(PAGE_SIZE, private=False)
    agent = Agent(vm.vcpus[0])
    agent.begin(b"\x0f\x01\x1f\x0f\x0b", rdi=int(no_table))  # lidt (%rdi); ud2
    agent.vcpu.expect(ShutdownExit)


@registers
@triple
def test_triple_fault_by_events(event_guest: EventGuestMaker) -> None:
    """A triple fault that KVM_SET_VCPU_EVENTS makes pending ends the next KVM_RUN in KVM_EXIT_SHUTDOWN.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS, KVM_VCPUEVENT_VALID_TRIPLE_FAULT.
    """
    guest = event_guest(cap=KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    events = guest.vcpu.events.get()
    events.triple_fault.pending = 1
    guest.vcpu.events.set(events)
    assert guest.vcpu.events.get().triple_fault.pending == 1
    guest.vcpu.expect(ShutdownExit)


@registers
@triple
def test_triple_fault_taken_back(event_guest: EventGuestMaker) -> None:
    """A pending triple fault that KVM_SET_VCPU_EVENTS clears leaves the guest running.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS, KVM_VCPUEVENT_VALID_TRIPLE_FAULT.
    """
    guest = event_guest(cap=KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    events = guest.vcpu.events.get()
    for pending in (1, 0):
        events.triple_fault.pending = pending
        guest.vcpu.events.set(events)
    assert guest.go_on() == 1
    assert guest.counts() == {}
