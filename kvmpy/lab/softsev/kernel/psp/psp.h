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
#define RET_INVALID_CONFIG	0x03
#define RET_INVALID_PAGE_SIZE	0x19
#define RET_INVALID_PAGE_STATE	0x1a
#define RET_INVALID_PAGE_OWNER	0x1c
#define RET_AEAD_OFLOW		0x1d
#define RET_RMP_INIT_REQUIRED	0x20
#define RET_BAD_SVN		0x21
#define RET_INVALID_KEY		0x27

/* The firmware's working buffer: no packet may be longer. */
#define SCRATCH_LEN		0x5000

/* mailbox.c */
u32 softsev_command(u32 cmd, void *buf);
u32 softsev_mailbox(u32 cmd, u64 pa);

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

/* What is signed: SHA-384 for attestation, SHA-256 for the certificates of the SEV API. */
typedef int (*softsev_hash)(const void *data, unsigned int len, u8 *out);

int softsev_key_make(struct softsev_key *key);
int softsev_sign(const struct softsev_key *key, softsev_hash hash, const void *data, unsigned int len,
		 struct softsev_sig *sig);
int softsev_verify(const struct softsev_pubkey *key, softsev_hash hash, const void *data, unsigned int len,
		   const struct softsev_sig *sig);
bool softsev_pubkey_valid(const struct softsev_pubkey *key);
void softsev_pubkey(const struct softsev_key *key, struct softsev_pubkey *out);
int softsev_ecdh(const struct softsev_key *key, const struct softsev_pubkey *peer, u8 *z);

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
#define CERT_ECDSA_SHA256	2
#define CERT_ECDH_SHA256	3

/* What PDH_CERT_EXPORT gives, and SEND_START takes, beside the PDH's certificate. */
struct softsev_chain {
	struct softsev_cert pek, oca, cek;
} __packed;

void softsev_cert_make(struct softsev_cert *cert, u32 usage, const struct softsev_key *key);
int softsev_cert_sign(struct softsev_cert *cert, u32 usage, const struct softsev_key *signer);
bool softsev_cert_sane(const struct softsev_cert *cert, u32 usage, u32 algo);
u32 softsev_cert_validate(const struct softsev_cert *cert, const struct softsev_cert *signer);

/* platform.c */
struct softsev_platform {
	bool legacy, es, owned;
	bool snp, rmp_ready, vlek;
	bool keys;
	struct softsev_key cek, oca, pek, pdh;
	struct softsev_cert pdh_cert;
	struct softsev_chain chain;
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

/* asid.c */
enum softsev_asid { ASID_DIRTY, ASID_CLEAN, ASID_ALLOCATED, ASID_IN_USE };

/**
 * struct softsev_asid_user - who asks for an ASID
 * @owner: a legacy guest's handle, or the physical address of an SNP guest's context
 * @es: it runs with SEV-ES or SNP, which have the lower ASIDs
 * @bound: it has an ASID already
 * @sent: it has left this platform
 * @running: its launch is over
 */
struct softsev_asid_user {
	u64 owner;
	bool es, bound, sent, running;
};

u32 softsev_asid_take(u32 asid, const struct softsev_asid_user *user);
void softsev_asid_run(u32 asid);
void softsev_asid_release(u32 asid, u64 owner);
void softsev_asid_flush(void);
void softsev_asid_reset(void);
bool softsev_asid_all_clean(void);

/* guest.c: guests of the legacy commands */
#define SOFTSEV_GUESTS	256

#define POLICY_NODBG	BIT(0)
#define POLICY_NOKS	BIT(1)
#define POLICY_ES	BIT(2)
#define POLICY_NOSEND	BIT(3)
#define POLICY_DOMAIN	BIT(4)
#define POLICY_SEV	BIT(5)
#define POLICY_RESERVED	GENMASK(15, 6)
#define POLICY_MAJOR	GENMASK(23, 16)
#define POLICY_MINOR	GENMASK(31, 24)

enum { GSTATE_INVALID, GSTATE_LUPDATE, GSTATE_LSECRET, GSTATE_RUNNING, GSTATE_SUPDATE, GSTATE_RUPDATE, GSTATE_SENT };

struct softsev_guest {
	bool used;
	u32 handle, policy, asid;
	u8 state;
	u8 tek[KEY128], tik[KEY128];	/* of its launch, or of its migration */
	struct shash_desc *digest;
	u8 measure[HASH256], ld[HASH256];
};

struct softsev_guest *softsev_guest(u32 handle);
u32 softsev_guest_find(u32 handle, struct softsev_guest **g);
u32 softsev_guest_in(u32 handle, int state, struct softsev_guest **g);
u32 softsev_guest_new(u32 shared, u32 policy, int state, const u8 *tek, const u8 *tik, u32 *handle);
void softsev_guest_run(struct softsev_guest *g);
unsigned int softsev_guest_count(void);
void softsev_guests_drop(void);
void softsev_vmsa_seal(void *vmsa);
bool softsev_vmsa_sealed(const void *vmsa);

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
u32 softsev_session_make(const struct softsev_cert *peer, u32 policy, const u8 *tek, const u8 *tik,
			 struct softsev_session *out);

#define PACKET_COMPRESSED	BIT(0)

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

/* snp.c, snp_guest.c, snp_page.c: platform, guest contexts, pages */
enum softsev_page { PAGE_HYPERVISOR, PAGE_RECLAIM, PAGE_FIRMWARE, PAGE_CONTEXT, PAGE_METADATA, PAGE_PRE_GUEST,
		    PAGE_PRE_SWAP, PAGE_GUEST_INVALID, PAGE_GUEST_VALID };

enum { GCTX_INIT, GCTX_LAUNCH, GCTX_RUNNING };

/* No migration agent. */
#define GCTX_NO_MA	U64_MAX
#define VMPCKS		4

struct softsev_gctx {
	u32 state, asid;
	u64 policy, pages, ma;
	u8 ld[HASH384], imd[HASH384];
	u8 vmpck[VMPCKS][32];
	u64 msg_count[VMPCKS];
	u8 host_data[32];
	u8 family_id[16], image_id[16];
	u32 guest_svn;
	u8 id_key_digest[HASH384], author_key_digest[HASH384];
	u8 report_id[32], report_id_ma[32];
	bool id_block, author_key, vcek_disabled, imi;
	u64 launch_tcb;
	u8 gosvw[16];
};

enum softsev_page softsev_page_state(u64 pa, struct softsev_rmp *e);
u32 softsev_page_check(u64 pa, u64 len);
u32 softsev_writable(u64 pa, u64 len);
struct softsev_gctx *softsev_gctx(u64 pa, u32 *ret);
void softsev_gctx_count(int change);

u32 softsev_snp_init(void *buf);
u32 softsev_snp_init_ex(void *buf);
u32 softsev_snp_shutdown(void *buf);
u32 softsev_snp_status(void *buf);
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
