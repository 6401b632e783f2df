// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: SEV certificates (SEV API, appendix C). All keys are on P-384, as those of the firmware.
 */
#include <linux/build_bug.h>
#include "psp.h"

#define CERT_BODY	offsetof(struct softsev_cert, sig1_usage)

/**
 * softsev_cert_make() - a certificate without signatures
 * @cert: what is made
 * @usage: what the key is for
 * @key: the key
 */
void softsev_cert_make(struct softsev_cert *cert, u32 usage, const struct softsev_key *key)
{
	BUILD_BUG_ON(sizeof(struct softsev_pubkey) != 0x404);
	BUILD_BUG_ON(sizeof(struct softsev_cert) != 0x824);

	memset(cert, 0, sizeof(*cert));
	cert->version = 1;
	cert->api_major = SOFTSEV_API_MAJOR;
	cert->api_minor = SOFTSEV_API_MINOR;
	cert->usage = usage;
	cert->algo = usage == CERT_PDH ? CERT_ECDH_SHA256 : CERT_ECDSA_SHA256;
	softsev_pubkey(key, &cert->key);
	cert->sig1_usage = CERT_NONE;
	cert->sig2_usage = CERT_NONE;
}

/**
 * softsev_cert_sign() - put a signature into the first free of the two places
 * @cert: the certificate
 * @usage: what the signer's key is for
 * @signer: the signer's key
 *
 * Return: 0, or an error.
 */
int softsev_cert_sign(struct softsev_cert *cert, u32 usage, const struct softsev_key *signer)
{
	bool first = cert->sig1_usage == CERT_NONE;

	*(first ? &cert->sig1_usage : &cert->sig2_usage) = usage;
	*(first ? &cert->sig1_algo : &cert->sig2_algo) = CERT_ECDSA_SHA256;
	return softsev_sign(signer, softsev_sha256, cert, CERT_BODY, first ? &cert->sig1 : &cert->sig2);
}

/**
 * softsev_cert_sane() - whether a certificate's body is that of a key for this use
 * @cert: the certificate
 * @usage: what the key must be for
 * @algo: the algorithm that it must be for
 *
 * Firmware: sev_cert_sanity_check().
 */
bool softsev_cert_sane(const struct softsev_cert *cert, u32 usage, u32 algo)
{
	return cert->version == 1 && cert->usage == usage && cert->algo == algo && softsev_pubkey_valid(&cert->key);
}

/* Of the signatures that name this signer's key, the last one decides. */
static u32 check_signatures(const struct softsev_cert *cert, const struct softsev_cert *signer)
{
	const struct {
		u32 usage, algo;
		const struct softsev_sig *sig;
	} sigs[] = {
		{ cert->sig1_usage, cert->sig1_algo, &cert->sig1 },
		{ cert->sig2_usage, cert->sig2_algo, &cert->sig2 },
	};
	u32 ret = SEV_RET_INVALID_CERTIFICATE;
	int i;

	for (i = 0; i < ARRAY_SIZE(sigs); i++) {
		if (!sigs[i].algo != (sigs[i].usage == CERT_NONE))
			return SEV_RET_BAD_SIGNATURE;
		if (sigs[i].algo != signer->algo || sigs[i].usage != signer->usage)
			continue;
		if (signer->algo != CERT_ECDSA_SHA256)
			return SEV_RET_UNSUPPORTED;
		ret = softsev_verify(&signer->key, softsev_sha256, cert, CERT_BODY, sigs[i].sig) ?
		      SEV_RET_BAD_SIGNATURE : SEV_RET_SUCCESS;
	}
	return ret;
}

/**
 * softsev_cert_validate() - check one link of a chain of certificates
 * @cert: the certificate
 * @signer: the certificate of the key that must have signed it
 *
 * Firmware: sev_cert_validate().
 *
 * Return: SEV_RET_SUCCESS, or the firmware's error.
 */
u32 softsev_cert_validate(const struct softsev_cert *cert, const struct softsev_cert *signer)
{
	u32 ret, by = signer->usage;
	bool right;

	if (!softsev_pubkey_valid(&signer->key) || by < CERT_OCA || by > CERT_CEK)
		return SEV_RET_INVALID_CERTIFICATE;
	ret = check_signatures(cert, signer);
	if (ret)
		return ret;
	switch (cert->usage) {
	case CERT_PDH:
		right = by == CERT_PEK;
		break;
	case CERT_PEK:
		right = by == CERT_OCA || by == CERT_CEK;
		break;
	case CERT_OCA:
		right = by == CERT_OCA;
		break;
	default:
		right = false;
	}
	return right && cert->version == 1 && softsev_pubkey_valid(&cert->key) ? SEV_RET_SUCCESS :
	       SEV_RET_INVALID_CERTIFICATE;
}
