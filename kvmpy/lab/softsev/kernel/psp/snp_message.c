// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: requests of SNP guests, in messages that only guest and firmware can read (SNP firmware ABI, chapters
 * 7 and 8.26): attestation reports, and keys derived for the guest.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <crypto/gcm.h>
#include <linux/printk.h>
#include "psp.h"

#define ALGO_AES_256_GCM	1
#define TAG_LEN		16

struct message {
	u8 tag[32];
	u64 sequence, reserved_28;
	u8 algo, header_version;
	u16 header_size;
	u8 type, version;
	u16 size;
	u32 reserved_38;
	u8 vmpck, reserved_3d[35];
	u8 payload[];
} __packed;

#define AUTHENTICATED	offsetof(struct message, algo)
#define AUTHENTICATED_LEN	(sizeof(struct message) - AUTHENTICATED)

enum { MSG_KEY_REQ = 3, MSG_REPORT_REQ = 5 };

struct report_request {
	u8 data[64];
	u32 vmpl;
	u32 key_select;
	u8 reserved[24];
} __packed;

struct report {
	u32 version, guest_svn;
	u64 policy;
	u8 family_id[16], image_id[16];
	u32 vmpl, signature_algo;
	u64 current_tcb, platform_info;
	u32 flags, reserved_4c;
	u8 report_data[64], measurement[HASH384], host_data[32];
	u8 id_key_digest[HASH384], author_key_digest[HASH384];
	u8 report_id[32], report_id_ma[32];
	u64 reported_tcb;
	u8 reserved_188[24];
	u8 chip_id[64];
	u64 committed_tcb;
	u8 current_build, current_minor, current_major, reserved_1eb;
	u8 committed_build, committed_minor, committed_major, reserved_1ef;
	u64 launch_tcb;
	u8 reserved_1f8[168];
	struct softsev_sig sig;
} __packed;

#define PLATFORM_SMT		BIT(0)
#define REPORT_FLAG_AUTHOR_KEY	BIT(0)
#define REPORT_FLAG_MASK_KEY	BIT(1)
#define REPORT_SIGNING_KEY	GENMASK(4, 2)
#define SIGNED_BY_VCEK		0
#define SIGNED_BY_VLEK		1
#define SIGNED_BY_NONE		7

struct report_response {
	u32 status, size;
	u8 reserved[24];
	struct report report;
} __packed;

struct key_request {
	u32 root, reserved;
	u64 fields;
	u32 vmpl, guest_svn;
	u64 tcb;
} __packed;

struct key_response {
	u32 status;
	u8 reserved[28];
	u8 key[32];
} __packed;

/* 0: VLEK where there is one, else VCEK; 1: VCEK; 2: VLEK. A key that is not there, or not allowed: INVALID_KEY. */
static u32 check_key(const struct softsev_gctx *c, u32 select)
{
	bool vlek = softsev_platform.vlek, vcek = !c->vcek_disabled;
	const bool there[] = { vlek || vcek, vcek, vlek, false };

	return there[select] ? SEV_RET_SUCCESS : RET_INVALID_KEY;
}

/* The key that signs: the chip's own is masked by SNP_CONFIG. */
static u32 signing_key(u32 select)
{
	const struct softsev_platform *p = &softsev_platform;

	if (select == 2 || (!select && p->vlek))
		return SIGNED_BY_VLEK;
	return p->config.mask_chip_key ? SIGNED_BY_NONE : SIGNED_BY_VCEK;
}

static u32 make_report(struct softsev_gctx *c, const struct report_request *q, u32 key, struct report *r)
{
	struct softsev_platform *p = &softsev_platform;

	BUILD_BUG_ON(sizeof(*r) != 1184);
	BUILD_BUG_ON(offsetof(struct report, sig) != 0x2a0);
	r->version = 2;
	r->guest_svn = c->guest_svn;
	r->policy = c->policy;
	memcpy(r->family_id, c->family_id, sizeof(r->family_id));
	memcpy(r->image_id, c->image_id, sizeof(r->image_id));
	r->vmpl = q->vmpl;
	r->signature_algo = 1;
	r->current_tcb = p->tcb;
	r->platform_info = softsev_smt() ? PLATFORM_SMT : 0;
	r->flags = (c->author_key ? REPORT_FLAG_AUTHOR_KEY : 0) |
		   (p->config.mask_chip_key ? REPORT_FLAG_MASK_KEY : 0) |
		   FIELD_PREP(REPORT_SIGNING_KEY, key);
	memcpy(r->report_data, q->data, sizeof(r->report_data));
	memcpy(r->measurement, c->ld, sizeof(r->measurement));
	memcpy(r->host_data, c->host_data, sizeof(r->host_data));
	memcpy(r->id_key_digest, c->id_key_digest, sizeof(r->id_key_digest));
	memcpy(r->author_key_digest, c->author_key_digest, sizeof(r->author_key_digest));
	memcpy(r->report_id, c->report_id, sizeof(r->report_id));
	memcpy(r->report_id_ma, c->report_id_ma, sizeof(r->report_id_ma));
	r->reported_tcb = p->config.reported_tcb;
	if (!p->config.mask_chip_id)
		memcpy(r->chip_id, p->chip_id, sizeof(r->chip_id));
	r->committed_tcb = p->committed_tcb;
	r->current_build = r->committed_build = SOFTSEV_BUILD;
	r->current_minor = r->committed_minor = SOFTSEV_API_MINOR;
	r->current_major = r->committed_major = SOFTSEV_API_MAJOR;
	r->launch_tcb = c->launch_tcb;
	if (key == SIGNED_BY_NONE)
		return SEV_RET_SUCCESS;
	return softsev_sign(key == SIGNED_BY_VLEK ? &p->vlek_key : &p->vcek, softsev_sha384, r,
			    offsetof(struct report, sig), &r->sig) ? SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

/* A VMPL may be any number from that of the key on: nothing is asked of it above. */
static u32 report(struct softsev_gctx *c, const struct report_request *q, u8 vmpck, struct report_response *a)
{
	u32 ret, select = q->key_select & 3;

	a->size = sizeof(a->report);
	if ((q->key_select & ~3u) || memchr_inv(q->reserved, 0, sizeof(q->reserved)))
		return SEV_RET_INVALID_PARAM;
	ret = check_key(c, select);
	if (ret)
		return ret;
	if (q->vmpl < vmpck)
		return SEV_RET_INVALID_PARAM;
	return make_report(c, q, signing_key(select), &a->report);
}

#define FIELD_POLICY	BIT(0)
#define FIELD_IMAGE	BIT(1)
#define FIELD_FAMILY	BIT(2)
#define FIELD_DIGEST	BIT(3)
#define FIELD_SVN	BIT(4)
#define FIELD_TCB	BIT(5)
#define FIELDS_KNOWN	GENMASK(5, 0)

#define ROOT_VMRK	BIT(0)
#define ROOT_KEY	GENMASK(2, 1)
#define ROOT_KNOWN	GENMASK(2, 0)

/* Of a TCB version no part may be above that of another. */
static bool tcb_above(u64 a, u64 b)
{
	int i;

	for (i = 0; i < 64; i += 8)
		if ((u8)(a >> i) > (u8)(b >> i))
			return true;
	return false;
}

static u32 check_derive(struct softsev_gctx *c, const struct key_request *q, u8 vmpck)
{
	u32 ret;

	if ((q->root & ~ROOT_KNOWN) || q->reserved)
		return SEV_RET_INVALID_PARAM;
	if (!(q->root & ROOT_VMRK)) {
		if (softsev_platform.config.mask_chip_key)
			return RET_INVALID_KEY;
		ret = check_key(c, FIELD_GET(ROOT_KEY, q->root));
		if (ret)
			return ret;
	}
	if (q->vmpl < vmpck || (q->fields & ~FIELDS_KNOWN))
		return SEV_RET_INVALID_PARAM;
	if ((q->fields & FIELD_TCB) && tcb_above(q->tcb, softsev_platform.committed_tcb))
		return SEV_RET_INVALID_PARAM;
	return (q->fields & FIELD_SVN) && q->guest_svn > c->guest_svn ? SEV_RET_INVALID_PARAM : SEV_RET_SUCCESS;
}

/* A key that is the same again for a guest with the same properties, on this platform until it is reset. */
static u32 derive_key(struct softsev_gctx *c, const struct key_request *q, u8 vmpck, struct key_response *a)
{
	const u8 *id_key = c->author_key ? c->author_key_digest : c->id_key_digest;
	u64 f = q->fields;
	u32 ret = check_derive(c, q, vmpck);

	if (ret)
		return ret;
	{
		const struct softsev_buf parts[] = {
			{ "guest key", 9 }, { &q->root, sizeof(q->root) }, { &q->vmpl, sizeof(q->vmpl) },
			{ &f, sizeof(f) },
			{ &q->guest_svn, f & FIELD_SVN ? sizeof(q->guest_svn) : 0 },
			{ &q->tcb, f & FIELD_TCB ? sizeof(q->tcb) : 0 },
			{ &c->policy, f & FIELD_POLICY ? sizeof(c->policy) : 0 },
			{ c->image_id, f & FIELD_IMAGE ? sizeof(c->image_id) : 0 },
			{ c->family_id, f & FIELD_FAMILY ? sizeof(c->family_id) : 0 },
			{ c->ld, f & FIELD_DIGEST ? sizeof(c->ld) : 0 },
			{ c->host_data, sizeof(c->host_data) }, { id_key, HASH384 },
		};

		if (softsev_hmac(softsev_platform.secret, sizeof(softsev_platform.secret), parts, ARRAY_SIZE(parts),
				 a->key))
			return SEV_RET_HWSEV_RET_PLATFORM;
	}
	return SEV_RET_SUCCESS;
}

static void message_iv(const struct message *m, u8 *iv)
{
	memset(iv, 0, GCM_AES_IV_SIZE);
	memcpy(iv, &m->sequence, sizeof(m->sequence));
}

/* Check and decrypt a request of which @room bytes are left in its page. The page is the hypervisor's: @m is a copy. */
static u32 open_request(struct softsev_gctx *c, const struct message *m, u64 room, struct aesgcm_ctx *gcm, u8 *payload)
{
	u8 iv[GCM_AES_IV_SIZE];

	if (m->header_version != 1 || m->header_size != sizeof(*m) || m->algo != ALGO_AES_256_GCM || !m->size ||
	    m->size % 16 || sizeof(*m) + m->size > room || m->vmpck >= VMPCKS)
		return SEV_RET_INVALID_PARAM;
	if (aesgcm_expandkey(gcm, c->vmpck[m->vmpck], 32, TAG_LEN))
		return SEV_RET_HWSEV_RET_PLATFORM;
	message_iv(m, iv);
	if (!aesgcm_decrypt(gcm, payload, m->payload, m->size, (const u8 *)m + AUTHENTICATED, AUTHENTICATED_LEN, iv,
			    m->tag))
		return SEV_RET_BAD_MEASUREMENT;
	if (c->msg_count[m->vmpck] == U64_MAX - 1 || m->sequence != c->msg_count[m->vmpck] + 1)
		return RET_AEAD_OFLOW;
	return m->version == 1 ? SEV_RET_SUCCESS : SEV_RET_INVALID_PARAM;
}

/*
 * What is wrong with the payload becomes the status in the response. A payload that is too short is read as if zeros
 * followed.
 */
static u32 answer(struct softsev_gctx *c, const struct message *m, const u8 *payload, u8 *out, u32 *out_size)
{
	memset(out, 0, PAGE_SIZE);
	switch (m->type) {
	case MSG_REPORT_REQ:
		*out_size = sizeof(struct report_response);
		*(u32 *)out = report(c, (const void *)payload, m->vmpck, (void *)out);
		return SEV_RET_SUCCESS;
	case MSG_KEY_REQ:
		*out_size = sizeof(struct key_response);
		*(u32 *)out = derive_key(c, (const void *)payload, m->vmpck, (void *)out);
		return SEV_RET_SUCCESS;
	default:
		pr_info("guest message of type %u is not supported\n", m->type);
		return SEV_RET_INVALID_PARAM;
	}
}

static u32 check_request(const struct sev_data_snp_guest_request *d, struct softsev_gctx **c)
{
	enum softsev_page response;
	struct softsev_rmp q, a;
	u32 ret;

	*c = softsev_gctx(d->gctx_paddr, &ret);
	if (!*c)
		return ret;
	softsev_page_state(d->req_paddr, &q);
	response = softsev_page_state(d->res_paddr, &a);
	if (response != PAGE_FIRMWARE)
		return RET_INVALID_PAGE_STATE;
	if (q.large || a.large)
		return RET_INVALID_PAGE_SIZE;
	if ((*c)->state != GCTX_RUNNING)
		return SEV_RET_INVALID_GUEST_STATE;
	if (offset_in_page(d->req_paddr) + sizeof(struct message) > PAGE_SIZE)
		return SEV_RET_INVALID_PARAM;
	return softsev_pa_valid(d->req_paddr, sizeof(struct message)) ? SEV_RET_SUCCESS : SEV_RET_INVALID_ADDRESS;
}

/* All are used one at a time: commands hold a mutex. */
static u8 request_copy[PAGE_SIZE], payload_copy[PAGE_SIZE], response_copy[PAGE_SIZE];

u32 softsev_snp_guest_request(void *buf)
{
	struct sev_data_snp_guest_request *d = buf;
	struct message *m = (struct message *)request_copy, *r;
	u8 iv[GCM_AES_IV_SIZE];
	struct aesgcm_ctx gcm;
	struct softsev_gctx *c;
	u32 room = PAGE_SIZE - offset_in_page(d->req_paddr), size = 0;
	u32 ret = check_request(d, &c);

	BUILD_BUG_ON(sizeof(*m) != 0x60);
	if (ret)
		return ret;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;

	memcpy(m, softsev_va(d->req_paddr), room);
	memset(payload_copy, 0, sizeof(payload_copy));
	ret = open_request(c, m, room, &gcm, payload_copy);
	ret = ret ?: answer(c, m, payload_copy, response_copy, &size);
	if (!ret && offset_in_page(d->res_paddr) + sizeof(*r) + size > PAGE_SIZE)
		ret = SEV_RET_INVALID_PARAM;
	if (ret)
		goto out;

	r = softsev_va(d->res_paddr);
	memset(r, 0, sizeof(*r));
	r->sequence = m->sequence + 1;
	r->algo = ALGO_AES_256_GCM;
	r->header_version = 1;
	r->header_size = sizeof(*r);
	r->type = m->type + 1;
	r->version = 1;
	r->size = size;
	r->vmpck = m->vmpck;
	message_iv(r, iv);
	aesgcm_encrypt(&gcm, r->payload, response_copy, size, (u8 *)r + AUTHENTICATED, AUTHENTICATED_LEN, iv, r->tag);
	c->msg_count[m->vmpck] += 2;
out:
	memzero_explicit(&gcm, sizeof(gcm));
	memzero_explicit(payload_copy, sizeof(payload_copy));
	memzero_explicit(response_copy, sizeof(response_copy));
	return ret;
}
