# SPDX-License-Identifier: Apache-2.0
"""Exceptions in guest code: fix-ups, handlers, and what nobody expected."""

from __future__ import annotations

import pytest

from kvmpy import GuestExceptionError, MakeVm

FAULTS = """
#include <kvmpy/guest.h>

#define HOLE	0x70000000ull

static u64 data = 5;

static void report(struct guest_fault fault)
{
	GUEST_SYNC(fault.faulted, fault.vector, fault.error_code, fault.cr2, fault.rip);
}

void guest_main(void)
{
	u64 low = 1, high = 0, value = 0;
	u64 cr0 = read_cr0();

	report(GUEST_TRY("nop"));
	report(GUEST_TRY("ud2"));
	report(GUEST_TRY("divq %2", : "+a"(low), "+d"(high) : "r"(0ull)));
	report(GUEST_TRY("movq (%1), %0", : "=r"(value) : "r"(HOLE + 8)));
	report(GUEST_TRY("movq %1, (%0)", : : "r"(HOLE + 16), "r"(value) : "memory"));
	/* Program text is read-only. */
	report(GUEST_TRY("movq %1, (%0)", : : "r"(guest_main), "r"(value) : "memory"));
	/* Not canonical. */
	report(GUEST_TRY("movq (%1), %0", : "=r"(value) : "r"(1ull << 62)));
	report(write_cr4_safe(~0ull));
	/* An x87 instruction with CR0.TS set. */
	write_cr0(cr0 | BIT(3));
	report(GUEST_TRY("fninit"));
	write_cr0(cr0);
	/* The second of three instructions. */
	value = 1;
	report(GUEST_TRY("incq %0; ud2; incq %0", : "+r"(value)));
	GUEST_ASSERT_EQ(value, 2u);
	report(GUEST_TRY("movq (%1), %0", : "=r"(value) : "r"(&data)));
	GUEST_ASSERT_EQ(value, 5u);
}
"""


def test_fix_ups(make_vm: MakeVm) -> None:
    """GUEST_TRY tells vector, error code, RIP and CR2 of the fault of one instruction, and goes on behind it.

    Error codes: Intel SDM volume 3, 6.13 and 4.7; #PF bits are present, write, user.
    """
    vm = make_vm.start(FAULTS)
    calls = [call.args for call in vm.vcpus[0].syncs()]
    main = int(vm.program.address_of("guest_main"))
    none = (0, 0xFF)
    assert [args[:2] if not args[0] else args[:4] for args in calls] == [
        none,
        (1, 6, 0, 0),
        (1, 0, 0, 0),
        (1, 14, 0, 0x70000008),
        (1, 14, 2, 0x70000010),
        (1, 14, 3, main),
        (1, 13, 0, 0),
        (1, 13, 0, 0),
        (1, 7, 0, 0),
        (1, 6, 0, 0),
        none,
    ]
    functions = {vm.program.function(args[4]) for args in calls if args[0]}
    assert {function[0].split(".")[0] for function in functions if function} == {"guest_main"}


TRAPS = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	struct guest_fault fault = GUEST_TRY("int3");

	GUEST_SYNC(fault.vector, fault.faulted);
	fault = GUEST_TRY("nop");
	GUEST_SYNC(fault.vector, fault.faulted);
}
"""


def test_a_fix_up_of_a_trap(make_vm: MakeVm) -> None:
    """GUEST_TRY tells of a breakpoint, which leaves RIP behind its instruction (Intel SDM volume 3, 6.5)."""
    vm = make_vm.start(TRAPS)
    assert [call.args for call in vm.vcpus[0].syncs()] == [(3, 1), (0xFF, 0)]


MSRS = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	struct guest_fault fault;
	u64 value = 5;

	fault = rdmsr_safe(0xdeadbeef, &value);
	GUEST_ASSERT_EQ(fault.vector, GP_VECTOR);
	GUEST_ASSERT_EQ(fault.error_code, 0u);
	GUEST_ASSERT_EQ(value, 0u);

	fault = rdmsr_safe(0xc0000100, &value);
	GUEST_ASSERT_EQ(fault.vector, NO_VECTOR);
	GUEST_ASSERT_EQ(value, 0u);

	fault = wrmsr_safe(0xc0000100, 0x123456789000);
	GUEST_ASSERT(!fault.faulted);
	fault = rdmsr_safe(0xc0000100, &value);
	GUEST_ASSERT_EQ(value, 0x123456789000u);

	/* The upper bits of the local APIC's base are reserved. */
	value = rdmsr(0x1b);
	GUEST_ASSERT_EQ(wrmsr_safe(0x1b, value | BIT(63)).vector, GP_VECTOR);
	GUEST_ASSERT_EQ(rdmsr(0x1b), value);
}
"""


def test_msr_accessors(make_vm: MakeVm) -> None:
    """The _safe forms of rdmsr and wrmsr report #GP and change nothing then."""
    vm = make_vm.run(MSRS)
    assert vm.vcpus[0].done


HANDLERS = """
#include <kvmpy/guest.h>

static struct exception_frame seen;

static void on_ud(struct exception_frame *frame)
{
	struct guest_fault mine = GUEST_TRY("divq %%rcx", : : "a"(1), "d"(0), "c"(0));

	GUEST_ASSERT_EQ(mine.vector, DE_VECTOR);
	seen = *frame;
	frame->rax = 0x5555;
	frame->rip += 2;
}

static void on_ud_again(struct exception_frame *frame)
{
	frame->rbx = 0x6666;
	frame->rip += 2;
}

void guest_main(void)
{
	u64 a = 0x1111, b = 0x2222, c = 0x3333, r12;
	struct guest_fault fault;

	guest_exception_install(UD_VECTOR, on_ud);
	asm volatile("movq $0x4444, %%r12; ud2; movq %%r12, %3"
		     : "+a"(a), "+b"(b), "+c"(c), "=r"(r12) : : "r12", "memory");
	GUEST_SYNC(a, b, c, r12);
	GUEST_SYNC(seen.vector, seen.error_code, seen.rax, seen.rbx, seen.rcx, seen.r12);
	GUEST_SYNC(seen.cs, seen.ss, seen.rflags & BIT(9), seen.rip, seen.rsp % 8);

	guest_exception_install(UD_VECTOR, on_ud_again);
	asm volatile("ud2" : "+a"(a), "+b"(b) : : "memory");
	GUEST_SYNC(a, b);

	/* A fix-up comes before a handler. */
	fault = GUEST_TRY("ud2");
	GUEST_SYNC(fault.vector);

	guest_exception_install(UD_VECTOR, NULL);
	GUEST_SYNC(GUEST_TRY("ud2").vector);
	asm volatile("ud2");
}
"""


def test_handlers(make_vm: MakeVm) -> None:
    """A handler sees the interrupted registers and may change them; fix-ups of its own do no harm."""
    vm = make_vm.start(HANDLERS)
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (0x5555, 0x2222, 0x3333, 0x4444)
    assert vcpu.sync().args == (6, 0, 0x1111, 0x2222, 0x3333, 0x4444)
    cs, ss, interrupts, rip, unaligned = vcpu.sync().args
    assert (cs, ss, interrupts, unaligned) == (8, 0x10, 0, 0)
    function = vm.program.function(rip)
    assert function is not None
    assert function[0] == "guest_main"
    assert vcpu.sync().args == (0x5555, 0x6666)
    assert vcpu.sync().args == (6,)
    assert vcpu.sync().args == (6,)
    with pytest.raises(GuestExceptionError, match="#UD") as caught:
        vcpu.sync()
    assert (caught.value.vector, caught.value.error_code) == (6, 0)


INTERRUPTED = """
#include <kvmpy/guest.h>

#define VECTOR	0x41

static volatile u32 hits;

static void on_interrupt(struct exception_frame *frame)
{
	struct guest_fault mine = GUEST_TRY("ud2");

	GUEST_ASSERT_EQ(mine.vector, UD_VECTOR);
	GUEST_ASSERT_EQ(frame->vector, (u64)VECTOR);
	hits++;
	apic_eoi();
}

void guest_main(void)
{
	struct guest_fault fault;

	guest_exception_install(VECTOR, on_interrupt);
	apic_enable();
	sti();
	apic_send_self(VECTOR);
	/* The interrupt arrives within. */
	fault = GUEST_TRY("1: pause; cmpl $0, %0; je 1b", : : "m"(hits));
	cli();
	GUEST_SYNC(fault.faulted, fault.vector, hits);
}
"""


@pytest.mark.requires("KVM_CAP_IRQCHIP")
def test_an_interrupt_is_no_fault_of_the_instruction(make_vm: MakeVm) -> None:
    """GUEST_TRY does not take an interrupt for a fault, nor a fault in its handler for its own."""
    vm = make_vm.start(INTERRUPTED)
    assert vm.vcpus[0].sync().args == (0, 0xFF, 1)


DOUBLE_FAULT = """
#include <kvmpy/guest.h>

static void on_df(struct exception_frame *frame)
{
	u64 here = (u64)__builtin_frame_address(0);

	GUEST_SYNC(frame->vector, frame->error_code, (here - (u64)guest_cpu()) >> 12, frame->rsp);
	GUEST_DONE();
}

void guest_main(void)
{
	guest_exception_install(DF_VECTOR, on_df);
	/* No stack to push the page fault's frame on. */
	asm volatile("movq $0x70000000, %%rsp; ud2" : : : "memory");
}
"""


def test_a_double_fault_has_a_stack_of_its_own(make_vm: MakeVm) -> None:
    """An exception without a stack becomes a #DF on its interrupt stack (AMD APM volume 2, 8.9.4)."""
    vm = make_vm.start(DOUBLE_FAULT)
    assert vm.vcpus[0].sync().args == (8, 0, 2, 0x70000000)


NMIS = """
#include <kvmpy/guest.h>

static volatile u32 hits;
static u64 stack_page;

static void on_nmi(struct exception_frame *frame)
{
	stack_page = ((u64)__builtin_frame_address(0) - (u64)guest_cpu()) >> 12;
	hits++;
}

static void wait_for(u32 count)
{
	while (hits < count)
		cpu_relax();
}

void guest_main(void)
{
	guest_exception_install(NMI_VECTOR, on_nmi);
	apic_enable();
	apic_send_nmi(apic_id());
	wait_for(1);
	GUEST_SYNC(hits, stack_page);

	/* An NMI that comes while GS is that of ring 3, as between an entry from there and its swapgs. */
	apic_send_nmi(apic_id());
	asm volatile("swapgs; 1: pause; cmpl $2, %0; jne 1b; swapgs" : : "m"(hits) : "memory");
	GUEST_SYNC(hits, guest_cpu_index());
}
"""


@pytest.mark.requires("KVM_CAP_IRQCHIP")
def test_nmis(make_vm: MakeVm) -> None:
    """NMIs run on their own stack, and with the right GS base even where SWAPGS is about to come."""
    vm = make_vm.start(NMIS)
    (hits, stack_page), second = (call.args for call in vm.vcpus[0].syncs())
    # With a GHCB the next NMI may come before this one has returned: they share the ordinary stack.
    assert (hits, stack_page == 3) == (1, not vm.protection.traits.has_ghcb)
    assert second == (2, 0)


VECTORS = """
#include <kvmpy/guest.h>

static u64 last;

static void handler(struct exception_frame *frame)
{
	last = frame->vector;
	if (frame->vector >= 32)
		apic_eoi();
}

void guest_main(void)
{
	apic_enable();
	for (int vector = 32; vector < 255; vector++) {
		guest_exception_install(vector, handler);
		last = 0;
		sti();
		apic_send_self(vector);
		while (READ_ONCE(last) != (u64)vector)
			cpu_relax();
		cli();
	}
}
"""


@pytest.mark.requires("KVM_CAP_IRQCHIP")
def test_every_interrupt_vector_reaches_its_handler(make_vm: MakeVm) -> None:
    """Each of the vectors 32 to 254, sent as a self-IPI, arrives with its own number."""
    vm = make_vm.run(VECTORS)
    assert vm.vcpus[0].done


GUARD = """
#include <kvmpy/guest.h>

static u64 recurse(u64 depth)
{
	volatile u64 pad[32];

	pad[0] = depth;
	return depth < (1ull << 32) ? recurse(depth + 1) + pad[0] : 0;
}

void guest_main(void)
{
	recurse(0);
}
"""


def test_a_stack_that_overflows(make_vm: MakeVm) -> None:
    """A guest that runs out of stack hits the guard page and ends with a double fault, not with damage."""
    vm = make_vm.start(GUARD)
    with pytest.raises(GuestExceptionError, match="#DF") as caught:
        vm.vcpus[0].run_to_done()
    assert caught.value.vector == 8
