# SPDX-License-Identifier: Apache-2.0
"""kvmclock: the time that a guest computes from what KVM puts into its memory."""

from __future__ import annotations

import errno
import time

import pytest

from kvmpy import (
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    GuestVm,
    MakeVm,
    Ucall,
    kvm_clock_data,
    kvm_cpuid2,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_ADJUST_CLOCK", "msr:0x4b564d01")

SECOND = 1_000_000_000
TSC_STABLE, GUEST_STOPPED = 1, 2

GUEST = """
#include "pvclock.h"

static volatile struct pvclock *clock_of(u64 gva)
{
	return (void *)(uintptr_t)(gva + guest_cpu_index() * sizeof(struct pvclock));
}

static void enable(u32 msr, u64 gpa)
{
	wrmsr(msr, (gpa + guest_cpu_index() * sizeof(struct pvclock)) | 1);
}

/* The time and the flags, again and again. */
void readings(u64 gva, u64 gpa, u64 msr)
{
	u64 wanted = (gpa + guest_cpu_index() * sizeof(struct pvclock)) | 1;
	u8 flags;

	enable(msr, gpa);
	GUEST_ASSERT_EQ(rdmsr(msr), wanted);
	for (;;) {
		u64 now = pvclock_read(clock_of(gva), &flags);

		GUEST_SYNC(now, flags);
	}
}

void advancing(u64 gva, u64 gpa)
{
	u64 last, now;
	u32 i;

	enable(MSR_KVM_SYSTEM_TIME, gpa);
	GUEST_ASSERT_EQ(clock_of(gva)->version & 1, 0u);
	GUEST_ASSERT_GT(clock_of(gva)->version, 0u);
	GUEST_ASSERT_GT(clock_of(gva)->tsc_to_system_mul, 0u);
	last = pvclock_read(clock_of(gva), NULL);
	for (i = 0; i < 200; i++) {
		now = pvclock_read(clock_of(gva), NULL);
		GUEST_ASSERT_GT(now, last);
		last = now;
	}
}

/* All vCPUs at once: nobody sees a time before one that another has seen. */
static u64 latest;

void together(u64 gva, u64 gpa)
{
	u64 before, now;
	u32 i;

	enable(MSR_KVM_SYSTEM_TIME, gpa);
	for (i = 0; i < 300; i++) {
		before = atomic_read(&latest);
		now = pvclock_read(clock_of(gva), NULL);
		GUEST_ASSERT_GE(now, before);
		while (before < now && !atomic_cmpxchg(&latest, before, now))
			before = atomic_read(&latest);
	}
}

void wall(u64 gva, u64 gpa, u64 msr)
{
	volatile struct pvclock_wall *clock = (void *)(uintptr_t)(gva + 2048);

	clock->version = 6;
	wrmsr(msr, gpa + 2048);
	GUEST_ASSERT_EQ(clock->version, 8u);
	GUEST_SYNC(clock->sec, clock->nsec);
	/* Every write brings a new reading. */
	clock->sec = 0;
	wrmsr(msr, gpa + 2048);
	GUEST_ASSERT_EQ(clock->version, 10u);
	GUEST_SYNC(clock->sec, clock->nsec);
}

void switched_off(u64 gva, u64 gpa)
{
	volatile struct pvclock *clock = clock_of(gva);
	u32 version;

	enable(MSR_KVM_SYSTEM_TIME, gpa);
	GUEST_SYNC(0);
	wrmsr(MSR_KVM_SYSTEM_TIME, 0);
	version = clock->version;
	clock->system_time = 0x5eed;
	GUEST_SYNC(1);
	GUEST_ASSERT_EQ(clock->version, version);
	GUEST_ASSERT_EQ(clock->system_time, 0x5eedull);
}

void stopped(u64 gva, u64 gpa)
{
	volatile struct pvclock *clock = clock_of(gva);

	enable(MSR_KVM_SYSTEM_TIME, gpa);
	GUEST_SYNC(clock->flags & PVCLOCK_GUEST_STOPPED);
	GUEST_SYNC(clock->flags & PVCLOCK_GUEST_STOPPED);
	clock->flags &= ~PVCLOCK_GUEST_STOPPED;
	GUEST_SYNC(clock->flags & PVCLOCK_GUEST_STOPPED);
}

void not_offered(u64 gva, u64 gpa)
{
	GUEST_SYNC(wrmsr_safe(MSR_KVM_SYSTEM_TIME, gpa | 1).vector,
		   wrmsr_safe(MSR_KVM_WALL_CLOCK, gpa).vector,
		   wrmsr_safe(MSR_KVM_OLD_SYSTEM_TIME, gpa | 1).vector,
		   wrmsr_safe(MSR_KVM_OLD_WALL_CLOCK, gpa).vector);
}
"""


def prepare(make_vm: MakeVm, entry: str, *args: int, vcpus: int = 1, **options: object) -> GuestVm:
    """Return a VM whose vCPUs will run *entry*, with a shared page for their clocks as argument."""
    vm = make_vm(GUEST, vcpus=vcpus, **options)  # type: ignore[arg-type]
    page = vm.alloc(4096, private=False)
    for vcpu in vm.vcpus:
        vcpu.set_entry(entry, int(page), int(vm.gva_to_gpa(page)), *args)
    return vm


def start(make_vm: MakeVm, entry: str, *args: int, vcpus: int = 1) -> GuestVm:
    """Return such a VM, launched."""
    vm = prepare(make_vm, entry, *args, vcpus=vcpus)
    vm.launch()
    return vm


def reading(vm: GuestVm, vcpu: int = 0) -> Ucall:
    """Return the guest's next reading: nanoseconds and flags."""
    return vm.vcpus[vcpu].sync()


def test_time_advances(make_vm: MakeVm) -> None:
    """The structure is consistent (an even version), and the time computed from it goes forward.

    Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW.
    """
    vm = start(make_vm, "advancing")
    vm.vcpus[0].run_to_done()


@pytest.mark.parametrize("msr", [0x4B56_4D01, 0x12], ids=["new", "old"])
def test_agrees_with_get_clock(make_vm: MakeVm, msr: int) -> None:
    """KVM_GET_CLOCK returns what the guest reads at the same moment.

    Documentation/virt/kvm/api.rst, 4.29 KVM_GET_CLOCK: exact with KVM_CLOCK_TSC_STABLE, else near it.
    """
    vm = start(make_vm, "readings", msr)
    reading(vm)
    for _ in range(20):
        before = vm.clock.get()
        now = reading(vm).args[0]
        after = vm.clock.get()
        slack = 0 if before.flags & after.flags & KVM_CLOCK_TSC_STABLE else SECOND // 100
        assert before.clock - slack <= now <= after.clock + slack


def test_realtime_is_the_hosts(make_vm: MakeVm) -> None:
    """Where KVM_GET_CLOCK gives the real time, it is the host's at that moment.

    Documentation/virt/kvm/api.rst, 4.29 KVM_GET_CLOCK: KVM_CLOCK_REALTIME.
    """
    vm = start(make_vm, "readings", 0x4B56_4D01)
    reading(vm)
    before = time.time_ns()
    clock = vm.clock.get()
    after = time.time_ns()
    if not clock.flags & KVM_CLOCK_REALTIME:
        pytest.skip("needs a host whose clock source is a stable TSC: KVM gives no real time here")
    assert before - SECOND // 1000 <= clock.realtime <= after + SECOND // 1000


@pytest.mark.parametrize("value", [0, 1234 * SECOND, 1 << 50])
def test_set_clock(make_vm: MakeVm, value: int) -> None:
    """KVM_SET_CLOCK sets the guest's time, forward and back, and it goes on from there.

    Documentation/virt/kvm/api.rst, 4.30 KVM_SET_CLOCK.
    """
    vm = start(make_vm, "readings", 0x4B56_4D01)
    reading(vm)
    started = time.monotonic_ns()
    vm.clock.set(kvm_clock_data(clock=value))
    before = vm.clock.get()
    now = reading(vm).args[0]
    after = vm.clock.get()
    # Two clocks of one host: where the TSC is not stable they differ a little.
    elapsed = time.monotonic_ns() - started
    assert value <= now <= value + 2 * elapsed + SECOND // 10
    slack = 0 if before.flags & after.flags & KVM_CLOCK_TSC_STABLE else SECOND // 100
    assert before.clock - slack <= now <= after.clock + slack


def test_times_of_the_host_come_together(make_vm: MakeVm) -> None:
    """KVM_GET_CLOCK has the real time and the TSC of one moment, or neither, and both go on.

    Documentation/virt/kvm/api.rst, 4.29 KVM_GET_CLOCK: KVM_CLOCK_REALTIME and KVM_CLOCK_HOST_TSC.
    """
    vm = start(make_vm, "readings", 0x4B56_4D01)
    reading(vm)
    first, second = vm.clock.get(), vm.clock.get()
    both = int(KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC)
    assert first.flags & both in (0, both)
    assert first.flags & ~(both | int(KVM_CLOCK_TSC_STABLE)) == 0
    if first.flags & second.flags & both:
        assert 0 < first.host_tsc < second.host_tsc
        assert 0 < first.realtime < second.realtime
        ticks = second.host_tsc - first.host_tsc
        passed = second.realtime - first.realtime
        khz = vm.vcpus[0].clock.get_tsc_khz()
        assert ticks / khz * 1e6 == pytest.approx(passed, rel=0.1, abs=2000)


@pytest.mark.requires(f"KVM_CAP_ADJUST_CLOCK&{int(KVM_CLOCK_REALTIME)}")
def test_set_clock_with_realtime(make_vm: MakeVm) -> None:
    """With KVM_CLOCK_REALTIME the time since that real time is added to the clock.

    Documentation/virt/kvm/api.rst, 4.30 KVM_SET_CLOCK: KVM_CLOCK_REALTIME.
    """
    vm = start(make_vm, "readings", 0x4B56_4D01)
    reading(vm)
    started = time.time_ns() - 1000 * SECOND
    vm.clock.set(kvm_clock_data(clock=5 * SECOND, flags=KVM_CLOCK_REALTIME, realtime=started))
    now = reading(vm).args[0]
    assert 1005 * SECOND <= now <= 1005 * SECOND + 20 * SECOND


@pytest.mark.requires(f"KVM_CAP_ADJUST_CLOCK&{int(KVM_CLOCK_REALTIME)}")
def test_realtime_in_the_future(make_vm: MakeVm) -> None:
    """A real time that is ahead of the host's does not take the clock back.

    Documentation/virt/kvm/api.rst, 4.30 KVM_SET_CLOCK (elapsed time is added); arch/x86/kvm/x86.c.
    """
    vm = start(make_vm, "readings", 0x4B56_4D01)
    reading(vm)
    ahead = time.time_ns() + 1000 * SECOND
    vm.clock.set(kvm_clock_data(clock=2000 * SECOND, flags=KVM_CLOCK_REALTIME, realtime=ahead))
    assert reading(vm).args[0] >= 2000 * SECOND


def test_one_vcpu_after_the_other(make_vm: MakeVm) -> None:
    """With the stable flag, a reading of one vCPU is never before an earlier one of another.

    Documentation/virt/kvm/x86/msr.rst: flags bit 0, measures across CPUs are monotonic.
    """
    vm = start(make_vm, "readings", 0x4B56_4D01, vcpus=3)
    last = 0
    for _ in range(10):
        for index in range(3):
            now, flags = reading(vm, index).args
            if not flags & TSC_STABLE:
                pytest.skip("needs a host whose TSC is stable: KVM does not promise it here")
            assert now >= last
            last = now


def test_vcpus_at_once(make_vm: MakeVm) -> None:
    """With the stable flag, vCPUs that run at once never see a time before one that another has seen.

    Documentation/virt/kvm/x86/msr.rst: flags bit 0.
    """
    vm = start(make_vm, "readings", 0x4B56_4D01)
    if not reading(vm).args[1] & TSC_STABLE:
        pytest.skip("needs a host whose TSC is stable: KVM does not promise it here")
    vm = start(make_vm, "together", vcpus=2)
    vm.run_all()


@pytest.mark.parametrize("msr", [0x4B56_4D00, 0x11], ids=["new", "old"])
def test_wall_clock(make_vm: MakeVm, msr: int) -> None:
    """The wall clock is the real time at the guest's time 0, written anew with every write of the MSR.

    Documentation/virt/kvm/x86/msr.rst, MSR_KVM_WALL_CLOCK_NEW.
    """
    vm = start(make_vm, "wall", msr)
    for _ in range(2):
        sec, nsec = vm.vcpus[0].sync().args
        assert 0 <= nsec < SECOND
        expected = time.time_ns() - vm.clock.get().clock
        assert abs(sec * SECOND + nsec - expected) < SECOND // 10


def test_switched_off(make_vm: MakeVm) -> None:
    """Once the guest has cleared the enable bit, KVM leaves its memory alone.

    Documentation/virt/kvm/x86/msr.rst: updated until anything with bit 0 clear is written.
    """
    vm = start(make_vm, "switched_off")
    assert vm.vcpus[0].sync().args == (0,)
    assert vm.vcpus[0].sync().args == (1,)
    vm.clock.set(kvm_clock_data(clock=1 << 40))
    vm.vcpus[0].run_to_done()


@pytest.mark.requires("KVM_CAP_KVMCLOCK_CTRL")
def test_guest_was_stopped(make_vm: MakeVm) -> None:
    """KVM_KVMCLOCK_CTRL sets the flag that tells the guest it was paused, and the guest clears it.

    Documentation/virt/kvm/api.rst, 4.70 KVM_KVMCLOCK_CTRL.
    """
    vcpu = start(make_vm, "stopped").vcpus[0]
    assert vcpu.sync().args == (0,)
    vcpu.clock.kvmclock_ctrl()
    assert vcpu.sync().args == (GUEST_STOPPED,)
    assert vcpu.sync().args == (0,)


@pytest.mark.requires("KVM_CAP_KVMCLOCK_CTRL")
def test_pause_without_clock(make_vm: MakeVm) -> None:
    """KVM_KVMCLOCK_CTRL of a vCPU that has not enabled the clock fails with EINVAL.

    Documentation/virt/kvm/api.rst, 4.70 KVM_KVMCLOCK_CTRL: the flag is in what the guest shares.
    """
    vm = start(make_vm, "stopped")
    with refused(errno.EINVAL):
        vm.vcpus[0].clock.kvmclock_ctrl()


@pytest.mark.requires("KVM_CAP_ENFORCE_PV_FEATURE_CPUID")
@pytest.mark.parametrize(("enforced", "vector"), [(True, 13), (False, 0xFF)])
def test_cpuid_is_enforced(make_vm: MakeVm, enforced: bool, vector: int) -> None:
    """With KVM_CAP_ENFORCE_PV_FEATURE_CPUID, and then only, MSRs that CPUID does not offer are #GP.

    Documentation/virt/kvm/api.rst, 6.80 KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
    """

    def without_clock(table: kvm_cpuid2) -> kvm_cpuid2:
        for entry in table.entries_list():
            if entry.function == 0x4000_0001:
                entry.eax &= ~(1 << 0 | 1 << 3)
        return table

    vm = prepare(make_vm, "not_offered", cpuid=without_clock)
    vm.vcpus[0].enable_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, int(enforced))
    vm.launch()
    assert vm.vcpus[0].sync().args == (vector,) * 4
