/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The local APIC.  xapic_* and x2apic_* reach it through MMIO and MSRs; apic_*
 * use the mode that apic_enable() or x2apic_enable() left this vCPU in.
 */
#ifndef KVMPY_APIC_H
#define KVMPY_APIC_H

#include <kvmpy/io.h>
#include <kvmpy/processor.h>

#define MSR_IA32_APICBASE	0x1b
#define APICBASE_BSP		BIT(8)
#define APICBASE_EXTD		BIT(10)
#define APICBASE_ENABLE		BIT(11)
#define MSR_X2APIC_BASE		0x800
#define MSR_IA32_TSC_DEADLINE	0x6e0

#define APIC_ID			0x020
#define APIC_LVR		0x030
#define APIC_TASKPRI		0x080
#define APIC_PROCPRI		0x0a0
#define APIC_EOI		0x0b0
#define APIC_LDR		0x0d0
#define APIC_DFR		0x0e0
#define APIC_SPIV		0x0f0
#define   APIC_SPIV_ENABLE	BIT(8)
#define APIC_ISR		0x100
#define APIC_TMR		0x180
#define APIC_IRR		0x200
#define APIC_ESR		0x280
#define APIC_ICR		0x300
#define APIC_ICR2		0x310
#define   APIC_DM_FIXED		0x00000
#define   APIC_DM_LOWEST	0x00100
#define   APIC_DM_SMI		0x00200
#define   APIC_DM_NMI		0x00400
#define   APIC_DM_INIT		0x00500
#define   APIC_DM_STARTUP	0x00600
#define   APIC_DEST_LOGICAL	0x00800
#define   APIC_ICR_BUSY		0x01000
#define   APIC_INT_ASSERT	0x04000
#define   APIC_INT_LEVEL	0x08000
#define   APIC_DEST_SELF	0x40000
#define   APIC_DEST_ALL		0x80000
#define   APIC_DEST_OTHERS	0xc0000
#define APIC_LVTT		0x320
#define   APIC_LVT_MASKED	0x10000
#define   APIC_TIMER_ONESHOT	0x00000
#define   APIC_TIMER_PERIODIC	0x20000
#define   APIC_TIMER_DEADLINE	0x40000
#define APIC_LVTTHMR		0x330
#define APIC_LVTPC		0x340
#define APIC_LVT0		0x350
#define APIC_LVT1		0x360
#define APIC_LVTERR		0x370
#define APIC_TMICT		0x380
#define APIC_TMCCT		0x390
#define APIC_TDCR		0x3e0
#define   APIC_TDR_DIV_1	0xb
#define   APIC_TDR_DIV_16	0x3
#define APIC_SELF_IPI		0x3f0

static __always_inline u32 xapic_read(u32 reg)
{
	return mmio_read32((void *)(uintptr_t)(KVMPY_XAPIC_GVA + reg));
}

static __always_inline void xapic_write(u32 reg, u32 value)
{
	mmio_write32((void *)(uintptr_t)(KVMPY_XAPIC_GVA + reg), value);
}

static __always_inline u64 x2apic_read(u32 reg)
{
	return rdmsr(MSR_X2APIC_BASE + (reg >> 4));
}

static __always_inline void x2apic_write(u32 reg, u64 value)
{
	wrmsr(MSR_X2APIC_BASE + (reg >> 4), value);
}

static __always_inline struct guest_fault x2apic_write_safe(u32 reg, u64 value)
{
	return wrmsr_safe(MSR_X2APIC_BASE + (reg >> 4), value);
}

static inline u32 apic_read(u32 reg)
{
	return guest_cpu()->x2apic ? x2apic_read(reg) : xapic_read(reg);
}

static inline void apic_write(u32 reg, u32 value)
{
	if (guest_cpu()->x2apic)
		x2apic_write(reg, value);
	else
		xapic_write(reg, value);
}

static inline void apic_eoi(void)
{
	apic_write(APIC_EOI, 0);
}

/* Switch the APIC on by software, in xAPIC or x2APIC mode; spurious vector 0xff. */
void apic_enable(void);
void x2apic_enable(void);
/* Off by APIC base, as after RESET without a boot loader. */
void apic_disable(void);

u32 apic_id(void);

/* Send @icr (vector, delivery mode, shorthand) to the APIC id @dest, after what is under way. */
void apic_send(u32 dest, u32 icr);

static inline void apic_send_ipi(u32 dest, u8 vector)
{
	apic_send(dest, APIC_DM_FIXED | APIC_INT_ASSERT | vector);
}

static inline void apic_send_self(u8 vector)
{
	apic_send(0, APIC_DM_FIXED | APIC_INT_ASSERT | APIC_DEST_SELF | vector);
}

static inline void apic_send_nmi(u32 dest)
{
	apic_send(dest, APIC_DM_NMI | APIC_INT_ASSERT);
}

/* @mode: APIC_TIMER_ONESHOT or APIC_TIMER_PERIODIC; @count in ticks of the undivided APIC clock. */
void apic_timer_start(u8 vector, u32 mode, u32 count);
void apic_timer_deadline(u8 vector, u64 tsc);
void apic_timer_stop(void);

/* Is @vector set in the 256-bit register that starts at @reg (APIC_ISR, APIC_TMR, APIC_IRR)? */
bool apic_test_vector(u32 reg, u8 vector);

#endif /* KVMPY_APIC_H */
