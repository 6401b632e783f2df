/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Software AMD-SP: what the commands share. They run one at a time, under the driver's mutex.
 *
 * Specifications: SEV API 0.24 (legacy commands), SEV-SNP firmware ABI 1.55.
 */
#ifndef __SOFTSEV_PSP_H
#define __SOFTSEV_PSP_H

#include <linux/bitfield.h>
#include <linux/fs.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/psp-sev.h>
#include <linux/string.h>
#include <crypto/hash.h>
#include <asm/softsev.h>

#define SOFTSEV_API_MAJOR	1
#define SOFTSEV_API_MINOR	55
#define SOFTSEV_BUILD		7

#define KEY128	16
#define HASH256	32
#define HASH384	48

/* Names for what older trees do not name. */
#define RET_INVALID_PAGE_STATE	0x1a
#define RET_INVALID_PAGE_SIZE	0x19
#define RET_INVALID_PAGE_OWNER	0x1c
#define RET_AEAD_OFLOW		0x1d
#define RET_INVALID_KEY		0x27

/* mailbox.c */
u32 softsev_command(u32 cmd, void *buf);

/* Physical addresses come with and without the encryption bit. */
static inline u64 softsev_pa(u64 pa)
{
	return pa & ~BIT_ULL(softsev_cbit());
}

static inline void *softsev_va(u64 pa)
{
	return softsev_mem(softsev_pa(pa));
}

static inline bool softsev_pa_valid(u64 pa, u64 len)
{
	u64 last = softsev_pa(pa) + len - 1;

	return len && pa && last >= softsev_pa(pa) && pfn_valid(PHYS_PFN(softsev_pa(pa))) && pfn_valid(PHYS_PFN(last));
}

/* crypto.c */
struct softsev_buf {
	const void *data;
	unsigned int len;
};

int softsev_sha256(const void *data, unsigned int len, u8 *out);
int softsev_sha384(const void *data, unsigned int len, u8 *out);
int softsev_hmac(const u8 *key, unsigned int key_len, const struct softsev_buf *parts, unsigned int n, u8 *out);
int softsev_kdf(u8 *out, unsigned int len, const u8 *key, unsigned int key_len, const char *label,
		const u8 *context, unsigned int context_len);
void softsev_aes_ctr(const u8 *key, const u8 *iv, const u8 *in, u8 *out, unsigned int len);
bool softsev_equal(const u8 *a, const u8 *b, unsigned int len);
struct shash_desc *softsev_sha256_begin(void);

/* ecdsa.c: P-384; numbers are little-endian, as the firmware's structures have them */
#define P384_BYTES	48
#define P384_DIGITS	6

struct softsev_key {
	u64 d[P384_DIGITS];
	u8 x[P384_BYTES], y[P384_BYTES];
};

/* How the firmware's structures hold a public key and a signature. */
struct softsev_pubkey {
	u32 curve;
	u8 x[72], y[72];
	u8 reserved[880];
} __packed;

struct softsev_sig {
	u8 r[72], s[72];
	u8 reserved[368];
} __packed;

#define SOFTSEV_CURVE_P384	2

int softsev_key_make(struct softsev_key *key);
int softsev_sign(const struct softsev_key *key, const void *data, unsigned int len, struct softsev_sig *sig);
int softsev_verify(const struct softsev_pubkey *key, const void *data, unsigned int len,
		   const struct softsev_sig *sig);
void softsev_pubkey(const struct softsev_key *key, struct softsev_pubkey *out);
int softsev_ecdh(const struct softsev_key *key, const struct softsev_pubkey *peer, u8 *z);

/* platform.c */
struct softsev_platform {
	bool legacy, es, owned;
	bool snp, rmp_ready, vlek;
	bool keys;
	struct softsev_key cek, oca, pek, pdh;
	struct softsev_key vcek, vlek_key, ark;
	struct sev_user_data_snp_config config;
	u64 tcb, committed_tcb;
	u8 chip_id[64];
	u8 secret[32];	/* what keys for guests are derived from */
};

extern struct softsev_platform softsev_platform;

#define SOFTSEV_TCB	0x0700000000000103ULL	/* microcode 7, SNP 0, TEE 1, boot loader 3 */

int softsev_keys_ready(void);
u32 softsev_init(void *buf);
u32 softsev_init_ex(void *buf);
u32 softsev_shutdown(void *buf);
u32 softsev_factory_reset(void *buf);
u32 softsev_platform_status(void *buf);
u32 softsev_pek_gen(void *buf);
u32 softsev_pdh_gen(void *buf);
u32 softsev_pdh_export(void *buf);
u32 softsev_pek_csr(void *buf);
u32 softsev_pek_import(void *buf);
u32 softsev_df_flush(void *buf);
u32 softsev_get_id(void *buf);

/* cert.c */
struct softsev_cert {
	u32 version;
	u8 api_major, api_minor;
	u16 reserved;
	u32 usage, algo;
	struct softsev_pubkey key;
	u32 sig1_usage, sig1_algo;
	struct softsev_sig sig1;
	u32 sig2_usage, sig2_algo;
	struct softsev_sig sig2;
} __packed;

#define CERT_OCA	0x1001
#define CERT_PEK	0x1002
#define CERT_PDH	0x1003
#define CERT_CEK	0x1004
#define CERT_NONE	0x1000
#define CERT_ECDSA_SHA384	0x102
#define CERT_ECDH_SHA384	0x103

int softsev_cert_make(struct softsev_cert *cert, u32 usage, const struct softsev_key *key);
int softsev_cert_sign(struct softsev_cert *cert, u32 usage, const struct softsev_key *signer);
bool softsev_cert_verify(const struct softsev_cert *cert, const struct softsev_pubkey *signer, u32 usage);

/* guest.c: guests of the legacy commands, and the ASIDs of all */
#define SOFTSEV_GUESTS	256

enum { GSTATE_INIT, GSTATE_LUPDATE, GSTATE_LSECRET, GSTATE_RUNNING, GSTATE_SUPDATE, GSTATE_RUPDATE, GSTATE_SENT };

struct softsev_guest {
	bool used;
	u32 handle, policy, asid;
	u8 state;
	u8 tek[KEY128], tik[KEY128];
	struct shash_desc *digest;
	u8 measure[HASH256], ld[HASH256];
	/* The transport session of SEND or RECEIVE. */
	u8 send_tek[KEY128], send_tik[KEY128];
};

struct softsev_guest *softsev_guest(u32 handle);
struct softsev_guest *softsev_guest_new(void);
void softsev_guest_free(struct softsev_guest *g);
unsigned int softsev_guest_count(void);
void softsev_guests_drop(void);
u32 softsev_guest_extend(struct softsev_guest *g, const void *data, unsigned int len);
u32 softsev_guest_buffer(u64 pa, u32 len);
void softsev_vmsa_seal(void *vmsa);
u32 softsev_asid_take(u32 asid, u32 first, u32 last, u64 owner);
void softsev_asid_release(u32 asid, u64 owner);
void softsev_asid_flush(void);
void softsev_asid_reset(void);
u64 softsev_asid_owner(u32 asid);

u32 softsev_decommission(void *buf);
u32 softsev_activate(void *buf);
u32 softsev_deactivate(void *buf);
u32 softsev_guest_status(void *buf);
u32 softsev_launch_start(void *buf);
u32 softsev_launch_update_data(void *buf);
u32 softsev_launch_update_vmsa(void *buf);
u32 softsev_launch_measure(void *buf);
u32 softsev_launch_secret(void *buf);
u32 softsev_launch_finish(void *buf);
u32 softsev_attestation_report(void *buf);
u32 softsev_dbg_decrypt(void *buf);
u32 softsev_dbg_encrypt(void *buf);

/* session.c */
struct softsev_session {
	u8 nonce[16];
	u8 wrap_tk[32];
	u8 wrap_iv[16];
	u8 wrap_mac[HASH256];
	u8 policy_mac[HASH256];
} __packed;

u32 softsev_session_open(u64 cert_pa, u32 cert_len, u64 session_pa, u32 session_len, u32 policy, u8 *tek, u8 *tik);
u32 softsev_session_make(const struct softsev_pubkey *peer, u32 policy, const u8 *tek, const u8 *tik,
			 struct softsev_session *out);

struct softsev_packet {
	u32 flags;
	u8 iv[16];
	u8 mac[HASH256];
} __packed;

/* migrate.c */
u32 softsev_send_start(void *buf);
u32 softsev_send_update_data(void *buf);
u32 softsev_send_update_vmsa(void *buf);
u32 softsev_send_finish(void *buf);
u32 softsev_send_cancel(void *buf);
u32 softsev_receive_start(void *buf);
u32 softsev_receive_update_data(void *buf);
u32 softsev_receive_update_vmsa(void *buf);
u32 softsev_receive_finish(void *buf);

/* snp.c: platform and guest contexts, pages */
enum softsev_page { PAGE_HYPERVISOR, PAGE_RECLAIM, PAGE_FIRMWARE, PAGE_CONTEXT, PAGE_METADATA, PAGE_PRE_GUEST,
		    PAGE_GUEST_INVALID, PAGE_GUEST_VALID };

enum { GCTX_INIT, GCTX_LAUNCH, GCTX_RUNNING };

#define GCTX_MAGIC	0x7863476e73746f73ULL
#define VMPCKS		4

struct softsev_gctx {
	u64 magic;
	u32 state, asid;
	u64 policy, pages;
	u8 ld[HASH384];
	u8 vmpck[VMPCKS][32];
	u64 msg_count[VMPCKS];
	u8 host_data[32];
	u8 family_id[16], image_id[16];
	u32 guest_svn;
	u8 id_key_digest[HASH384], author_key_digest[HASH384];
	u8 report_id[32];
	bool id_block, author_key, vcek_disabled, imi;
	u64 launch_tcb;
	u8 gosvw[16];
	u32 tsc_khz;
};

enum softsev_page softsev_page_state(u64 pa, struct softsev_rmp *e);
struct softsev_gctx *softsev_gctx(u64 pa, u32 *ret);
unsigned int softsev_gctx_count(void);

u32 softsev_snp_init(void *buf);
u32 softsev_snp_init_ex(void *buf);
u32 softsev_snp_shutdown(void *buf);
u32 softsev_snp_status(void *buf);
u32 softsev_snp_df_flush(void *buf);
u32 softsev_snp_feature_info(void *buf);
u32 softsev_snp_config(void *buf);
u32 softsev_snp_commit(void *buf);
u32 softsev_snp_vlek_load(void *buf);
u32 softsev_snp_gctx_create(void *buf);
u32 softsev_snp_activate(void *buf);
u32 softsev_snp_decommission(void *buf);
u32 softsev_snp_guest_status(void *buf);
u32 softsev_snp_page_reclaim(void *buf);
u32 softsev_snp_page_unsmash(void *buf);
u32 softsev_snp_dbg_decrypt(void *buf);
u32 softsev_snp_dbg_encrypt(void *buf);

/* snp_launch.c, snp_cpuid.c, snp_message.c */
u32 softsev_snp_launch_start(void *buf);
u32 softsev_snp_launch_update(void *buf);
u32 softsev_snp_launch_finish(void *buf);
u32 softsev_cpuid_page(void *page);
u32 softsev_snp_guest_request(void *buf);

/* x509.c, debugfs.c */
struct dentry;
void softsev_x509_init(struct dentry *folder);
void softsev_debugfs_init(void);

#endif
