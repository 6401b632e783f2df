// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: X.509 certificates of the keys that sign attestation reports, for whoever checks one. In debugfs, as
 * softsev/{root,vcek,vlek}.der. Their names say that they are no AMD keys.
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include "psp.h"

#define CERT_MAX	1024

struct der {
	u8 data[CERT_MAX];
	unsigned int len;
};

enum { DER_INTEGER = 0x02, DER_BITS = 0x03, DER_UTF8 = 0x0c, DER_SEQUENCE = 0x30, DER_SET = 0x31, DER_TIME = 0x17,
       DER_VERSION = 0xa0 };

static const u8 oid_ecdsa_sha384[] = { 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03 };
static const u8 oid_ec_p384[] = { 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
				  0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22 };
static const u8 oid_common_name[] = { 0x06, 0x03, 0x55, 0x04, 0x03 };

static void der_put(struct der *d, const void *data, unsigned int len)
{
	if (WARN_ON_ONCE(d->len + len > CERT_MAX))
		return;
	memcpy(d->data + d->len, data, len);
	d->len += len;
}

/* Wrap what was put since @start into an element. */
static void der_wrap(struct der *d, unsigned int start, u8 tag)
{
	unsigned int len = d->len - start, head = len < 0x80 ? 2 : len < 0x100 ? 3 : 4;

	if (WARN_ON_ONCE(d->len + head > CERT_MAX))
		return;
	memmove(d->data + start + head, d->data + start, len);
	d->data[start] = tag;
	if (head == 2) {
		d->data[start + 1] = len;
	} else if (head == 3) {
		d->data[start + 1] = 0x81;
		d->data[start + 2] = len;
	} else {
		d->data[start + 1] = 0x82;
		d->data[start + 2] = len >> 8;
		d->data[start + 3] = len;
	}
	d->len += head;
}

/* A positive number of 48 bytes, given lowest byte first. */
static void der_number(struct der *d, const u8 *le)
{
	unsigned int start = d->len, i = P384_BYTES;

	while (i > 1 && !le[i - 1])
		i--;
	if (le[i - 1] & 0x80)
		der_put(d, "", 1);
	while (i--)
		der_put(d, &le[i], 1);
	der_wrap(d, start, DER_INTEGER);
}

static void der_name(struct der *d, const char *name)
{
	unsigned int start = d->len, text;

	der_put(d, oid_common_name, sizeof(oid_common_name));
	text = d->len;
	der_put(d, name, strlen(name));
	der_wrap(d, text, DER_UTF8);
	der_wrap(d, start, DER_SEQUENCE);
	der_wrap(d, start, DER_SET);
	der_wrap(d, start, DER_SEQUENCE);
}

static void der_algorithm(struct der *d)
{
	unsigned int start = d->len;

	der_put(d, oid_ecdsa_sha384, sizeof(oid_ecdsa_sha384));
	der_wrap(d, start, DER_SEQUENCE);
}

static void der_key(struct der *d, const struct softsev_key *key)
{
	unsigned int start = d->len, bits, i;

	der_put(d, oid_ec_p384, sizeof(oid_ec_p384));
	der_wrap(d, start, DER_SEQUENCE);
	bits = d->len;
	der_put(d, "\0\4", 2);
	for (i = P384_BYTES; i--;)
		der_put(d, &key->x[i], 1);
	for (i = P384_BYTES; i--;)
		der_put(d, &key->y[i], 1);
	der_wrap(d, bits, DER_BITS);
	der_wrap(d, start, DER_SEQUENCE);
}

static void der_validity(struct der *d)
{
	unsigned int start = d->len, at = d->len;

	der_put(d, "200101000000Z", 13);
	der_wrap(d, at, DER_TIME);
	at = d->len;
	der_put(d, "491231235959Z", 13);
	der_wrap(d, at, DER_TIME);
	der_wrap(d, start, DER_SEQUENCE);
}

static int certificate(struct der *d, const char *subject, const struct softsev_key *key, u8 serial,
		       const char *issuer, const struct softsev_key *signer)
{
	unsigned int at, bits;
	struct softsev_sig sig;
	int ret;

	d->len = 0;
	der_put(d, "\2\1\2", 3);		/* version 3 */
	der_wrap(d, 0, DER_VERSION);
	at = d->len;
	der_put(d, &serial, 1);
	der_wrap(d, at, DER_INTEGER);
	der_algorithm(d);
	der_name(d, issuer);
	der_validity(d);
	der_name(d, subject);
	der_key(d, key);
	der_wrap(d, 0, DER_SEQUENCE);

	ret = softsev_sign(signer, softsev_sha384, d->data, d->len, &sig);
	if (ret)
		return ret;
	der_algorithm(d);
	bits = d->len;
	der_put(d, "", 1);
	at = d->len;
	der_number(d, sig.r);
	der_number(d, sig.s);
	der_wrap(d, at, DER_SEQUENCE);
	der_wrap(d, bits, DER_BITS);
	der_wrap(d, 0, DER_SEQUENCE);
	return 0;
}

#define ROOT_NAME	"kvmpy lab software AMD-SP root (not AMD)"

static int show(struct seq_file *m, const char *name, const struct softsev_key *key, u8 serial)
{
	struct der *d = kzalloc(sizeof(*d), GFP_KERNEL);
	int ret;

	if (!d)
		return -ENOMEM;
	ret = softsev_keys_ready() ?: certificate(d, name, key, serial, ROOT_NAME, &softsev_platform.ark);
	if (!ret)
		seq_write(m, d->data, d->len);
	kfree(d);
	return ret;
}

static int root_show(struct seq_file *m, void *v)
{
	return show(m, ROOT_NAME, &softsev_platform.ark, 1);
}
DEFINE_SHOW_ATTRIBUTE(root);

static int vcek_show(struct seq_file *m, void *v)
{
	return show(m, "kvmpy lab software VCEK (not AMD)", &softsev_platform.vcek, 2);
}
DEFINE_SHOW_ATTRIBUTE(vcek);

static int vlek_show(struct seq_file *m, void *v)
{
	return show(m, "kvmpy lab software VLEK (not AMD)", &softsev_platform.vlek_key, 3);
}
DEFINE_SHOW_ATTRIBUTE(vlek);

void softsev_x509_init(struct dentry *folder)
{
	debugfs_create_file("root.der", 0444, folder, NULL, &root_fops);
	debugfs_create_file("vcek.der", 0444, folder, NULL, &vcek_fops);
	debugfs_create_file("vlek.der", 0444, folder, NULL, &vlek_fops);
}
