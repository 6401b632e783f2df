// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: SEND and RECEIVE (SEV API, chapter 6). The packets are encrypted and authenticated for real, so that
 * a guest can go from one VM to another of this platform.
 *
 * Of the receiver only its PDH is looked at: a chain up to AMD cannot exist here.
 */
#include <linux/random.h>
#include <linux/slab.h>
#include "psp.h"

#define POLICY_ES	BIT(2)
#define POLICY_NOSEND	BIT(3)

static u32 check(u32 handle, int state, bool active, struct softsev_guest **g)
{
	if (!softsev_platform.legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	*g = softsev_guest(handle);
	if (!*g)
		return SEV_RET_INVALID_GUEST;
	if ((*g)->state != state)
		return SEV_RET_INVALID_GUEST_STATE;
	return active && !(*g)->asid ? SEV_RET_INACTIVE : SEV_RET_SUCCESS;
}

/* The MAC of a packet; @context tells data from a VMSA. */
static int packet_mac(const u8 *tik, u8 context, const struct softsev_packet *h, u32 guest_len, u32 trans_len,
		      const void *data, u8 *mac)
{
	const struct softsev_buf parts[] = {
		{ &context, 1 }, { &h->flags, 4 }, { h->iv, sizeof(h->iv) }, { &guest_len, 4 }, { &trans_len, 4 },
		{ data, trans_len },
	};

	return softsev_hmac(tik, KEY128, parts, ARRAY_SIZE(parts), mac);
}

u32 softsev_send_start(void *buf)
{
	struct sev_data_send_start *d = buf;
	struct softsev_cert *cert;
	struct softsev_guest *g;
	u32 ret = check(d->handle, GSTATE_RUNNING, false, &g);

	if (ret)
		return ret;
	if (d->session_len < sizeof(struct softsev_session)) {
		d->session_len = sizeof(struct softsev_session);
		return SEV_RET_INVALID_LEN;
	}
	if (g->policy & POLICY_NOSEND)
		return SEV_RET_POLICY_FAILURE;
	if (d->pdh_cert_len < sizeof(*cert))
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(d->pdh_cert_address, sizeof(*cert)) ||
	    !softsev_pa_valid(d->session_address, sizeof(struct softsev_session)))
		return SEV_RET_INVALID_ADDRESS;
	cert = softsev_va(d->pdh_cert_address);
	if (cert->version != 1 || cert->usage != CERT_PDH)
		return SEV_RET_INVALID_CERTIFICATE;
	get_random_bytes(g->send_tek, KEY128);
	get_random_bytes(g->send_tik, KEY128);
	ret = softsev_session_make(&cert->key, g->policy, g->send_tek, g->send_tik, softsev_va(d->session_address));
	if (ret)
		return ret;
	d->policy = g->policy;
	d->session_len = sizeof(struct softsev_session);
	g->state = GSTATE_SUPDATE;
	return SEV_RET_SUCCESS;
}

static u32 send(u32 handle, u64 hdr_pa, u32 *hdr_len, u64 guest_pa, u32 guest_len, u64 trans_pa, u32 *trans_len,
		bool vmsa)
{
	struct softsev_packet *h;
	struct softsev_guest *g;
	u32 ret = check(handle, GSTATE_SUPDATE, true, &g);

	if (ret)
		return ret;
	if (*hdr_len < sizeof(*h) || *trans_len < guest_len) {
		*hdr_len = sizeof(*h);
		*trans_len = guest_len;
		return SEV_RET_INVALID_LEN;
	}
	ret = softsev_guest_buffer(guest_pa, guest_len);
	if (ret)
		return ret;
	if (!softsev_pa_valid(hdr_pa, sizeof(*h)) || !softsev_pa_valid(trans_pa, guest_len))
		return SEV_RET_INVALID_ADDRESS;
	h = softsev_va(hdr_pa);
	h->flags = 0;
	get_random_bytes(h->iv, sizeof(h->iv));
	softsev_aes_ctr(g->send_tek, h->iv, softsev_va(guest_pa), softsev_va(trans_pa), guest_len);
	*hdr_len = sizeof(*h);
	*trans_len = guest_len;
	return packet_mac(g->send_tik, vmsa ? 3 : 2, h, guest_len, guest_len, softsev_va(trans_pa), h->mac) ?
	       SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

u32 softsev_send_update_data(void *buf)
{
	struct sev_data_send_update_data *d = buf;
	u32 hdr_len = d->hdr_len, trans_len = d->trans_len, ret;

	ret = send(d->handle, d->hdr_address, &hdr_len, d->guest_address, d->guest_len, d->trans_address, &trans_len,
		   false);
	d->hdr_len = hdr_len;
	d->trans_len = trans_len;
	return ret;
}

u32 softsev_send_update_vmsa(void *buf)
{
	struct sev_data_send_update_vmsa *d = buf;
	u32 hdr_len = d->hdr_len, trans_len = d->trans_len, ret;

	ret = send(d->handle, d->hdr_address, &hdr_len, d->guest_address, d->guest_len, d->trans_address, &trans_len,
		   true);
	d->hdr_len = hdr_len;
	d->trans_len = trans_len;
	return ret;
}

u32 softsev_send_finish(void *buf)
{
	struct sev_data_send_finish *d = buf;
	struct softsev_guest *g;
	u32 ret = check(d->handle, GSTATE_SUPDATE, false, &g);

	if (!ret)
		g->state = GSTATE_SENT;
	return ret;
}

u32 softsev_send_cancel(void *buf)
{
	struct sev_data_send_cancel *d = buf;
	struct softsev_guest *g;
	u32 ret = check(d->handle, GSTATE_SUPDATE, false, &g);

	if (!ret)
		g->state = GSTATE_RUNNING;
	return ret;
}

u32 softsev_receive_start(void *buf)
{
	struct sev_data_receive_start *d = buf;
	u8 tek[KEY128], tik[KEY128];
	struct softsev_guest *g;
	u32 ret;

	if (!softsev_platform.legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->handle && !softsev_guest(d->handle))
		return SEV_RET_INVALID_GUEST;
	if ((d->policy & POLICY_ES) && !softsev_platform.es)
		return SEV_RET_UNSUPPORTED;
	ret = softsev_session_open(d->pdh_cert_address, d->pdh_cert_len, d->session_address, d->session_len, d->policy,
				   tek, tik);
	if (ret)
		return ret;
	g = softsev_guest_new();
	if (!g)
		return SEV_RET_RESOURCE_LIMIT;
	g->policy = d->policy;
	g->state = GSTATE_RUPDATE;
	memcpy(g->tek, tek, KEY128);
	memcpy(g->tik, tik, KEY128);
	d->handle = g->handle;
	return SEV_RET_SUCCESS;
}

static u32 receive(u32 handle, u64 hdr_pa, u32 hdr_len, u64 guest_pa, u32 guest_len, u64 trans_pa, u32 trans_len,
		   bool vmsa)
{
	struct softsev_packet *h;
	struct softsev_guest *g;
	u8 mac[HASH256];
	u32 ret = check(handle, GSTATE_RUPDATE, true, &g);

	ret = ret ?: softsev_guest_buffer(guest_pa, guest_len);
	if (ret)
		return ret;
	if (hdr_len < sizeof(*h) || trans_len < guest_len)
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(hdr_pa, sizeof(*h)) || !softsev_pa_valid(trans_pa, trans_len))
		return SEV_RET_INVALID_ADDRESS;
	h = softsev_va(hdr_pa);
	if (h->flags)
		return SEV_RET_UNSUPPORTED;
	if (packet_mac(g->tik, vmsa ? 3 : 2, h, guest_len, trans_len, softsev_va(trans_pa), mac))
		return SEV_RET_HWSEV_RET_PLATFORM;
	if (!softsev_equal(mac, h->mac, sizeof(mac)))
		return SEV_RET_BAD_MEASUREMENT;
	softsev_aes_ctr(g->tek, h->iv, softsev_va(trans_pa), softsev_va(guest_pa), guest_len);
	if (vmsa)
		softsev_vmsa_seal(softsev_va(guest_pa));
	return SEV_RET_SUCCESS;
}

u32 softsev_receive_update_data(void *buf)
{
	struct sev_data_receive_update_data *d = buf;

	return receive(d->handle, d->hdr_address, d->hdr_len, d->guest_address, d->guest_len, d->trans_address,
		       d->trans_len, false);
}

u32 softsev_receive_update_vmsa(void *buf)
{
	struct sev_data_receive_update_vmsa *d = buf;

	return receive(d->handle, d->hdr_address, d->hdr_len, d->guest_address, d->guest_len, d->trans_address,
		       d->trans_len, true);
}

u32 softsev_receive_finish(void *buf)
{
	struct sev_data_receive_finish *d = buf;
	struct softsev_guest *g;
	u32 ret = check(d->handle, GSTATE_RUPDATE, true, &g);

	if (!ret)
		g->state = GSTATE_RUNNING;
	return ret;
}
