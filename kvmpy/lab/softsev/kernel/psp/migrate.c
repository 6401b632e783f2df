// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: SEND and RECEIVE (SEV API, chapter 6). The packets are encrypted and authenticated for real, so that
 * a guest can go from one VM to another of this platform. The order of each command's checks is that of the firmware:
 * docs/software-amd-sp-commands.md.
 *
 * A chain up to AMD cannot exist here: a policy that asks for one is never met.
 */
#include <linux/random.h>
#include <linux/slab.h>
#include "psp.h"

#define CONTEXT_DATA		2	/* of a VMSA, too */

/* What ASK and ARK take, with keys of so many bytes: each has a key of two numbers, and the ARK has signed both. */
#define AMD_CERTS(ask, ark)	(2 * 64 + 2 * (ask) + 4 * (ark))

/* The MAC of a packet. */
static int packet_mac(const u8 *tik, const struct softsev_packet *h, u32 len, const void *data, u8 *mac)
{
	const u8 context = CONTEXT_DATA;
	const struct softsev_buf parts[] = {
		{ &context, 1 }, { &h->flags, 4 }, { h->iv, sizeof(h->iv) }, { &len, 4 }, { &len, 4 }, { data, len },
	};

	return softsev_hmac(tik, KEY128, parts, ARRAY_SIZE(parts), mac);
}

static u32 check_lengths(const struct sev_data_send_start *d)
{
	if (d->plat_certs_len != sizeof(struct softsev_chain) || d->pdh_cert_len != sizeof(struct softsev_cert))
		return SEV_RET_INVALID_LEN;
	return SEV_RET_SUCCESS;
}

/* Firmware: validate_platform(). Nothing of this platform is signed by AMD, so the ARK never is the right one. */
static u32 check_platform(const struct sev_data_send_start *d)
{
	u32 ret = check_lengths(d), n = d->amd_certs_len;

	if (ret)
		return ret;
	if (n != AMD_CERTS(256, 256) && n != AMD_CERTS(256, 512) && n != AMD_CERTS(512, 256) &&
	    n != AMD_CERTS(512, 512))
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(d->plat_certs_address, d->plat_certs_len) ||
	    !softsev_pa_valid(d->pdh_cert_address, d->pdh_cert_len) || !softsev_pa_valid(d->amd_certs_address, n))
		return SEV_RET_INVALID_ADDRESS;
	return SEV_RET_INVALID_CERTIFICATE;
}

/* Firmware: validate_domain(). */
static u32 check_domain(const struct sev_data_send_start *d)
{
	const struct softsev_chain *c;
	u32 ret = check_lengths(d);

	if (ret)
		return ret;
	if (!softsev_pa_valid(d->plat_certs_address, d->plat_certs_len) ||
	    !softsev_pa_valid(d->pdh_cert_address, d->pdh_cert_len))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	c = softsev_va(d->plat_certs_address);
	ret = softsev_cert_validate(&c->oca, &c->oca) ?: softsev_cert_validate(&c->pek, &c->oca);
	ret = ret ?: softsev_cert_validate(softsev_va(d->pdh_cert_address), &c->pek);
	if (!ret && memcmp(&c->oca, &softsev_platform.chain.oca, sizeof(c->oca)))
		ret = SEV_RET_POLICY_FAILURE;
	return ret;
}

u32 softsev_send_start(void *buf)
{
	struct sev_data_send_start *d = buf;
	struct softsev_session session;
	struct softsev_guest *g;
	u32 ret = softsev_guest_find(d->handle, &g);

	if (ret)
		return ret;
	if (d->session_len != sizeof(struct softsev_session)) {
		d->session_len = sizeof(struct softsev_session);
		return SEV_RET_INVALID_LEN;
	}
	if (g->state != GSTATE_RUNNING)
		return SEV_RET_INVALID_GUEST_STATE;
	if (g->policy & POLICY_NOSEND)
		return SEV_RET_POLICY_FAILURE;
	ret = g->policy & POLICY_SEV ? check_platform(d) : SEV_RET_SUCCESS;
	ret = ret ?: softsev_page_check(d->session_address, d->session_len);
	ret = ret ?: g->policy & POLICY_DOMAIN ? check_domain(d) : SEV_RET_SUCCESS;
	if (ret)
		return ret;
	if (d->pdh_cert_len != sizeof(struct softsev_cert))
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(d->pdh_cert_address, d->pdh_cert_len))
		return SEV_RET_INVALID_ADDRESS;
	get_random_bytes(g->tek, KEY128);
	get_random_bytes(g->tik, KEY128);
	ret = softsev_session_make(softsev_va(d->pdh_cert_address), g->policy, g->tek, g->tik, &session);
	if (ret)
		return ret;
	if (!softsev_pa_valid(d->session_address, sizeof(session)))
		return SEV_RET_INVALID_ADDRESS;
	memcpy(softsev_va(d->session_address), &session, sizeof(session));
	d->policy = g->policy;
	g->state = GSTATE_SUPDATE;
	return SEV_RET_SUCCESS;
}

/* The commands for data and for a VMSA have one form. */
struct transport {
	u32 handle, reserved;
	u64 hdr_pa;
	u32 hdr_len, reserved2;
	u64 guest_pa;
	u32 guest_len, reserved3;
	u64 trans_pa;
	u32 trans_len;
} __packed;

static u32 check_send(struct transport *d, bool vmsa, struct softsev_guest **g)
{
	u32 ret;

	if (!softsev_platform.legacy || !softsev_guest_count())
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->hdr_len < sizeof(struct softsev_packet)) {
		d->hdr_len = sizeof(struct softsev_packet);
		return SEV_RET_INVALID_LEN;
	}
	ret = softsev_guest_in(d->handle, GSTATE_SUPDATE, g);
	if (ret)
		return ret;
	if (vmsa && !((*g)->policy & POLICY_ES))
		return SEV_RET_UNSUPPORTED;
	if (!(*g)->asid)
		return SEV_RET_INACTIVE;
	if (!d->guest_len || d->guest_len > SCRATCH_LEN || d->guest_len % 16 || d->trans_len < d->guest_len)
		return SEV_RET_INVALID_LEN;
	if (d->guest_pa % 16)
		return SEV_RET_INVALID_ADDRESS;
	ret = softsev_writable(d->hdr_pa, d->hdr_len) ?: softsev_writable(d->trans_pa, d->trans_len);
	if (ret)
		return ret;
	if (!softsev_pa_valid(d->guest_pa, d->guest_len))
		return SEV_RET_INVALID_ADDRESS;
	if (vmsa && (d->guest_len < PAGE_SIZE || !softsev_vmsa_sealed(softsev_va(d->guest_pa))))
		return SEV_RET_INVALID_PARAM;
	return SEV_RET_SUCCESS;
}

static u32 send(struct transport *d, bool vmsa)
{
	struct softsev_packet *h;
	struct softsev_guest *g;
	u32 ret = check_send(d, vmsa, &g);

	BUILD_BUG_ON(sizeof(*d) != sizeof(struct sev_data_send_update_data));
	if (ret)
		return ret;
	h = softsev_va(d->hdr_pa);
	h->flags = 0;
	get_random_bytes(h->iv, sizeof(h->iv));
	softsev_aes_ctr(g->tek, h->iv, softsev_va(d->guest_pa), softsev_va(d->trans_pa), d->guest_len);
	d->hdr_len = sizeof(*h);
	return packet_mac(g->tik, h, d->guest_len, softsev_va(d->trans_pa), h->mac) ? SEV_RET_HWSEV_RET_PLATFORM :
	       SEV_RET_SUCCESS;
}

u32 softsev_send_update_data(void *buf)
{
	return send(buf, false);
}

u32 softsev_send_update_vmsa(void *buf)
{
	return send(buf, true);
}

static u32 send_end(u32 handle, int state)
{
	struct softsev_guest *g;
	u32 ret = softsev_guest_in(handle, GSTATE_SUPDATE, &g);

	if (ret)
		return ret;
	memzero_explicit(g->tek, KEY128);
	memzero_explicit(g->tik, KEY128);
	g->state = state;
	return SEV_RET_SUCCESS;
}

u32 softsev_send_finish(void *buf)
{
	struct sev_data_send_finish *d = buf;

	return send_end(d->handle, GSTATE_SENT);
}

u32 softsev_send_cancel(void *buf)
{
	struct sev_data_send_cancel *d = buf;

	return send_end(d->handle, GSTATE_RUNNING);
}

u32 softsev_receive_start(void *buf)
{
	struct sev_data_receive_start *d = buf;
	u8 tek[KEY128], tik[KEY128];
	u32 ret;

	if (!softsev_platform.legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	ret = softsev_session_open(d->pdh_cert_address, d->pdh_cert_len, d->session_address, d->session_len, d->policy,
				   tek, tik);
	return ret ?: softsev_guest_new(d->handle, d->policy, GSTATE_RUPDATE, tek, tik, &d->handle);
}

static u32 check_receive(const struct transport *d, bool vmsa, struct softsev_guest **g)
{
	u32 ret = softsev_guest_in(d->handle, GSTATE_RUPDATE, g);

	if (ret)
		return ret;
	if (vmsa && !((*g)->policy & POLICY_ES))
		return SEV_RET_UNSUPPORTED;
	if (!(*g)->asid)
		return SEV_RET_INACTIVE;
	if (!d->guest_len || d->guest_len > SCRATCH_LEN || d->guest_len % 16 || d->guest_len != d->trans_len ||
	    d->hdr_len < sizeof(struct softsev_packet))
		return SEV_RET_INVALID_LEN;
	if (d->guest_pa % 16)
		return SEV_RET_INVALID_ADDRESS;
	ret = softsev_writable(d->guest_pa, d->guest_len);
	if (ret)
		return ret;
	return softsev_pa_valid(d->hdr_pa, sizeof(struct softsev_packet)) ? SEV_RET_SUCCESS : SEV_RET_INVALID_ADDRESS;
}

static u32 receive(const struct transport *d, bool vmsa)
{
	struct softsev_packet *h;
	struct softsev_guest *g;
	u8 mac[HASH256];
	u32 ret = check_receive(d, vmsa, &g);

	if (ret)
		return ret;
	h = softsev_va(d->hdr_pa);
	if (h->flags & PACKET_COMPRESSED)
		return SEV_RET_UNSUPPORTED;
	if (!softsev_pa_valid(d->trans_pa, d->trans_len))
		return SEV_RET_INVALID_ADDRESS;
	if (packet_mac(g->tik, h, d->trans_len, softsev_va(d->trans_pa), mac))
		return SEV_RET_HWSEV_RET_PLATFORM;
	if (!softsev_equal(mac, h->mac, sizeof(mac)))
		return SEV_RET_BAD_MEASUREMENT;
	if (vmsa && d->trans_len < PAGE_SIZE)
		return SEV_RET_INVALID_LEN;
	softsev_aes_ctr(g->tek, h->iv, softsev_va(d->trans_pa), softsev_va(d->guest_pa), d->guest_len);
	if (vmsa)
		softsev_vmsa_seal(softsev_va(d->guest_pa));
	return SEV_RET_SUCCESS;
}

u32 softsev_receive_update_data(void *buf)
{
	return receive(buf, false);
}

u32 softsev_receive_update_vmsa(void *buf)
{
	return receive(buf, true);
}

u32 softsev_receive_finish(void *buf)
{
	struct sev_data_receive_finish *d = buf;
	struct softsev_guest *g;
	u32 ret = softsev_guest_in(d->handle, GSTATE_RUPDATE, &g);

	if (!ret)
		softsev_guest_run(g);
	return ret;
}
