# SPDX-License-Identifier: Apache-2.0
"""The local APIC's timer: one-shot, periodic and TSC-deadline mode."""

from __future__ import annotations

import pytest

from kvmpy import Kvm, MakeVm, kvm_cpuid2

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")

MODES = pytest.mark.parametrize("x2apic", [0, 1], ids=["xapic", "x2apic"])
TSC_DEADLINE_BIT = 1 << 24

# Counts are in nanoseconds at KVM's default clock of 1 GHz.
GUEST = """
#include "../irq/interrupts.h"

#define VECTOR		0x51
#define US		1000u
#define MS		1000000u
#define LONG		(4000u * MS)

static volatile u64 fired_at;

static void handler(struct exception_frame *frame)
{
	fired_at = rdtsc();
	interrupts[guest_cpu_index()][frame->vector]++;
	apic_eoi();
}

static void setup(u64 x2apic)
{
	guest_exception_install(VECTOR, handler);
	if (x2apic)
		x2apic_enable();
	else
		apic_enable();
}

static void quiet(void)
{
	u32 before = irq_count(VECTOR);

	irq_window();
	irq_window();
	GUEST_ASSERT_EQ(irq_count(VECTOR), before);
}

void one_shot(u64 x2apic)
{
	u32 n;

	setup(x2apic);
	for (n = 1; n <= 3; n++) {
		apic_timer_start(VECTOR, APIC_TIMER_ONESHOT, 300 * US);
		irq_wait(VECTOR, n);
		GUEST_ASSERT_EQ(apic_read(APIC_TMCCT), 0u);
		GUEST_ASSERT_EQ(apic_read(APIC_TMICT), 300 * US);
		quiet();
		GUEST_ASSERT_EQ(irq_count(VECTOR), n);
	}
}

void periodic(u64 x2apic)
{
	u32 n;

	setup(x2apic);
	apic_timer_start(VECTOR, APIC_TIMER_PERIODIC, 1 * MS);
	for (n = 1; n <= 5; n++)
		irq_wait(VECTOR, n);
	GUEST_ASSERT_LE(apic_read(APIC_TMCCT), 1 * MS);
	apic_timer_stop();
	irq_window();
	quiet();
}

void count(u64 x2apic)
{
	u32 last, now;

	setup(x2apic);
	apic_timer_start(VECTOR, APIC_TIMER_ONESHOT, LONG);
	GUEST_ASSERT_EQ(apic_read(APIC_TMICT), LONG);
	last = apic_read(APIC_TMCCT);
	GUEST_ASSERT_LE(last, LONG);
	GUEST_ASSERT_GT(last, 0u);
	do {
		now = apic_read(APIC_TMCCT);
		GUEST_ASSERT_LE(now, last);
	} while (now == last);
	/* 0 stops it. */
	apic_write(APIC_TMICT, 0);
	GUEST_ASSERT_EQ(apic_read(APIC_TMCCT), 0u);
}

void masked(u64 x2apic)
{
	setup(x2apic);
	apic_timer_start(VECTOR, APIC_TIMER_ONESHOT | APIC_LVT_MASKED, 100 * US);
	while (apic_read(APIC_TMCCT))
		cpu_relax();
	quiet();
}

void deadline(u64 x2apic, u64 ticks)
{
	u32 n;

	setup(x2apic);
	for (n = 1; n <= 3; n++) {
		u64 when = rdtsc() + ticks;

		apic_timer_deadline(VECTOR, when);
		irq_wait(VECTOR, n);
		GUEST_ASSERT_GE(fired_at, when);
		GUEST_ASSERT_EQ(rdmsr(MSR_IA32_TSC_DEADLINE), 0ull);
		quiet();
	}
}

void past_deadline(u64 x2apic)
{
	setup(x2apic);
	apic_timer_deadline(VECTOR, 1);
	irq_wait(VECTOR, 1);
	quiet();
}

static void disarm_by_zero(void)
{
	wrmsr(MSR_IA32_TSC_DEADLINE, 0);
}

static void disarm_by_mode(void)
{
	apic_write(APIC_LVTT, APIC_TIMER_ONESHOT | VECTOR);
}

/* A machine under load may be too late to disarm: again, with more time. */
static void disarmed_in_time(u64 x2apic, u64 ticks, void (*disarm)(void))
{
	u64 when, armed;
	u32 before;

	setup(x2apic);
	for (;; ticks *= 2) {
		when = rdtsc() + ticks;
		apic_timer_deadline(VECTOR, when);
		armed = rdmsr(MSR_IA32_TSC_DEADLINE);
		disarm();
		GUEST_ASSERT_EQ(rdmsr(MSR_IA32_TSC_DEADLINE), 0ull);
		if (rdtsc() < when)
			break;
		irq_window();
	}
	GUEST_ASSERT_EQ(armed, when);
	before = irq_count(VECTOR);
	while (rdtsc() < when)
		cpu_relax();
	quiet();
	GUEST_ASSERT_EQ(irq_count(VECTOR), before);
}

void disarm(u64 x2apic, u64 ticks)
{
	disarmed_in_time(x2apic, ticks, disarm_by_zero);
}

void switch_mode(u64 x2apic, u64 ticks)
{
	disarmed_in_time(x2apic, ticks, disarm_by_mode);
}

void other_modes(u64 x2apic)
{
	setup(x2apic);
	apic_write(APIC_LVTT, APIC_TIMER_ONESHOT | VECTOR);
	wrmsr(MSR_IA32_TSC_DEADLINE, 1);
	GUEST_ASSERT_EQ(rdmsr(MSR_IA32_TSC_DEADLINE), 0ull);
	quiet();
	/* In deadline mode it is the initial count that is ignored. */
	apic_write(APIC_LVTT, APIC_TIMER_DEADLINE | VECTOR);
	apic_write(APIC_TMICT, 1 * US);
	GUEST_ASSERT_EQ(apic_read(APIC_TMCCT), 0u);
	quiet();
}

void entry_without_deadline(void)
{
	setup(0);
	apic_write(APIC_LVTT, APIC_TIMER_DEADLINE | VECTOR);
	GUEST_ASSERT_EQ(apic_read(APIC_LVTT), VECTOR);
}
"""


def offer_deadline(table: kvm_cpuid2) -> kvm_cpuid2:
    """Return CPUID with the TSC-deadline timer, which older kernels tell by capability only."""
    for entry in table.entries_list():
        if entry.function == 1:
            entry.ecx |= TSC_DEADLINE_BIT
    return table


def hide_deadline(table: kvm_cpuid2) -> kvm_cpuid2:
    """Return CPUID without the TSC-deadline timer."""
    for entry in table.entries_list():
        if entry.function == 1:
            entry.ecx &= ~TSC_DEADLINE_BIT
    return table


def milliseconds(kvm: Kvm, number: int) -> int:
    """Return that time in ticks of the guest's TSC."""
    with kvm.create_vm() as vm:
        return vm.create_vcpu().clock.get_tsc_khz() * number


@MODES
def test_one_shot(make_vm: MakeVm, x2apic: int) -> None:
    """A one-shot timer interrupts once, its current count is 0 then, and it can be started again.

    Intel SDM 3A, 12.5.4 (APIC timer).
    """
    make_vm.run(GUEST, "one_shot", x2apic, cpuid=offer_deadline)


@MODES
def test_periodic(make_vm: MakeVm, x2apic: int) -> None:
    """A periodic timer interrupts again and again, until it is stopped.

    Intel SDM 3A, 12.5.4.
    """
    make_vm.run(GUEST, "periodic", x2apic, cpuid=offer_deadline)


@MODES
def test_count(make_vm: MakeVm, x2apic: int) -> None:
    """The current count starts at the initial count and runs down; initial count 0 stops it.

    Intel SDM 3A, 12.5.4.
    """
    make_vm.run(GUEST, "count", x2apic, cpuid=offer_deadline)


@MODES
def test_masked(make_vm: MakeVm, x2apic: int) -> None:
    """A masked timer counts to 0 and does not interrupt.

    Intel SDM 3A, 12.5.1 (local vector table, mask).
    """
    make_vm.run(GUEST, "masked", x2apic, cpuid=offer_deadline)


@pytest.mark.requires("KVM_CAP_TSC_DEADLINE_TIMER", "KVM_CAP_GET_TSC_KHZ", "stable-tsc")
@MODES
def test_deadline(make_vm: MakeVm, kvm: Kvm, x2apic: int) -> None:
    """In TSC-deadline mode the interrupt comes when the TSC has reached the deadline, which is 0 then.

    Intel SDM 3A, 12.5.4.1 (TSC-deadline mode).
    """
    make_vm.run(GUEST, "deadline", x2apic, milliseconds(kvm, 2), cpuid=offer_deadline)


@pytest.mark.requires("KVM_CAP_TSC_DEADLINE_TIMER")
@MODES
def test_past_deadline(make_vm: MakeVm, x2apic: int) -> None:
    """A deadline that has passed interrupts at once.

    Intel SDM 3A, 12.5.4.1.
    """
    make_vm.run(GUEST, "past_deadline", x2apic, cpuid=offer_deadline)


@pytest.mark.requires("KVM_CAP_TSC_DEADLINE_TIMER", "KVM_CAP_GET_TSC_KHZ")
@MODES
def test_disarm(make_vm: MakeVm, kvm: Kvm, x2apic: int) -> None:
    """The deadline reads back while it is armed; deadline 0 disarms it.

    Intel SDM 3A, 12.5.4.1.
    """
    make_vm.run(GUEST, "disarm", x2apic, milliseconds(kvm, 5), cpuid=offer_deadline)


@pytest.mark.requires("KVM_CAP_TSC_DEADLINE_TIMER")
@MODES
def test_registers_of_other_modes(make_vm: MakeVm, x2apic: int) -> None:
    """Outside TSC-deadline mode the deadline is ignored and reads 0; inside it the initial count is ignored.

    Intel SDM 3A, 12.5.4.1.
    """
    make_vm.run(GUEST, "other_modes", x2apic, cpuid=offer_deadline)


@pytest.mark.requires("KVM_CAP_TSC_DEADLINE_TIMER", "KVM_CAP_GET_TSC_KHZ")
@MODES
def test_leaving_deadline_mode(make_vm: MakeVm, kvm: Kvm, x2apic: int) -> None:
    """Switching from TSC-deadline mode to another one disarms the timer.

    Intel SDM 3A, 12.5.4.1.
    """
    make_vm.run(GUEST, "switch_mode", x2apic, milliseconds(kvm, 5), cpuid=offer_deadline)


def test_deadline_mode_without_cpuid(make_vm: MakeVm) -> None:
    """Without CPUID.1:ECX.TSC_DEADLINE the timer's entry has no such mode: the bit does not stick.

    Intel SDM 3A, 12.5.4.1 (the bit is reserved then).
    """
    make_vm.run(GUEST, "entry_without_deadline", cpuid=hide_deadline)
