// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: guests of the legacy commands (SEV API, chapter 6), and the ASIDs of all guests.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/printk.h>
#include <linux/random.h>
#include <linux/slab.h>
#include "psp.h"

#define POLICY_NODBG	BIT(0)
#define POLICY_NOKS	BIT(1)
#define POLICY_ES	BIT(2)

#define VMSA_MARK	0x41534d5674666f53ULL

static struct softsev_guest guests[SOFTSEV_GUESTS];

/* Owners of the ASIDs: a legacy guest's handle, or the physical address of an SNP guest's context. */
static u64 asid_owner[SOFTSEV_ASID_MAX + 1];
static bool asid_dirty[SOFTSEV_ASID_MAX + 1];

u32 softsev_asid_take(u32 asid, u32 first, u32 last, u64 owner)
{
	if (asid < first || asid > last)
		return SEV_RET_INVALID_ASID;
	if (asid_owner[asid])
		return SEV_RET_ASID_OWNED;
	if (asid_dirty[asid])
		return SEV_RET_DFFLUSH_REQUIRED;
	asid_owner[asid] = owner;
	return SEV_RET_SUCCESS;
}

void softsev_asid_release(u32 asid, u64 owner)
{
	if (asid && asid <= SOFTSEV_ASID_MAX && asid_owner[asid] == owner) {
		asid_owner[asid] = 0;
		asid_dirty[asid] = true;
	}
}

u64 softsev_asid_owner(u32 asid)
{
	return asid <= SOFTSEV_ASID_MAX ? asid_owner[asid] : 0;
}

void softsev_asid_flush(void)
{
	memset(asid_dirty, 0, sizeof(asid_dirty));
}

/* softsev_asid_reset - nobody knows what the caches hold when the platform is initialised */
void softsev_asid_reset(void)
{
	int i;

	for (i = 0; i <= SOFTSEV_ASID_MAX; i++)
		asid_dirty[i] = !asid_owner[i];
}

struct softsev_guest *softsev_guest(u32 handle)
{
	return handle && handle <= SOFTSEV_GUESTS && guests[handle - 1].used ? &guests[handle - 1] : NULL;
}

struct softsev_guest *softsev_guest_new(void)
{
	struct softsev_guest *g;
	int i;

	for (i = 0; i < SOFTSEV_GUESTS; i++) {
		g = &guests[i];
		if (g->used)
			continue;
		memset(g, 0, sizeof(*g));
		g->digest = softsev_sha256_begin();
		if (!g->digest)
			return NULL;
		g->used = true;
		g->handle = i + 1;
		return g;
	}
	return NULL;
}

void softsev_guest_free(struct softsev_guest *g)
{
	softsev_asid_release(g->asid, g->handle);
	kfree(g->digest);
	memzero_explicit(g, sizeof(*g));
}

unsigned int softsev_guest_count(void)
{
	unsigned int n = 0;
	int i;

	for (i = 0; i < SOFTSEV_GUESTS; i++)
		n += guests[i].used;
	return n;
}

void softsev_guests_drop(void)
{
	int i;

	for (i = 0; i < SOFTSEV_GUESTS; i++)
		if (guests[i].used)
			softsev_guest_free(&guests[i]);
}

/* softsev_guest_extend - measure data that the guest is launched with */
u32 softsev_guest_extend(struct softsev_guest *g, const void *data, unsigned int len)
{
	return crypto_shash_update(g->digest, data, len) ? SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

/* softsev_guest_buffer - what is asked of an address and length of guest memory */
u32 softsev_guest_buffer(u64 pa, u32 len)
{
	if (!len || len % 16)
		return SEV_RET_INVALID_LEN;
	if (softsev_pa(pa) % 16 || !softsev_pa_valid(pa, len))
		return SEV_RET_INVALID_ADDRESS;
	return SEV_RET_SUCCESS;
}

/* softsev_vmsa_seal - an encrypted VMSA is the only one that VMRUN takes; here it is one with this mark */
void softsev_vmsa_seal(void *vmsa)
{
	*(u64 *)(vmsa + PAGE_SIZE - 8) = VMSA_MARK;
}

/* Check what all commands with a handle check; @state below 0 stands for any. */
static u32 guest_check(u32 handle, int state, bool active, struct softsev_guest **g)
{
	if (!softsev_platform.legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	*g = softsev_guest(handle);
	if (!*g)
		return SEV_RET_INVALID_GUEST;
	if (state >= 0 && (*g)->state != state)
		return SEV_RET_INVALID_GUEST_STATE;
	if (active && !(*g)->asid)
		return SEV_RET_INACTIVE;
	return SEV_RET_SUCCESS;
}

u32 softsev_decommission(void *buf)
{
	struct sev_data_decommission *d = buf;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, -1, false, &g);

	if (ret)
		return ret;
	if (g->asid)
		return SEV_RET_ACTIVE;
	softsev_guest_free(g);
	return SEV_RET_SUCCESS;
}

u32 softsev_activate(void *buf)
{
	struct sev_data_activate *d = buf;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, -1, false, &g);
	bool es;

	if (ret)
		return ret;
	if (g->state == GSTATE_INIT || g->state == GSTATE_SENT)
		return SEV_RET_INVALID_GUEST_STATE;
	if (g->asid)
		return SEV_RET_ACTIVE;
	es = g->policy & POLICY_ES;
	ret = softsev_asid_take(d->asid, es ? 1 : SOFTSEV_ASID_MIN_SEV, es ? SOFTSEV_ASID_MIN_SEV - 1 : SOFTSEV_ASID_MAX,
				g->handle);
	if (!ret)
		g->asid = d->asid;
	return ret;
}

u32 softsev_deactivate(void *buf)
{
	struct sev_data_deactivate *d = buf;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, -1, false, &g);

	if (ret)
		return ret;
	softsev_asid_release(g->asid, g->handle);
	g->asid = 0;
	return SEV_RET_SUCCESS;
}

u32 softsev_guest_status(void *buf)
{
	struct sev_data_guest_status *d = buf;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, -1, false, &g);

	if (ret)
		return ret;
	d->policy = g->policy;
	d->asid = g->asid;
	d->state = g->state;
	return SEV_RET_SUCCESS;
}

/* What a policy asks of the platform. */
static u32 policy_check(u32 policy)
{
	unsigned int major = FIELD_GET(GENMASK(23, 16), policy), minor = FIELD_GET(GENMASK(31, 24), policy);

	if (major > SOFTSEV_API_MAJOR || (major == SOFTSEV_API_MAJOR && minor > SOFTSEV_API_MINOR))
		return SEV_RET_POLICY_FAILURE;
	if ((policy & POLICY_ES) && !softsev_platform.es)
		return SEV_RET_UNSUPPORTED;
	return SEV_RET_SUCCESS;
}

u32 softsev_launch_start(void *buf)
{
	struct sev_data_launch_start *d = buf;
	struct softsev_guest *g, *other = NULL;
	u8 tek[KEY128], tik[KEY128];
	u32 ret;

	if (!softsev_platform.legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	ret = policy_check(d->policy);
	if (ret)
		return ret;
	if (d->handle) {
		/* The key of another guest, which must allow it, and have the same policy. */
		other = softsev_guest(d->handle);
		if (!other)
			return SEV_RET_INVALID_GUEST;
		if ((other->policy & POLICY_NOKS) || other->policy != d->policy)
			return SEV_RET_POLICY_FAILURE;
	}
	if (d->session_address) {
		ret = softsev_session_open(d->dh_cert_address, d->dh_cert_len, d->session_address, d->session_len,
					   d->policy, tek, tik);
		if (ret)
			return ret;
	} else {
		get_random_bytes(tek, sizeof(tek));
		get_random_bytes(tik, sizeof(tik));
	}
	g = softsev_guest_new();
	if (!g)
		return SEV_RET_RESOURCE_LIMIT;
	g->policy = d->policy;
	g->state = GSTATE_LUPDATE;
	memcpy(g->tek, tek, sizeof(tek));
	memcpy(g->tik, tik, sizeof(tik));
	d->handle = g->handle;
	return SEV_RET_SUCCESS;
}

u32 softsev_launch_update_data(void *buf)
{
	struct sev_data_launch_update_data *d = buf;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, GSTATE_LUPDATE, true, &g);

	ret = ret ?: softsev_guest_buffer(d->address, d->len);
	return ret ?: softsev_guest_extend(g, softsev_va(d->address), d->len);
}

u32 softsev_launch_update_vmsa(void *buf)
{
	struct sev_data_launch_update_vmsa *d = buf;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, GSTATE_LUPDATE, true, &g);

	ret = ret ?: softsev_guest_buffer(d->address, d->len);
	if (ret)
		return ret;
	if (!(g->policy & POLICY_ES))
		return SEV_RET_POLICY_FAILURE;
	if (d->len != PAGE_SIZE)
		return SEV_RET_INVALID_LEN;
	if (!PAGE_ALIGNED(softsev_pa(d->address)))
		return SEV_RET_INVALID_ADDRESS;
	ret = softsev_guest_extend(g, softsev_va(d->address), d->len);
	if (!ret)
		softsev_vmsa_seal(softsev_va(d->address));
	return ret;
}

struct measurement {
	u8 measure[HASH256], nonce[16];
};

u32 softsev_launch_measure(void *buf)
{
	const u8 context = 4, major = SOFTSEV_API_MAJOR, minor = SOFTSEV_API_MINOR, build = SOFTSEV_BUILD;
	struct sev_data_launch_measure *d = buf;
	struct measurement *m;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, -1, false, &g);

	if (ret)
		return ret;
	if (d->len < sizeof(*m)) {
		d->len = sizeof(*m);
		return SEV_RET_INVALID_LEN;
	}
	if (g->state != GSTATE_LUPDATE)
		return SEV_RET_INVALID_GUEST_STATE;
	if (!softsev_pa_valid(d->address, sizeof(*m)))
		return SEV_RET_INVALID_ADDRESS;
	m = softsev_va(d->address);
	get_random_bytes(m->nonce, sizeof(m->nonce));
	if (crypto_shash_final(g->digest, g->ld))
		return SEV_RET_HWSEV_RET_PLATFORM;
	{
		const struct softsev_buf parts[] = {
			{ &context, 1 }, { &major, 1 }, { &minor, 1 }, { &build, 1 },
			{ &g->policy, 4 }, { g->ld, sizeof(g->ld) }, { m->nonce, sizeof(m->nonce) },
		};

		if (softsev_hmac(g->tik, KEY128, parts, ARRAY_SIZE(parts), m->measure))
			return SEV_RET_HWSEV_RET_PLATFORM;
	}
	memcpy(g->measure, m->measure, sizeof(g->measure));
	d->len = sizeof(*m);
	g->state = GSTATE_LSECRET;
	pr_info("guest %u: launch digest %*phN, policy %#x\n", g->handle, HASH256, g->ld, g->policy);
	return SEV_RET_SUCCESS;
}

u32 softsev_launch_secret(void *buf)
{
	struct sev_data_launch_secret *d = buf;
	const u8 context = 1;
	struct softsev_packet *h;
	struct softsev_guest *g;
	u8 mac[HASH256];
	u32 ret = guest_check(d->handle, GSTATE_LSECRET, true, &g);

	ret = ret ?: softsev_guest_buffer(d->guest_address, d->guest_len);
	if (ret)
		return ret;
	if (d->hdr_len < sizeof(*h) || d->guest_len > 16384 || d->trans_len < d->guest_len)
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(d->hdr_address, sizeof(*h)) || !softsev_pa_valid(d->trans_address, d->trans_len))
		return SEV_RET_INVALID_ADDRESS;
	h = softsev_va(d->hdr_address);
	if (h->flags)	/* compression */
		return SEV_RET_UNSUPPORTED;
	{
		const struct softsev_buf parts[] = {
			{ &context, 1 }, { &h->flags, 4 }, { h->iv, sizeof(h->iv) }, { &d->guest_len, 4 },
			{ &d->trans_len, 4 }, { softsev_va(d->trans_address), d->trans_len },
			{ g->measure, sizeof(g->measure) },
		};

		if (softsev_hmac(g->tik, KEY128, parts, ARRAY_SIZE(parts), mac))
			return SEV_RET_HWSEV_RET_PLATFORM;
	}
	if (!softsev_equal(mac, h->mac, sizeof(mac)))
		return SEV_RET_BAD_MEASUREMENT;
	softsev_aes_ctr(g->tek, h->iv, softsev_va(d->trans_address), softsev_va(d->guest_address), d->guest_len);
	return SEV_RET_SUCCESS;
}

u32 softsev_launch_finish(void *buf)
{
	struct sev_data_launch_finish *d = buf;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, GSTATE_LSECRET, true, &g);

	if (!ret)
		g->state = GSTATE_RUNNING;
	return ret;
}

/* What a SEV or SEV-ES guest is, signed with the PEK. */
struct attestation {
	u8 nonce[16];
	u8 digest[HASH256];
	u32 policy, sig_usage, sig_algo, reserved;
	struct softsev_sig sig;
} __packed;

u32 softsev_attestation_report(void *buf)
{
	struct sev_data_attestation_report *d = buf;
	struct attestation *a;
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, -1, false, &g);

	if (ret)
		return ret;
	if (d->len < sizeof(*a)) {
		d->len = sizeof(*a);
		return SEV_RET_INVALID_LEN;
	}
	if (g->state != GSTATE_LSECRET && g->state != GSTATE_RUNNING)
		return SEV_RET_INVALID_GUEST_STATE;
	if (!softsev_pa_valid(d->address, sizeof(*a)))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	a = softsev_va(d->address);
	memset(a, 0, sizeof(*a));
	memcpy(a->nonce, d->mnonce, sizeof(a->nonce));
	memcpy(a->digest, g->ld, sizeof(a->digest));
	a->policy = g->policy;
	a->sig_usage = CERT_PEK;
	a->sig_algo = CERT_ECDSA_SHA384;
	d->len = sizeof(*a);
	return softsev_sign(&softsev_platform.pek, a, offsetof(struct attestation, sig_usage), &a->sig) ?
	       SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

static u32 debug_copy(struct sev_data_dbg *d)
{
	struct softsev_guest *g;
	u32 ret = guest_check(d->handle, -1, true, &g);

	if (ret)
		return ret;
	if (g->policy & POLICY_NODBG)
		return SEV_RET_POLICY_FAILURE;
	if (!d->len || d->len % 16)
		return SEV_RET_INVALID_LEN;
	if (softsev_pa(d->src_addr) % 16 || softsev_pa(d->dst_addr) % 16 || !softsev_pa_valid(d->src_addr, d->len) ||
	    !softsev_pa_valid(d->dst_addr, d->len))
		return SEV_RET_INVALID_ADDRESS;
	memmove(softsev_va(d->dst_addr), softsev_va(d->src_addr), d->len);
	return SEV_RET_SUCCESS;
}

u32 softsev_dbg_decrypt(void *buf)
{
	return debug_copy(buf);
}

u32 softsev_dbg_encrypt(void *buf)
{
	return debug_copy(buf);
}
