# SPDX-License-Identifier: Apache-2.0
"""Ends of L2: shutdown, EFER.SVME cleared under it, a VMCB that is gone; and VMRUN that cannot begin."""

from __future__ import annotations

import pytest

from kvmpy import (
    EFER,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    L1,
    L2,
    PAGE_SIZE,
    Cpuid,
    Fault,
    Gpa,
    InternalErrorExit,
    MakeVm,
    Msr,
    ShutdownExit,
    SvmExit,
    Vector,
)
from kvmpy.core.errors import ClosedError
from kvmpy.core.vcpu import RUN_EINTR

pytestmark = [pytest.mark.protections("none", "cbit"), pytest.mark.requires("cpuid:svm")]

NOP, UD2 = b"\x90", b"\x0f\x0b"
OUT = b"\xe6\x42"


@pytest.mark.parametrize("intercepted", [False, True], ids=["passes", "intercepted"])
def test_triple_fault(l2: L2, intercepted: bool) -> None:
    """A triple fault of L2 is an exit to L1 where it intercepts shutdown, else the end of the VM.

    AMD APM volume 2, 15.14.3 Shutdown Intercept; Documentation/virt/kvm/api.rst, KVM_EXIT_SHUTDOWN.
    """
    l2.reset()
    l2.load(UD2)
    l2.vmcb["idtr.limit"] = 0
    l2.intercept(SvmExit.SHUTDOWN, on=intercepted)
    l2.begin()
    if intercepted:
        assert l2.end().code == SvmExit.SHUTDOWN
        l2.reset()
        assert l2.run(NOP).code == SvmExit.VMMCALL
    else:
        l2.vcpu.expect(ShutdownExit)


@pytest.mark.requires("KVM_CAP_X86_TRIPLE_FAULT_EVENT")
@pytest.mark.parametrize("intercepted", [False, True], ids=["passes", "intercepted"])
def test_triple_fault_by_events(make_vm: MakeVm, npt: bool, intercepted: bool) -> None:
    """A triple fault that KVM_SET_VCPU_EVENTS makes pending in L2 outlives immediate_exit, then happens.

    Documentation/virt/kvm/api.rst, 4.32 (KVM_VCPUEVENT_VALID_TRIPLE_FAULT).
    """
    vm = make_vm(L1, before_vcpus=lambda vm: vm.enable_cap(KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1))
    l2 = L2(vm.vcpus[0], npt=npt)
    vcpu = l2.vcpu
    l2.load(OUT + NOP)
    l2.intercept(SvmExit.SHUTDOWN, on=intercepted)
    l2.begin()
    vcpu.next()
    vcpu.complete_io()
    events = vcpu.events.get()
    assert events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    assert events.triple_fault.pending == 0
    events.triple_fault.pending = 1
    vcpu.events.set(events)
    vcpu.run_area.immediate_exit = 1
    assert vcpu.run_once() == RUN_EINTR
    vcpu.run_area.immediate_exit = 0
    assert vcpu.events.get().triple_fault.pending == 1
    if intercepted:
        got = l2.end()
        assert (got.code, l2.offset) == (SvmExit.SHUTDOWN, 2), str(got)
    else:
        vcpu.expect(ShutdownExit)


def test_svme_cleared(l2: L2) -> None:
    """An L2 that clears EFER.SVME, which L1 does not intercept, ends in a shutdown.

    AMD APM volume 2, 15.5.1: "the effect of turning off EFER.SVME while a guest is running is undefined".
    """
    l2.reset()
    l2.load(
        b"\x0f\x32\x25" + (~int(EFER.SVME) & 0xFFFF_FFFF).to_bytes(4, "little") + b"\x0f\x30",
        rcx=Msr.MSR_EFER,
    )
    l2.begin()
    l2.vcpu.expect(ShutdownExit)
    assert l2.vcpu.nested.get().flags & 1 == 0


def test_svme_set_again(l2: L2) -> None:
    """An L2 that writes EFER as it is goes on.

    AMD APM volume 2, 15.5.1.
    """
    l2.reset()
    assert l2.run(b"\x0f\x32\x0f\x30", rcx=Msr.MSR_EFER).code == SvmExit.VMMCALL


def bad_addresses(l2: L2) -> dict[str, int]:
    """Return addresses that VMRUN, VMLOAD and VMSAVE refuse with #GP."""
    width = Cpuid.from_struct(l2.vcpu.cpuid.get()).maxphyaddr
    good = l2.pa(l2.vmcb_gva)
    return {
        "not aligned": good | 8,
        "not a page": good | 0x800,
        "beyond the width": good | 1 << width,
        "the last page of all": (1 << 64) - PAGE_SIZE,
    }


INSTRUCTIONS = {"VMRUN": b"\x0f\x01\xd8", "VMLOAD": b"\x0f\x01\xda", "VMSAVE": b"\x0f\x01\xdb"}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_bad_address(l2: L2, name: str) -> None:
    """VMRUN, VMLOAD and VMSAVE of an address that is no page of physical memory are #GP(0).

    AMD APM volume 3, VMRUN, VMLOAD, VMSAVE.
    """
    l2.reset()
    wrong = []
    for what, address in bad_addresses(l2).items():
        got = l2.agent.execute(INSTRUCTIONS[name], rax=address)
        if got != Fault(Vector.GP, 0):
            wrong.append(f"{what} ({address:#x}): {got}")
    assert not wrong, "\n".join(wrong)
    assert l2.run(NOP).code == SvmExit.VMMCALL


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_no_memory(l2: L2, name: str) -> None:
    """The same of a legal address without memory behind it ends in an error that the host can see.

    arch/x86/kvm/svm/nested.c, nested_svm_vmrun(): emulation cannot go on.
    """
    l2.reset()
    l2.agent.begin(INSTRUCTIONS[name], rax=0x1_2345_6000)
    l2.vcpu.expect(InternalErrorExit)


@pytest.mark.parametrize("name", [*INSTRUCTIONS, "STGI", "CLGI", "INVLPGA"])
def test_without_svme(l2: L2, name: str) -> None:
    """SVM's instructions are #UD in ring 0 while EFER.SVME is clear, and #GP(0) in ring 3 once it is set.

    AMD APM volume 3, each instruction's exceptions.  In ring 3 the processor looks at its own EFER, where KVM
    has SVME set always.
    """
    code = INSTRUCTIONS.get(name) or {
        "STGI": b"\x0f\x01\xdc", "CLGI": b"\x0f\x01\xdd", "INVLPGA": b"\x0f\x01\xdf"
    }[name]  # fmt: skip
    efer = l2.agent.rdmsr(Msr.MSR_EFER)
    assert isinstance(efer, int)
    assert l2.agent.execute(code, rax=l2.pa(l2.vmcb_gva)) == Fault(Vector.UD, 0)
    assert l2.agent.wrmsr(Msr.MSR_EFER, efer | EFER.SVME) is None
    assert l2.agent.execute(code, ring=3, rax=l2.pa(l2.vmcb_gva)) == Fault(Vector.GP, 0)


def test_without_host_save_area(l2: L2) -> None:
    """VMRUN without a host save area in VM_HSAVE_PA is #GP(0), and an address that is none is refused.

    AMD APM volume 2, 15.30.4 VM_HSAVE_PA MSR; arch/x86/kvm/svm/nested.c, nested_svm_vmrun().
    """
    l2.reset()
    hsave = l2.agent.rdmsr(Msr.MSR_VM_HSAVE_PA)
    assert isinstance(hsave, int)
    assert hsave
    assert l2.agent.wrmsr(Msr.MSR_VM_HSAVE_PA, 0) is None
    assert l2.agent.execute(INSTRUCTIONS["VMRUN"], rax=l2.pa(l2.vmcb_gva)) == Fault(Vector.GP, 0)
    for bad in (hsave | 0x10, 1 << 63):
        assert l2.agent.wrmsr(Msr.MSR_VM_HSAVE_PA, bad) == Fault(Vector.GP, 0)
    assert l2.agent.wrmsr(Msr.MSR_VM_HSAVE_PA, hsave) is None
    assert l2.run(NOP).code == SvmExit.VMMCALL


def test_vmcb_gone(make_vm: MakeVm, npt: bool) -> None:
    """If the VMCB's memory is gone when L2 exits, the VM ends in a shutdown: there is no place for the exit.

    arch/x86/kvm/svm/nested.c, nested_svm_vmexit().
    """
    vm = make_vm(L1)
    l2 = L2(vm.vcpus[0], npt=npt)
    apart = Gpa(0x1000_0000)
    slot = vm.add_memory(apart, PAGE_SIZE, private=False)
    l2.reset()
    l2.load(OUT + NOP)
    vm.memory.write(apart, bytes(l2.vmcb.page))
    # vmrun %rax
    l2.agent.begin(b"\x0f\x01\xd8", rax=int(apart))
    vm.vcpus[0].next()
    vm.vcpus[0].complete_io()
    slot.delete()
    vm.vcpus[0].expect(ShutdownExit)


def test_closed_in_l2(l2: L2) -> None:
    """A VM can be closed while L2 stands in the middle of an instruction, and so can its vCPU.

    Documentation/virt/kvm/api.rst, 4.2 KVM_CREATE_VM: the VM goes with its last file descriptor.
    """
    l2.reset()
    l2.load(OUT + NOP)
    l2.begin()
    l2.vcpu.next()
    state = l2.vcpu.nested.get()
    assert state.flags & 1
    l2.vm.close()
    with pytest.raises(ClosedError):
        l2.vcpu.nested.set(state)
