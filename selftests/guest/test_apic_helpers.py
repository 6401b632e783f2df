# SPDX-License-Identifier: Apache-2.0
"""The guest's helpers for its local APIC do the same in both modes."""

from __future__ import annotations

import pytest

from kvmpy import MakeVm

pytestmark = pytest.mark.requires("KVM_CAP_IRQCHIP")

HELPERS = """
#include <kvmpy/guest.h>

#define VECTOR	0x51

static volatile u32 hits;

static void handler(struct exception_frame *frame)
{
	hits++;
	apic_eoi();
}

static void wait_for(u32 count)
{
	while (hits < count) {
		sti_hlt();
		cli();
	}
}

void guest_main(u64 x2apic)
{
	guest_exception_install(VECTOR, handler);
	x2apic ? x2apic_enable() : apic_enable();

	GUEST_ASSERT_EQ(apic_id(), guest_cpu()->apic_id);
	GUEST_ASSERT_EQ(apic_read(APIC_SPIV), 0x1ffu);
	GUEST_ASSERT_EQ(rdmsr(MSR_IA32_APICBASE) & (APICBASE_ENABLE | APICBASE_EXTD),
			x2apic ? APICBASE_ENABLE | APICBASE_EXTD : APICBASE_ENABLE);

	apic_send_self(VECTOR);
	GUEST_ASSERT(apic_test_vector(APIC_IRR, VECTOR));
	GUEST_ASSERT(!apic_test_vector(APIC_IRR, VECTOR + 1));
	irq_window();
	GUEST_ASSERT_EQ(hits, 1u);
	GUEST_ASSERT(!apic_test_vector(APIC_IRR, VECTOR));
	GUEST_ASSERT(!apic_test_vector(APIC_ISR, VECTOR));

	apic_send_ipi(apic_id(), VECTOR);
	wait_for(2);
	GUEST_ASSERT_EQ(hits, 2u);

	apic_timer_start(VECTOR, APIC_TIMER_ONESHOT, 10000);
	wait_for(3);
	GUEST_ASSERT_EQ(hits, 3u);
	GUEST_ASSERT_EQ(apic_read(APIC_TMCCT), 0u);

	apic_timer_start(VECTOR, APIC_TIMER_PERIODIC, 5000000);
	wait_for(4);
	wait_for(5);
	/* 0 from the end of a period until KVM begins the next one, however late that is. */
	while (!apic_read(APIC_TMCCT))
		cpu_relax();
	apic_timer_stop();
	GUEST_ASSERT_EQ(apic_read(APIC_TMCCT), 0u);
	/* Any number of periods may have passed, and the last one's interrupt may still be pending. */
	irq_window();
	hits = 5;

	if (cpuid(1, 0).ecx & BIT(24)) {
		apic_timer_deadline(VECTOR, rdtsc() + 100000);
		wait_for(6);
		GUEST_ASSERT_EQ(hits, 6u);
		GUEST_ASSERT_EQ(rdmsr(MSR_IA32_TSC_DEADLINE), 0u);
	}

	/* From x2APIC mode, the way back leads through "disabled"; both must come out as asked. */
	apic_enable();
	GUEST_ASSERT_EQ(rdmsr(MSR_IA32_APICBASE) & (APICBASE_ENABLE | APICBASE_EXTD), APICBASE_ENABLE);
	apic_disable();
	GUEST_ASSERT_EQ(rdmsr(MSR_IA32_APICBASE) & (APICBASE_ENABLE | APICBASE_EXTD), 0u);
}
"""


@pytest.mark.parametrize("mode", ["xapic", "x2apic"])
def test_helpers(make_vm: MakeVm, mode: str) -> None:
    """Ids, self IPIs, IPIs, timers in each mode, EOI and the mode switches work as named."""
    vm = make_vm.run(HELPERS, "guest_main", mode == "x2apic")
    assert vm.vcpus[0].done
