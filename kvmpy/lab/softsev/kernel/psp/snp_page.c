// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the states of pages, and the commands that change them (SNP firmware ABI, chapters 5 and 8).
 */
#include <linux/mm.h>
#include "psp.h"

#define LARGE_PAGE	BIT(0)
#define RECLAIM_RESERVED	GENMASK_ULL(11, 1)
#define PAGES_2M	512

static struct softsev_platform *p = &softsev_platform;

/**
 * softsev_page_state() - the state that an RMP entry stands for
 * @pa: an address in the page
 * @e: becomes the entry
 *
 * Firmware: rmp_entry_get_state().
 */
enum softsev_page softsev_page_state(u64 pa, struct softsev_rmp *e)
{
	softsev_rmp_read(PHYS_PFN(softsev_pa(pa)), e);
	if (!e->assigned)
		return PAGE_HYPERVISOR;
	if (!e->immutable) {
		if (!e->asid)
			return PAGE_RECLAIM;
		return e->validated ? PAGE_GUEST_VALID : PAGE_GUEST_INVALID;
	}
	if (e->asid)
		return e->validated ? PAGE_PRE_SWAP : PAGE_PRE_GUEST;
	if (e->vmsa)
		return PAGE_CONTEXT;
	return e->gpa ? PAGE_METADATA : PAGE_FIRMWARE;
}

/**
 * softsev_page_check() - whether the pages that the firmware is to write to are its own
 * @pa: an address that the hypervisor named
 * @len: how many bytes
 *
 * That is asked once SNP is initialised, of pages that have an RMP entry. Of a range that begins inside a page, the last
 * page is not looked at: neither does the firmware, in check_page_range_firmware_writable().
 *
 * Return: SEV_RET_SUCCESS or INVALID_PAGE_STATE.
 */
u32 softsev_page_check(u64 pa, u64 len)
{
	struct softsev_rmp e;
	u64 at;

	for (at = 0; p->snp && at < len; at += e.large ? PMD_SIZE : PAGE_SIZE)
		if (softsev_page_state(pa + at, &e) != PAGE_FIRMWARE && pfn_valid(PHYS_PFN(softsev_pa(pa + at))))
			return RET_INVALID_PAGE_STATE;
	return SEV_RET_SUCCESS;
}

/**
 * softsev_writable() - whether the firmware can write to memory that the hypervisor named
 * @pa: its address
 * @len: how many bytes
 *
 * Return: SEV_RET_SUCCESS, INVALID_PAGE_STATE or INVALID_ADDRESS.
 */
u32 softsev_writable(u64 pa, u64 len)
{
	u32 ret = softsev_page_check(pa, len);

	return ret || softsev_pa_valid(pa, len) ? ret : SEV_RET_INVALID_ADDRESS;
}

u32 softsev_snp_page_reclaim(void *buf)
{
	struct sev_data_snp_page_reclaim *d = buf;
	bool large = d->paddr & LARGE_PAGE;
	u64 pa = softsev_pa(d->paddr) & PAGE_MASK;
	enum softsev_page state;
	struct softsev_rmp e;

	if (d->paddr & RECLAIM_RESERVED)
		return SEV_RET_INVALID_PARAM;
	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!softsev_pa_valid(pa, large ? PMD_SIZE : PAGE_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	state = softsev_page_state(pa, &e);
	if (large != e.large)
		return RET_INVALID_PAGE_SIZE;
	if (large && !IS_ALIGNED(pa, PMD_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	if (!e.immutable)
		return SEV_RET_SUCCESS;
	if (state == PAGE_CONTEXT)
		return RET_INVALID_PAGE_STATE;
	/* A pre-guest page becomes the guest's, a pre-swap page its own again, the others a reclaim page. */
	e.immutable = 0;
	softsev_rmp_write(PHYS_PFN(pa), &e);
	return SEV_RET_SUCCESS;
}

/* 512 entries of 4K in a row become one of 2M. */
u32 softsev_snp_page_unsmash(void *buf)
{
	struct sev_data_snp_page_unsmash *d = buf;
	u64 pa = softsev_pa(d->paddr), pfn = PHYS_PFN(pa);
	enum softsev_page state;
	struct softsev_rmp first, e;
	int i;

	if ((d->paddr & RECLAIM_RESERVED) || !IS_ALIGNED(pa, PMD_SIZE))
		return SEV_RET_INVALID_PARAM;
	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!softsev_pa_valid(pa, PMD_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	state = softsev_page_state(pa, &first);
	for (i = 0; i < PAGES_2M; i++)
		if (softsev_page_state(pa + i * PAGE_SIZE, &e) != state || e.large || !e.immutable || e.vmsa || !e.asid ||
		    e.asid != first.asid || e.gpa != first.gpa + i * PAGE_SIZE ||
		    memcmp(e.perms, first.perms, sizeof(e.perms)))
			return RET_INVALID_PAGE_STATE;
	if (!IS_ALIGNED(first.gpa, PMD_SIZE))
		return RET_INVALID_PAGE_STATE;
	memset(&e, 0, sizeof(e));
	for (i = 1; i < PAGES_2M; i++)
		softsev_rmp_write(pfn + i, &e);
	first.large = 1;
	softsev_rmp_write(pfn, &first);
	return SEV_RET_SUCCESS;
}
