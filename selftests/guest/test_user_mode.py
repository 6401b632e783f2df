# SPDX-License-Identifier: Apache-2.0
"""Ring 3 and back."""

from __future__ import annotations

import pytest

from kvmpy import GuestExceptionError, MakeVm

CALLS = """
#include <kvmpy/guest.h>

static u8 stack[4096] GUEST_USER_DATA;
static u64 counter GUEST_USER_DATA;
static u64 kernel_only = 7;

static u64 GUEST_USER add(u64 n)
{
	for (u64 i = 0; i < n; i++)
		WRITE_ONCE(counter, counter + 1);
	return counter;
}

static u64 GUEST_USER stack_of(u64 unused)
{
	return (u64)__builtin_frame_address(0);
}

static u64 GUEST_USER halt(u64 unused)
{
	asm volatile("hlt");
	return 1;
}

static u64 GUEST_USER load(u64 address)
{
	return READ_ONCE(*(u64 *)address);
}

static u64 GUEST_USER undefined(u64 unused)
{
	asm volatile("ud2");
	return 1;
}

static u64 GUEST_USER breakpoint(u64 unused)
{
	asm volatile("int3");
	return 77;
}

static void run(u64 (*function)(u64), u64 arg)
{
	struct guest_user_exit exit = guest_user_run(function, arg, stack + sizeof(stack));

	GUEST_SYNC(exit.returned, exit.returned ? exit.value : exit.fault.vector,
		   exit.fault.error_code, exit.fault.cr2);
}

static void on_breakpoint(struct exception_frame *frame)
{
	GUEST_SYNC(100, frame->cs, frame->ss, guest_cpu_index());
	GUEST_ASSERT(exception_from_user(frame));
}

void guest_main(void)
{
	run(add, 1000);
	run(stack_of, 0);
	run(halt, 0);
	run(load, (u64)&kernel_only);
	run(load, (u64)&counter);
	run(undefined, 0);
	run(breakpoint, 0);
	guest_exception_install(BP_VECTOR, on_breakpoint);
	run(breakpoint, 0);
	GUEST_SYNC(read_rflags() & BIT(9), guest_cpu()->user_rsp, kernel_only);
	sti();
	guest_user_run(add, 1, stack + sizeof(stack));
	GUEST_SYNC(read_rflags() & BIT(9));
}
"""


def test_calls_into_ring_3(make_vm: MakeVm) -> None:
    """A function runs in ring 3 on the stack given, returns its value, or tells which exception ended it.

    #PF error code 5: user, present (Intel SDM volume 3, 4.7); HLT outside ring 0 is #GP(0).
    """
    vm = make_vm.start(CALLS)
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args[:2] == (1, 1000)
    returned, where = vcpu.sync().args[:2]
    stack = vm.program.symbol("stack")
    assert returned
    assert int(stack.gva) <= where < int(stack.gva) + stack.size
    assert vcpu.sync().args == (0, 13, 0, 0)
    assert vcpu.sync().args == (0, 14, 5, int(vm.program.address_of("kernel_only")))
    assert vcpu.sync().args[:2] == (1, 1000)
    assert vcpu.sync().args == (0, 6, 0, 0)
    assert vcpu.sync().args == (0, 3, 0, 0)
    assert vcpu.sync().args == (100, 0x2B, 0x23, 0)
    assert vcpu.sync().args[:2] == (1, 77)
    assert vcpu.sync().args == (0, 0, 7)
    assert vcpu.sync().args == (1 << 9,)
    vcpu.run_to_done()


INTERRUPTED = """
#include <kvmpy/guest.h>

#define VECTOR	0x51

static u8 stack[4096] GUEST_USER_DATA;
static u8 inner_stack[4096] GUEST_USER_DATA;
static u32 flag GUEST_USER_DATA;

static u64 GUEST_USER wait(u64 value)
{
	while (READ_ONCE(flag) != value)
		;
	return flag;
}

static u64 GUEST_USER twice(u64 x)
{
	return 2 * x;
}

static void on_timer(struct exception_frame *frame)
{
	struct guest_user_exit inner = guest_user_run(twice, 21, inner_stack + sizeof(inner_stack));

	GUEST_SYNC(frame->cs, inner.returned, inner.value);
	flag = 9;
	apic_eoi();
}

void guest_main(void)
{
	struct guest_user_exit exit;

	guest_exception_install(VECTOR, on_timer);
	apic_enable();
	apic_timer_start(VECTOR, APIC_TIMER_ONESHOT, 1000000);
	exit = guest_user_run(wait, 9, stack + sizeof(stack));
	GUEST_SYNC(exit.returned, exit.value);
}
"""


@pytest.mark.requires("KVM_CAP_IRQCHIP")
def test_interrupts_reach_ring_3(make_vm: MakeVm) -> None:
    """A timer interrupt ends a loop in ring 3; its handler may enter ring 3 itself meanwhile."""
    vm = make_vm.start(INTERRUPTED)
    assert [call.args for call in vm.vcpus[0].syncs()] == [(0x2B, 1, 42), (1, 9)]


NMI = """
#include <kvmpy/guest.h>

static u8 stack[4096] GUEST_USER_DATA;
static u32 ready GUEST_USER_DATA;
static u32 stop GUEST_USER_DATA;
static u32 target;

static u64 GUEST_USER loop(u64 unused)
{
	WRITE_ONCE(ready, 1);
	while (!READ_ONCE(stop))
		;
	return stop;
}

static void on_nmi(struct exception_frame *frame)
{
	GUEST_SYNC(frame->cs, guest_cpu_index());
	stop = 5;
}

void guest_main(void)
{
	struct guest_user_exit exit;

	guest_exception_install(NMI_VECTOR, on_nmi);
	apic_enable();
	target = apic_id();
	exit = guest_user_run(loop, 0, stack + sizeof(stack));
	GUEST_SYNC(exit.returned, exit.value);
}

void sender(void)
{
	apic_enable();
	while (!READ_ONCE(ready))
		cpu_relax();
	apic_send_nmi(target);
}
"""


@pytest.mark.requires("KVM_CAP_IRQCHIP")
def test_nmis_reach_ring_3(make_vm: MakeVm) -> None:
    """An NMI from another vCPU interrupts ring 3, finds the per-CPU area, and goes back there."""
    vm = make_vm(NMI, vcpus=2)
    vm.vcpus[1].set_entry("sender")
    vm.launch()
    seen: list[tuple[int, ...]] = []
    vm.run_all(on_sync=lambda _vcpu, call: seen.append(call.args))
    assert seen == [(0x2B, 0), (1, 5)]


STRAY = """
#include <kvmpy/guest.h>

static u8 stack[4096] GUEST_USER_DATA;

static u64 GUEST_USER fails(u64 unused)
{
	asm volatile("ud2");
	return 1;
}

static void on_ud(struct exception_frame *frame)
{
	guest_exception_unexpected(frame);
}

void guest_main(void)
{
	guest_exception_install(UD_VECTOR, on_ud);
	guest_user_run(fails, 0, stack + sizeof(stack));
}
"""


def test_an_unexpected_exception_in_ring_3(make_vm: MakeVm) -> None:
    """A handler that gives up ends the test with the exception of the code that it interrupted."""
    vm = make_vm.start(STRAY)
    with pytest.raises(GuestExceptionError, match=r"#UD.*\n  in fails") as caught:
        vm.vcpus[0].run_to_done()
    assert caught.value.vector == 6
