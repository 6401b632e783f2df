/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KVMPY_GCM_H
#define KVMPY_GCM_H

#include <kvmpy/string.h>
#include <kvmpy/types.h>

/*
 * AES-256 in Galois/counter mode (FIPS 197, NIST SP 800-38D), small and slow:
 * for a guest that seals messages with a key that is to stay in the guest.
 */
struct gcm {
	u8 sbox[256];
	u8 round[15][16];
	u64 hash_key[2];
	u64 sum[2];
};

static inline u8 gcm_rotate(u8 x, int by)
{
	return x << by | x >> (8 - by);
}

static inline u8 gcm_double(u8 x)
{
	return x << 1 ^ (x >> 7) * 0x1b;
}

static inline u64 gcm_load(const u8 *from)
{
	u64 value = 0;

	for (int i = 0; i < 8; i++)
		value = value << 8 | from[i];
	return value;
}

static inline void gcm_store(u8 *to, u64 value)
{
	for (int i = 7; i >= 0; i--, value >>= 8)
		to[i] = value;
}

/* All powers p of 3 with their inverses q, each then through the affine map. */
static void gcm_make_sbox(u8 *sbox)
{
	u8 p = 1, q = 1;

	do {
		p = p ^ gcm_double(p);
		q ^= q << 1;
		q ^= q << 2;
		q ^= q << 4;
		q ^= (q >> 7) * 0x09;
		sbox[p] = q ^ gcm_rotate(q, 1) ^ gcm_rotate(q, 2) ^ gcm_rotate(q, 3) ^ gcm_rotate(q, 4) ^ 0x63;
	} while (p != 1);
	sbox[0] = 0x63;
}

static void gcm_expand_key(struct gcm *gcm, const u8 *key)
{
	u8 *words = gcm->round[0], constant = 1;

	memcpy(words, key, 32);
	for (int i = 32; i < 240; i += 4) {
		u8 word[4];

		memcpy(word, words + i - 4, 4);
		if (i % 32 == 0) {
			u8 first = word[0];

			word[0] = gcm->sbox[word[1]] ^ constant;
			word[1] = gcm->sbox[word[2]];
			word[2] = gcm->sbox[word[3]];
			word[3] = gcm->sbox[first];
			constant = gcm_double(constant);
		} else if (i % 32 == 16) {
			for (int n = 0; n < 4; n++)
				word[n] = gcm->sbox[word[n]];
		}
		for (int n = 0; n < 4; n++)
			words[i + n] = words[i + n - 32] ^ word[n];
	}
}

static void gcm_encrypt_block(const struct gcm *gcm, u8 *block)
{
	for (int n = 0; n < 16; n++)
		block[n] ^= gcm->round[0][n];
	for (int round = 1; round < 15; round++) {
		u8 old[16];

		memcpy(old, block, 16);
		for (int n = 0; n < 16; n++)
			block[n] = gcm->sbox[old[(n + n % 4 * 4) % 16]];
		for (int n = 0; round < 14 && n < 16; n += 4) {
			u8 *c = block + n, all = c[0] ^ c[1] ^ c[2] ^ c[3], first = c[0];

			for (int r = 0; r < 4; r++)
				c[r] ^= all ^ gcm_double(c[r] ^ (r < 3 ? c[r + 1] : first));
		}
		for (int n = 0; n < 16; n++)
			block[n] ^= gcm->round[round][n];
	}
}

static void gcm_hash_block(struct gcm *gcm, const u8 *block)
{
	u64 high = 0, low = 0, a = gcm->hash_key[0], b = gcm->hash_key[1];
	u64 x[2] = { gcm->sum[0] ^ gcm_load(block), gcm->sum[1] ^ gcm_load(block + 8) };

	for (int bit = 0; bit < 128; bit++) {
		u64 carry = b & 1;

		if (x[bit / 64] >> (63 - bit % 64) & 1) {
			high ^= a;
			low ^= b;
		}
		b = b >> 1 | a << 63;
		a = a >> 1 ^ (carry ? 0xe1ULL << 56 : 0);
	}
	gcm->sum[0] = high;
	gcm->sum[1] = low;
}

static void gcm_hash(struct gcm *gcm, const u8 *data, size_t size)
{
	while (size) {
		size_t part = size < 16 ? size : 16;
		u8 block[16] = { 0 };

		memcpy(block, data, part);
		gcm_hash_block(gcm, block);
		data += part;
		size -= part;
	}
}

static void gcm_counter_mode(const struct gcm *gcm, const u8 *iv, u32 counter, u8 *text, size_t size)
{
	while (size) {
		size_t part = size < 16 ? size : 16;
		u8 block[16];

		memcpy(block, iv, 12);
		for (int n = 0; n < 4; n++)
			block[12 + n] = counter >> (24 - 8 * n);
		gcm_encrypt_block(gcm, block);
		for (size_t n = 0; n < part; n++)
			text[n] ^= block[n];
		counter++;
		text += part;
		size -= part;
	}
}

static void gcm_tag(struct gcm *gcm, const u8 *iv, const u8 *known, size_t known_size, const u8 *text,
		    size_t size, u8 *tag)
{
	u8 lengths[16];

	gcm->sum[0] = gcm->sum[1] = 0;
	gcm_hash(gcm, known, known_size);
	gcm_hash(gcm, text, size);
	gcm_store(lengths, known_size * 8);
	gcm_store(lengths + 8, size * 8);
	gcm_hash_block(gcm, lengths);
	gcm_store(tag, gcm->sum[0]);
	gcm_store(tag + 8, gcm->sum[1]);
	gcm_counter_mode(gcm, iv, 1, tag, 16);
}

static void gcm_init(struct gcm *gcm, const u8 *key)
{
	u8 zero[16] = { 0 };

	gcm_make_sbox(gcm->sbox);
	gcm_expand_key(gcm, key);
	gcm_encrypt_block(gcm, zero);
	gcm->hash_key[0] = gcm_load(zero);
	gcm->hash_key[1] = gcm_load(zero + 8);
}

/* Encrypt @text in place and make the tag of it and of @known; @key has 32 bytes, @iv 12, @tag 16. */
static inline void gcm_seal(const u8 *key, const u8 *iv, const u8 *known, size_t known_size, u8 *text,
			    size_t size, u8 *tag)
{
	struct gcm gcm;

	gcm_init(&gcm, key);
	gcm_counter_mode(&gcm, iv, 2, text, size);
	gcm_tag(&gcm, iv, known, known_size, text, size, tag);
}

/* Decrypt @text in place where the tag is the right one; otherwise it stays, and the answer is false. */
static inline bool gcm_open(const u8 *key, const u8 *iv, const u8 *known, size_t known_size, u8 *text,
			    size_t size, const u8 *tag)
{
	struct gcm gcm;
	u8 expected[16];

	gcm_init(&gcm, key);
	gcm_tag(&gcm, iv, known, known_size, text, size, expected);
	if (memcmp(expected, tag, 16))
		return false;
	gcm_counter_mode(&gcm, iv, 2, text, size);
	return true;
}

#endif /* KVMPY_GCM_H */
