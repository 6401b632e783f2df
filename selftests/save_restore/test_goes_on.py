# SPDX-License-Identifier: Apache-2.0
"""A guest that is saved in mid-run and restored into a new VM goes on as if nothing had happened."""

from __future__ import annotations

import pytest

from kvmpy import KVM_MP_STATE_HALTED, GuestTimeoutError, GuestVm, IoExit, MakeVm, Msi, kvm_cpuid2
from selftests.conftest import Move, said

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")


VECTOR = 0x51
NMI = Msi.to(0, 0, delivery_mode=4)

GUEST = """
#include "../irq/interrupts.h"

#define VECTOR	0x51

static u64 total;
GUEST_SHARED u64 visible;

void count(void)
{
	u64 i;

	for (i = 1;; i++) {
		total += i;
		visible = total;
		GUEST_SYNC(i, total);
	}
}

/* All registers hold values of their own across one port access. */
void registers(void)
{
	u64 sum;

	asm volatile("pushq	%%rbp\\n"
		     "movq	$0x1111111111111111, %%rbx\\n"
		     "movq	$0x2222222222222222, %%rcx\\n"
		     "movq	$0x3333333333333333, %%rdx\\n"
		     "movq	$0x4444444444444444, %%rsi\\n"
		     "movq	$0x5555555555555555, %%rdi\\n"
		     "movq	$0x6666666666666666, %%rbp\\n"
		     "movq	$0x7777777777777777, %%r8\\n"
		     "movq	$0x8888888888888888, %%r9\\n"
		     "movq	$0x9999999999999999, %%r10\\n"
		     "movq	$0xaaaaaaaaaaaaaaaa, %%r11\\n"
		     "movq	$0xbbbbbbbbbbbbbbbb, %%r12\\n"
		     "movq	$0xcccccccccccccccc, %%r13\\n"
		     "movq	$0xdddddddddddddddd, %%r14\\n"
		     "movq	$0xeeeeeeeeeeeeeeee, %%r15\\n"
		     "movl	$0x01020304, %%eax\\n"
		     "stc\\n"
		     "outl	%%eax, $0x10\\n"
		     /* The carry counts as one. */
		     "adcq	$0, %%rax\\n"
		     "xorq	%%rbx, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%rcx, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%rdx, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%rsi, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%rdi, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%rbp, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%r8, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%r9, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%r10, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%r11, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%r12, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%r13, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%r14, %%rax\\n"
		     "rolq	$1, %%rax\\n"
		     "xorq	%%r15, %%rax\\n"
		     "popq	%%rbp\\n"
		     : "=a"(sum)
		     :
		     : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
		       "r15", "memory", "cc");
	GUEST_SYNC(sum);
}

void ask_port(void)
{
	GUEST_SYNC(inl(0x10));
}

static void nmi_handler(struct exception_frame *frame)
{
	GUEST_SYNC('n', frame->rip != 0);
	irq_window();
	GUEST_SYNC('e');
}

/* What comes while interrupts are off waits; the host moves the guest meanwhile. */
void pending(void)
{
	irq_install(VECTOR);
	guest_exception_install(NMI_VECTOR, nmi_handler);
	x2apic_enable();
	apic_write(APIC_TASKPRI, 0x20);
	GUEST_SYNC('r');
	GUEST_SYNC('s', apic_test_vector(APIC_IRR, VECTOR), apic_read(APIC_TASKPRI),
		   rdmsr(MSR_IA32_APICBASE));
	irq_wait(VECTOR, 1);
	GUEST_SYNC('d', irq_count(VECTOR));
}

void nmi(void)
{
	guest_exception_install(NMI_VECTOR, nmi_handler);
	for (;;) {
		u32 i;

		GUEST_SYNC('w');
		for (i = 0; i < 600; i++)
			cpu_relax();
	}
}

void halted(void)
{
	irq_install(VECTOR);
	apic_enable();
	GUEST_SYNC('r');
	irq_wait(VECTOR, 1);
	GUEST_SYNC('d', irq_count(VECTOR));
}

void one_shot(void)
{
	u32 left;

	irq_install(VECTOR);
	apic_enable();
	apic_timer_start(VECTOR, APIC_TIMER_ONESHOT, 40000000);
	left = apic_read(APIC_TMCCT);
	GUEST_SYNC('r', left);
	GUEST_ASSERT_LE(apic_read(APIC_TMCCT), left);
	irq_wait(VECTOR, 1);
	GUEST_SYNC('d', irq_count(VECTOR));
}

void deadline(u64 ticks)
{
	u64 when;

	irq_install(VECTOR);
	apic_enable();
	when = rdtsc() + ticks;
	apic_timer_deadline(VECTOR, when);
	GUEST_SYNC('r');
	irq_wait(VECTOR, 1);
	GUEST_ASSERT_GE(rdtsc(), when);
	GUEST_SYNC('d', irq_count(VECTOR));
}

void time(void)
{
	for (;;)
		GUEST_SYNC(rdtsc());
}

void leaf(void)
{
	for (;;)
		GUEST_SYNC(cpuid(0x40000010, 0).ebx);
}
"""


def handled(vm: GuestVm) -> str | int:
    """Return the handler's first word within three words of the guest's."""
    return next((word for word in (said(vm)[0] for _ in range(3)) if word != "w"), "nothing")


def test_goes_on(make_vm: MakeVm, move: Move) -> None:
    """A guest that counts goes on counting through ten moves, private and shared memory included.

    Documentation/virt/kvm/api.rst, section 4: what is got from a vCPU can be set in another one.
    """
    vm = make_vm.start(GUEST, "count")
    total = 0
    for number in range(1, 11):
        total += number
        assert vm.vcpus[0].sync().args == (number, total)
        assert vm.symbol("visible").u64 == total
        vm = move(vm)


def test_registers(make_vm: MakeVm, move: Move) -> None:
    """All general registers, the flags and the stack are those that the guest had.

    Documentation/virt/kvm/api.rst, 4.11 KVM_GET_REGS and 4.12 KVM_SET_REGS.
    """
    vm = make_vm.start(GUEST, "registers")
    got = vm.vcpus[0].expect(IoExit)
    assert (got.port, got.value) == (0x10, 0x0102_0304)
    vm = move(vm)
    mask = (1 << 64) - 1
    expected = 0x0102_0304 + 1
    for digit in range(1, 15):
        expected ^= 0x1111_1111_1111_1111 * digit
        if digit < 14:
            expected = (expected << 1 | expected >> 63) & mask
    assert vm.vcpus[0].sync().args == (expected,)


def test_answered_input(make_vm: MakeVm, move: Move) -> None:
    """A port input that is answered before the move reaches the guest after it.

    Documentation/virt/kvm/api.rst, KVM_EXIT_IO: the access is completed before state is saved.
    """
    vm = make_vm.start(GUEST, "ask_port")
    vm.vcpus[0].expect(IoExit).respond(0xCAFE_F00D)
    assert move(vm).vcpus[0].sync().args == (0xCAFE_F00D,)


def test_pending_interrupt(make_vm: MakeVm, move: Move) -> None:
    """An interrupt that waits in the local APIC moves along, as do x2APIC mode and task priority.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC and 4.58 KVM_SET_LAPIC.
    """
    vm = make_vm.start(GUEST, "pending")
    assert said(vm) == ("r",)
    vm.irq.signal_msi(Msi.to(0, VECTOR))
    vm = move(vm)
    assert said(vm) == ("s", 1, 0x20, 0xFEE0_0D00)
    assert said(vm) == ("d", 1)


def test_pending_nmi(make_vm: MakeVm, move: Move) -> None:
    """A queued NMI moves along; in its handler, further ones stay blocked until the IRET after the move.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS and 4.32 KVM_SET_VCPU_EVENTS.
    """
    vm = make_vm.start(GUEST, "nmi")
    assert said(vm) == ("w",)
    vm.vcpus[0].events.nmi()
    vm = move(vm)
    assert handled(vm) == "n"
    vm = move(vm)
    vm.vcpus[0].events.nmi()
    assert said(vm) == ("e",)
    assert handled(vm) == "n"
    assert said(vm) == ("e",)


def test_halted(make_vm: MakeVm, move: Move) -> None:
    """A halted vCPU is halted in the new VM too, and wakes there.

    Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE and 4.39 KVM_SET_MP_STATE.
    """
    vm = make_vm.start(GUEST, "halted")
    assert said(vm) == ("r",)
    vcpu = vm.vcpus[0]
    for _ in range(100):
        with pytest.raises(GuestTimeoutError):
            vcpu.next(timeout=0.05)
        if vcpu.get_mp_state() == KVM_MP_STATE_HALTED:
            break
    vm = move(vm)
    assert vm.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED
    vm.irq.signal_msi(Msi.to(0, VECTOR))
    assert said(vm) == ("d", 1)


def test_one_shot_timer(make_vm: MakeVm, move: Move) -> None:
    """A timer that runs goes on running: its count does not go up, and it interrupts in the new VM.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC: the current count is part of the state.
    """
    vm = make_vm.start(GUEST, "one_shot")
    assert said(vm)[0] == "r"
    assert said(move(vm)) == ("d", 1)


def offer_deadline(table: kvm_cpuid2) -> kvm_cpuid2:
    """Return CPUID with the TSC-deadline timer, which older kernels tell by capability only."""
    for entry in table.entries_list():
        if entry.function == 1:
            entry.ecx |= 1 << 24
    return table


@pytest.mark.requires("KVM_CAP_TSC_DEADLINE_TIMER", "KVM_CAP_GET_TSC_KHZ")
def test_deadline_timer(make_vm: MakeVm, move: Move) -> None:
    """A TSC deadline moves along and interrupts in the new VM, not before the guest's TSC has reached it.

    Intel SDM 3A, 12.5.4.1; Documentation/virt/kvm/api.rst, 4.19 KVM_SET_MSRS.
    """
    vm = make_vm(GUEST, cpuid=offer_deadline)
    vm.vcpus[0].set_entry("deadline", vm.vcpus[0].clock.get_tsc_khz() * 40)
    vm.launch()
    assert said(vm) == ("r",)
    assert said(move(vm)) == ("d", 1)


def test_tsc_never_goes_back(make_vm: MakeVm, move: Move) -> None:
    """The guest's TSC does not go back when it moves.

    Documentation/virt/kvm/devices/vcpu.rst, 4.1 KVM_VCPU_TSC_OFFSET: the TSC over a live migration.
    """
    vm = make_vm.start(GUEST, "time")
    seen = []
    for _ in range(4):
        seen.append(vm.vcpus[0].sync().args[0])
        vm = move(vm)
    assert seen == sorted(seen)


def test_cpuid(make_vm: MakeVm, move: Move) -> None:
    """The guest finds the CPUID that it had, though the new VM was made with another one.

    Documentation/virt/kvm/api.rst, KVM_SET_CPUID2.
    """

    def marked(table: kvm_cpuid2) -> kvm_cpuid2:
        entries = table.entries_list()
        extra = entries[0].copy()
        extra.function, extra.index, extra.flags = 0x4000_0010, 0, 0
        extra.eax, extra.ebx, extra.ecx, extra.edx = 0, 0x5EED, 0, 0
        return kvm_cpuid2.of([*entries, extra])

    vm = make_vm.start(GUEST, "leaf", cpuid=marked)
    assert vm.vcpus[0].sync().args == (0x5EED,)
    assert move(vm).vcpus[0].sync().args == (0x5EED,)
