// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the platform's state, keys and certificates (SEV API, chapter 5). The order of each command's checks
 * is that of the firmware: docs/software-amd-sp-commands.md.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/cc_platform.h>
#include <linux/printk.h>
#include <linux/random.h>
#include <linux/sizes.h>
#include "psp.h"

struct softsev_platform softsev_platform = {
	.tcb = SOFTSEV_TCB,
	.committed_tcb = SOFTSEV_TCB,
	.config.reported_tcb = SOFTSEV_TCB,
};

#define STATUS_OWNED		BIT(0)
#define STATUS_CONFIG_ES	BIT(8)
#define NV_LEN			(32 * 1024)

static struct softsev_platform *p = &softsev_platform;

static int pdh_make(void)
{
	int ret = softsev_key_make(&p->pdh);

	softsev_cert_make(&p->pdh_cert, CERT_PDH, &p->pdh);
	return ret ?: softsev_cert_sign(&p->pdh_cert, CERT_PEK, &p->pek);
}

/* A PEK of a new OCA, and what it signs. */
static int oca_make(void)
{
	struct softsev_chain *c = &p->chain;
	int ret = softsev_key_make(&p->oca) ?: softsev_key_make(&p->pek);

	softsev_cert_make(&c->oca, CERT_OCA, &p->oca);
	softsev_cert_make(&c->pek, CERT_PEK, &p->pek);
	ret = ret ?: softsev_cert_sign(&c->oca, CERT_OCA, &p->oca);
	ret = ret ?: softsev_cert_sign(&c->pek, CERT_OCA, &p->oca);
	ret = ret ?: softsev_cert_sign(&c->pek, CERT_CEK, &p->cek);
	p->owned = false;
	return ret ?: pdh_make();
}

/**
 * softsev_keys_ready() - make the platform's keys and certificates when they are first needed
 *
 * Return: 0, or an error.
 */
int softsev_keys_ready(void)
{
	int ret;

	if (p->keys)
		return 0;
	ret = softsev_key_make(&p->cek) ?: oca_make();
	ret = ret ?: softsev_key_make(&p->vcek) ?: softsev_key_make(&p->vlek_key) ?: softsev_key_make(&p->ark);
	if (ret)
		return ret;
	/* AMD's signature of the CEK is not the firmware's to give. */
	softsev_cert_make(&p->chain.cek, CERT_CEK, &p->cek);
	get_random_bytes(p->chip_id, sizeof(p->chip_id));
	memcpy(p->chip_id, "software AMD-SP", sizeof("software AMD-SP") - 1);
	get_random_bytes(p->secret, sizeof(p->secret));
	p->keys = true;
	return 0;
}

static u32 keys_made(int error)
{
	return error ? SEV_RET_HWSEV_RET_PLATFORM : SEV_RET_SUCCESS;
}

/* The TMR must be there for SEV-ES; under SNP it must be the firmware's. */
static u32 check_tmr(u64 address, u32 len)
{
	u32 size = p->rmp_ready ? SZ_2M : SZ_1M, ret = softsev_page_check(address, len);

	if (ret)
		return ret;
	if (!IS_ALIGNED(address, size))
		return SEV_RET_INVALID_ADDRESS;
	if (len != size)
		return SEV_RET_INVALID_LEN;
	return softsev_pa_valid(address, len) ? SEV_RET_SUCCESS : SEV_RET_INVALID_ADDRESS;
}

static u32 check_nv(u64 nv, u32 len)
{
	if (!nv)
		return SEV_RET_SUCCESS;
	if (!PAGE_ALIGNED(softsev_pa(nv)) || !softsev_pa_valid(nv, len))
		return SEV_RET_INVALID_ADDRESS;
	if (len != NV_LEN)
		return SEV_RET_INVALID_LEN;
	return softsev_page_check(nv, len);
}

static bool overlap(u64 a, u64 b, u64 a_len, u64 b_len)
{
	return softsev_pa(a) < softsev_pa(b) + b_len && softsev_pa(b) < softsev_pa(a) + a_len;
}

/* Firmware: sev_mcmd_init_common(). @ex is NULL for INIT, which keeps its keys elsewhere. */
static u32 init(u32 flags, bool reserved, u64 tmr, u32 tmr_len, const struct sev_data_init_ex *ex)
{
	u32 ret;

	if (p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if ((flags & ~SEV_INIT_FLAGS_SEV_ES) || reserved)
		return RET_INVALID_CONFIG;
	if (cc_platform_has(CC_ATTR_HOST_SEV_SNP) && !p->rmp_ready)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (ex) {
		if (ex->length != sizeof(*ex))
			return SEV_RET_INVALID_LEN;
		ret = check_nv(ex->nv_address, ex->nv_len);
		if (ret)
			return ret;
	}
	if (flags & SEV_INIT_FLAGS_SEV_ES) {
		if (ex && ex->nv_address && overlap(tmr, ex->nv_address, p->rmp_ready ? SZ_2M : SZ_1M, NV_LEN))
			return SEV_RET_INVALID_ADDRESS;
		ret = check_tmr(tmr, tmr_len);
		if (ret)
			return ret;
	}
	p->legacy = true;
	p->es = flags & SEV_INIT_FLAGS_SEV_ES;
	/* Of the two kinds of initialisation, the first one leaves every ASID in need of a flush. */
	if (!p->snp)
		softsev_asid_reset();
	return SEV_RET_SUCCESS;
}

u32 softsev_init(void *buf)
{
	struct sev_data_init *d = buf;

	return init(d->flags, d->reserved, d->tmr_address, d->tmr_len, NULL);
}

u32 softsev_init_ex(void *buf)
{
	struct sev_data_init_ex *d = buf;

	return init(d->flags, d->reserved, d->tmr_address, d->tmr_len, d);
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
	if (!p->legacy) {
		s->state = SEV_STATE_UNINIT;
		return SEV_RET_SUCCESS;
	}
	s->guest_count = softsev_guest_count();
	s->state = s->guest_count ? SEV_STATE_WORKING : SEV_STATE_INIT;
	s->flags = (p->owned ? STATUS_OWNED : 0) | (p->es ? STATUS_CONFIG_ES : 0);
	return SEV_RET_SUCCESS;
}

u32 softsev_pek_gen(void *buf)
{
	if (!p->legacy || softsev_guest_count())
		return SEV_RET_INVALID_PLATFORM_STATE;
	return keys_made(softsev_keys_ready() ?: oca_make());
}

u32 softsev_pdh_gen(void *buf)
{
	if (!p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	return keys_made(softsev_keys_ready() ?: pdh_make());
}

/* The PDH's certificate, and those of PEK, OCA and CEK; AMD's own are not there. */
u32 softsev_pdh_export(void *buf)
{
	struct sev_data_pdh_cert_export *d = buf;
	u32 ret;

	if (!p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->pdh_cert_len < sizeof(p->pdh_cert) || d->cert_chain_len < sizeof(p->chain)) {
		d->pdh_cert_len = sizeof(p->pdh_cert);
		d->cert_chain_len = sizeof(p->chain);
		return SEV_RET_INVALID_LEN;
	}
	/* Both pages' states come before both addresses. */
	ret = softsev_page_check(d->pdh_cert_address, d->pdh_cert_len);
	ret = ret ?: softsev_page_check(d->cert_chain_address, d->cert_chain_len);
	ret = ret ?: softsev_writable(d->pdh_cert_address, d->pdh_cert_len);
	ret = ret ?: softsev_writable(d->cert_chain_address, d->cert_chain_len);
	ret = ret ?: keys_made(softsev_keys_ready());
	if (ret)
		return ret;
	memcpy(softsev_va(d->pdh_cert_address), &p->pdh_cert, sizeof(p->pdh_cert));
	memcpy(softsev_va(d->cert_chain_address), &p->chain, sizeof(p->chain));
	d->pdh_cert_len = sizeof(p->pdh_cert);
	d->cert_chain_len = sizeof(p->chain);
	return SEV_RET_SUCCESS;
}

u32 softsev_pek_csr(void *buf)
{
	struct sev_data_pek_csr *d = buf;
	u32 ret;

	if (!p->legacy)
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (d->len < sizeof(struct softsev_cert)) {
		d->len = sizeof(struct softsev_cert);
		return SEV_RET_INVALID_LEN;
	}
	ret = softsev_writable(d->address, d->len) ?: keys_made(softsev_keys_ready());
	if (ret)
		return ret;
	d->len = sizeof(struct softsev_cert);
	softsev_cert_make(softsev_va(d->address), CERT_PEK, &p->pek);
	return SEV_RET_SUCCESS;
}

/* An owner takes the platform: its OCA has signed the PEK. */
u32 softsev_pek_import(void *buf)
{
	struct sev_data_pek_cert_import *d = buf;
	struct softsev_cert *pek, *oca;
	u32 ret;

	if (!p->legacy || softsev_guest_count())
		return SEV_RET_INVALID_PLATFORM_STATE;
	if (p->owned)
		return SEV_RET_ALREADY_OWNED;
	if (d->pek_cert_len != sizeof(*pek) || d->oca_cert_len != sizeof(*oca))
		return SEV_RET_INVALID_LEN;
	if (!softsev_pa_valid(d->pek_cert_address, sizeof(*pek)) || !softsev_pa_valid(d->oca_cert_address, sizeof(*oca)))
		return SEV_RET_INVALID_ADDRESS;
	if (softsev_keys_ready())
		return SEV_RET_HWSEV_RET_PLATFORM;
	pek = softsev_va(d->pek_cert_address);
	oca = softsev_va(d->oca_cert_address);
	ret = softsev_cert_validate(oca, oca) ?: softsev_cert_validate(pek, oca);
	if (ret)
		return ret;
	if (memcmp(pek, &p->chain.pek, offsetof(struct softsev_cert, sig1_usage)) ||
	    (pek->sig1_usage != CERT_NONE && pek->sig2_usage != CERT_NONE))
		return SEV_RET_INVALID_CERTIFICATE;
	p->chain.pek = *pek;
	p->chain.oca = *oca;
	p->owned = true;
	return keys_made(softsev_cert_sign(&p->chain.pek, CERT_CEK, &p->cek) ?: pdh_make());
}

/* DF_FLUSH and SNP_DF_FLUSH: in any state. */
u32 softsev_df_flush(void *buf)
{
	softsev_asid_flush();
	return SEV_RET_SUCCESS;
}

u32 softsev_get_id(void *buf)
{
	struct sev_data_get_id *d = buf;
	u32 ret;

	if (d->len < sizeof(p->chip_id)) {
		d->len = sizeof(p->chip_id);
		return SEV_RET_INVALID_LEN;
	}
	ret = softsev_writable(d->address, d->len) ?: keys_made(softsev_keys_ready());
	if (ret)
		return ret;
	memcpy(softsev_va(d->address), p->chip_id, sizeof(p->chip_id));
	d->len = sizeof(p->chip_id);
	return SEV_RET_SUCCESS;
}
