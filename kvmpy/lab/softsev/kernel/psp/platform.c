// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the platform's state and keys (SEV API, chapter 5).
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/printk.h>
#include <linux/random.h>
#include "psp.h"

struct softsev_platform softsev_platform = {
	.tcb = SOFTSEV_TCB,
	.committed_tcb = SOFTSEV_TCB,
	.config.reported_tcb = SOFTSEV_TCB,
};

#define STATUS_OWNED		BIT(0)
#define STATUS_CONFIG_ES	BIT(8)

static struct softsev_platform *p = &softsev_platform;

/* softsev_keys_ready - make the platform's keys when they are first needed; 0 or an error */
int softsev_keys_ready(void)
{
	if (p->keys)
		return 0;
	if (softsev_key_make(&p->cek) || softsev_key_make(&p->oca) || softsev_key_make(&p->pek) ||
	    softsev_key_make(&p->pdh) || softsev_key_make(&p->vcek) || softsev_key_make(&p->vlek_key) ||
	    softsev_key_make(&p->ark))
		return -EIO;
	get_random_bytes(p->chip_id, sizeof(p->chip_id));
	memcpy(p->chip_id, "software AMD-SP", sizeof("software AMD-SP") - 1);
	get_random_bytes(p->secret, sizeof(p->secret));
	p->keys = true;
	return 0;
}

static u32 init(u32 flags)
{
	if (p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	p->legacy = true;
	p->es = flags & SEV_INIT_FLAGS_SEV_ES;
	softsev_asid_reset();
	return SEV_RET_SUCCESS;
}

/* The TMR must be there for SEV-ES; under SNP it must be the firmware's. */
static u32 check_tmr(u32 flags, u64 address, u32 len)
{
	struct softsev_rmp e;

	if (!(flags & SEV_INIT_FLAGS_SEV_ES))
		return SEV_RET_SUCCESS;
	if (len < 1024 * 1024)
		return SEV_RET_INVALID_LEN;
	if (!IS_ALIGNED(address, 1024 * 1024) || !softsev_pa_valid(address, len))
		return SEV_RET_INVALID_ADDRESS;
	if (p->snp && softsev_page_state(address, &e) != PAGE_FIRMWARE)
		return RET_INVALID_PAGE_STATE;
	return SEV_RET_SUCCESS;
}

u32 softsev_init(void *buf)
{
	struct sev_data_init *d = buf;

	return check_tmr(d->flags, d->tmr_address, d->tmr_len) ?: init(d->flags);
}

u32 softsev_init_ex(void *buf)
{
	struct sev_data_init_ex *d = buf;

	if (d->length < sizeof(*d) || d->nv_len < 32 * 1024)
		return SEV_RET_INVALID_LEN;
	return check_tmr(d->flags, d->tmr_address, d->tmr_len) ?: init(d->flags);
}

u32 softsev_shutdown(void *buf)
{
	softsev_guests_drop();
	p->legacy = false;
	p->es = false;
	return SEV_RET_SUCCESS;
}

u32 softsev_factory_reset(void *buf)
{
	if (p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	p->keys = false;
	p->owned = false;
	return SEV_RET_SUCCESS;
}

u32 softsev_platform_status(void *buf)
{
	struct sev_user_data_status *s = buf;

	memset(s, 0, sizeof(*s));
	s->api_major = SOFTSEV_API_MAJOR;
	s->api_minor = SOFTSEV_API_MINOR;
	s->build = SOFTSEV_BUILD;
	s->guest_count = softsev_guest_count();
	if (!p->legacy)
		s->state = SEV_STATE_UNINIT;
	else
		s->state = s->guest_count ? SEV_STATE_WORKING : SEV_STATE_INIT;
	s->flags = (p->owned ? STATUS_OWNED : 0) | (p->es ? STATUS_CONFIG_ES : 0);
	return SEV_RET_SUCCESS;
}

u32 softsev_pek_gen(void *buf)
{
	if (!p->legacy || softsev_guest_count())
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (softsev_keys_ready() || softsev_key_make(&p->oca) || softsev_key_make(&p->pek) ||
	    softsev_key_make(&p->pdh))
		return SEV_RET_HWSEV_RET_PLATFORM;
	p->owned = false;
	return SEV_RET_SUCCESS;
}

u32 softsev_pdh_gen(void *buf)
{
	if (!p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	return softsev_keys_ready() || softsev_key_make(&p->pdh) ? SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

struct cert_chain {
	struct softsev_cert pek, oca, cek;
};

/* softsev_pdh_export - the PDH's certificate, and those of PEK, OCA and CEK; AMD's own are not there */
u32 softsev_pdh_export(void *buf)
{
	struct sev_data_pdh_cert_export *d = buf;
	struct softsev_cert *pdh;
	struct cert_chain *c;
	int bad;

	if (!p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->pdh_cert_len < sizeof(*pdh) || d->cert_chain_len < sizeof(*c)) {
		d->pdh_cert_len = sizeof(*pdh);
		d->cert_chain_len = sizeof(*c);
		return SEV_RET_INVALID_LEN;
	}
	if (!softsev_pa_valid(d->pdh_cert_address, sizeof(*pdh)) || !softsev_pa_valid(d->cert_chain_address, sizeof(*c)))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	pdh = softsev_va(d->pdh_cert_address);
	c = softsev_va(d->cert_chain_address);
	bad = softsev_cert_make(pdh, CERT_PDH, &p->pdh) ?: softsev_cert_sign(pdh, CERT_PEK, &p->pek);
	bad = bad ?: softsev_cert_make(&c->pek, CERT_PEK, &p->pek);
	bad = bad ?: softsev_cert_sign(&c->pek, CERT_OCA, &p->oca);
	bad = bad ?: softsev_cert_sign(&c->pek, CERT_CEK, &p->cek);
	bad = bad ?: softsev_cert_make(&c->oca, CERT_OCA, &p->oca);
	bad = bad ?: softsev_cert_sign(&c->oca, CERT_OCA, &p->oca);
	bad = bad ?: softsev_cert_make(&c->cek, CERT_CEK, &p->cek);
	bad = bad ?: softsev_cert_sign(&c->cek, CERT_CEK, &p->cek);
	d->pdh_cert_len = sizeof(*pdh);
	d->cert_chain_len = sizeof(*c);
	return bad ? SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

u32 softsev_pek_csr(void *buf)
{
	struct sev_data_pek_csr *d = buf;

	if (!p->legacy || softsev_guest_count())
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->len < sizeof(struct softsev_cert)) {
		d->len = sizeof(struct softsev_cert);
		return SEV_RET_INVALID_LEN;
	}
	if (!softsev_pa_valid(d->address, d->len))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	d->len = sizeof(struct softsev_cert);
	softsev_cert_make(softsev_va(d->address), CERT_PEK, &p->pek);
	return SEV_RET_SUCCESS;
}

/* softsev_pek_import - an owner takes the platform: its OCA has signed the PEK */
u32 softsev_pek_import(void *buf)
{
	struct sev_data_pek_cert_import *d = buf;
	struct softsev_cert *pek, *oca;
	struct softsev_pubkey own;

	if (!p->legacy || softsev_guest_count())
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (p->owned)
		return SEV_RET_ALREADY_OWNED;
	if (d->pek_cert_len < sizeof(*pek) || d->oca_cert_len < sizeof(*oca))
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(d->pek_cert_address, sizeof(*pek)) || !softsev_pa_valid(d->oca_cert_address, sizeof(*oca)))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	pek = softsev_va(d->pek_cert_address);
	oca = softsev_va(d->oca_cert_address);
	softsev_pubkey(&p->pek, &own);
	if (pek->usage != CERT_PEK || oca->usage != CERT_OCA || memcmp(&pek->key, &own, sizeof(own)))
		return SEV_RET_INVALID_CERTIFICATE;
	if (!softsev_cert_verify(oca, &oca->key, CERT_OCA) || !softsev_cert_verify(pek, &oca->key, CERT_OCA))
		return SEV_RET_BAD_SIGNATURE;
	p->owned = true;
	return SEV_RET_SUCCESS;
}

u32 softsev_df_flush(void *buf)
{
	if (!p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	softsev_asid_flush();
	return SEV_RET_SUCCESS;
}

u32 softsev_get_id(void *buf)
{
	struct sev_data_get_id *d = buf;

	if (d->len < sizeof(p->chip_id)) {
		d->len = sizeof(p->chip_id);
		return SEV_RET_INVALID_LEN;
	}
	if (!softsev_pa_valid(d->address, sizeof(p->chip_id)))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	memcpy(softsev_va(d->address), p->chip_id, sizeof(p->chip_id));
	d->len = sizeof(p->chip_id);
	return SEV_RET_SUCCESS;
}
