// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: SEV certificates (SEV API, appendix C).
 */
#include <linux/build_bug.h>
#include "psp.h"

#define CERT_BODY	offsetof(struct softsev_cert, sig1_usage)

int softsev_cert_make(struct softsev_cert *cert, u32 usage, const struct softsev_key *key)
{
	BUILD_BUG_ON(sizeof(struct softsev_pubkey) != 0x404);
	BUILD_BUG_ON(sizeof(struct softsev_cert) != 0x824);

	memset(cert, 0, sizeof(*cert));
	cert->version = 1;
	cert->api_major = SOFTSEV_API_MAJOR;
	cert->api_minor = SOFTSEV_API_MINOR;
	cert->usage = usage;
	cert->algo = usage == CERT_PDH ? CERT_ECDH_SHA384 : CERT_ECDSA_SHA384;
	softsev_pubkey(key, &cert->key);
	cert->sig1_usage = CERT_NONE;
	cert->sig2_usage = CERT_NONE;
	return 0;
}

/* softsev_cert_sign - put a signature into the first free of the two places */
int softsev_cert_sign(struct softsev_cert *cert, u32 usage, const struct softsev_key *signer)
{
	if (cert->sig1_usage == CERT_NONE) {
		cert->sig1_usage = usage;
		cert->sig1_algo = CERT_ECDSA_SHA384;
		return softsev_sign(signer, cert, CERT_BODY, &cert->sig1);
	}
	cert->sig2_usage = usage;
	cert->sig2_algo = CERT_ECDSA_SHA384;
	return softsev_sign(signer, cert, CERT_BODY, &cert->sig2);
}

bool softsev_cert_verify(const struct softsev_cert *cert, const struct softsev_pubkey *signer, u32 usage)
{
	if (cert->sig1_usage == usage && !softsev_verify(signer, cert, CERT_BODY, &cert->sig1))
		return true;
	return cert->sig2_usage == usage && !softsev_verify(signer, cert, CERT_BODY, &cert->sig2);
}
