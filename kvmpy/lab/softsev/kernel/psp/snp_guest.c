// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: contexts of SNP guests, and the commands about a guest that is there (SNP firmware ABI, chapter 8).
 */
#include <linux/mm.h>
#include <linux/topology.h>
#include "psp.h"

#define POLICY_DEBUG	BIT_ULL(19)
#define POLICY_SINGLE_SOCKET	BIT_ULL(20)

static struct softsev_platform *p = &softsev_platform;

/**
 * softsev_gctx() - what every command with a guest context begins with
 * @pa: the context's address
 * @ret: becomes SEV_RET_SUCCESS, or the firmware's error
 *
 * Return: the context, or NULL.
 */
struct softsev_gctx *softsev_gctx(u64 pa, u32 *ret)
{
	struct softsev_rmp e;

	if (!PAGE_ALIGNED(pa))
		*ret = SEV_RET_INVALID_PARAM;
	else if (!p->snp)
		*ret = SEV_RET_INVALID_PLATFORM_STATE;
	else if (!softsev_pa_valid(pa, PAGE_SIZE) || softsev_page_state(pa, &e) != PAGE_CONTEXT)
		*ret = SEV_RET_INVALID_GUEST;
	else
		*ret = SEV_RET_SUCCESS;
	return *ret ? NULL : softsev_va(pa);
}

u32 softsev_snp_gctx_create(void *buf)
{
	struct sev_data_snp_addr *d = buf;
	struct softsev_gctx *c;
	struct softsev_rmp e;

	if (!PAGE_ALIGNED(d->address))
		return SEV_RET_INVALID_PARAM;
	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!softsev_pa_valid(d->address, PAGE_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_page_state(d->address, &e) != PAGE_FIRMWARE)
		return RET_INVALID_PAGE_STATE;
	if (e.large)
		return RET_INVALID_PAGE_SIZE;
	BUILD_BUG_ON(sizeof(*c) > PAGE_SIZE);
	c = softsev_va(d->address);
	memset(c, 0, PAGE_SIZE);
	c->state = GCTX_INIT;
	c->launch_tcb = p->committed_tcb;
	e.vmsa = 1;
	softsev_rmp_write(PHYS_PFN(softsev_pa(d->address)), &e);
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_activate(void *buf)
{
	struct sev_data_snp_activate *d = buf;
	struct softsev_asid_user user;
	struct softsev_gctx *c;
	u32 ret;

	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	if (c->state == GCTX_INIT)
		return SEV_RET_INVALID_GUEST_STATE;
	if (softsev_rmp_uses(d->asid))
		return RET_INVALID_CONFIG;
	if ((c->policy & POLICY_SINGLE_SOCKET) && topology_max_packages() > 1)
		return SEV_RET_POLICY_FAILURE;
	user = (struct softsev_asid_user) {
		.owner = softsev_pa(d->gctx_paddr),
		.es = true,
		.bound = c->asid,
		.running = c->state == GCTX_RUNNING,
	};
	ret = softsev_asid_take(d->asid, &user);
	if (!ret)
		c->asid = d->asid;
	return ret;
}

u32 softsev_snp_decommission(void *buf)
{
	struct sev_data_snp_addr *d = buf;
	struct softsev_gctx *c;
	struct softsev_rmp e;
	u32 ret;

	c = softsev_gctx(d->address, &ret);
	if (!c)
		return ret;
	softsev_asid_release(c->asid, softsev_pa(d->address));
	if (c->state != GCTX_INIT)
		softsev_gctx_count(-1);
	memset(c, 0, PAGE_SIZE);
	softsev_page_state(d->address, &e);
	e.vmsa = 0;
	softsev_rmp_write(PHYS_PFN(softsev_pa(d->address)), &e);
	return SEV_RET_SUCCESS;
}

struct snp_guest_status {
	u64 policy;
	u32 asid;
	u8 state, reserved[3];
	u32 vcek_disabled, reserved_14;
	u64 reserved_18;
} __packed;

u32 softsev_snp_guest_status(void *buf)
{
	struct sev_data_snp_guest_status *d = buf;
	struct snp_guest_status *s;
	struct softsev_gctx *c;
	u32 ret;

	if (!PAGE_ALIGNED(d->gctx_paddr) || offset_in_page(d->address) + sizeof(*s) > PAGE_SIZE)
		return SEV_RET_INVALID_PARAM;
	c = softsev_gctx(d->gctx_paddr, &ret);
	ret = ret ?: softsev_writable(d->address, sizeof(*s));
	if (ret)
		return ret;
	s = softsev_va(d->address);
	memset(s, 0, sizeof(*s));
	s->policy = c->policy;
	s->asid = c->asid;
	s->state = c->state;
	s->vcek_disabled = c->vcek_disabled;
	return SEV_RET_SUCCESS;
}

/* What both commands check of the guest that owns the page at @guest_pa. */
static u32 debug_copy(struct sev_data_snp_dbg *d, struct softsev_gctx *c, u64 guest_pa)
{
	struct softsev_rmp e;

	softsev_page_state(guest_pa, &e);
	if (e.asid != c->asid)
		return RET_INVALID_PAGE_OWNER;
	if (!(c->policy & POLICY_DEBUG))
		return SEV_RET_POLICY_FAILURE;
	if (!c->asid)
		return SEV_RET_INACTIVE;
	if (!softsev_pa_valid(d->src_addr, PAGE_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	memcpy(softsev_va(d->dst_addr), softsev_va(d->src_addr), PAGE_SIZE);
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_dbg_decrypt(void *buf)
{
	struct sev_data_snp_dbg *d = buf;
	enum softsev_page src, dst;
	struct softsev_gctx *c;
	struct softsev_rmp e;
	u32 ret;

	if (!PAGE_ALIGNED(d->gctx_paddr | d->src_addr | d->dst_addr))
		return SEV_RET_INVALID_PARAM;
	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	src = softsev_page_state(d->src_addr, &e);
	dst = softsev_page_state(d->dst_addr, &e);
	if ((src != PAGE_PRE_GUEST && src != PAGE_PRE_SWAP && src != PAGE_GUEST_INVALID && src != PAGE_GUEST_VALID) ||
	    dst != PAGE_FIRMWARE)
		return RET_INVALID_PAGE_STATE;
	return debug_copy(d, c, d->src_addr);
}

u32 softsev_snp_dbg_encrypt(void *buf)
{
	struct sev_data_snp_dbg *d = buf;
	enum softsev_page dst;
	struct softsev_gctx *c;
	struct softsev_rmp e;
	u32 ret;

	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!PAGE_ALIGNED(d->gctx_paddr | d->src_addr | d->dst_addr))
		return SEV_RET_INVALID_PARAM;
	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	dst = softsev_page_state(d->dst_addr, &e);
	if (dst != PAGE_PRE_GUEST && dst != PAGE_PRE_SWAP)
		return RET_INVALID_PAGE_STATE;
	return debug_copy(d, c, d->dst_addr);
}
