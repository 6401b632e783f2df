# SPDX-License-Identifier: Apache-2.0
"""General registers and system registers that both sides see: the host by ioctl, the guest by instruction."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    CR4,
    PAGE_SIZE,
    RFLAGS,
    Agent,
    Fault,
    Gva,
    IoExit,
    MakeVm,
    Msr,
    Vcpu,
    kvm_regs,
    segments,
)
from kvmpy.x86.registers import GENERAL

INCREMENT = """
#include <kvmpy/guest.h>

/* Entered by the host with registers of its own: no stack, no GS. */
asm(".text\\n"
    ".globl increment, incremented\\n"
    "increment:\\n"
    "	incq	%rax; incq %rbx; incq %rcx; incq %rdx\\n"
    "	incq	%rsi; incq %rdi; incq %rsp; incq %rbp\\n"
    "	incq	%r8; incq %r9; incq %r10; incq %r11\\n"
    "	incq	%r12; incq %r13; incq %r14; incq %r15\\n"
    "	outb	%al, $0x42\\n"
    "incremented: jmp incremented\\n");

void guest_main(void)
{
	GUEST_SYNC(0);
}
"""


def pattern(name: str) -> int:
    """Return a value of its own for each register; canonical, so that RSP may hold it too."""
    return 0x1000_0000_0000 * (GENERAL.index(name) % 7) + 0x0123_4567_89AB + GENERAL.index(name) * 0x10001


# mov %cs, %eax and so on; str %eax
SELECTORS = {
    "cs": b"\x8c\xc8",
    "ds": b"\x8c\xd8",
    "es": b"\x8c\xc0",
    "fs": b"\x8c\xe0",
    "ss": b"\x8c\xd0",
    "tr": b"\x0f\x00\xc8",
}


def number(value: int | Fault) -> int:
    assert isinstance(value, int)
    return value


def what_guest_sees(agent: Agent, scratch: Gva) -> dict[str, int]:
    """Return the guest's look at its system registers."""
    seen = {f"cr{index}": number(agent.read_cr(index)) for index in (0, 2, 3, 4, 8)}
    for name, msr in (("efer", Msr.MSR_EFER), ("fs_base", Msr.MSR_FS_BASE), ("gs_base", Msr.MSR_GS_BASE)):
        seen[name] = number(agent.rdmsr(msr))
    for name, store in (("gdt", b"\x0f\x01\x07"), ("idt", b"\x0f\x01\x0f")):  # sgdt, sidt (%rdi)
        agent.must(store, rdi=int(scratch))
        seen[f"{name}_limit"] = agent.vm.variable(scratch, 2).u16
        seen[f"{name}_base"] = agent.vm.variable(scratch + 2, 8).u64
    # mov %cs, %eax and so on; str %eax
    selectors = {
        "cs": b"\x8c\xc8",
        "ds": b"\x8c\xd8",
        "es": b"\x8c\xc0",
        "fs": b"\x8c\xe0",
        "ss": b"\x8c\xd0",
    }
    for name, store in (*selectors.items(), ("tr", b"\x0f\x00\xc8")):
        seen[name] = agent.must(store).rax
    return seen


@pytest.mark.usefixtures("open_registers")
def test_general_registers(make_vm: MakeVm) -> None:
    """KVM_SET_REGS reaches every general register of the guest, and KVM_GET_REGS shows it changed.

    Documentation/virt/kvm/api.rst, 4.11 KVM_GET_REGS and 4.12 KVM_SET_REGS.
    """
    vm = make_vm.start(INCREMENT)
    vcpu = vm.vcpus[0]
    vcpu.sync()
    vcpu.complete_io()
    regs = kvm_regs(rip=int(vm.program.address_of("increment")), rflags=int(RFLAGS.FIXED))
    for name in GENERAL:
        setattr(regs, name, pattern(name))
    vcpu.regs.set(regs)
    assert vcpu.expect(IoExit).value == pattern("rax") + 1 & 0xFF
    vcpu.complete_io()
    after = vcpu.regs.get()
    assert {name: getattr(after, name) for name in GENERAL} == {name: pattern(name) + 1 for name in GENERAL}
    assert after.rip == vm.program.address_of("incremented")


def test_fixed_flag(vcpu: Vcpu) -> None:
    """Bit 1 of RFLAGS is set whatever KVM_SET_REGS is given, and the others are as given.

    Intel SDM volume 1, 3.4.3 EFLAGS Register (bit 1 is always 1).
    """
    for flags in (0, int(RFLAGS.CF | RFLAGS.ZF | RFLAGS.DF | RFLAGS.AC | RFLAGS.ID)):
        vcpu.regs.set(kvm_regs(rflags=flags))
        assert vcpu.regs.get().rflags == flags | RFLAGS.FIXED


@pytest.mark.usefixtures("open_registers")
def test_guest_sees_what_host_set(make_vm: MakeVm) -> None:
    """Control registers, bases, tables and selectors of KVM_SET_SREGS are those that the guest reads.

    Documentation/virt/kvm/api.rst, 4.14 KVM_SET_SREGS.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    scratch = agent.vm.alloc(PAGE_SIZE, private=False)
    agent.start()
    vcpu = agent.vcpu
    vcpu.complete_io()
    sregs = vcpu.regs.get_sregs()
    sregs.cr2 = 0x0000_7ABC_DEF0_1234
    sregs.cr4 |= int(CR4.TSD | CR4.DE)
    sregs.cr8 = 5
    sregs.fs.base = 0x0000_1234_5678_9000
    sregs.idt.limit = 0x7FF
    vcpu.regs.set_sregs(sregs)
    assert what_guest_sees(agent, scratch) == {
        "cr0": sregs.cr0,
        "cr2": 0x0000_7ABC_DEF0_1234,
        "cr3": sregs.cr3,
        "cr4": sregs.cr4,
        "cr8": 5,
        "efer": sregs.efer,
        "fs_base": 0x0000_1234_5678_9000,
        "gs_base": sregs.gs.base,
        "gdt_base": sregs.gdt.base,
        "gdt_limit": sregs.gdt.limit,
        "idt_base": sregs.idt.base,
        "idt_limit": 0x7FF,
        "cs": sregs.cs.selector,
        "ds": sregs.ds.selector,
        "es": sregs.es.selector,
        "fs": sregs.fs.selector,
        "ss": sregs.ss.selector,
        "tr": sregs.tr.selector,
    }


@pytest.mark.usefixtures("open_registers")
def test_host_sees_what_guest_set(make_vm: MakeVm) -> None:
    """KVM_GET_SREGS shows what the guest wrote to control registers, to a segment base and to a selector.

    Documentation/virt/kvm/api.rst, 4.13 KVM_GET_SREGS.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.start()
    before = agent.vcpu.regs.get_sregs()
    assert agent.write_cr(2, 0xFFFF_8000_1234_5678) is None
    assert agent.write_cr(8, 9) is None
    assert agent.write_cr(4, before.cr4 ^ CR4.TSD) is None
    assert agent.wrmsr(Msr.MSR_FS_BASE, 0x7FFF_0000_1000) is None
    agent.must(b"\x8e\xc0", rax=0)  # mov %eax, %es
    after = agent.vcpu.regs.get_sregs()
    assert (after.cr2, after.cr8, after.cr4) == (0xFFFF_8000_1234_5678, 9, before.cr4 ^ CR4.TSD)
    assert (after.fs.base, after.es.selector) == (0x7FFF_0000_1000, 0)
    assert (after.cr0, after.cr3, after.efer) == (before.cr0, before.cr3, before.efer)


@pytest.mark.usefixtures("open_registers")
def test_pending_interrupt(make_vm: MakeVm) -> None:
    """An interrupt in KVM_SET_SREGS' interrupt_bitmap is delivered when the guest runs on.

    Documentation/virt/kvm/api.rst, 4.13 KVM_GET_SREGS ("acknowledged by the APIC but not yet injected").
    """
    vcpu = make_vm.start("""
#include <kvmpy/guest.h>

static volatile u64 vector;

static void handler(struct exception_frame *frame)
{
	vector = frame->vector;
}

void guest_main(void)
{
	guest_exception_install(0x91, handler);
	sti();
	GUEST_SYNC(0);
	cli();
	GUEST_SYNC(vector);
}
""").vcpus[0]
    vcpu.sync()
    vcpu.complete_io()
    sregs = vcpu.regs.get_sregs()
    assert list(sregs.interrupt_bitmap) == [0, 0, 0, 0]
    sregs.interrupt_bitmap[0x91 // 64] = 1 << 0x91 % 64
    vcpu.regs.set_sregs(sregs)
    assert list(vcpu.regs.get_sregs().interrupt_bitmap) == [0, 0, 1 << 0x91 % 64, 0]
    assert vcpu.sync().args == (0x91,)
    assert list(vcpu.regs.get_sregs().interrupt_bitmap) == [0, 0, 0, 0]


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires("trait:host_sees_private")
def test_redirected(make_vm: MakeVm) -> None:
    """A vCPU whose RIP and argument registers the host changed goes on there.

    Documentation/virt/kvm/api.rst, 4.12 KVM_SET_REGS.
    """
    vm = make_vm.start("""
#include <kvmpy/guest.h>

__noinline void elsewhere(u64 a, u64 b)
{
	GUEST_SYNC(a, b);
}

void guest_main(void)
{
	GUEST_SYNC(0);
	elsewhere(1, 2);
}
""")
    vcpu = vm.vcpus[0]
    vcpu.sync()
    vcpu.complete_io()
    regs = vcpu.regs.get()
    back = regs.rip
    regs.rsp -= 8
    vm.write(Gva(regs.rsp), int(back).to_bytes(8, "little"))
    regs.rip, regs.rdi, regs.rsi = int(vm.program.address_of("elsewhere")), 0x77, 0x88
    vcpu.regs.set(regs)
    assert vcpu.sync().args == (0x77, 0x88)
    assert vcpu.sync().args == (1, 2)


def test_translation_without_paging(vcpu: Vcpu) -> None:
    """With paging off KVM_TRANSLATE returns every linear address as its own physical address.

    Documentation/virt/kvm/api.rst, 4.15 KVM_TRANSLATE; Intel SDM volume 3, 4.1.1 (CR0.PG is 0).
    """
    sregs = vcpu.regs.get_sregs()
    segments.protected_mode_sregs(sregs, gdt=0x2000, idt=0x3000, tss=0x4000)
    vcpu.regs.set_sregs(sregs)
    for address in (0, 0x1234_5678, 0xFFFF_FFF0):
        translation = vcpu.translate(address)
        assert (translation.valid, translation.physical_address) == (1, address)
