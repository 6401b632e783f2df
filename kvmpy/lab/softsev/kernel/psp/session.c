// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: sessions with a guest's owner, or with another platform (SEV API, chapter 2).
 *
 * ECDH with the PDH gives a secret, from which a key that wraps the transport keys and one that signs them are derived.
 */
#include <linux/random.h>
#include "psp.h"

struct session_keys {
	u8 kek[KEY128], kik[KEY128];
};

static int session_keys(const struct softsev_pubkey *peer, const u8 *nonce, struct session_keys *keys)
{
	u8 z[P384_BYTES], master[KEY128];
	int ret;

	ret = softsev_ecdh(&softsev_platform.pdh, peer, z);
	ret = ret ?: softsev_kdf(master, sizeof(master), z, sizeof(z), "sev-master-secret", nonce, 16);
	ret = ret ?: softsev_kdf(keys->kek, KEY128, master, sizeof(master), "sev-kek", NULL, 0);
	return ret ?: softsev_kdf(keys->kik, KEY128, master, sizeof(master), "sev-kik", NULL, 0);
}

static int hmac_one(const u8 *key, const void *data, unsigned int len, u8 *out)
{
	const struct softsev_buf part = { data, len };

	return softsev_hmac(key, KEY128, &part, 1, out);
}

/* What a policy may ask, once its MAC is right. Without a session nobody looks: the firmware does not either. */
static u32 check_policy(u32 policy)
{
	unsigned int major = FIELD_GET(POLICY_MAJOR, policy), minor = FIELD_GET(POLICY_MINOR, policy);

	if (major > SOFTSEV_API_MAJOR || (major == SOFTSEV_API_MAJOR && minor > SOFTSEV_API_MINOR) ||
	    (policy & POLICY_RESERVED))
		return SEV_RET_POLICY_FAILURE;
	return SEV_RET_SUCCESS;
}

/**
 * softsev_session_open() - take the transport keys out of a session
 * @cert_pa: the other side's Diffie-Hellman certificate
 * @cert_len: its length
 * @session_pa: the session
 * @session_len: its length
 * @policy: the guest's, which the session authenticates
 * @tek: becomes the encryption key
 * @tik: becomes the integrity key
 *
 * Firmware: sev_mcmd_launch_start(), sev_mcmd_receive_start(), sev_channel_open_server(), sev_guest_verify_policy().
 *
 * Return: SEV_RET_SUCCESS, or the firmware's error.
 */
u32 softsev_session_open(u64 cert_pa, u32 cert_len, u64 session_pa, u32 session_len, u32 policy, u8 *tek, u8 *tik)
{
	struct softsev_session *s;
	struct session_keys keys;
	struct softsev_cert *cert;
	u8 mac[HASH256], tk[2 * KEY128];

	if (session_len != sizeof(*s))
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(session_pa, sizeof(*s)))
		return SEV_RET_INVALID_ADDRESS;
	if (cert_len != sizeof(*cert))
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(cert_pa, sizeof(*cert)))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	cert = softsev_va(cert_pa);
	s = softsev_va(session_pa);
	if (!softsev_cert_sane(cert, CERT_PDH, CERT_ECDH_SHA256) || session_keys(&cert->key, s->nonce, &keys))
		return SEV_RET_INVALID_CERTIFICATE;
	if (hmac_one(keys.kik, s->wrap_tk, sizeof(s->wrap_tk), mac))
		return SEV_RET_HWSEV_RET_PLATFORM;
	if (!softsev_equal(mac, s->wrap_mac, sizeof(mac)))
		return SEV_RET_BAD_MEASUREMENT;
	softsev_aes_ctr(keys.kek, s->wrap_iv, s->wrap_tk, tk, sizeof(tk));
	if (hmac_one(tk + KEY128, &policy, sizeof(policy), mac))
		return SEV_RET_HWSEV_RET_PLATFORM;
	if (!softsev_equal(mac, s->policy_mac, sizeof(mac)))
		return SEV_RET_BAD_MEASUREMENT;
	memcpy(tek, tk, KEY128);
	memcpy(tik, tk + KEY128, KEY128);
	memzero_explicit(&keys, sizeof(keys));
	return check_policy(policy);
}

/**
 * softsev_session_make() - wrap transport keys for another platform
 * @peer: its Diffie-Hellman certificate
 * @policy: the guest's
 * @tek: the encryption key
 * @tik: the integrity key
 * @s: becomes the session
 *
 * Firmware: sev_channel_open_client().
 *
 * Return: SEV_RET_SUCCESS, or the firmware's error.
 */
u32 softsev_session_make(const struct softsev_cert *peer, u32 policy, const u8 *tek, const u8 *tik,
			 struct softsev_session *s)
{
	struct session_keys keys;
	u8 tk[2 * KEY128];

	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	get_random_bytes(s->nonce, sizeof(s->nonce));
	get_random_bytes(s->wrap_iv, sizeof(s->wrap_iv));
	if (!softsev_cert_sane(peer, CERT_PDH, CERT_ECDH_SHA256) || session_keys(&peer->key, s->nonce, &keys))
		return SEV_RET_INVALID_CERTIFICATE;
	memcpy(tk, tek, KEY128);
	memcpy(tk + KEY128, tik, KEY128);
	softsev_aes_ctr(keys.kek, s->wrap_iv, tk, s->wrap_tk, sizeof(tk));
	if (hmac_one(keys.kik, s->wrap_tk, sizeof(s->wrap_tk), s->wrap_mac) ||
	    hmac_one(tik, &policy, sizeof(policy), s->policy_mac))
		return SEV_RET_HWSEV_RET_PLATFORM;
	memzero_explicit(&keys, sizeof(keys));
	return SEV_RET_SUCCESS;
}
