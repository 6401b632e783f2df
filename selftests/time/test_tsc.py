# SPDX-License-Identifier: Apache-2.0
"""The guest's time-stamp counter: what guest and host read, write and shift."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, Agent, GuestVm, Kvm, MakeVm, Vm

pytestmark = pytest.mark.requires("KVM_CAP_GET_TSC_KHZ")

MSR_TSC = 0x10
MSR_TSC_ADJUST = 0x3B
# A guest's answer does not take longer than this.
SECONDS = 60

GUEST = """
#include <kvmpy/guest.h>

#define MSR_TSC		0x10
#define MSR_TSC_ADJUST	0x3b
#define MSR_TSC_AUX	0xc0000103
#define CR4_TSD		BIT(2)

void readings(void)
{
	for (;;)
		GUEST_SYNC(rdtsc());
}

void msr_agrees(void)
{
	u32 i;

	for (i = 0; i < 50; i++) {
		u64 before = rdtsc();
		u64 msr = rdmsr(MSR_TSC);
		u64 after = rdtsc();

		GUEST_ASSERT_GE(msr, before);
		GUEST_ASSERT_GE(after, msr);
		GUEST_ASSERT_GT(after, before);
	}
}

void guest_writes(u64 limit)
{
	static const u64 values[] = { 0, 1ull << 40, 1000, 1ull << 60 };
	u32 i;

	for (i = 0; i < ARRAY_SIZE(values); i++) {
		wrmsr(MSR_TSC, values[i]);
		GUEST_ASSERT_GE(rdtsc(), values[i]);
		GUEST_ASSERT_LT(rdtsc(), values[i] + limit);
	}
}

void adjust(u64 limit)
{
	u64 before, now, adjusted;

	GUEST_ASSERT_EQ(rdmsr(MSR_TSC_ADJUST), 0ull);
	/* What is added to the adjustment is added to the counter. */
	before = rdtsc();
	wrmsr(MSR_TSC_ADJUST, 1ull << 50);
	now = rdtsc();
	GUEST_ASSERT_GE(now, before + (1ull << 50));
	GUEST_ASSERT_LT(now, before + (1ull << 50) + limit);
	GUEST_ASSERT_EQ(rdmsr(MSR_TSC_ADJUST), 1ull << 50);
	/* And the other way round. */
	before = rdtsc();
	wrmsr(MSR_TSC, before + (1ull << 51));
	adjusted = rdmsr(MSR_TSC_ADJUST);
	GUEST_ASSERT_LE(adjusted, (1ull << 50) + (1ull << 51));
	GUEST_ASSERT_GT(adjusted, (1ull << 50) + (1ull << 51) - limit);
}

void adjust_by_host(void)
{
	GUEST_SYNC(rdtsc(), rdmsr(MSR_TSC_ADJUST));
	GUEST_SYNC(rdtsc(), rdmsr(MSR_TSC_ADJUST));
}

GUEST_USER_DATA static u8 stack[4096] __aligned(16);

GUEST_USER static u64 user_rdtsc(u64 arg)
{
	u32 low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high));
	return low | (u64)high << 32;
}

void ring3(void)
{
	struct guest_user_exit exit;
	u64 before = rdtsc();

	exit = guest_user_run(user_rdtsc, 0, stack + sizeof(stack));
	GUEST_ASSERT(exit.returned);
	GUEST_ASSERT_GE(exit.value, before);
	GUEST_ASSERT_LE(exit.value, rdtsc());

	write_cr4(read_cr4() | CR4_TSD);
	exit = guest_user_run(user_rdtsc, 0, stack + sizeof(stack));
	GUEST_ASSERT(!exit.returned);
	GUEST_ASSERT_EQ(exit.fault.vector, GP_VECTOR);
	/* Ring 0 may read it still. */
	GUEST_ASSERT_GT(rdtsc(), before);

	write_cr4(read_cr4() & ~CR4_TSD);
	exit = guest_user_run(user_rdtsc, 0, stack + sizeof(stack));
	GUEST_ASSERT(exit.returned);
}

static u64 latest;

void together(void)
{
	u32 i;

	for (i = 0; i < 500; i++) {
		u64 before = atomic_read(&latest);
		u64 now = rdtsc();

		GUEST_ASSERT_GE(now, before);
		while (before < now && !atomic_cmpxchg(&latest, before, now))
			before = atomic_read(&latest);
	}
}
"""


def limit(kvm: Kvm) -> int:
    """Return more ticks than any step of these tests takes."""
    with kvm.create_vm() as vm:
        return vm.create_vcpu().clock.get_tsc_khz() * 1000 * SECONDS


def reading(vm: GuestVm, vcpu: int = 0) -> int:
    """Return the guest's next reading."""
    return vm.vcpus[vcpu].sync().args[0]


STABLE = pytest.mark.requires("stable-tsc")


def test_msr_is_the_counter(make_vm: MakeVm) -> None:
    """IA32_TIME_STAMP_COUNTER reads what RDTSC reads, and both go forward.

    Intel SDM 3B, 19.17 (time-stamp counter).
    """
    make_vm.start(GUEST, "msr_agrees").vcpus[0].run_to_done()


def test_host_reads_it(make_vm: MakeVm) -> None:
    """KVM_GET_MSRS of the TSC is between the guest's readings before and after.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS.
    """
    vm = make_vm.start(GUEST, "readings")
    for _ in range(10):
        before = reading(vm)
        host = vm.vcpus[0].msrs.get(MSR_TSC)
        assert before <= host <= reading(vm)


@pytest.mark.parametrize("value", [1 << 40, 1 << 60])
def test_host_writes_it(make_vm: MakeVm, kvm: Kvm, value: int) -> None:
    """The guest's counter goes on from what KVM_SET_MSRS wrote.

    Documentation/virt/kvm/api.rst, 4.19 KVM_SET_MSRS.
    """
    vm = make_vm.start(GUEST, "readings")
    reading(vm)
    vm.vcpus[0].msrs.set(MSR_TSC, value)
    assert value <= reading(vm) < value + limit(kvm)


def test_guest_writes_it(make_vm: MakeVm, kvm: Kvm) -> None:
    """The guest may write its counter, forward and back.

    Intel SDM 3B, 19.17; Documentation/virt/kvm/x86/timekeeping.rst.
    """
    make_vm.start(GUEST, "guest_writes", limit(kvm)).vcpus[0].run_to_done()


@pytest.mark.requires("msr:0x3b")
def test_adjust(make_vm: MakeVm, kvm: Kvm) -> None:
    """Writing IA32_TSC_ADJUST shifts the counter, and writing the counter shifts IA32_TSC_ADJUST.

    Intel SDM 3B, 19.17.3 (time-stamp counter adjustment).
    """
    make_vm.start(GUEST, "adjust", limit(kvm)).vcpus[0].run_to_done()


@pytest.mark.requires("msr:0x3b")
def test_adjust_by_host(make_vm: MakeVm, kvm: Kvm) -> None:
    """Restoring IA32_TSC_ADJUST by KVM_SET_MSRS does not shift the counter, which is restored by itself.

    arch/x86/kvm/x86.c, kvm_set_msr_common(): host-initiated writes keep the TSC.
    """
    vm = make_vm.start(GUEST, "adjust_by_host")
    before, adjusted = vm.vcpus[0].sync().args
    assert adjusted == 0
    vm.vcpus[0].msrs.set(MSR_TSC_ADJUST, 1 << 55)
    now, adjusted = vm.vcpus[0].sync().args
    assert adjusted == 1 << 55
    assert before <= now < before + limit(kvm)


@pytest.mark.requires("msr:0x3b")
def test_host_write_leaves_adjust(make_vm: MakeVm, kvm: Kvm) -> None:
    """KVM_SET_MSRS of the counter leaves IA32_TSC_ADJUST alone; the guest's own write adds to what is there.

    Intel SDM 3B, 19.17.3 (time-stamp counter adjustment); arch/x86/kvm/x86.c, kvm_set_msr_common().
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.start()
    agent.vcpu.msrs.set(MSR_TSC_ADJUST, 1 << 50)
    agent.vcpu.msrs.set(MSR_TSC, 1 << 45)
    assert agent.rdmsr(MSR_TSC_ADJUST) == 1 << 50
    now = agent.rdmsr(MSR_TSC)
    assert isinstance(now, int)
    assert 1 << 45 <= now < (1 << 45) + limit(kvm)
    assert agent.wrmsr(MSR_TSC, now + (1 << 40)) is None
    adjusted = agent.rdmsr(MSR_TSC_ADJUST)
    assert isinstance(adjusted, int)
    # What has passed since the reading is taken back.
    shift = adjusted - (1 << 50)
    assert (1 << 40) - limit(kvm) < shift <= 1 << 40
    assert agent.vcpu.msrs.get(MSR_TSC_ADJUST) == adjusted


@STABLE
def test_new_vcpu_starts_at_zero(vm: Vm, kvm: Kvm) -> None:
    """The counter of a VM's first vCPU starts at 0, and a later one goes with it; IA32_TSC_ADJUST is 0.

    Intel SDM 3B, 19.17 (the counter is cleared by reset); arch/x86/kvm/x86.c, kvm_arch_vcpu_postcreate().
    """
    first = vm.create_vcpu(0)
    at_start = first.msrs.get(MSR_TSC)
    before = first.msrs.get(MSR_TSC)
    second = vm.create_vcpu(1).msrs.get(MSR_TSC)
    after = first.msrs.get(MSR_TSC)
    assert at_start < limit(kvm)
    assert before <= second <= after
    if MSR_TSC_ADJUST in kvm.get_msr_index_list():
        assert first.msrs.get(MSR_TSC_ADJUST) == 0


def test_ring3(make_vm: MakeVm) -> None:
    """Ring 3 reads the same counter, unless CR4.TSD is set: then RDTSC is #GP there.

    Intel SDM 2B, RDTSC; 3A, 2.5 (CR4.TSD).
    """
    make_vm.start(GUEST, "ring3").vcpus[0].run_to_done()


@STABLE
def test_one_vcpu_after_the_other(make_vm: MakeVm) -> None:
    """A reading on one vCPU is never before an earlier one on another.

    Documentation/virt/kvm/x86/timekeeping.rst: KVM synchronises the TSCs of a VM's vCPUs.
    """
    vm = make_vm.start(GUEST, "readings", vcpus=3)
    seen = [reading(vm, index % 3) for index in range(30)]
    assert seen == sorted(seen)


@STABLE
def test_vcpus_at_once(make_vm: MakeVm) -> None:
    """vCPUs that run at once never read a TSC before one that another has read.

    Documentation/virt/kvm/x86/timekeeping.rst.
    """
    make_vm.start(GUEST, "together", vcpus=2).run_all()
