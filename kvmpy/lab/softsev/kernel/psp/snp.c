// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the SNP platform, guest contexts, and the states of pages (SNP firmware ABI, chapters 5 and 8).
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/mm.h>
#include <linux/printk.h>
#include <linux/random.h>
#include <linux/topology.h>
#include "psp.h"

#define RANGES_MAX	((PAGE_SIZE - sizeof(struct sev_data_range_list)) / sizeof(struct sev_data_range))
#define LARGE_PAGE	BIT(0)
#define PAGES_2M	512
#define POLICY_DEBUG	BIT_ULL(19)
#define POLICY_SINGLE_SOCKET	BIT_ULL(20)

static struct softsev_platform *p = &softsev_platform;
static unsigned int contexts;

/* softsev_page_state - the state that an RMP entry stands for */
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
		return PAGE_PRE_GUEST;
	if (e->vmsa)
		return PAGE_CONTEXT;
	return e->gpa ? PAGE_METADATA : PAGE_FIRMWARE;
}

/* What a page that the firmware writes to must be: the firmware's, once SNP is initialised. */
static u32 check_output(u64 pa, u32 len)
{
	struct softsev_rmp e;

	if (!softsev_pa_valid(pa, len))
		return SEV_RET_INVALID_ADDRESS;
	if (p->snp && softsev_page_state(pa, &e) != PAGE_FIRMWARE)
		return RET_INVALID_PAGE_STATE;
	return SEV_RET_SUCCESS;
}

/* softsev_gctx - the guest context at an address, or NULL and a firmware error */
struct softsev_gctx *softsev_gctx(u64 pa, u32 *ret)
{
	struct softsev_gctx *c;
	struct softsev_rmp e;

	*ret = SEV_RET_INVALID_PLATFORM_STATE;
	if (!p->snp)
		return NULL;
	*ret = SEV_RET_INVALID_ADDRESS;
	if (!PAGE_ALIGNED(softsev_pa(pa)) || !softsev_pa_valid(pa, PAGE_SIZE))
		return NULL;
	*ret = RET_INVALID_PAGE_STATE;
	if (softsev_page_state(pa, &e) != PAGE_CONTEXT)
		return NULL;
	c = softsev_va(pa);
	*ret = SEV_RET_INVALID_GUEST;
	if (c->magic != GCTX_MAGIC)
		return NULL;
	*ret = SEV_RET_SUCCESS;
	return c;
}

unsigned int softsev_gctx_count(void)
{
	return contexts;
}

static u32 snp_init(void)
{
	if (p->snp || p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	softsev_rmp_reset();
	softsev_asid_reset();
	contexts = 0;
	p->snp = true;
	p->rmp_ready = true;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_init(void *buf)
{
	return snp_init();
}

u32 softsev_snp_init_ex(void *buf)
{
	struct sev_data_snp_init_ex *d = buf;
	struct sev_data_range_list *list;
	unsigned int i;

	if (!d->init_rmp && !p->rmp_ready)
		return 0x20;	/* RMP_INIT_REQUIRED */
	if (d->list_paddr_en) {
		if (!softsev_pa_valid(d->list_paddr, PAGE_SIZE))
			return SEV_RET_INVALID_ADDRESS;
		list = softsev_va(d->list_paddr);
		if (list->num_elements > RANGES_MAX)
			return SEV_RET_INVALID_PARAM;
		for (i = 0; i < list->num_elements; i++)
			if (!PAGE_ALIGNED(list->ranges[i].base))
				return SEV_RET_INVALID_ADDRESS;
	}
	return snp_init();
}

u32 softsev_snp_shutdown(void *buf)
{
	if (p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	p->snp = false;
	contexts = 0;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_status(void *buf)
{
	struct sev_data_snp_addr *d = buf;
	struct sev_user_data_snp_status *s;
	u32 ret = check_output(d->address, sizeof(*s));

	if (ret)
		return ret;
	s = softsev_va(d->address);
	memset(s, 0, sizeof(*s));
	s->api_major = SOFTSEV_API_MAJOR;
	s->api_minor = SOFTSEV_API_MINOR;
	s->build_id = SOFTSEV_BUILD;
	s->state = p->snp;
	s->is_rmp_initialized = p->rmp_ready;
	s->mask_chip_id = p->config.mask_chip_id;
	s->mask_chip_key = p->config.mask_chip_key;
	s->vlek_en = p->vlek;
	s->guest_count = contexts;
	s->current_tcb_version = p->tcb;
	s->reported_tcb_version = p->config.reported_tcb;
	/* Older headers have no name for this bit; its place is fixed: FEATURE_INFO is there. */
	*(u32 *)((u8 *)s + 8) |= BIT(3);
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_df_flush(void *buf)
{
	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	softsev_asid_flush();
	return SEV_RET_SUCCESS;
}

/* SNP_FEATURE_INFO: none of the features is there. Older trees have no structure for it. */
u32 softsev_snp_feature_info(void *buf)
{
	struct {
		u32 length, ecx_in;
		u64 address;
	} __packed *d = buf;
	u32 ret;

	if (d->length < sizeof(*d))
		return SEV_RET_INVALID_LEN;
	ret = check_output(d->address, 16);
	if (ret)
		return ret;
	if (d->ecx_in)
		return SEV_RET_INVALID_PARAM;
	memset(softsev_va(d->address), 0, 16);
	return SEV_RET_SUCCESS;
}

/* Of a TCB version no part may be above that of another. */
static bool tcb_above(u64 a, u64 b)
{
	int i;

	for (i = 0; i < 64; i += 8)
		if ((u8)(a >> i) > (u8)(b >> i))
			return true;
	return false;
}

u32 softsev_snp_config(void *buf)
{
	struct sev_user_data_snp_config *d = buf;

	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->rsvd || memchr_inv(d->rsvd1, 0, sizeof(d->rsvd1)))
		return SEV_RET_INVALID_PARAM;
	if (tcb_above(d->reported_tcb, p->committed_tcb))
		return SEV_RET_INVALID_PARAM;
	p->config = *d;
	if (!d->reported_tcb)
		p->config.reported_tcb = p->tcb;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_commit(void *buf)
{
	struct sev_data_snp_commit *d = buf;

	if (d->len < sizeof(*d))
		return SEV_RET_INVALID_LEN;
	p->committed_tcb = p->tcb;
	p->config.reported_tcb = p->tcb;
	return SEV_RET_SUCCESS;
}

/* A wrapped VLEK cannot be opened without AMD's keys: any one stands for the software's own VLEK. */
u32 softsev_snp_vlek_load(void *buf)
{
	struct {
		u32 len;
		u8 version, rsvd[3];
		u64 address;
	} __packed *d = buf;

	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->len < sizeof(*d))
		return SEV_RET_INVALID_LEN;
	if (d->version)
		return SEV_RET_INVALID_PARAM;
	if (!softsev_pa_valid(d->address, 432))
		return SEV_RET_INVALID_ADDRESS;
	p->vlek = true;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_gctx_create(void *buf)
{
	struct sev_data_snp_addr *d = buf;
	struct softsev_gctx *c;
	struct softsev_rmp e;

	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!PAGE_ALIGNED(softsev_pa(d->address)) || !softsev_pa_valid(d->address, PAGE_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_page_state(d->address, &e) != PAGE_FIRMWARE)
		return RET_INVALID_PAGE_STATE;
	BUILD_BUG_ON(sizeof(*c) > PAGE_SIZE);
	c = softsev_va(d->address);
	memset(c, 0, PAGE_SIZE);
	c->magic = GCTX_MAGIC;
	c->state = GCTX_INIT;
	e.vmsa = 1;
	softsev_rmp_write(PHYS_PFN(softsev_pa(d->address)), &e);
	contexts++;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_activate(void *buf)
{
	struct sev_data_snp_activate *d = buf;
	struct softsev_gctx *c;
	u32 ret;

	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	if (c->state == GCTX_INIT)
		return SEV_RET_INVALID_GUEST_STATE;
	if (c->asid)
		return SEV_RET_ACTIVE;
	if ((c->policy & POLICY_SINGLE_SOCKET) && topology_max_packages() > 1)
		return SEV_RET_POLICY_FAILURE;
	ret = softsev_asid_take(d->asid, 1, SOFTSEV_ASID_MIN_SEV - 1, softsev_pa(d->gctx_paddr));
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
	memset(c, 0, PAGE_SIZE);
	softsev_page_state(d->address, &e);
	e.vmsa = 0;
	softsev_rmp_write(PHYS_PFN(softsev_pa(d->address)), &e);
	contexts--;
	return SEV_RET_SUCCESS;
}

struct snp_guest_status {
	u64 policy;
	u32 asid;
	u8 state, reserved[3];
	u8 reserved_10[32];
	u8 vcek_disabled, reserved_31[63];
	u32 tsc_khz;
} __packed;

u32 softsev_snp_guest_status(void *buf)
{
	struct sev_data_snp_guest_status *d = buf;
	struct snp_guest_status *s;
	struct softsev_gctx *c;
	u32 ret;

	c = softsev_gctx(d->gctx_paddr, &ret);
	ret = ret ?: check_output(d->address, sizeof(*s));
	if (ret)
		return ret;
	s = softsev_va(d->address);
	memset(s, 0, sizeof(*s));
	s->policy = c->policy;
	s->asid = c->asid;
	s->state = c->state;
	s->vcek_disabled = c->vcek_disabled;
	s->tsc_khz = c->tsc_khz;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_page_reclaim(void *buf)
{
	struct sev_data_snp_page_reclaim *d = buf;
	u64 pa = softsev_pa(d->paddr) & ~(u64)LARGE_PAGE;
	struct softsev_rmp e;

	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!PAGE_ALIGNED(pa) || !softsev_pa_valid(pa, PAGE_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	switch (softsev_page_state(pa, &e)) {
	case PAGE_FIRMWARE:
	case PAGE_METADATA:
	case PAGE_PRE_GUEST:
		break;
	case PAGE_RECLAIM:
		return SEV_RET_SUCCESS;
	default:
		return RET_INVALID_PAGE_STATE;
	}
	if (!!(d->paddr & LARGE_PAGE) != e.large)
		return RET_INVALID_PAGE_SIZE;
	e.immutable = 0;
	e.asid = 0;
	e.validated = 0;
	softsev_rmp_write(PHYS_PFN(pa), &e);
	return SEV_RET_SUCCESS;
}

/* SNP_PAGE_UNSMASH: 512 entries of 4K in a row become one of 2M */
u32 softsev_snp_page_unsmash(void *buf)
{
	struct sev_data_snp_page_unsmash *d = buf;
	u64 pa = softsev_pa(d->paddr) & ~(u64)LARGE_PAGE, pfn = PHYS_PFN(pa);
	struct softsev_rmp first, e;
	int i;

	if (!p->snp)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!IS_ALIGNED(pa, PMD_SIZE) || !softsev_pa_valid(pa, PMD_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_page_state(pa, &first) != PAGE_PRE_GUEST || !IS_ALIGNED(first.gpa, PMD_SIZE))
		return RET_INVALID_PAGE_STATE;
	if (first.large)
		return RET_INVALID_PAGE_SIZE;
	for (i = 1; i < PAGES_2M; i++)
		if (softsev_page_state(pa + i * PAGE_SIZE, &e) != PAGE_PRE_GUEST || e.asid != first.asid ||
		    e.gpa != first.gpa + i * PAGE_SIZE)
			return RET_INVALID_PAGE_STATE;
	memset(&e, 0, sizeof(e));
	for (i = 1; i < PAGES_2M; i++)
		softsev_rmp_write(pfn + i, &e);
	first.large = 1;
	softsev_rmp_write(pfn, &first);
	return SEV_RET_SUCCESS;
}

static u32 debug_copy(struct sev_data_snp_dbg *d, u64 guest_pa)
{
	struct softsev_gctx *c;
	enum softsev_page state;
	struct softsev_rmp e;
	u32 ret;

	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	if (!c->asid)
		return SEV_RET_INACTIVE;
	if (!(c->policy & POLICY_DEBUG))
		return SEV_RET_POLICY_FAILURE;
	if (!PAGE_ALIGNED(softsev_pa(d->src_addr)) || !PAGE_ALIGNED(softsev_pa(d->dst_addr)) ||
	    !softsev_pa_valid(d->src_addr, PAGE_SIZE) || !softsev_pa_valid(d->dst_addr, PAGE_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	state = softsev_page_state(guest_pa, &e);
	if (state != PAGE_GUEST_VALID && state != PAGE_GUEST_INVALID && state != PAGE_PRE_GUEST)
		return RET_INVALID_PAGE_STATE;
	if (e.asid != c->asid)
		return RET_INVALID_PAGE_OWNER;
	memcpy(softsev_va(d->dst_addr), softsev_va(d->src_addr), PAGE_SIZE);
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_dbg_decrypt(void *buf)
{
	struct sev_data_snp_dbg *d = buf;

	return debug_copy(d, d->src_addr);
}

u32 softsev_snp_dbg_encrypt(void *buf)
{
	struct sev_data_snp_dbg *d = buf;

	return debug_copy(d, d->dst_addr);
}
