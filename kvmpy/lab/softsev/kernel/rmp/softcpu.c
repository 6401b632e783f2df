// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the features that the processor seems to have, and the CPUID leaf that describes them.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/cache.h>
#include <linux/cc_platform.h>
#include <linux/export.h>
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/printk.h>
#include <linux/topology.h>
#include <asm/cmdline.h>
#include <asm/cpufeature.h>
#include <asm/processor.h>
#include <asm/setup.h>
#include <asm/softsev.h>
#if __has_include(<asm/cpuid/api.h>)
#include <asm/cpuid/api.h>
#endif

#define CPUID_SEV	0x8000001f
#define CPUID_EXT_MAX	0x80000000

bool softsev_on __ro_after_init;
EXPORT_SYMBOL_GPL(softsev_on);

/* Read long before parameters are: this only makes it a known one. */
static int __init softsev_parameter(char *value)
{
	return 1;
}
__setup("softsev", softsev_parameter);

/**
 * softsev_cpu_init() - called while a processor is identified, so that its features are there from the beginning
 * @c: the processor
 */
void softsev_cpu_init(struct cpuinfo_x86 *c)
{
	if (system_state < SYSTEM_RUNNING && cmdline_find_option_bool(boot_command_line, "softsev"))
		softsev_on = true;
	if (!softsev_on)
		return;
	set_cpu_cap(c, X86_FEATURE_SEV);
	set_cpu_cap(c, X86_FEATURE_SEV_ES);
	set_cpu_cap(c, X86_FEATURE_SEV_SNP);
	set_cpu_cap(c, X86_FEATURE_DECODEASSISTS);
	set_cpu_cap(c, X86_FEATURE_FLUSHBYASID);
}

/**
 * softsev_cbit() - the position of the encryption bit: the highest physical address bit that nested paging takes
 */
unsigned int softsev_cbit(void)
{
	return boot_cpu_data.x86_phys_bits - 1;
}
EXPORT_SYMBOL_GPL(softsev_cbit);

void softsev_cpuid_count(u32 fn, u32 index, u32 *eax, u32 *ebx, u32 *ecx, u32 *edx)
{
	if (!softsev_on || fn != CPUID_SEV) {
		cpuid_count(fn, index, eax, ebx, ecx, edx);
		if (softsev_on && fn == CPUID_EXT_MAX)
			*eax = max_t(u32, *eax, CPUID_SEV);
		return;
	}
	*eax = SOFTSEV_CPUID_SEV | SOFTSEV_CPUID_ES | SOFTSEV_CPUID_SNP;
	*ebx = softsev_cbit();
	*ecx = SOFTSEV_ASID_MAX;
	*edx = SOFTSEV_ASID_MIN_SEV;
}
EXPORT_SYMBOL_GPL(softsev_cpuid_count);

void softsev_cpuid(u32 fn, u32 *eax, u32 *ebx, u32 *ecx, u32 *edx)
{
	softsev_cpuid_count(fn, 0, eax, ebx, ecx, edx);
}
EXPORT_SYMBOL_GPL(softsev_cpuid);

u32 softsev_cpuid_eax(u32 fn)
{
	u32 eax, ebx, ecx, edx;

	softsev_cpuid_count(fn, 0, &eax, &ebx, &ecx, &edx);
	return eax;
}
EXPORT_SYMBOL_GPL(softsev_cpuid_eax);

/**
 * softsev_smt() - whether the machine has hyper-threads, whether or not this kernel runs them
 *
 * As the firmware sees it: what "nosmt" and smt/control do changes nothing.
 */
bool softsev_smt(void)
{
	return topology_max_smt_threads() > 1;
}
EXPORT_SYMBOL_GPL(softsev_smt);
