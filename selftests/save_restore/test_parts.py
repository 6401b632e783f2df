# SPDX-License-Identifier: Apache-2.0
"""Saved state part by part: MSRs, debug and vector registers, kvmclock, and several vCPUs at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from kvmpy import GuestVm, MakeVm, VcpuThread

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")

Move = Callable[[GuestVm], GuestVm]

VCPUS = 4
TIMEOUT = 10.0

GUEST = """
#include "../irq/interrupts.h"

#define MSR_STAR		0xc0000081
#define MSR_LSTAR		0xc0000082
#define MSR_SYSCALL_MASK	0xc0000084
#define MSR_FS_BASE		0xc0000100
#define MSR_KERNEL_GS_BASE	0xc0000102
#define MSR_SYSENTER_CS		0x174
#define MSR_SYSENTER_ESP	0x175
#define MSR_SYSENTER_EIP	0x176
#define MSR_PAT			0x277

/* AMD's SYSENTER takes 32-bit addresses: the rest of the two MSRs is not kept there. */
static const struct {
	u32 msr;
	u64 value;
} msr_values[] = {
	{ MSR_STAR, 0x0023000800000000 },
	{ MSR_LSTAR, 0xffff800000401234 },
	{ MSR_SYSCALL_MASK, 0x47700 },
	{ MSR_FS_BASE, 0x00007f1234567000 },
	{ MSR_KERNEL_GS_BASE, 0xffff888812345000 },
	{ MSR_SYSENTER_CS, 0x10 },
	{ MSR_SYSENTER_ESP, 0x88801000 },
	{ MSR_SYSENTER_EIP, 0x80405678 },
	{ MSR_PAT, 0x0007040600070506 },
};

void msrs(void)
{
	u32 i;

	for (i = 0; i < ARRAY_SIZE(msr_values); i++)
		wrmsr(msr_values[i].msr, msr_values[i].value);
	GUEST_SYNC('r');
	for (i = 0; i < ARRAY_SIZE(msr_values); i++)
		GUEST_ASSERT_EQ(rdmsr(msr_values[i].msr), msr_values[i].value);
}

void debug_registers(void)
{
	write_dr0(0x1111111111110);
	write_dr1(0x2222222222220);
	write_dr2(0x3333333333330);
	write_dr3(0x4444444444440);
	/* Nothing is enabled; the lengths and types stay. */
	write_dr7(0x11110400);
	GUEST_SYNC('r');
	GUEST_ASSERT_EQ(read_dr0(), 0x1111111111110ull);
	GUEST_ASSERT_EQ(read_dr1(), 0x2222222222220ull);
	GUEST_ASSERT_EQ(read_dr2(), 0x3333333333330ull);
	GUEST_ASSERT_EQ(read_dr3(), 0x4444444444440ull);
	GUEST_ASSERT_EQ(read_dr7(), 0x11110400ull);
}

GUEST_USER_DATA static u8 stack[4096] __aligned(16);
GUEST_USER_DATA static u64 vector[2] __aligned(16) = { 0x0123456789abcdef, 0xfedcba9876543210 };

/* An exception without a handler ends ring 3 with the registers as they are. */
GUEST_USER static u64 load_vectors(u64 arg)
{
	asm volatile("movups %0, %%xmm0; movups %0, %%xmm15; fninit; fldpi; ud2" : : "m"(vector));
	return arg;
}

GUEST_USER static u64 store_vectors(u64 arg)
{
	asm volatile("movups %%xmm0, %0" : "=m"(vector));
	if (vector[0] != 0x0123456789abcdef || vector[1] != 0xfedcba9876543210)
		return 1;
	asm volatile("movups %%xmm15, %0" : "=m"(vector));
	if (vector[0] != 0x0123456789abcdef || vector[1] != 0xfedcba9876543210)
		return 2;
	asm volatile("fldpi; fcompp; fnstsw %%ax; movzwl %%ax, %%eax; movq %%rax, %0"
		     : "=m"(vector[0]) : : "rax");
	return vector[0] & 0x4500;
}

void vectors(void)
{
	struct guest_user_exit exit;

	exit = guest_user_run(load_vectors, 0, stack + sizeof(stack));
	GUEST_ASSERT_EQ(exit.fault.vector, UD_VECTOR);
	GUEST_SYNC('r');
	exit = guest_user_run(store_vectors, 0, stack + sizeof(stack));
	GUEST_ASSERT(exit.returned);
	/* C3 alone: both are equal. */
	GUEST_ASSERT_EQ(exit.value, 0x4000ull);
}

#define VECTOR	0x51
#define CPUS	4

static struct guest_barrier barrier;
static u64 rounds[CPUS];
GUEST_SHARED volatile u64 progress;

/* Each vCPU counts, waits for all others, and interrupts its neighbour. */
void together(u64 nr)
{
	u32 me = guest_cpu_index();
	u32 n;

	irq_install(VECTOR);
	x2apic_enable();
	for (n = 1; n <= nr; n++) {
		rounds[me]++;
		guest_barrier_wait(&barrier, CPUS);
		apic_send_ipi((me + 1) % CPUS, VECTOR);
		irq_wait(VECTOR, n);
		if (me == 0)
			progress = n;
	}
	guest_barrier_wait(&barrier, CPUS);
	GUEST_ASSERT_EQ(rounds[(me + 2) % CPUS], nr);
}

void alone(u64 nr)
{
	u32 me = guest_cpu_index();
	u64 i;

	for (i = 1; i <= nr; i++)
		GUEST_SYNC(me, i, ++rounds[me]);
}
"""


def run_for_a_while(vm: GuestVm) -> None:
    """Run all vCPUs at once for some rounds, and kick them out at whatever they are doing."""
    threads = [VcpuThread(vcpu.run_until_kicked, vcpu=vcpu) for vcpu in vm.vcpus]
    enough = vm.symbol("progress").u64 + 10
    end = time.monotonic() + TIMEOUT
    for thread in threads:
        thread.start()
    try:
        while vm.symbol("progress").u64 < enough:
            assert time.monotonic() < end, "the vCPUs make no progress"
            os.sched_yield()
    finally:
        for thread in threads:
            thread.stop()


def moved_at_ready(make_vm: MakeVm, move: Move, entry: str) -> None:
    """Run *entry* to its word, move it, and let it finish: the guest asserts."""
    vm = make_vm.start(GUEST, entry)
    assert vm.vcpus[0].sync().args == (ord("r"),)
    move(vm).vcpus[0].run_to_done()


def test_msrs(make_vm: MakeVm, move: Move) -> None:
    """System call, segment base and page attribute MSRs have the values that the guest gave them.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS and 4.19 KVM_SET_MSRS.
    """
    moved_at_ready(make_vm, move, "msrs")


@pytest.mark.requires("KVM_CAP_DEBUGREGS")
def test_debug_registers(make_vm: MakeVm, move: Move) -> None:
    """The guest's debug registers move along.

    Documentation/virt/kvm/api.rst, 4.33 KVM_GET_DEBUGREGS and 4.34 KVM_SET_DEBUGREGS.
    """
    moved_at_ready(make_vm, move, "debug_registers")


@pytest.mark.requires("KVM_CAP_XSAVE")
def test_vector_registers(make_vm: MakeVm, move: Move) -> None:
    """SSE and x87 registers that ring 3 loaded are there when it goes on.

    Documentation/virt/kvm/api.rst, 4.42 KVM_GET_XSAVE and 4.43 KVM_SET_XSAVE.
    """
    moved_at_ready(make_vm, move, "vectors")


def test_snapshot_is_the_same_after_restore(make_vm: MakeVm, move: Move) -> None:
    """What is saved from a restored vCPU equals what it was restored from, clocks apart.

    Documentation/virt/kvm/api.rst, section 4: every part has a get and a set.
    """
    vm = make_vm.start(GUEST, "alone", 5)
    assert vm.vcpus[0].sync().args == (0, 1, 1)
    if not vm.protection.traits.can_read_registers:
        pytest.skip("needs readable registers: the protection hides them")
    before = vm.vcpus[0].save()
    vm = move(vm)
    assert before.differences(vm.vcpus[0].save()) == []
    assert vm.vcpus[0].sync().args == (0, 2, 2)


def test_several_vcpus(make_vm: MakeVm, move: Move) -> None:
    """Each of several vCPUs goes on where it was, in the same memory.

    Documentation/virt/kvm/api.rst, section 4: vCPU state belongs to a vCPU.
    """
    vm = make_vm.start(GUEST, "alone", 6, vcpus=VCPUS)
    for round_ in range(1, 4):
        for vcpu in vm.vcpus:
            # Some are ahead of others.
            for step in range(1 + vcpu.index % 2):
                number = (round_ - 1) * (1 + vcpu.index % 2) + 1 + step
                assert vcpu.sync().args == (vcpu.index, number, number)
        vm = move(vm)
    for vcpu in vm.vcpus[0::2]:
        assert [call.args for call in vcpu.syncs()] == [(vcpu.index, n, n) for n in (4, 5, 6)]
    for vcpu in vm.vcpus[1::2]:
        vcpu.run_to_done()


def test_vcpus_that_wait_for_each_other(make_vm: MakeVm, move: Move) -> None:
    """vCPUs that run at once, meet at barriers and interrupt each other finish their work in a new VM.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC: interrupts between them are part of the state.
    """
    vm = make_vm.start(GUEST, "together", 60, vcpus=VCPUS)
    for _ in range(3):
        run_for_a_while(vm)
        vm = move(vm)
    vm.run_all()
    assert vm.symbol("progress").u64 == 60
