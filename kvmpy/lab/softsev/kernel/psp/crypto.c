// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: hashes, the key derivation of SEV sessions, AES in counter mode.
 */
#include <crypto/aes.h>
#include <crypto/hash.h>
#include <linux/err.h>
#include <linux/slab.h>
#include <linux/unaligned.h>
#include "psp.h"

enum { SHA256, SHA384, HMAC, ALGORITHMS };

/* Made when first used: KVM may initialise SEV before the algorithms are registered. */
static struct crypto_shash *algorithm(int which)
{
	static const char * const names[] = { "sha256", "sha384", "hmac(sha256)" };
	static struct crypto_shash *tfms[ALGORITHMS];

	if (!tfms[which]) {
		struct crypto_shash *tfm = crypto_alloc_shash(names[which], 0, 0);

		if (IS_ERR(tfm)) {
			pr_err_ratelimited("softsev: no %s: %ld\n", names[which], PTR_ERR(tfm));
			return NULL;
		}
		tfms[which] = tfm;
	}
	return tfms[which];
}

static int digest(int which, const void *data, unsigned int len, u8 *out)
{
	struct crypto_shash *tfm = algorithm(which);

	return tfm ? crypto_shash_tfm_digest(tfm, data, len, out) : -ENOENT;
}

int softsev_sha256(const void *data, unsigned int len, u8 *out)
{
	return digest(SHA256, data, len, out);
}

int softsev_sha384(const void *data, unsigned int len, u8 *out)
{
	return digest(SHA384, data, len, out);
}

/**
 * softsev_sha256_begin() - start a SHA-256
 *
 * Return: what takes data; kfree() it after crypto_shash_final(). NULL without memory.
 */
struct shash_desc *softsev_sha256_begin(void)
{
	struct crypto_shash *tfm = algorithm(SHA256);
	struct shash_desc *desc;

	if (!tfm)
		return NULL;
	desc = kzalloc(sizeof(*desc) + crypto_shash_descsize(tfm), GFP_KERNEL);
	if (!desc)
		return NULL;
	desc->tfm = tfm;
	if (crypto_shash_init(desc)) {
		kfree(desc);
		return NULL;
	}
	return desc;
}

int softsev_hmac(const u8 *key, unsigned int key_len, const struct softsev_buf *parts, unsigned int n, u8 *out)
{
	struct crypto_shash *tfm = algorithm(HMAC);
	unsigned int i;
	int ret;

	if (!tfm)
		return -ENOENT;
	ret = crypto_shash_setkey(tfm, key, key_len);
	if (!ret) {
		SHASH_DESC_ON_STACK(desc, tfm);

		desc->tfm = tfm;
		ret = crypto_shash_init(desc);
		for (i = 0; !ret && i < n; i++)
			if (parts[i].len)
				ret = crypto_shash_update(desc, parts[i].data, parts[i].len);
		if (!ret)
			ret = crypto_shash_final(desc, out);
		shash_desc_zero(desc);
	}
	return ret;
}

/**
 * softsev_kdf() - NIST SP 800-108 in counter mode with HMAC-SHA-256, as the SEV API uses it: little-endian numbers
 * @out: becomes the key
 * @len: how many bytes
 * @key: the key that it is derived from
 * @key_len: how many bytes
 * @label: what it is for
 * @context: what else goes into it
 * @context_len: how many bytes
 *
 * Return: 0, or an error.
 */
int softsev_kdf(u8 *out, unsigned int len, const u8 *key, unsigned int key_len, const char *label,
		const u8 *context, unsigned int context_len)
{
	__le32 counter, bits = cpu_to_le32(len * 8);
	u8 block[HASH256];
	u32 i;

	for (i = 1; len; i++) {
		const struct softsev_buf parts[] = {
			{ &counter, 4 }, { label, strlen(label) }, { "", 1 }, { context, context_len }, { &bits, 4 },
		};
		unsigned int n = min_t(unsigned int, len, sizeof(block));
		int ret;

		counter = cpu_to_le32(i);
		ret = softsev_hmac(key, key_len, parts, ARRAY_SIZE(parts), block);
		if (ret)
			return ret;
		memcpy(out, block, n);
		out += n;
		len -= n;
	}
	return 0;
}

/* Kernels have one of two types of key; the makefile looks which. */
struct aes_key_schedule {
#ifdef SOFTSEV_AES_ENCKEY
	struct aes_enckey key;
#else
	struct crypto_aes_ctx key;
#endif
};

static void expand_key(struct aes_key_schedule *to, const u8 *key)
{
#ifdef SOFTSEV_AES_ENCKEY
	aes_prepareenckey(&to->key, key, KEY128);
#else
	aes_expandkey(&to->key, key, KEY128);
#endif
}

void softsev_aes_ctr(const u8 *key, const u8 *iv, const u8 *in, u8 *out, unsigned int len)
{
	u8 counter[AES_BLOCK_SIZE], stream[AES_BLOCK_SIZE];
	struct aes_key_schedule ctx;
	unsigned int i;
	int at;

	memcpy(counter, iv, sizeof(counter));
	expand_key(&ctx, key);
	for (i = 0; i < len; i++) {
		if (i % AES_BLOCK_SIZE == 0) {
			aes_encrypt(&ctx.key, stream, counter);
			for (at = AES_BLOCK_SIZE - 1; at >= 0 && !++counter[at]; at--)
				;
		}
		out[i] = in[i] ^ stream[i % AES_BLOCK_SIZE];
	}
	memzero_explicit(&ctx, sizeof(ctx));
}

bool softsev_equal(const u8 *a, const u8 *b, unsigned int len)
{
	u8 different = 0;

	while (len--)
		different |= *a++ ^ *b++;
	return !different;
}
