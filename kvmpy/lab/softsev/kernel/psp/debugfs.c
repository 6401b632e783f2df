// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: what tests see and do in debugfs, folder softsev. "rmp" shows the RMP; a page frame number written to
 * "host_write" makes the host write to that page.
 */
#include <linux/debugfs.h>
#include <linux/kernel.h>
#include <linux/seq_file.h>
#include "psp.h"

static int rmp_show(struct seq_file *m, void *v)
{
	return softsev_rmp_show(m);
}
DEFINE_SHOW_ATTRIBUTE(rmp);

static ssize_t host_write(struct file *file, const char __user *buf, size_t len, loff_t *at)
{
	int ret;
	u64 pfn;

	ret = kstrtou64_from_user(buf, len, 0, &pfn);
	ret = ret ?: softsev_host_write(pfn);
	return ret ?: len;
}

static const struct file_operations host_write_fops = {
	.open = simple_open,
	.write = host_write,
};

void softsev_debugfs_init(void)
{
	struct dentry *folder = debugfs_create_dir("softsev", NULL);

	softsev_x509_init(folder);
	debugfs_create_file("rmp", 0400, folder, NULL, &rmp_fops);
	debugfs_create_file("host_write", 0200, folder, NULL, &host_write_fops);
}
