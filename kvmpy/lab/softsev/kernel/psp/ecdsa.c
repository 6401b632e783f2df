// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: ECDSA and ECDH on P-384, on the kernel's elliptic curve arithmetic.
 *
 * The kernel has no signing. Numbers are arrays of native digits, lowest first: on x86 the same bytes as the firmware's
 * little-endian fields.
 */
#include <linux/kernel.h>
#include <linux/random.h>
#include <crypto/ecc_curve.h>
#include <crypto/ecdh.h>
#include <crypto/internal/ecc.h>
#include "psp.h"

static const struct ecc_curve *p384(void)
{
	return ecc_get_curve(ECC_CURVE_NIST_P384);
}

static void random_scalar(u64 *k)
{
	do {
		get_random_bytes(k, P384_BYTES);
	} while (ecc_is_key_valid(ECC_CURVE_NIST_P384, P384_DIGITS, k, P384_BYTES));
}

/* The point k * G. */
static int base_point(const u64 *k, u8 *x, u8 *y)
{
	u64 be[2 * P384_DIGITS], le[P384_DIGITS];
	int ret = ecc_make_pub_key(ECC_CURVE_NIST_P384, P384_DIGITS, k, be);

	if (ret)
		return ret;
	ecc_swap_digits(be, le, P384_DIGITS);
	memcpy(x, le, P384_BYTES);
	ecc_swap_digits(be + P384_DIGITS, le, P384_DIGITS);
	memcpy(y, le, P384_BYTES);
	return 0;
}

int softsev_key_make(struct softsev_key *key)
{
	random_scalar(key->d);
	return base_point(key->d, key->x, key->y);
}

void softsev_pubkey(const struct softsev_key *key, struct softsev_pubkey *out)
{
	memset(out, 0, sizeof(*out));
	out->curve = SOFTSEV_CURVE_P384;
	memcpy(out->x, key->x, P384_BYTES);
	memcpy(out->y, key->y, P384_BYTES);
}

/* The number that is signed: a hash that is shorter than the curve's order is taken as it is. */
static int hash_number(softsev_hash hash, const void *data, unsigned int len, u64 *z)
{
	unsigned int size = hash == softsev_sha256 ? HASH256 : HASH384;
	u8 digest[HASH384];
	int ret = hash(data, len, digest);

	ecc_digits_from_bytes(digest, size, z, P384_DIGITS);
	if (!ret && vli_cmp(z, p384()->n, P384_DIGITS) >= 0)
		vli_sub(z, z, p384()->n, P384_DIGITS);
	return ret;
}

/* a = (a + b) mod n, both below n: a - (n - b), plus n when that is negative. */
static void add_mod(u64 *a, const u64 *b)
{
	const u64 *n = p384()->n;
	u64 rest[P384_DIGITS], zero[P384_DIGITS] = {};

	if (vli_is_zero(b, P384_DIGITS))
		return;
	vli_sub(rest, n, b, P384_DIGITS);
	if (vli_cmp(a, rest, P384_DIGITS) >= 0) {
		vli_sub(a, a, rest, P384_DIGITS);
	} else {
		vli_sub(rest, rest, a, P384_DIGITS);
		vli_sub(a, n, rest, P384_DIGITS);
		if (!vli_cmp(a, n, P384_DIGITS))
			memcpy(a, zero, sizeof(zero));
	}
}

int softsev_sign(const struct softsev_key *key, softsev_hash hash, const void *data, unsigned int len,
		 struct softsev_sig *sig)
{
	const struct ecc_curve *curve = p384();
	u64 k[P384_DIGITS], r[P384_DIGITS], s[P384_DIGITS], z[P384_DIGITS], t[P384_DIGITS];
	u8 y[P384_BYTES];
	int ret;

	ret = hash_number(hash, data, len, z);
	if (ret)
		return ret;
	do {
		random_scalar(k);
		ret = base_point(k, (u8 *)r, y);
		if (ret)
			return ret;
		if (vli_cmp(r, curve->n, P384_DIGITS) >= 0)
			vli_sub(r, r, curve->n, P384_DIGITS);
		vli_mod_mult_slow(t, r, key->d, curve->n, P384_DIGITS);
		add_mod(t, z);
		vli_mod_inv(k, k, curve->n, P384_DIGITS);
		vli_mod_mult_slow(s, k, t, curve->n, P384_DIGITS);
	} while (vli_is_zero(r, P384_DIGITS) || vli_is_zero(s, P384_DIGITS));

	memset(sig, 0, sizeof(*sig));
	memcpy(sig->r, r, P384_BYTES);
	memcpy(sig->s, s, P384_BYTES);
	memzero_explicit(k, sizeof(k));
	return 0;
}

static int public_point(const struct softsev_pubkey *key, struct ecc_point *point)
{
	if (key->curve != SOFTSEV_CURVE_P384 || memchr_inv(key->x + P384_BYTES, 0, sizeof(key->x) - P384_BYTES) ||
	    memchr_inv(key->y + P384_BYTES, 0, sizeof(key->y) - P384_BYTES))
		return -EINVAL;
	memcpy(point->x, key->x, P384_BYTES);
	memcpy(point->y, key->y, P384_BYTES);
	return ecc_is_pubkey_valid_partial(p384(), point);
}

/**
 * softsev_pubkey_valid() - whether a key is a point of P-384
 * @key: the key
 */
bool softsev_pubkey_valid(const struct softsev_pubkey *key)
{
	u64 x[P384_DIGITS], y[P384_DIGITS];
	struct ecc_point point = ECC_POINT_INIT(x, y, P384_DIGITS);

	return !public_point(key, &point);
}

/**
 * softsev_verify() - check a signature
 * @key: the signer's key
 * @hash: what the data are hashed with
 * @data: what was signed
 * @len: how many bytes
 * @sig: the signature
 *
 * Return: 0, or -EBADMSG: the signature, or the key itself, is not right.
 */
int softsev_verify(const struct softsev_pubkey *key, softsev_hash hash, const void *data, unsigned int len,
		   const struct softsev_sig *sig)
{
	u64 x[P384_DIGITS], y[P384_DIGITS], rx[P384_DIGITS], ry[P384_DIGITS];
	u64 r[P384_DIGITS], s[P384_DIGITS], z[P384_DIGITS], u1[P384_DIGITS], u2[P384_DIGITS];
	struct ecc_point point = ECC_POINT_INIT(x, y, P384_DIGITS), sum = ECC_POINT_INIT(rx, ry, P384_DIGITS);
	const struct ecc_curve *curve = p384();

	if (public_point(key, &point))
		return -EBADMSG;
	memcpy(r, sig->r, P384_BYTES);
	memcpy(s, sig->s, P384_BYTES);
	if (vli_is_zero(r, P384_DIGITS) || vli_cmp(r, curve->n, P384_DIGITS) >= 0 ||
	    vli_is_zero(s, P384_DIGITS) || vli_cmp(s, curve->n, P384_DIGITS) >= 0)
		return -EBADMSG;
	if (hash_number(hash, data, len, z))
		return -EBADMSG;
	vli_mod_inv(s, s, curve->n, P384_DIGITS);
	vli_mod_mult_slow(u1, z, s, curve->n, P384_DIGITS);
	vli_mod_mult_slow(u2, r, s, curve->n, P384_DIGITS);
	ecc_point_mult_shamir(&sum, u1, &curve->g, u2, &point, curve);
	if (vli_cmp(rx, curve->n, P384_DIGITS) >= 0)
		vli_sub(rx, rx, curve->n, P384_DIGITS);
	return vli_cmp(rx, r, P384_DIGITS) ? -EBADMSG : 0;
}

/**
 * softsev_ecdh() - the shared secret of a key and another side's
 * @key: the own key
 * @peer: the other side's
 * @z: becomes the x coordinate, highest byte first
 *
 * Return: 0, or an error.
 */
int softsev_ecdh(const struct softsev_key *key, const struct softsev_pubkey *peer, u8 *z)
{
	u64 x[P384_DIGITS], y[P384_DIGITS], be[2 * P384_DIGITS], secret[P384_DIGITS];
	struct ecc_point point = ECC_POINT_INIT(x, y, P384_DIGITS);
	int ret;

	if (public_point(peer, &point))
		return -EINVAL;
	ecc_swap_digits(x, be, P384_DIGITS);
	ecc_swap_digits(y, be + P384_DIGITS, P384_DIGITS);
	ret = crypto_ecdh_shared_secret(ECC_CURVE_NIST_P384, P384_DIGITS, key->d, be, secret);
	if (!ret)
		memcpy(z, secret, P384_BYTES);
	return ret;
}
