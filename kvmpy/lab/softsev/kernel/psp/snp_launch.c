// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: launch of SNP guests (SNP firmware ABI, chapter 8.14 and following).
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/mm.h>
#include <linux/printk.h>
#include <linux/random.h>
#include <linux/topology.h>
#include "psp.h"

#define POLICY_KNOWN	GENMASK_ULL(25, 0)
#define POLICY_UNAVAILABLE	GENMASK_ULL(24, 22)	/* XTS-256, RAPL, ciphertext hiding */
#define ID_ALGO_P384	1

u32 softsev_snp_launch_start(void *buf)
{
	struct sev_data_snp_launch_start *d = buf;
	struct softsev_gctx *c;
	u64 policy = d->policy;
	u32 ret;
	int i;

	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	if (c->state != GCTX_INIT)
		return SEV_RET_INVALID_GUEST_STATE;
	if (d->ma_en)	/* migration agents are not modelled */
		return SEV_RET_INVALID_PARAM;
	if ((policy & ~POLICY_KNOWN) || !(policy & BIT_ULL(17)) || d->rsvd)
		return SEV_RET_INVALID_PARAM;
	if (FIELD_GET(GENMASK_ULL(15, 8), policy) > SOFTSEV_API_MAJOR ||
	    (FIELD_GET(GENMASK_ULL(15, 8), policy) == SOFTSEV_API_MAJOR &&
	     FIELD_GET(GENMASK_ULL(7, 0), policy) > SOFTSEV_API_MINOR))
		return SEV_RET_POLICY_FAILURE;
	if (policy & POLICY_UNAVAILABLE)
		return SEV_RET_POLICY_FAILURE;
	if (!(policy & BIT_ULL(16)) && topology_max_smt_threads() > 1)
		return SEV_RET_POLICY_FAILURE;

	c->policy = policy;
	c->imi = d->imi_en;
	c->tsc_khz = d->desired_tsc_khz;
	c->launch_tcb = softsev_platform.tcb;
	memcpy(c->gosvw, d->gosvw, sizeof(c->gosvw));
	get_random_bytes(c->report_id, sizeof(c->report_id));
	for (i = 0; i < VMPCKS; i++)
		get_random_bytes(c->vmpck[i], sizeof(c->vmpck[i]));
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

/* The GPA that VMSA pages are measured with. */
#define VMSA_GPA	0xfffffffff000ULL

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

static u32 measure(struct softsev_gctx *c, struct sev_data_snp_launch_update *d, const void *page, u64 gpa)
{
	struct page_info info = {
		.length = sizeof(info),
		.type = d->page_type,
		.imi = d->imi_page,
		.vmpl3 = d->vmpl3_perms,
		.vmpl2 = d->vmpl2_perms,
		.vmpl1 = d->vmpl1_perms,
		.gpa = d->page_type == SNP_PAGE_TYPE_VMSA ? VMSA_GPA : gpa,
	};

	BUILD_BUG_ON(sizeof(info) != 0x70);
	memcpy(info.digest, c->ld, HASH384);
	if ((d->page_type == SNP_PAGE_TYPE_NORMAL || d->page_type == SNP_PAGE_TYPE_VMSA) &&
	    softsev_sha384(page, PAGE_SIZE, info.contents))
		return SEV_RET_HWSEV_RET_PLATFORM;
	return softsev_sha384(&info, sizeof(info), c->ld) ? SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

static u32 update_page(struct softsev_gctx *c, struct sev_data_snp_launch_update *d, u64 pa, u64 gpa)
{
	void *page = softsev_va(pa);
	u32 ret;

	if (d->page_type == SNP_PAGE_TYPE_CPUID) {
		ret = softsev_cpuid_page(page);
		if (ret)
			return ret;
	}
	ret = measure(c, d, page, gpa);
	if (ret)
		return ret;
	if (d->page_type == SNP_PAGE_TYPE_ZERO)
		memset(page, 0, PAGE_SIZE);
	if (d->page_type == SNP_PAGE_TYPE_SECRET)
		fill_secrets(c, page);
	c->pages++;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_launch_update(void *buf)
{
	struct sev_data_snp_launch_update *d = buf;
	u64 size = d->page_size ? PMD_SIZE : PAGE_SIZE, pa = softsev_pa(d->address), at;
	struct softsev_gctx *c;
	struct softsev_rmp e;
	u32 ret;

	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	if (c->state != GCTX_LAUNCH)
		return SEV_RET_INVALID_GUEST_STATE;
	if (!c->asid)
		return SEV_RET_INACTIVE;
	if (d->page_type < SNP_PAGE_TYPE_NORMAL || d->page_type >= SNP_PAGE_TYPE_MAX || (d->imi_page && !c->imi))
		return SEV_RET_INVALID_PARAM;
	if (!IS_ALIGNED(pa, size) || !softsev_pa_valid(pa, size))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_page_state(pa, &e) != PAGE_PRE_GUEST)
		return RET_INVALID_PAGE_STATE;
	if (e.asid != c->asid)
		return RET_INVALID_PAGE_OWNER;
	if (e.large != d->page_size)
		return RET_INVALID_PAGE_SIZE;
	if (size == PMD_SIZE && d->page_type != SNP_PAGE_TYPE_NORMAL && d->page_type != SNP_PAGE_TYPE_ZERO &&
	    d->page_type != SNP_PAGE_TYPE_UNMEASURED)
		return RET_INVALID_PAGE_SIZE;
	for (at = 0; at < size; at += PAGE_SIZE) {
		ret = update_page(c, d, pa + at, e.gpa + at);
		if (ret)
			return ret;
	}
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
	switch (softsev_verify(key, data, len, sig)) {
	case 0:
		return SEV_RET_SUCCESS;
	case -EINVAL:
		return RET_INVALID_KEY;
	default:
		return SEV_RET_BAD_SIGNATURE;
	}
}

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
	if (block->version != 1 || auth->id_key_algo != ID_ALGO_P384 ||
	    (d->auth_key_en && auth->author_key_algo != ID_ALGO_P384))
		return SEV_RET_INVALID_PARAM;
	ret = check_signature(&auth->id_key, block, sizeof(*block), &auth->id_block_sig);
	if (!ret && d->auth_key_en)
		ret = check_signature(&auth->author_key, &auth->id_key, sizeof(auth->id_key), &auth->id_key_sig);
	if (ret)
		return ret;
	if (memcmp(block->digest, c->ld, HASH384)) {
		pr_info("the ID block expects launch digest %*phN\n", HASH384, block->digest);
		return SEV_RET_BAD_MEASUREMENT;
	}
	if (block->policy != c->policy)
		return SEV_RET_POLICY_FAILURE;
	memcpy(c->family_id, block->family_id, sizeof(c->family_id));
	memcpy(c->image_id, block->image_id, sizeof(c->image_id));
	c->guest_svn = block->guest_svn;
	if (softsev_sha384(&auth->id_key, sizeof(auth->id_key), c->id_key_digest))
		return SEV_RET_HWSEV_RET_PLATFORM;
	if (d->auth_key_en && softsev_sha384(&auth->author_key, sizeof(auth->author_key), c->author_key_digest))
		return SEV_RET_HWSEV_RET_PLATFORM;
	c->id_block = true;
	c->author_key = d->auth_key_en;
	return SEV_RET_SUCCESS;
}

u32 softsev_snp_launch_finish(void *buf)
{
	struct sev_data_snp_launch_finish *d = buf;
	struct softsev_gctx *c;
	u32 ret;

	c = softsev_gctx(d->gctx_paddr, &ret);
	if (!c)
		return ret;
	if (c->state != GCTX_LAUNCH)
		return SEV_RET_INVALID_GUEST_STATE;
	pr_info("SNP guest of ASID %u: launch digest %*phN, policy %#llx, %llu pages\n", c->asid, HASH384, c->ld,
		c->policy, c->pages);
	if (d->auth_key_en && !d->id_block_en)
		return SEV_RET_INVALID_PARAM;
	if (d->id_block_en) {
		ret = check_id_block(c, d);
		if (ret)
			return ret;
	}
	memcpy(c->host_data, d->host_data, sizeof(c->host_data));
	c->vcek_disabled = d->vcek_disabled;
	c->state = GCTX_RUNNING;
	return SEV_RET_SUCCESS;
}
