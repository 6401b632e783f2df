// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the SNP platform (SNP firmware ABI, chapters 5 and 8). The order of each command's checks is that of
 * the firmware: docs/software-amd-sp-commands.md.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/mm.h>
#include <linux/printk.h>
#include "psp.h"

#define RANGES_MAX	((PAGE_SIZE - sizeof(struct sev_data_range_list)) / sizeof(struct sev_data_range))
#define RET_RMP_INITIALIZATION_FAILED	0x26

static struct softsev_platform *p = &softsev_platform;
static unsigned int launched;

/* Launches that began are what the platform's status counts. */
void softsev_gctx_count(int change)
{
	launched += change;
}

/* Firmware: snp_mcmd_init_common(). @list_pa is of INIT_EX, which may come without a list. */
static u32 snp_init(bool init_rmp, bool with_list, u64 list_pa)
{
	const struct sev_data_range_list *list;
	unsigned int i;

	if (p->snp || p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!init_rmp && !p->rmp_ready)
		return RET_RMP_INIT_REQUIRED;
	if (with_list && !init_rmp)
		return SEV_RET_INVALID_PARAM;
	if (with_list) {
		if (!softsev_pa_valid(list_pa, PAGE_SIZE))
			return RET_RMP_INITIALIZATION_FAILED;
		list = softsev_va(list_pa);
		if (list->num_elements > RANGES_MAX)
			return RET_RMP_INITIALIZATION_FAILED;
		for (i = 0; i < list->num_elements; i++)
			if (!PAGE_ALIGNED(list->ranges[i].base))
				return RET_RMP_INITIALIZATION_FAILED;
	}
	if (init_rmp)
		softsev_rmp_reset();
	softsev_asid_reset();
	launched = 0;
	p->snp = true;
	p->rmp_ready = true;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_init(void *buf)
{
	return snp_init(true, false, 0);
}

u32 softsev_snp_init_ex(void *buf)
{
	/* Older trees do not name all of the bits; what 1.55 does not know is reserved. */
	struct {
		u32 init_rmp : 1, list_paddr_en : 1, reserved : 30;
		u32 reserved2;
		u64 list_paddr;
		u8 reserved3[48];
	} __packed *d = buf;

	BUILD_BUG_ON(sizeof(*d) != sizeof(struct sev_data_snp_init_ex));
	if (d->reserved || d->reserved2 || memchr_inv(d->reserved3, 0, sizeof(d->reserved3)))
		return SEV_RET_INVALID_PARAM;
	return snp_init(d->init_rmp, d->list_paddr_en, d->list_paddr);
}

u32 softsev_snp_shutdown(void *buf)
{
	struct {
		u32 len;
		u32 iommu : 1, x86 : 1, reserved : 30;
	} __packed *d = buf;

	BUILD_BUG_ON(sizeof(*d) != sizeof(struct sev_data_snp_shutdown_ex));
	if (p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (!p->snp)
		return SEV_RET_SUCCESS;
	if (!softsev_asid_all_clean())
		return SEV_RET_DFFLUSH_REQUIRED;
	/* X86_SNP_SHUTDOWN is not on offer: see FEATURE_INFO. */
	if (d->len != sizeof(*d) || d->reserved || d->x86)
		return SEV_RET_INVALID_PARAM;
	p->snp = false;
	p->vlek = false;
	if (d->iommu)
		p->rmp_ready = false;
	return SEV_RET_SUCCESS;
}

static bool within_page(u64 pa, u64 len)
{
	return offset_in_page(pa) + len <= PAGE_SIZE;
}

u32 softsev_snp_status(void *buf)
{
	struct sev_data_snp_addr *d = buf;
	struct sev_user_data_snp_status *s;
	u32 ret;

	if (!within_page(d->address, sizeof(*s)))
		return SEV_RET_INVALID_PARAM;
	ret = softsev_writable(d->address, sizeof(*s));
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
	s->guest_count = launched;
	s->current_tcb_version = p->tcb;
	s->reported_tcb_version = p->config.reported_tcb;
	/* Older headers have no name for this bit; its place is fixed: FEATURE_INFO is there. */
	*(u32 *)((u8 *)s + 8) |= BIT(3);
	return SEV_RET_SUCCESS;
}

#define FEATURE_LEGACY		BIT(0)	/* subfunction 0, EBX: the commands of the SEV API */
#define FEATURE_VLEK		BIT(0)	/* subfunction 0, ECX */
#define MESSAGE_KEY		BIT(1)	/* subfunction 1, EAX: guest messages */
#define MESSAGE_REPORT		BIT(2)

/* SNP_FEATURE_INFO. Older trees have no structure for it. */
u32 softsev_snp_feature_info(void *buf)
{
	static const u32 leaves[][4] = {
		{ 1, FEATURE_LEGACY, FEATURE_VLEK, 0 },
		{ MESSAGE_KEY | MESSAGE_REPORT, 0, 0, 0 },
	};
	struct {
		u32 length, ecx_in;
		u64 address;
	} __packed *d = buf;
	u32 ret;

	if (d->length != sizeof(*d))
		return SEV_RET_INVALID_PARAM;
	if (d->address % 4 || !within_page(d->address, sizeof(leaves[0])))
		return SEV_RET_INVALID_ADDRESS;
	ret = softsev_writable(d->address, sizeof(leaves[0]));
	if (ret)
		return ret;
	if (d->ecx_in >= ARRAY_SIZE(leaves))
		return SEV_RET_INVALID_PARAM;
	memcpy(softsev_va(d->address), leaves[d->ecx_in], sizeof(leaves[0]));
	return SEV_RET_SUCCESS;
}

/* Boot loader, TEE, SNP and microcode, the first one counting most: bytes 0, 1, 6 and 7. */
static u32 tcb_number(u64 tcb)
{
	return (tcb & 0xff) << 24 | (tcb >> 8 & 0xff) << 16 | (tcb >> 48 & 0xff) << 8 | tcb >> 56;
}

u32 softsev_snp_config(void *buf)
{
	struct sev_user_data_snp_config *d = buf;
	u64 tcb = d->reported_tcb;

	if (d->rsvd || memchr_inv(d->rsvd1, 0, sizeof(d->rsvd1)))
		return SEV_RET_INVALID_PARAM;
	/* What differs and is not below is above: a reserved byte, too. */
	if (tcb && tcb != p->committed_tcb && tcb_number(tcb) >= tcb_number(p->committed_tcb))
		return SEV_RET_INVALID_PARAM;
	p->config = *d;
	if (!tcb)
		p->config.reported_tcb = p->committed_tcb;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_commit(void *buf)
{
	struct sev_data_snp_commit *d = buf;

	if (d->len != sizeof(*d))
		return SEV_RET_INVALID_PARAM;
	p->committed_tcb = p->tcb;
	p->config.reported_tcb = p->tcb;
	return SEV_RET_SUCCESS;
}

/* A wrapped VLEK as AMD's server gives it. */
struct wrapped_vlek {
	u8 iv[12];
	u32 reserved;
	u8 vlek[384];
	u64 tcb, reserved2;
	u8 tag[16];
} __packed;

/* It cannot be opened without AMD's keys: any one of this TCB stands for the software's own VLEK. */
u32 softsev_snp_vlek_load(void *buf)
{
	struct {
		u32 len;
		u8 version, rsvd[3];
		u64 address;
	} __packed *d = buf;
	const struct wrapped_vlek *w;

	BUILD_BUG_ON(sizeof(*w) != 432);
	if (d->len != sizeof(*d) || d->version || memchr_inv(d->rsvd, 0, sizeof(d->rsvd)))
		return SEV_RET_INVALID_PARAM;
	if (!softsev_pa_valid(d->address, sizeof(*w)))
		return SEV_RET_INVALID_ADDRESS;
	w = softsev_va(d->address);
	if (w->tcb != p->config.reported_tcb)
		return RET_BAD_SVN;
	p->vlek = true;
	return SEV_RET_SUCCESS;
}
