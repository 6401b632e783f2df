// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: launch of SNP guests (SNP firmware ABI, chapter 8.14 and following). The order of each command's checks
 * is that of the firmware: docs/software-amd-sp-commands.md.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/mm.h>
#include <linux/printk.h>
#include <linux/random.h>
#include "psp.h"

#define POLICY_MINOR_SNP	GENMASK_ULL(7, 0)
#define POLICY_MAJOR_SNP	GENMASK_ULL(15, 8)
#define POLICY_SMT		BIT_ULL(16)
#define POLICY_VMPL		BIT_ULL(17)	/* must be one */
#define POLICY_MIGRATE_MA	BIT_ULL(18)
#define POLICY_SINGLE_SOCKET	BIT_ULL(20)
#define POLICY_RESERVED_SNP	GENMASK_ULL(63, 21)	/* all that is of later firmware */
#define ID_ALGO_P384		1

/* Whether the platform is what a policy asks for; @ma is the migration agent's context, or NULL. */
static bool policy_met(u64 policy, const struct softsev_gctx *ma)
{
	unsigned int major = FIELD_GET(POLICY_MAJOR_SNP, policy), minor = FIELD_GET(POLICY_MINOR_SNP, policy);

	if (ma && (!(policy & POLICY_MIGRATE_MA) || ma->ma != GCTX_NO_MA ||
		   ((policy & POLICY_SINGLE_SOCKET) && !(ma->policy & POLICY_SINGLE_SOCKET))))
		return false;
	if (!(policy & POLICY_VMPL) || (policy & POLICY_RESERVED_SNP))
		return false;
	if (!(policy & POLICY_SMT) && softsev_smt())
		return false;
	return major < SOFTSEV_API_MAJOR || (major == SOFTSEV_API_MAJOR && minor <= SOFTSEV_API_MINOR);
}

u32 softsev_snp_launch_start(void *buf)
{
	struct sev_data_snp_launch_start *d = buf;
	struct softsev_gctx *c, *ma = NULL;
	u32 ret;
	int i;

	if (!PAGE_ALIGNED(d->gctx_paddr | d->ma_gctx_paddr) || d->rsvd)
		return SEV_RET_INVALID_PARAM;
	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	if (c->state != GCTX_INIT)
		return SEV_RET_INVALID_GUEST_STATE;
	if (d->ma_en) {
		ma = softsev_gctx(d->ma_gctx_paddr, &ret);
		if (!ma)
			return ret;
	}
	if (!policy_met(d->policy, ma))
		return SEV_RET_POLICY_FAILURE;

	c->policy = d->policy;
	c->ma = ma ? d->ma_gctx_paddr : GCTX_NO_MA;
	if (ma)
		memcpy(c->report_id_ma, ma->report_id, sizeof(c->report_id_ma));
	else
		memset(c->report_id_ma, 0xff, sizeof(c->report_id_ma));
	c->imi = d->imi_en;
	memcpy(c->gosvw, d->gosvw, sizeof(c->gosvw));
	get_random_bytes(c->report_id, sizeof(c->report_id));
	for (i = 0; i < VMPCKS; i++)
		get_random_bytes(c->vmpck[i], sizeof(c->vmpck[i]));
	softsev_gctx_count(1);
	c->state = GCTX_LAUNCH;
	return SEV_RET_SUCCESS;
}

/* What a launch digest is extended with, for each page. */
struct page_info {
	u8 digest[HASH384], contents[HASH384];
	u16 length;
	u8 type, imi;
	u8 vmpl3, vmpl2, vmpl1, reserved;
	u64 gpa;
} __packed;

#define VMSA_TSC_SCALE	0x2f0	/* and the offset behind it: measured as zeros */

struct secrets_page {
	u32 version;
	u32 imi;
	u32 fms, reserved;
	u8 gosvw[16];
	u8 vmpck[VMPCKS][32];
	u8 os_area[96];
	u8 vmsa_tweak[64];
	u8 svsm[32];
	u32 tsc_factor;
} __packed;

static void fill_secrets(struct softsev_gctx *c, void *page)
{
	struct secrets_page *s = page;

	BUILD_BUG_ON(offsetof(struct secrets_page, vmpck) != 0x20);
	BUILD_BUG_ON(offsetof(struct secrets_page, vmsa_tweak) != 0x100);
	memset(page, 0, PAGE_SIZE);
	s->version = 3;
	s->imi = c->imi;
	s->fms = softsev_cpuid_eax(1);
	memcpy(s->gosvw, c->gosvw, sizeof(s->gosvw));
	memcpy(s->vmpck, c->vmpck, sizeof(s->vmpck));
}

/* Firmware's scratch: a VMSA without its TSC fields. Commands run one at a time. */
static u8 scratch[PAGE_SIZE];

static u32 measure(struct softsev_gctx *c, struct sev_data_snp_launch_update *d, const void *page, u64 gpa)
{
	struct page_info info = {
		.length = sizeof(info),
		.type = d->page_type,
		.imi = d->imi_page,
		.vmpl3 = d->vmpl3_perms,
		.vmpl2 = d->vmpl2_perms,
		.vmpl1 = d->vmpl1_perms,
		.gpa = gpa,
	};
	int bad = 0;

	BUILD_BUG_ON(sizeof(info) != 0x70);
	if (d->page_type == SNP_PAGE_TYPE_VMSA) {
		memcpy(scratch, page, PAGE_SIZE);
		memset(scratch + VMSA_TSC_SCALE, 0, 2 * sizeof(u64));
		page = scratch;
	}
	if (d->page_type == SNP_PAGE_TYPE_NORMAL || d->page_type == SNP_PAGE_TYPE_VMSA)
		bad = softsev_sha384(page, PAGE_SIZE, info.contents);
	memcpy(info.digest, c->ld, HASH384);
	bad = bad ?: softsev_sha384(&info, sizeof(info), c->ld);
	if (d->imi_page) {
		memcpy(info.digest, c->imd, HASH384);
		bad = bad ?: softsev_sha384(&info, sizeof(info), c->imd);
	}
	return bad ? SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

static u32 update_page(struct softsev_gctx *c, struct sev_data_snp_launch_update *d, u64 pa, u64 gpa)
{
	void *page = softsev_va(pa);
	u32 ret = SEV_RET_SUCCESS;

	if (d->page_type == SNP_PAGE_TYPE_CPUID)
		ret = softsev_cpuid_page(page);
	ret = ret ?: measure(c, d, page, gpa);
	if (ret)
		return ret;
	if (d->page_type == SNP_PAGE_TYPE_ZERO)
		memset(page, 0, PAGE_SIZE);
	if (d->page_type == SNP_PAGE_TYPE_SECRET)
		fill_secrets(c, page);
	c->pages++;
	return SEV_RET_SUCCESS;
}

/* What is asked of the page; the guest's own state comes behind. */
static u32 check_page(const struct sev_data_snp_launch_update *d, struct softsev_rmp *e)
{
	if (!softsev_pa_valid(d->address, PAGE_SIZE) || softsev_page_state(d->address, e) != PAGE_PRE_GUEST)
		return RET_INVALID_PAGE_STATE;
	if (e->large != d->page_size)
		return RET_INVALID_PAGE_SIZE;
	if (e->large && !IS_ALIGNED(softsev_pa(d->address), PMD_SIZE))
		return SEV_RET_INVALID_ADDRESS;
	switch (d->page_type) {
	case SNP_PAGE_TYPE_NORMAL:
	case SNP_PAGE_TYPE_ZERO:
	case SNP_PAGE_TYPE_UNMEASURED:
		return SEV_RET_SUCCESS;
	case SNP_PAGE_TYPE_VMSA:
	case SNP_PAGE_TYPE_SECRET:
	case SNP_PAGE_TYPE_CPUID:
		return e->large ? RET_INVALID_PAGE_SIZE : SEV_RET_SUCCESS;
	default:
		return SEV_RET_INVALID_PARAM;
	}
}

static u32 check_update(const struct sev_data_snp_launch_update *d, struct softsev_gctx **c, struct softsev_rmp *e)
{
	u32 ret;

	if (!PAGE_ALIGNED(d->gctx_paddr | d->address) || d->rsvd || d->rsvd2 || d->rsvd3 || d->rsvd4)
		return SEV_RET_INVALID_PARAM;
	*c = softsev_gctx(d->gctx_paddr, &ret);
	ret = ret ?: check_page(d, e);
	if (ret)
		return ret;
	if ((*c)->state != GCTX_LAUNCH)
		return SEV_RET_INVALID_GUEST_STATE;
	if (!(*c)->asid)
		return SEV_RET_INACTIVE;
	if (e->asid != (*c)->asid)
		return RET_INVALID_PAGE_OWNER;
	return (*c)->imi && !d->imi_page ? SEV_RET_INVALID_PARAM : SEV_RET_SUCCESS;
}

u32 softsev_snp_launch_update(void *buf)
{
	struct sev_data_snp_launch_update *d = buf;
	u64 pa = softsev_pa(d->address), at;
	struct softsev_gctx *c;
	struct softsev_rmp e;
	u32 ret = check_update(d, &c, &e);

	for (at = 0; !ret && at < (e.large ? PMD_SIZE : PAGE_SIZE); at += PAGE_SIZE)
		ret = update_page(c, d, pa + at, e.gpa + at);
	if (ret)
		return ret;
	/* The page is the guest's now, and valid. */
	e.immutable = 0;
	e.validated = 1;
	e.vmsa = d->page_type == SNP_PAGE_TYPE_VMSA;
	e.perms[0] = d->vmpl1_perms;
	e.perms[1] = d->vmpl2_perms;
	e.perms[2] = d->vmpl3_perms;
	softsev_rmp_write(PHYS_PFN(pa), &e);
	return SEV_RET_SUCCESS;
}

struct id_block {
	u8 digest[HASH384];
	u8 family_id[16], image_id[16];
	u32 version, guest_svn;
	u64 policy;
} __packed;

struct id_auth {
	u32 id_key_algo, author_key_algo;
	u8 reserved_8[0x38];
	struct softsev_sig id_block_sig;
	struct softsev_pubkey id_key;
	u8 reserved_644[0x3c];
	struct softsev_sig id_key_sig;
	struct softsev_pubkey author_key;
	u8 reserved_c84[0x37c];
} __packed;

static u32 check_signature(const struct softsev_pubkey *key, const void *data, u32 len, const struct softsev_sig *sig)
{
	return softsev_verify(key, softsev_sha384, data, len, sig) ? SEV_RET_BAD_SIGNATURE : SEV_RET_SUCCESS;
}

/* The version of the block is not looked at: neither does the firmware. */
static u32 check_id_block(struct softsev_gctx *c, struct sev_data_snp_launch_finish *d)
{
	struct id_block *block;
	struct id_auth *auth;
	u32 ret;

	BUILD_BUG_ON(sizeof(*block) != 96);
	BUILD_BUG_ON(sizeof(*auth) != PAGE_SIZE);
	if (!softsev_pa_valid(d->id_block_paddr, sizeof(*block)) || !softsev_pa_valid(d->id_auth_paddr, sizeof(*auth)))
		return SEV_RET_INVALID_ADDRESS;
	block = softsev_va(d->id_block_paddr);
	auth = softsev_va(d->id_auth_paddr);
	if (memcmp(block->digest, c->ld, HASH384)) {
		pr_info("the ID block expects launch digest %*phN\n", HASH384, block->digest);
		return SEV_RET_BAD_MEASUREMENT;
	}
	if (block->policy != c->policy)
		return SEV_RET_POLICY_FAILURE;
	if (auth->id_key_algo != ID_ALGO_P384 || (d->auth_key_en && auth->author_key_algo != ID_ALGO_P384))
		return SEV_RET_INVALID_PARAM;
	ret = check_signature(&auth->id_key, block, sizeof(*block), &auth->id_block_sig);
	if (ret)
		return ret;
	memcpy(c->family_id, block->family_id, sizeof(c->family_id));
	memcpy(c->image_id, block->image_id, sizeof(c->image_id));
	c->guest_svn = block->guest_svn;
	if (softsev_sha384(&auth->id_key, sizeof(auth->id_key), c->id_key_digest))
		return SEV_RET_HWSEV_RET_PLATFORM;
	if (!d->auth_key_en)
		return SEV_RET_SUCCESS;
	ret = check_signature(&auth->author_key, &auth->id_key, sizeof(auth->id_key), &auth->id_key_sig);
	if (!ret && softsev_sha384(&auth->author_key, sizeof(auth->author_key), c->author_key_digest))
		ret = SEV_RET_HWSEV_RET_PLATFORM;
	return ret;
}

u32 softsev_snp_launch_finish(void *buf)
{
	struct sev_data_snp_launch_finish *d = buf;
	struct softsev_gctx *c;
	u32 ret;

	if (!PAGE_ALIGNED(d->gctx_paddr) || d->rsvd)
		return SEV_RET_INVALID_PARAM;
	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	if (c->state != GCTX_LAUNCH || c->imi)
		return SEV_RET_INVALID_GUEST_STATE;
	if (!c->asid)
		return SEV_RET_INACTIVE;
	pr_info("SNP guest of ASID %u: launch digest %*phN, policy %#llx, %llu pages\n", c->asid, HASH384, c->ld,
		c->policy, c->pages);
	if (d->id_block_en) {
		ret = check_id_block(c, d);
		if (ret)
			return ret;
	}
	memcpy(c->host_data, d->host_data, sizeof(c->host_data));
	c->id_block = d->id_block_en;
	c->author_key = d->auth_key_en;
	c->vcek_disabled = d->vcek_disabled;
	softsev_asid_run(c->asid);
	c->state = GCTX_RUNNING;
	return SEV_RET_SUCCESS;
}
