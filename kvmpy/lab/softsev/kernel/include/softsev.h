/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Software AMD-SP: what the parts in the CPU code, the RMP, KVM and the ccp driver know of each other.
 *
 * Everything is off unless the kernel is booted with "softsev".
 */
#ifndef _ASM_X86_SOFTSEV_H
#define _ASM_X86_SOFTSEV_H

#include <linux/sched.h>
#include <linux/types.h>

/* Bits of CPUID 0x8000001f EAX. */
#define SOFTSEV_CPUID_SEV	BIT(1)
#define SOFTSEV_CPUID_ES	BIT(3)
#define SOFTSEV_CPUID_SNP	BIT(4)

/* ASIDs 1 to 32 are for SEV-ES and SNP, 33 to 64 for SEV. */
#define SOFTSEV_ASID_MAX	64
#define SOFTSEV_ASID_MIN_SEV	33

struct cpuinfo_x86;

#ifdef CONFIG_SOFTSEV
extern bool softsev_on;

static __always_inline bool softsev_enabled(void)
{
	return softsev_on;
}

void softsev_cpu_init(struct cpuinfo_x86 *c);
unsigned int softsev_cbit(void);
bool softsev_smt(void);

void softsev_cpuid_count(u32 fn, u32 index, u32 *eax, u32 *ebx, u32 *ecx, u32 *edx);
void softsev_cpuid(u32 fn, u32 *eax, u32 *ebx, u32 *ecx, u32 *edx);
u32 softsev_cpuid_eax(u32 fn);
#else
static inline bool softsev_enabled(void) { return false; }
static inline void softsev_cpu_init(struct cpuinfo_x86 *c) { }
#endif

/*
 * Memory that stands for the platform's own: between these two no allocation of this thread fails by fault injection
 * (Documentation/fault-injection/fault-injection.rst, fail-nth), nor is it counted.
 */
static inline unsigned int softsev_own_memory_begin(void)
{
#ifdef CONFIG_FAULT_INJECTION
	unsigned int nth = current->fail_nth;

	current->fail_nth = 0;
	return nth;
#else
	return 0;
#endif
}

static inline void softsev_own_memory_end(unsigned int nth)
{
#ifdef CONFIG_FAULT_INJECTION
	current->fail_nth = nth;
#endif
}

/**
 * struct softsev_rmp - one RMP entry
 * @gpa: the guest address that the page belongs at
 * @asid: the guest that it belongs to, or 0
 * @assigned: it is not the hypervisor's
 * @large: it stands at the first page of 2M and answers for all of them
 * @immutable: the hypervisor may not change it
 * @vmsa: the page is a VMSA, or a guest context
 * @validated: the guest has accepted it
 * @perms: permissions of VMPL1 to VMPL3; VMPL0 may always do everything
 */
struct softsev_rmp {
	u64 gpa;
	u32 asid;
	u8 assigned  : 1,
	   large     : 1,
	   immutable : 1,
	   vmsa	     : 1,
	   validated : 1;
	u8 perms[3];
};

/* What RMPUPDATE, PSMASH, PVALIDATE and RMPADJUST return (APM volume 3). */
#define SOFTSEV_RMP_OK			0
#define SOFTSEV_RMP_FAIL_INPUT		1
#define SOFTSEV_RMP_FAIL_PERMISSION	2
#define SOFTSEV_RMP_FAIL_INUSE		3
#define SOFTSEV_RMP_FAIL_OVERLAP	4
#define SOFTSEV_RMP_FAIL_SIZEMISMATCH	6
#define SOFTSEV_RMP_FAIL_BADADDR	7

/* Instructions of the host. */
int softsev_rmpupdate(u64 pfn, u64 gpa, u32 asid, bool assigned, bool large, bool immutable);
int softsev_psmash(u64 pfn);

/* What the processor and the firmware do. */
void softsev_rmp_read(u64 pfn, struct softsev_rmp *e);
void softsev_rmp_write(u64 pfn, const struct softsev_rmp *e);
void softsev_rmp_reset(void);
bool softsev_rmp_uses(u32 asid);
u64 softsev_rmp_generation(void);
void *softsev_mem(u64 pa);

/* What the host may do with its memory. */
int softsev_host_may_write(u64 pfn, bool large, bool may);
unsigned long softsev_host_fault(unsigned long error, unsigned long address);
int softsev_host_write(u64 pfn);
void softsev_rmp_describe(u64 pfn);

struct seq_file;
int softsev_rmp_show(struct seq_file *m);

#endif
