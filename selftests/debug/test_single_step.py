# SPDX-License-Identifier: Apache-2.0
"""Single steps of a debugger."""

from __future__ import annotations

import pytest

from kvmpy import (
    KVM_GUESTDBG_BLOCKIRQ,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    RFLAGS,
    DebugExit,
    Exit,
    GuestVcpu,
    GuestVm,
    IoExit,
    MakeVm,
    Ucall,
    Vector,
)
from selftests.debug.conftest import Line, LineMaker

pytestmark = [
    pytest.mark.requires("KVM_CAP_SET_GUEST_DEBUG"),
    pytest.mark.usefixtures("open_registers", "open_tables"),
]

STEP = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP
DR6_BS = 0xFFFF_4FF0
LABELS = ("b", "write", "c", "read", "d", "end")


def step_to(guest: Line, label: str, control: int = STEP) -> None:
    """Step until the guest stands at *label*."""
    for _ in range(1000):
        if guest.step(control).pc == guest.at(label):
            return
    pytest.fail(f"1000 steps did not lead to {label}")


@pytest.mark.parametrize("ring", ["kernel", "user"])
def test_each_instruction(line: LineMaker, ring: str) -> None:
    """Every KVM_RUN executes one instruction and exits with #DB, DR6.BS and the address of the next one.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_SINGLESTEP.
    """
    guest = line(ring)
    step_to(guest, "a")
    for label in LABELS:
        got = guest.step(STEP)
        # The processor may set B0 to B3 for addresses that are not enabled.
        assert (got.exception, got.pc, got.dr6 & ~0xF) == (Vector.DB, guest.at(label), DR6_BS)
        assert guest.vcpu.regs.get().rip == got.pc


def test_ends(line: LineMaker) -> None:
    """Stepping ends when it is switched off; the guest runs on and saw nothing of it.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG ("the next run should single-step").
    """
    guest = line()
    step_to(guest, "write")
    guest.vcpu.debug.set(0)
    assert guest.finish() == (3, 0, 0, 0, 0)


def test_not_without_enable(line: LineMaker) -> None:
    """KVM_GUESTDBG_SINGLESTEP without KVM_GUESTDBG_ENABLE does nothing.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_ENABLE.
    """
    guest = line()
    guest.vcpu.debug.set(KVM_GUESTDBG_SINGLESTEP)
    assert guest.finish() == (3, 0, 0, 0, 0)


def test_trap_flag_is_hidden(line: LineMaker) -> None:
    """The trap flag that KVM uses for stepping does not show in KVM_GET_REGS.

    arch/x86/kvm/regs.c, kvm_get_rflags().
    """
    guest = line()
    step_to(guest, "b")
    assert not guest.vcpu.regs.get().rflags & RFLAGS.TF


@pytest.mark.requires(f"KVM_CAP_SET_GUEST_DEBUG2&{int(KVM_GUESTDBG_BLOCKIRQ):#x}")
def test_blocked_interrupts(line: LineMaker) -> None:
    """With KVM_GUESTDBG_BLOCKIRQ an NMI that is pending waits until stepping is over.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_BLOCKIRQ.
    """
    guest = line()
    control = STEP | KVM_GUESTDBG_BLOCKIRQ
    step_to(guest, "a", control)
    guest.vcpu.events.nmi()
    assert [guest.step(control).pc for _ in LABELS] == [guest.at(label) for label in LABELS]
    guest.vcpu.debug.set(0)
    assert guest.finish() == (3, 0, 1, 0, guest.at("end"))


EMULATED = """
#include <kvmpy/guest.h>

static volatile u64 faults;

static void skip_ud2(struct exception_frame *frame)
{
	faults++;
	frame->rip += 2;
}

void intercepted(void)
{
	GUEST_SYNC(0);
	asm volatile("nop\\n"
		     ".globl step_cpuid, step_rdmsr, step_wrmsr, step_cr, step_end\\n"
		     "step_cpuid: xorl %%eax, %%eax; cpuid\\n"
		     "step_rdmsr: movl $0xc0000082, %%ecx; rdmsr\\n"
		     "step_wrmsr: wrmsr\\n"
		     "step_cr:	movq %%cr4, %%rax; movq %%rax, %%cr4\\n"
		     "step_end:	nop\\n"
		     : : : "rax", "rbx", "rcx", "rdx", "memory");
	GUEST_SYNC(1);
}

void port(void)
{
	GUEST_SYNC(0);
	asm volatile("nop\\n"
		     ".globl port_out, port_in, port_end\\n"
		     "port_out:	outb %%al, $0x42\\n"
		     "port_in:	inb $0x42, %%al\\n"
		     "port_end:	nop\\n\\t"
		     "nop" : : : "rax", "memory");
	GUEST_SYNC(1);
}

void exception(void)
{
	guest_exception_install(UD_VECTOR, skip_ud2);
	GUEST_SYNC(0);
	asm volatile("nop\\n"
		     ".globl fault_before, fault_at, fault_behind, fault_end\\n"
		     "fault_before: nop\\n"
		     "fault_at:	ud2\\n"
		     "fault_behind: nop\\n\\t"
		     "nop\\n"
		     "fault_end: nop" : : : "memory");
	GUEST_SYNC(faults);
}
"""


def start(make_vm: MakeVm, entry: str) -> tuple[GuestVm, GuestVcpu]:
    """Return a VM that stands before the instructions of *entry*."""
    vm = make_vm.start(EMULATED, entry)
    vcpu = vm.vcpus[0]
    vcpu.sync()
    vcpu.complete_io()
    return vm, vcpu


def step(vcpu: GuestVcpu) -> Ucall | Exit:
    """Run one instruction."""
    vcpu.debug.set(STEP)
    return vcpu.next()


def steps(vcpu: GuestVcpu) -> tuple[list[int], Ucall]:
    """Step to the next SYNC; return the addresses on the way."""
    seen: list[int] = []
    while len(seen) < 2000:
        got = step(vcpu)
        if isinstance(got, Ucall):
            return seen, got
        assert isinstance(got, DebugExit)
        seen.append(got.pc)
    pytest.fail("2000 steps did not lead to a SYNC")


def test_over_intercepted_instructions(make_vm: MakeVm) -> None:
    """Instructions that KVM executes for the guest, such as CPUID, RDMSR and MOV CR4, are single steps too.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG; arch/x86/kvm/x86.c,
    kvm_skip_emulated_instruction().
    """
    vm, vcpu = start(make_vm, "intercepted")
    seen, end = steps(vcpu)
    labels = ("step_cpuid", "step_rdmsr", "step_wrmsr", "step_cr", "step_end")
    places = [vm.program.address_of(label) for label in labels]
    first, last = seen.index(places[0]), seen.index(places[-1])
    line = seen[first : last + 1]
    assert line == sorted(line)
    # Eight instructions lie between the first label and the last, one of them for each address.
    assert len(set(line)) == len(line) == 8
    assert set(places) <= set(line)
    assert end.args == (1,)


def test_over_port_io(make_vm: MakeVm) -> None:
    """An instruction that exits for I/O is followed by the step's own exit once user space has done its part.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG; arch/x86/kvm/x86.c,
    kvm_skip_emulated_instruction().
    """
    vm, vcpu = start(make_vm, "port")
    address = vm.program.address_of
    seen = None
    while seen != address("port_out"):
        got = step(vcpu)
        assert isinstance(got, DebugExit)
        seen = got.pc
    out = step(vcpu)
    assert isinstance(out, IoExit)
    assert vcpu.expect(DebugExit).pc == address("port_in")
    answer = step(vcpu)
    assert isinstance(answer, IoExit)
    answer.respond(0x5A)
    assert vcpu.expect(DebugExit).pc == address("port_end")
    assert vcpu.regs.get().rax & 0xFF == 0x5A


def test_over_an_exception(make_vm: MakeVm) -> None:
    """Stepping over an instruction that faults runs the guest's handler once and goes on stepping behind it.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_SINGLESTEP.
    """
    vm, vcpu = start(make_vm, "exception")
    seen, end = steps(vcpu)
    address = vm.program.address_of
    assert end.args == (1,)
    assert seen.count(address("fault_at")) == 1
    assert seen.index(address("fault_at")) == seen.index(address("fault_before")) + 1
    assert address("fault_end") in seen


SHADOWS = """
#include <kvmpy/guest.h>

#define VECTOR		0x51
#define DEADLINE_MSR	0x6e0

static volatile u64 interrupts;

static void handler(struct exception_frame *frame)
{
	interrupts++;
	apic_eoi();
}

/* With an interrupt pending: POPF that lets it in, CPUID, a WRMSR that KVM serves on its fast path. */
void pending(void)
{
	guest_exception_install(VECTOR, handler);
	x2apic_enable();
	apic_write(APIC_LVTT, APIC_LVT_MASKED | APIC_TIMER_DEADLINE | VECTOR);
	apic_send_self(VECTOR);
	GUEST_SYNC(0);
	asm volatile("nop\\n"
		     "pushfq; orq $0x200, (%%rsp)\\n"
		     ".globl line_0, line_1, line_2, line_3, line_4, line_5, line_6, line_7, line_8\\n"
		     "line_0: nop\\n"
		     "line_1: popfq\\n"
		     "line_2: xorl %%eax, %%eax\\n"
		     "line_3: cpuid\\n"
		     "line_4: movl $0x6e0, %%ecx\\n"
		     "line_5: wrmsr\\n"
		     "line_6: nop\\n"
		     "line_7: cli\\n"
		     "line_8: nop" : : : "rax", "rbx", "rcx", "rdx", "memory");
	GUEST_SYNC(interrupts);
	irq_window();
	GUEST_SYNC(interrupts);
}

void interrupts_on(void)
{
	GUEST_SYNC(0);
	asm volatile("nop\\n"
		     ".globl line_p, line_q, line_r, line_s, line_t\\n"
		     "line_p: nop\\n"
		     "line_q: sti\\n"
		     "line_r: nop\\n"
		     "line_s: cli\\n"
		     "line_t: nop" : : : "memory");
	GUEST_SYNC(1);
}

void stack_segment(void)
{
	GUEST_SYNC(0);
	asm volatile("nop\\n"
		     ".globl line_a, line_b, line_c, line_d, line_e\\n"
		     "line_a: movl %%ss, %%eax\\n"
		     "line_b: movl %%eax, %%ss\\n"
		     "line_c: nop\\n"
		     "line_d: nop\\n"
		     "line_e: nop" : : : "rax", "memory");
	GUEST_SYNC(1);
}
"""


def start_shadows(make_vm: MakeVm, entry: str) -> tuple[GuestVm, GuestVcpu]:
    """Return a VM that stands before the instructions of *entry*."""
    vm = make_vm.start(SHADOWS, entry)
    vcpu = vm.vcpus[0]
    vcpu.sync()
    vcpu.complete_io()
    return vm, vcpu


@pytest.mark.requires(f"KVM_CAP_SET_GUEST_DEBUG2&{int(KVM_GUESTDBG_BLOCKIRQ):#x}", "cpuid:x2apic")
def test_with_an_interrupt_pending(make_vm: MakeVm) -> None:
    """With KVM_GUESTDBG_BLOCKIRQ steps lead over POPF, CPUID and a write of the TSC deadline, served
    on KVM's fast path, one by one, while an interrupt is pending; it comes when stepping is over.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_BLOCKIRQ; arch/x86/kvm/x86.c,
    handle_fastpath_wrmsr().
    """
    vm, vcpu = start_shadows(make_vm, "pending")
    places = [vm.program.address_of(f"line_{number}") for number in range(9)]
    control = STEP | KVM_GUESTDBG_BLOCKIRQ
    seen: list[int] = []
    while places[-1] not in seen:
        vcpu.debug.set(control)
        seen.append(vcpu.expect(DebugExit).pc)
        assert len(seen) < 1000
    assert seen[seen.index(places[0]) :] == places
    vcpu.debug.set(0)
    assert vcpu.sync().args == (0,)
    assert vcpu.sync().args == (1,)


def test_without_blocking_the_interrupt_comes(make_vm: MakeVm) -> None:
    """Without KVM_GUESTDBG_BLOCKIRQ the pending interrupt is taken on the way, once, and steps lead through.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_SINGLESTEP.
    """
    vm, vcpu = start_shadows(make_vm, "pending")
    places = [vm.program.address_of(f"line_{number}") for number in range(9)]
    seen: list[int] = []
    while not isinstance(got := step(vcpu), Ucall):
        assert isinstance(got, DebugExit)
        seen.append(got.pc)
        assert len(seen) < 4000
    assert got.args == (1,)
    assert [pc for pc in seen if pc in places] == places


def test_over_sti(make_vm: MakeVm) -> None:
    """STI holds back interrupts, but no step: the instruction behind it is one of its own.

    Intel SDM volume 3, 6.8.1 (STI delays maskable interrupts); AMD APM volume 2, 13.1.4 Single Stepping.
    """
    vm, vcpu = start_shadows(make_vm, "interrupts_on")
    places = [vm.program.address_of(f"line_{letter}") for letter in "pqrst"]
    seen, end = steps(vcpu)
    assert seen[seen.index(places[0]) : seen.index(places[-1]) + 1] == places
    assert end.args == (1,)


def test_over_a_load_of_ss(make_vm: MakeVm) -> None:
    """Steps lead over MOV SS; the one behind it may come together with it, as the processor holds it back.

    AMD APM volume 2, 13.1.4 Single Stepping; Intel SDM volume 3, 6.8.3 (MOV SS inhibits debug exceptions).
    """
    vm, vcpu = start_shadows(make_vm, "stack_segment")
    places = [vm.program.address_of(f"line_{letter}") for letter in "abcde"]
    seen, end = steps(vcpu)
    line = seen[seen.index(places[0]) : seen.index(places[-1]) + 1]
    assert line in (places, [place for place in places if place != places[2]])
    assert end.args == (1,)
