/* SPDX-License-Identifier: Apache-2.0 */
/* Privileged and model-specific instructions. */
#ifndef KVMPY_PROCESSOR_H
#define KVMPY_PROCESSOR_H

#include <kvmpy/exception.h>

struct cpuid_regs {
	u32 eax, ebx, ecx, edx;
};

static __always_inline struct cpuid_regs cpuid(u32 leaf, u32 subleaf)
{
	struct cpuid_regs r = { .eax = leaf, .ecx = subleaf };

	asm volatile("cpuid" : "+a"(r.eax), "=b"(r.ebx), "+c"(r.ecx), "=d"(r.edx) : : "memory");
	return r;
}

static __always_inline u64 rdmsr(u32 msr)
{
	u32 low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr) : "memory");
	return low | (u64)high << 32;
}

static __always_inline void wrmsr(u32 msr, u64 value)
{
	asm volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

/* *value is 0 after a fault. */
static __always_inline struct guest_fault rdmsr_safe(u32 msr, u64 *value)
{
	u32 low = 0, high = 0;
	struct guest_fault fault;

	fault = GUEST_TRY("rdmsr", : "+a"(low), "+d"(high) : "c"(msr) : "memory");
	*value = fault.faulted ? 0 : low | (u64)high << 32;
	return fault;
}

static __always_inline struct guest_fault wrmsr_safe(u32 msr, u64 value)
{
	u32 low = value, high = value >> 32;

	return GUEST_TRY("wrmsr", : : "c"(msr), "a"(low), "d"(high) : "memory");
}

static __always_inline u64 rdtsc(void)
{
	u32 low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return low | (u64)high << 32;
}

static __always_inline u64 rdtscp(u32 *aux)
{
	u32 low, high;

	asm volatile("rdtscp" : "=a"(low), "=d"(high), "=c"(*aux) : : "memory");
	return low | (u64)high << 32;
}

#define __KVMPY_REG(reg)							\
static __always_inline u64 read_##reg(void)					\
{										\
	unsigned long value;							\
										\
	asm volatile("mov %%" #reg ", %0" : "=r"(value) : : "memory");		\
	return value;								\
}										\
										\
static __always_inline void write_##reg(u64 value)				\
{										\
	asm volatile("mov %0, %%" #reg : : "r"((unsigned long)value) : "memory"); \
}										\
										\
static __always_inline struct guest_fault write_##reg##_safe(u64 value)	\
{										\
	return GUEST_TRY("mov %0, %%" #reg, : : "r"((unsigned long)value) : "memory"); \
}

__KVMPY_REG(cr0)
__KVMPY_REG(cr2)
__KVMPY_REG(cr3)
__KVMPY_REG(cr4)
#ifdef __x86_64__
__KVMPY_REG(cr8)
#endif
__KVMPY_REG(dr0)
__KVMPY_REG(dr1)
__KVMPY_REG(dr2)
__KVMPY_REG(dr3)
__KVMPY_REG(dr6)
__KVMPY_REG(dr7)
#undef __KVMPY_REG

static __always_inline u64 xgetbv(u32 index)
{
	u32 low, high;

	asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(index) : "memory");
	return low | (u64)high << 32;
}

static __always_inline struct guest_fault xsetbv_safe(u32 index, u64 value)
{
	u32 low = value, high = value >> 32;

	return GUEST_TRY("xsetbv", : : "c"(index), "a"(low), "d"(high) : "memory");
}

static __always_inline u64 read_rflags(void)
{
	unsigned long flags;

	asm volatile("pushf; pop %0" : "=r"(flags) : : "memory");
	return flags;
}

static __always_inline void write_rflags(u64 flags)
{
	asm volatile("push %0; popf" : : "r"((unsigned long)flags) : "memory", "cc");
}

static __always_inline void invlpg(const volatile void *address)
{
	asm volatile("invlpg (%0)" : : "r"(address) : "memory");
}

static __always_inline void flush_tlb(void)
{
	write_cr3(read_cr3());
}

static __always_inline void sti(void)
{
	asm volatile("sti" : : : "memory");
}

static __always_inline void cli(void)
{
	asm volatile("cli" : : : "memory");
}

static __always_inline void hlt(void)
{
	asm volatile("hlt" : : : "memory");
}

/*
 * Wait for an interrupt with no window in which it could be missed, also where
 * STI's shadow gets lost (QEMU without KVM forgets it at VMRUN): one that comes
 * between the two instructions returns behind the HLT.
 */
static __always_inline void sti_hlt(void)
{
	asm volatile("sti\n"
		     "771: hlt\n"
		     ".pushsection .guest_idle, \"a\", @progbits\n"
		     ".long 771b\n"
		     ".popsection" : : : "memory");
}

static __always_inline void cpu_relax(void)
{
	asm volatile("pause" : : : "memory");
}

/*
 * Let in what is pending, then switch interrupts off. One instruction would do,
 * but hosts that emulate ring 0 look for interrupts every 1024 of them.
 */
static inline void irq_window(void)
{
	sti();
	for (int i = 0; i < 600; i++)
		cpu_relax();
	cli();
}

#endif /* KVMPY_PROCESSOR_H */
