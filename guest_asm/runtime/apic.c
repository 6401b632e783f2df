// SPDX-License-Identifier: Apache-2.0
#include <kvmpy/apic.h>
#include <kvmpy/atomic.h>

static void software_enable(void)
{
	apic_write(APIC_SPIV, APIC_SPIV_ENABLE | 0xff);
}

void apic_disable(void)
{
	wrmsr(MSR_IA32_APICBASE, rdmsr(MSR_IA32_APICBASE) & ~(APICBASE_ENABLE | APICBASE_EXTD));
	guest_cpu()->x2apic = false;
}

void apic_enable(void)
{
	u64 base = rdmsr(MSR_IA32_APICBASE);

	/* The way from x2APIC mode to xAPIC mode leads through "disabled". */
	if (base & APICBASE_EXTD) {
		apic_disable();
		base &= ~APICBASE_EXTD;
	}
	wrmsr(MSR_IA32_APICBASE, base | APICBASE_ENABLE);
	guest_cpu()->x2apic = false;
	software_enable();
}

void x2apic_enable(void)
{
	u64 base = rdmsr(MSR_IA32_APICBASE);

	if (!(base & APICBASE_ENABLE))
		wrmsr(MSR_IA32_APICBASE, base | APICBASE_ENABLE);
	wrmsr(MSR_IA32_APICBASE, base | APICBASE_ENABLE | APICBASE_EXTD);
	guest_cpu()->x2apic = true;
	software_enable();
}

u32 apic_id(void)
{
	return guest_cpu()->x2apic ? x2apic_read(APIC_ID) : xapic_read(APIC_ID) >> 24;
}

void apic_send(u32 dest, u32 icr)
{
	if (guest_cpu()->x2apic) {
		x2apic_write(APIC_ICR, (u64)dest << 32 | icr);
		return;
	}
	while (xapic_read(APIC_ICR) & APIC_ICR_BUSY)
		cpu_relax();
	xapic_write(APIC_ICR2, dest << 24);
	xapic_write(APIC_ICR, icr);
}

void apic_timer_start(u8 vector, u32 mode, u32 count)
{
	apic_write(APIC_TDCR, APIC_TDR_DIV_1);
	apic_write(APIC_LVTT, mode | vector);
	apic_write(APIC_TMICT, count);
}

void apic_timer_deadline(u8 vector, u64 tsc)
{
	apic_write(APIC_LVTT, APIC_TIMER_DEADLINE | vector);
	/* An xAPIC write is ordered with the MSR's only by a fence (SDM, "TSC-Deadline Mode"). */
	smp_mb();
	wrmsr(MSR_IA32_TSC_DEADLINE, tsc);
}

void apic_timer_stop(void)
{
	apic_write(APIC_LVTT, APIC_LVT_MASKED);
	apic_write(APIC_TMICT, 0);
}

bool apic_test_vector(u32 reg, u8 vector)
{
	return apic_read(reg + vector / 32 * 0x10) & 1u << vector % 32;
}
