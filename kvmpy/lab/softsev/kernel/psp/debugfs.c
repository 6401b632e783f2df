// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: what tests see and do in debugfs, folder softsev.
 *
 * "rmp" shows the RMP; a page frame number written to "host_write" makes the host write to that page. The rest is a bench
 * for the commands, below KVM and the driver: "command" runs one, on "memory", 4M of which "memory_pfn" is the first
 * page, and "rmpupdate" changes the RMP's entries of these pages.
 */
#include <linux/debugfs.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <asm/set_memory.h>
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

/*
 * A command: written are its number (4 bytes) and its buffer, read are its status (4 bytes) and what the buffer is then.
 * The buffer is what the mailbox's would be after all checks of the mailbox itself.
 */
struct bench_command {
	u32 number;
	u8 buf[PAGE_SIZE - sizeof(u32)];
	size_t len;
};

static int command_open(struct inode *inode, struct file *file)
{
	file->private_data = kzalloc(sizeof(struct bench_command), GFP_KERNEL);
	return file->private_data ? 0 : -ENOMEM;
}

static int command_release(struct inode *inode, struct file *file)
{
	kfree(file->private_data);
	return 0;
}

static ssize_t command_write(struct file *file, const char __user *buf, size_t len, loff_t *at)
{
	struct bench_command *c = file->private_data;

	if (len < sizeof(c->number) || len > PAGE_SIZE)
		return -EINVAL;
	memset(c, 0, sizeof(*c));
	if (copy_from_user(c, buf, len))
		return -EFAULT;
	c->len = len;
	c->number = softsev_command(c->number, c->buf);
	return len;
}

static ssize_t command_read(struct file *file, char __user *buf, size_t len, loff_t *at)
{
	struct bench_command *c = file->private_data;

	return simple_read_from_buffer(buf, len, at, c, c->len);
}

static const struct file_operations command_fops = {
	.open = command_open,
	.release = command_release,
	.write = command_write,
	.read = command_read,
	.llseek = default_llseek,
};

/* Two pages of 2M: one for what a command works on, one for all that it needs beside. */
#define BENCH_ORDER	10
#define BENCH_SIZE	(PAGE_SIZE << BENCH_ORDER)

static struct page *bench;
static DEFINE_MUTEX(bench_mutex);

static ssize_t memory_read(struct file *file, char __user *buf, size_t len, loff_t *at)
{
	return simple_read_from_buffer(buf, len, at, softsev_mem(page_to_phys(bench)), BENCH_SIZE);
}

static ssize_t memory_write(struct file *file, const char __user *buf, size_t len, loff_t *at)
{
	return simple_write_to_buffer(softsev_mem(page_to_phys(bench)), BENCH_SIZE, at, buf, len);
}

static const struct file_operations memory_fops = {
	.open = simple_open,
	.read = memory_read,
	.write = memory_write,
	.llseek = default_llseek,
};

static int memory_pfn_get(void *data, u64 *pfn)
{
	*pfn = page_to_pfn(bench);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(memory_pfn_fops, memory_pfn_get, NULL, "%#llx\n");

/* Number of the page in "memory", guest address, ASID; whether it is assigned, large, immutable. */
static ssize_t rmpupdate_write(struct file *file, const char __user *buf, size_t len, loff_t *at)
{
	unsigned int page, asid, assigned, large, immutable;
	unsigned long long gpa;
	char line[80];
	int ret;

	if (len >= sizeof(line))
		return -EINVAL;
	if (copy_from_user(line, buf, len))
		return -EFAULT;
	line[len] = 0;
	if (sscanf(line, "%u %llx %u %u %u %u", &page, &gpa, &asid, &assigned, &large, &immutable) != 6 ||
	    page >= 1 << BENCH_ORDER)
		return -EINVAL;
	mutex_lock(&bench_mutex);
	ret = softsev_rmpupdate(page_to_pfn(bench) + page, gpa, asid, assigned, large, immutable);
	mutex_unlock(&bench_mutex);
	return ret ? -EPERM : len;
}

static const struct file_operations rmpupdate_fops = {
	.open = simple_open,
	.write = rmpupdate_write,
};

/**
 * softsev_debugfs_init() - make the folder and its files
 */
void softsev_debugfs_init(void)
{
	struct dentry *folder = debugfs_create_dir("softsev", NULL);

	softsev_x509_init(folder);
	debugfs_create_file("rmp", 0400, folder, NULL, &rmp_fops);
	debugfs_create_file("host_write", 0200, folder, NULL, &host_write_fops);
	bench = alloc_pages(GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN, BENCH_ORDER);
	if (!bench)
		return;
	/* The kernel's rmpupdate() would split the direct map; "rmpupdate" is below it. */
	if (set_memory_4k((unsigned long)page_address(bench), 1 << BENCH_ORDER)) {
		__free_pages(bench, BENCH_ORDER);
		return;
	}
	debugfs_create_file("command", 0600, folder, NULL, &command_fops);
	debugfs_create_file("memory", 0600, folder, NULL, &memory_fops);
	debugfs_create_file("memory_pfn", 0400, folder, NULL, &memory_pfn_fops);
	debugfs_create_file("rmpupdate", 0200, folder, NULL, &rmpupdate_fops);
}
