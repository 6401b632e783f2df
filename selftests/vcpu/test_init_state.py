# SPDX-License-Identifier: Apache-2.0
"""What INIT resets and what it keeps: it is no RESET.

AMD APM volume 2, 14.1.2 (Initialization Operation) and table 14-2; Intel SDM 3A, table 11-1.
"""

from __future__ import annotations

import pytest

from kvmpy import AGENT, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, Agent, GuestVcpu, MakeVm

pytestmark = [
    pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP", "KVM_CAP_MP_STATE"),
    pytest.mark.protections("none", "cbit"),
]

APIC_BASE, X2APIC, SPIV, ICR = 0x1B, 0xFEE0_0D00, 0x80F, 0x830
INIT = 0x4500
ET, NW, CD = 1 << 4, 1 << 29, 1 << 30
# MSRs that INIT keeps, each with a value that is not its first one.
KEPT = {
    "PAT": (0x277, 0x0606_0606_0606_0606),
    "MTRR_DEF_TYPE": (0x2FF, 0xC06),
    "MTRR_FIX64K": (0x250, 0x0606_0606_0606_0606),
    "STAR": (0xC000_0081, 0x0013_0008_0000_0000),
    "LSTAR": (0xC000_0082, 0x1234_5000),
    "SFMASK": (0xC000_0084, 0x4_7700),
    "KERNEL_GS_BASE": (0xC000_0102, 0x5678_9000),
}


def pair(make_vm: MakeVm) -> tuple[Agent, GuestVcpu]:
    """Return a vCPU that can send, and one that runs so far as user space knows."""
    vm = make_vm(AGENT, vcpus=2)
    sender, target = Agent(vm.vcpus[0]), vm.vcpus[1]
    sender.start()
    target.set_mp_state(KVM_MP_STATE_RUNNABLE)
    return sender, target


def send_init(sender: Agent, target: GuestVcpu) -> None:
    """Let one vCPU send INIT to the other."""
    for msr, value in ((APIC_BASE, X2APIC), (SPIV, 0x1FF), (ICR, target.vcpu_id << 32 | INIT)):
        assert sender.wrmsr(msr, value) is None
    # KVM takes INIT when it is asked for the state at the latest.
    assert target.get_mp_state() == KVM_MP_STATE_INIT_RECEIVED


def init(make_vm: MakeVm, cr0: int) -> GuestVcpu:
    """Return a vCPU that had all of KEPT, and *cr0* beside its own, when another one sent it INIT."""
    sender, target = pair(make_vm)
    for msr, value in KEPT.values():
        target.msrs.set(msr, value)
    sregs = target.regs.get_sregs()
    sregs.cr0 |= cr0
    sregs.cr2 = 0x1234
    target.regs.set_sregs(sregs)
    regs = target.regs.get()
    regs.rax = regs.r15 = 0x77
    target.regs.set(regs)
    send_init(sender, target)
    return target


@pytest.mark.parametrize("bits", [0, CD, CD | NW], ids=["cached", "no-fill", "off"])
def test_cache_bits(make_vm: MakeVm, bits: int) -> None:
    """CR0 is 10h after INIT but for CD and NW, which stay as they were."""
    cr0 = int(init(make_vm, bits).regs.get_sregs().cr0)
    assert cr0 == ET | bits, f"CR0 is {cr0:#x} after INIT, expected {ET | bits:#x}"


def test_kept(make_vm: MakeVm) -> None:
    """MSRs of memory types and of system calls stay."""
    target = init(make_vm, 0)
    got = {name: hex(target.msrs.get(msr)) for name, (msr, _) in KEPT.items()}
    assert got == {name: hex(value) for name, (_, value) in KEPT.items()}


def test_extended_state_is_kept(make_vm: MakeVm) -> None:
    """XCR0 and the x87's words stay, which RESET sets anew."""
    sender, target = pair(make_vm)
    fpu = target.fpu.get()
    fpu.fcw, fpu.fsw = 0x27F, 0x3841
    target.fpu.set(fpu)
    xcrs = target.fpu.get_xcrs()
    xcrs.xcrs[0].value = 3
    target.fpu.set_xcrs(xcrs)
    send_init(sender, target)
    assert (target.fpu.get_xcrs().xcrs[0].value, target.fpu.get().fcw, target.fpu.get().fsw) == (
        3,
        0x27F,
        0x3841,
    )


def test_reset(make_vm: MakeVm) -> None:
    """Control, segment, debug and general registers are those of a new processor."""
    target = init(make_vm, CD)
    sregs, regs = target.regs.get_sregs(), target.regs.get()
    got = {
        "CR2": sregs.cr2, "CR3": sregs.cr3, "CR4": sregs.cr4, "CR8": sregs.cr8, "EFER": sregs.efer,
        "CS": sregs.cs.selector, "CS base": sregs.cs.base, "DS": sregs.ds.selector, "SS base": sregs.ss.base,
        "GDT": (sregs.gdt.base, sregs.gdt.limit), "IDT": (sregs.idt.base, sregs.idt.limit),
        "RIP": regs.rip, "RFLAGS": regs.rflags, "RAX": regs.rax, "RSP": regs.rsp, "R15": regs.r15,
        "DR7": target.debug.get_regs().dr7,
    }  # fmt: skip
    assert got == {
        "CR2": 0, "CR3": 0, "CR4": 0, "CR8": 0, "EFER": 0, "CS": 0xF000, "CS base": 0xFFFF_0000, "DS": 0,
        "SS base": 0, "GDT": (0, 0xFFFF), "IDT": (0, 0xFFFF), "RIP": 0xFFF0, "RFLAGS": 2, "RAX": 0, "RSP": 0,
        "R15": 0, "DR7": 0x400,
    }  # fmt: skip
