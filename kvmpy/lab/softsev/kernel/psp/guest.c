// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: guests of the legacy commands (SEV API, chapter 6). The order of each command's checks is that of the
 * firmware: docs/software-amd-sp-commands.md.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/printk.h>
#include <linux/random.h>
#include <linux/slab.h>
#include "psp.h"

#define VMSA_MARK		0x41534d5674666f53ULL

static struct softsev_guest guests[SOFTSEV_GUESTS];

struct softsev_guest *softsev_guest(u32 handle)
{
	return handle && handle <= SOFTSEV_GUESTS && guests[handle - 1].used ? &guests[handle - 1] : NULL;
}

/**
 * softsev_guest_find() - what every command with a handle begins with
 * @handle: the guest's
 * @g: becomes the guest
 *
 * Return: SEV_RET_SUCCESS; INVALID_PLATFORM_STATE while there is no guest at all, INVALID_GUEST without this one.
 */
u32 softsev_guest_find(u32 handle, struct softsev_guest **g)
{
	if (!softsev_platform.legacy || !softsev_guest_count())
		return SEV_RET_INVALID_PLATFORM_STATE;
	*g = softsev_guest(handle);
	return *g ? SEV_RET_SUCCESS : SEV_RET_INVALID_GUEST;
}

/**
 * softsev_guest_in() - find a guest that must be in one state
 * @handle: the guest's
 * @state: where it must be
 * @g: becomes the guest
 *
 * Return: SEV_RET_SUCCESS, or the firmware's error.
 */
u32 softsev_guest_in(u32 handle, int state, struct softsev_guest **g)
{
	u32 ret = softsev_guest_find(handle, g);

	if (!ret && (*g)->state != state)
		ret = SEV_RET_INVALID_GUEST_STATE;
	return ret;
}

/**
 * softsev_guest_new() - begin a guest
 * @shared: handle of a guest whose key it shares, or 0
 * @policy: its policy
 * @state: its first state
 * @tek: its transport encryption key
 * @tik: its transport integrity key
 * @handle: becomes its handle
 *
 * Firmware: sev_mcmd_launch_start(), sev_mcmd_receive_start(), find_free_guest_handle().
 *
 * Return: SEV_RET_SUCCESS, or the firmware's error.
 */
u32 softsev_guest_new(u32 shared, u32 policy, int state, const u8 *tek, const u8 *tik, u32 *handle)
{
	struct softsev_guest *g, *other;
	int i;

	if (shared) {
		other = softsev_guest(shared);
		if (!other)
			return SEV_RET_INVALID_GUEST;
		if ((other->policy & POLICY_NOKS) || other->policy != policy)
			return SEV_RET_POLICY_FAILURE;
	}
	for (i = 0; i < SOFTSEV_GUESTS && guests[i].used; i++)
		;
	if (i == SOFTSEV_GUESTS)
		return SEV_RET_RESOURCE_LIMIT;
	if ((policy & POLICY_ES) && !softsev_platform.es)
		return SEV_RET_UNSUPPORTED;
	g = &guests[i];
	memset(g, 0, sizeof(*g));
	g->digest = softsev_sha256_begin();
	if (!g->digest)
		return SEV_RET_HWSEV_RET_PLATFORM;
	g->used = true;
	g->handle = i + 1;
	g->policy = policy;
	g->state = state;
	memcpy(g->tek, tek, KEY128);
	memcpy(g->tik, tik, KEY128);
	*handle = g->handle;
	return SEV_RET_SUCCESS;
}

static void guest_free(struct softsev_guest *g)
{
	softsev_asid_release(g->asid, g->handle);
	kfree(g->digest);
	memzero_explicit(g, sizeof(*g));
}

/**
 * softsev_guest_run() - the end of a launch or of a migration: the transport keys are forgotten
 * @g: the guest
 */
void softsev_guest_run(struct softsev_guest *g)
{
	softsev_asid_run(g->asid);
	memzero_explicit(g->tek, KEY128);
	memzero_explicit(g->tik, KEY128);
	g->state = GSTATE_RUNNING;
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
			guest_free(&guests[i]);
}

/**
 * softsev_vmsa_seal() - mark a VMSA as encrypted: VMRUN takes no other
 * @vmsa: the page
 */
void softsev_vmsa_seal(void *vmsa)
{
	*(u64 *)(vmsa + PAGE_SIZE - 8) = VMSA_MARK;
}

bool softsev_vmsa_sealed(const void *vmsa)
{
	return *(const u64 *)(vmsa + PAGE_SIZE - 8) == VMSA_MARK;
}

u32 softsev_decommission(void *buf)
{
	struct sev_data_decommission *d = buf;
	struct softsev_guest *g;
	u32 ret = softsev_guest_find(d->handle, &g);

	if (ret)
		return ret;
	if (g->asid)
		return SEV_RET_ACTIVE;
	guest_free(g);
	return SEV_RET_SUCCESS;
}

u32 softsev_activate(void *buf)
{
	struct sev_data_activate *d = buf;
	struct softsev_asid_user user;
	struct softsev_guest *g;
	u32 ret = softsev_guest_find(d->handle, &g);

	if (ret)
		return ret;
	user = (struct softsev_asid_user) {
		.owner = g->handle,
		.es = g->policy & POLICY_ES,
		.bound = g->asid,
		.sent = g->state == GSTATE_SENT,
		.running = g->state == GSTATE_RUNNING || g->state == GSTATE_SUPDATE,
	};
	ret = softsev_asid_take(d->asid, &user);
	if (!ret)
		g->asid = d->asid;
	return ret;
}

u32 softsev_deactivate(void *buf)
{
	struct sev_data_deactivate *d = buf;
	struct softsev_guest *g;
	u32 ret = softsev_guest_find(d->handle, &g);

	if (ret)
		return ret;
	if (!g->asid)
		return SEV_RET_INACTIVE;
	softsev_asid_release(g->asid, g->handle);
	g->asid = 0;
	return SEV_RET_SUCCESS;
}

/* Of a guest that is none, it tells that. */
u32 softsev_guest_status(void *buf)
{
	struct sev_data_guest_status *d = buf;
	struct softsev_guest *g;

	if (!softsev_platform.legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	g = softsev_guest(d->handle);
	d->state = g ? g->state : GSTATE_INVALID;
	if (g) {
		d->policy = g->policy;
		d->asid = g->asid;
	}
	return SEV_RET_SUCCESS;
}

u32 softsev_launch_start(void *buf)
{
	struct sev_data_launch_start *d = buf;
	u8 tek[KEY128], tik[KEY128];
	u32 ret;

	if (!softsev_platform.legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->dh_cert_address) {
		ret = softsev_session_open(d->dh_cert_address, d->dh_cert_len, d->session_address, d->session_len,
					   d->policy, tek, tik);
		if (ret)
			return ret;
	} else {
		get_random_bytes(tek, sizeof(tek));
		get_random_bytes(tik, sizeof(tik));
	}
	return softsev_guest_new(d->handle, d->policy, GSTATE_LUPDATE, tek, tik, &d->handle);
}

static u32 launch_update(u32 handle, u64 pa, u32 len, bool vmsa)
{
	struct softsev_guest *g;
	u32 ret = softsev_guest_in(handle, GSTATE_LUPDATE, &g);

	if (ret)
		return ret;
	if (vmsa && !(g->policy & POLICY_ES))
		return SEV_RET_UNSUPPORTED;
	if (!g->asid)
		return SEV_RET_INACTIVE;
	if (pa % 16)
		return SEV_RET_INVALID_ADDRESS;
	if (!len || len % 16)
		return SEV_RET_INVALID_LEN;
	ret = softsev_writable(pa, len);
	if (ret)
		return ret;
	if (crypto_shash_update(g->digest, softsev_va(pa), len))
		return SEV_RET_HWSEV_RET_PLATFORM;
	if (vmsa)
		softsev_vmsa_seal(softsev_va(pa));
	return SEV_RET_SUCCESS;
}

u32 softsev_launch_update_data(void *buf)
{
	struct sev_data_launch_update_data *d = buf;

	return launch_update(d->handle, d->address, d->len, false);
}

u32 softsev_launch_update_vmsa(void *buf)
{
	struct sev_data_launch_update_vmsa *d = buf;

	if (d->len != PAGE_SIZE)
		return SEV_RET_INVALID_LEN;
	return launch_update(d->handle, d->address, d->len, true);
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
	u32 ret = softsev_guest_in(d->handle, GSTATE_LUPDATE, &g);

	if (ret)
		return ret;
	if (d->len < sizeof(*m)) {
		d->len = sizeof(*m);
		return SEV_RET_INVALID_LEN;
	}
	ret = softsev_writable(d->address, d->len);
	if (ret)
		return ret;
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
	g->state = GSTATE_LSECRET;
	pr_info("guest %u: launch digest %*phN, policy %#x\n", g->handle, HASH256, g->ld, g->policy);
	return SEV_RET_SUCCESS;
}

static u32 check_secret(const struct sev_data_launch_secret *d, struct softsev_guest **g)
{
	u32 ret = softsev_guest_find(d->handle, g);

	if (ret)
		return ret;
	if (d->guest_address % 16)
		return SEV_RET_INVALID_ADDRESS;
	if (d->hdr_len != sizeof(struct softsev_packet) || !d->guest_len || d->guest_len % 16 ||
	    d->guest_len > SCRATCH_LEN || d->guest_len != d->trans_len)
		return SEV_RET_INVALID_LEN;
	if ((*g)->state != GSTATE_LSECRET)
		return SEV_RET_INVALID_GUEST_STATE;
	if (!(*g)->asid)
		return SEV_RET_INACTIVE;
	ret = softsev_writable(d->guest_address, d->guest_len);
	if (ret)
		return ret;
	return softsev_pa_valid(d->hdr_address, d->hdr_len) && softsev_pa_valid(d->trans_address, d->trans_len) ?
	       SEV_RET_SUCCESS : SEV_RET_INVALID_ADDRESS;
}

u32 softsev_launch_secret(void *buf)
{
	struct sev_data_launch_secret *d = buf;
	const u8 context = 1;
	struct softsev_packet *h;
	struct softsev_guest *g;
	u8 mac[HASH256];
	u32 ret = check_secret(d, &g);

	if (ret)
		return ret;
	h = softsev_va(d->hdr_address);
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
	if (h->flags & PACKET_COMPRESSED)
		return SEV_RET_UNSUPPORTED;
	softsev_aes_ctr(g->tek, h->iv, softsev_va(d->trans_address), softsev_va(d->guest_address), d->guest_len);
	return SEV_RET_SUCCESS;
}

u32 softsev_launch_finish(void *buf)
{
	struct sev_data_launch_finish *d = buf;
	struct softsev_guest *g;
	u32 ret = softsev_guest_in(d->handle, GSTATE_LSECRET, &g);

	if (!ret)
		softsev_guest_run(g);
	return ret;
}

/* What a SEV or SEV-ES guest is, signed with the PEK. */
struct attestation {
	u8 nonce[16];
	u8 digest[HASH256];
	u32 policy, sig_usage, sig_algo, reserved;
	u8 sig[144];
} __packed;

u32 softsev_attestation_report(void *buf)
{
	struct sev_data_attestation_report *d = buf;
	struct attestation *a;
	struct softsev_guest *g;
	struct softsev_sig sig;
	u32 ret = softsev_guest_find(d->handle, &g);

	BUILD_BUG_ON(sizeof(*a) != 0xd0);
	if (ret)
		return ret;
	if (g->state != GSTATE_LSECRET && g->state != GSTATE_RUNNING && g->state != GSTATE_SUPDATE &&
	    g->state != GSTATE_SENT)
		return SEV_RET_INVALID_GUEST_STATE;
	if (d->len < sizeof(*a)) {
		d->len = sizeof(*a);
		return SEV_RET_INVALID_LEN;
	}
	ret = softsev_writable(d->address, d->len);
	if (ret)
		return ret;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	a = softsev_va(d->address);
	memset(a, 0, sizeof(*a));
	memcpy(a->nonce, d->mnonce, sizeof(a->nonce));
	memcpy(a->digest, g->ld, sizeof(a->digest));
	a->policy = g->policy;
	a->sig_usage = CERT_PEK;
	a->sig_algo = CERT_ECDSA_SHA256;
	d->len = sizeof(*a);
	if (softsev_sign(&softsev_platform.pek, softsev_sha256, a, offsetof(struct attestation, sig_usage), &sig))
		return SEV_RET_HWSEV_RET_PLATFORM;
	memcpy(a->sig, &sig, sizeof(a->sig));
	return SEV_RET_SUCCESS;
}

static u32 debug_copy(struct sev_data_dbg *d)
{
	struct softsev_guest *g;
	u32 ret;

	if (!softsev_platform.legacy || !softsev_guest_count())
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->src_addr % 16 || d->dst_addr % 16)
		return SEV_RET_INVALID_ADDRESS;
	if (d->len % 16)
		return SEV_RET_INVALID_LEN;
	ret = softsev_guest_find(d->handle, &g);
	if (ret)
		return ret;
	if (g->policy & POLICY_NODBG)
		return SEV_RET_POLICY_FAILURE;
	ret = softsev_page_check(d->dst_addr, d->len);
	if (ret)
		return ret;
	if (!g->asid)
		return SEV_RET_INACTIVE;
	if (!softsev_pa_valid(d->src_addr, d->len) || !softsev_pa_valid(d->dst_addr, d->len))
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
