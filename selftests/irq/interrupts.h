/* SPDX-License-Identifier: Apache-2.0 */
/* Interrupts counted per vCPU and vector, with an EOI of the local APIC each. */
#ifndef SELFTESTS_INTERRUPTS_H
#define SELFTESTS_INTERRUPTS_H

#include <kvmpy/guest.h>

#define INTERRUPTS_CPUS		8

static volatile u32 interrupts[INTERRUPTS_CPUS][256];

static inline u32 irq_count(u8 vector)
{
	return interrupts[guest_cpu_index()][vector];
}

static void irq_counter(struct exception_frame *frame)
{
	interrupts[guest_cpu_index()][frame->vector]++;
	apic_eoi();
}

static inline void irq_install(u8 vector)
{
	guest_exception_install(vector, irq_counter);
}

/* Halt until this vCPU has taken @vector @count times, and leave interrupts off. */
static inline void irq_wait(u8 vector, u32 count)
{
	cli();
	while (irq_count(vector) < count) {
		sti_hlt();
		cli();
	}
}

#endif /* SELFTESTS_INTERRUPTS_H */
