// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the CPUID page (SNP firmware ABI, 8.17.2.6). The firmware compares it with what this CPU can do and,
 * when it says more, corrects it and refuses.
 */
#include <linux/kernel.h>
#include "psp.h"

#define CPUID_ENTRIES	64

struct cpuid_entry {
	u32 eax_in, ecx_in;
	u64 xcr0_in, xss_in;
	u32 eax, ebx, ecx, edx;
	u64 reserved;
} __packed;

struct cpuid_page {
	u32 count, reserved;
	u64 reserved_8;
	struct cpuid_entry entries[CPUID_ENTRIES];
} __packed;

enum { ANY, SUBSET, EXACT };

/* How the registers of a function are compared; what is not here may be anything. */
static const struct rule {
	u32 function, index;
	u8 eax, ebx, ecx, edx;
} rules[] = {
	{ 0x00000001, 0, ANY, ANY, SUBSET, SUBSET },
	{ 0x00000007, 0, ANY, SUBSET, SUBSET, SUBSET },
	{ 0x0000000d, 0, SUBSET, ANY, ANY, ANY },
	{ 0x0000000d, 1, SUBSET, ANY, SUBSET, ANY },
	{ 0x80000001, 0, ANY, ANY, SUBSET, SUBSET },
	{ 0x80000007, 0, ANY, SUBSET, ANY, SUBSET },
	{ 0x80000008, 0, ANY, SUBSET, ANY, ANY },
	{ 0x8000000a, 0, ANY, ANY, ANY, SUBSET },
	{ 0x8000001f, 0, SUBSET, EXACT, ANY, ANY },
	{ 0x80000021, 0, SUBSET, ANY, ANY, ANY },
};

/* Bits that a hypervisor adds, and that the CPU itself does not show. */
#define LEAF1_ECX_ALLOWED	(BIT(21) | BIT(27) | BIT(31))	/* x2APIC, OSXSAVE, hypervisor */

static bool correct(u32 *value, u32 allowed, u8 how)
{
	u32 old = *value;

	if (how == SUBSET)
		*value &= allowed;
	else if (how == EXACT)
		*value = allowed;
	return old != *value;
}

/* The size of the XSAVE area for the state components that are on, in the standard form. */
static u32 xsave_size(u64 xcr0)
{
	u32 size = 576, eax, ebx, ecx, edx;
	int i;

	for (i = 2; i < 63; i++) {
		if (!(xcr0 & BIT_ULL(i)))
			continue;
		softsev_cpuid_count(0xd, i, &eax, &ebx, &ecx, &edx);
		size = max(size, eax + ebx);
	}
	return size;
}

static bool correct_entry(struct cpuid_entry *e)
{
	u32 eax, ebx, ecx, edx;
	bool changed = false;
	int i;

	if (e->eax_in == 0xd && e->ecx_in == 0)
		changed |= correct(&e->ebx, xsave_size(e->xcr0_in), EXACT);
	for (i = 0; i < ARRAY_SIZE(rules); i++) {
		if (rules[i].function != e->eax_in || rules[i].index != e->ecx_in)
			continue;
		softsev_cpuid_count(e->eax_in, e->ecx_in, &eax, &ebx, &ecx, &edx);
		if (e->eax_in == 1)
			ecx |= LEAF1_ECX_ALLOWED;
		changed |= correct(&e->eax, eax, rules[i].eax);
		changed |= correct(&e->ebx, ebx, rules[i].ebx);
		changed |= correct(&e->ecx, ecx, rules[i].ecx);
		changed |= correct(&e->edx, edx, rules[i].edx);
	}
	return changed;
}

u32 softsev_cpuid_page(void *page)
{
	struct cpuid_page *c = page;
	bool changed = false;
	u32 i;

	if (c->reserved || c->reserved_8 || c->count > CPUID_ENTRIES)
		return SEV_RET_INVALID_PARAM;
	for (i = 0; i < c->count; i++)
		changed |= c->entries[i].reserved | correct_entry(&c->entries[i]);
	return changed ? SEV_RET_INVALID_PARAM : SEV_RET_SUCCESS;
}
