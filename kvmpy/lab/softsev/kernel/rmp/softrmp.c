// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the reverse map table, and the instructions of the host that change it.
 *
 * One entry a page, in chunks of 2M that exist once a page of them was assigned. The generation counts changes that take
 * something away from a guest: whoever keeps translations drops them when it moved.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/export.h>
#include <linux/printk.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/xarray.h>
#include <asm/softsev.h>

#define CHUNK_PAGES	512

struct rmp_chunk {
	struct softsev_rmp e[CHUNK_PAGES];
};

static DEFINE_XARRAY(rmp_chunks);
static DEFINE_RAW_SPINLOCK(rmp_lock);
static u64 rmp_generation = 1;

static struct softsev_rmp *rmp_entry(u64 pfn)
{
	struct rmp_chunk *chunk = xa_load(&rmp_chunks, pfn / CHUNK_PAGES);

	return chunk ? &chunk->e[pfn % CHUNK_PAGES] : NULL;
}

/* The caller may sleep. */
static struct softsev_rmp *rmp_entry_make(u64 pfn)
{
	unsigned long at = pfn / CHUNK_PAGES;
	struct rmp_chunk *chunk, *old;
	unsigned int nth;

	if (!xa_load(&rmp_chunks, at)) {
		nth = softsev_own_memory_begin();
		chunk = kzalloc(sizeof(*chunk), GFP_KERNEL);
		old = chunk ? xa_cmpxchg(&rmp_chunks, at, NULL, chunk, GFP_KERNEL) : NULL;
		softsev_own_memory_end(nth);
		if (!chunk)
			return NULL;
		if (old)
			kfree(chunk);
		if (xa_is_err(old))
			return NULL;
	}
	return rmp_entry(pfn);
}

/* The entry that answers for a page: the 2M entry at its head, or its own. */
static struct softsev_rmp *rmp_authority(u64 pfn)
{
	struct softsev_rmp *head = rmp_entry(ALIGN_DOWN(pfn, CHUNK_PAGES));

	return head && head->assigned && head->large ? head : rmp_entry(pfn);
}

/**
 * softsev_rmp_read() - the RMP's opinion of one 4K page
 * @pfn: the page
 * @e: becomes the entry; a guest's page inside a 2M entry has its own guest address
 */
void softsev_rmp_read(u64 pfn, struct softsev_rmp *e)
{
	struct softsev_rmp *from;
	unsigned long flags;

	raw_spin_lock_irqsave(&rmp_lock, flags);
	from = rmp_authority(pfn);
	if (from) {
		*e = *from;
		if (e->assigned && e->large && e->asid)
			e->gpa += (pfn % CHUNK_PAGES) << PAGE_SHIFT;
	} else {
		memset(e, 0, sizeof(*e));
	}
	raw_spin_unlock_irqrestore(&rmp_lock, flags);
}
EXPORT_SYMBOL_GPL(softsev_rmp_read);

/**
 * softsev_rmp_write() - change an entry past all checks, as the firmware and the processor do
 * @pfn: the page, which was assigned before: its entry is there
 * @e: the new entry; a 2M entry keeps its guest address
 *
 * Never splits or joins.
 */
void softsev_rmp_write(u64 pfn, const struct softsev_rmp *e)
{
	struct softsev_rmp *to;
	unsigned long flags;
	u64 gpa;

	raw_spin_lock_irqsave(&rmp_lock, flags);
	to = rmp_authority(pfn);
	if (to) {
		gpa = to->gpa;
		if (to->validated && !e->validated)
			rmp_generation++;
		*to = *e;
		if (to->assigned && to->large)
			to->gpa = gpa;
	}
	raw_spin_unlock_irqrestore(&rmp_lock, flags);
	WARN_ON_ONCE(!to);
}
EXPORT_SYMBOL_GPL(softsev_rmp_write);

/**
 * softsev_rmp_uses() - whether any page is assigned to an ASID
 * @asid: the ASID; nobody has 0
 */
bool softsev_rmp_uses(u32 asid)
{
	struct rmp_chunk *chunk;
	unsigned long at;
	int i;

	xa_for_each(&rmp_chunks, at, chunk)
		for (i = 0; asid && i < CHUNK_PAGES; i++)
			if (chunk->e[i].assigned && chunk->e[i].asid == asid)
				return true;
	return false;
}
EXPORT_SYMBOL_GPL(softsev_rmp_uses);

/**
 * softsev_rmp_generation() - counts what was taken away from guests
 */
u64 softsev_rmp_generation(void)
{
	return READ_ONCE(rmp_generation);
}
EXPORT_SYMBOL_GPL(softsev_rmp_generation);

static int rmp_check_update(u64 pfn, bool large)
{
	struct softsev_rmp *head = rmp_entry(ALIGN_DOWN(pfn, CHUNK_PAGES)), *own = rmp_entry(pfn);
	int i;

	if (!large) {
		if (head && head->assigned && head->large)
			return SOFTSEV_RMP_FAIL_OVERLAP;
		return own && own->immutable ? SOFTSEV_RMP_FAIL_PERMISSION : SOFTSEV_RMP_OK;
	}
	if (own && own->assigned && own->large)
		return own->immutable ? SOFTSEV_RMP_FAIL_PERMISSION : SOFTSEV_RMP_OK;
	for (i = 0; own && i < CHUNK_PAGES; i++)
		if (own[i].assigned)
			return SOFTSEV_RMP_FAIL_OVERLAP;
	return SOFTSEV_RMP_OK;
}

static int rmp_update(u64 pfn, u64 gpa, u32 asid, bool assigned, bool large, bool immutable)
{
	struct softsev_rmp *e;
	unsigned long flags;
	int ret;

	raw_spin_lock_irqsave(&rmp_lock, flags);
	ret = rmp_check_update(pfn, large);
	if (!ret) {
		e = rmp_entry(pfn);
		if (e->assigned)
			rmp_generation++;
		memset(e, 0, sizeof(*e));
		if (assigned) {
			e->gpa = gpa;
			e->asid = asid;
			e->assigned = 1;
			e->large = large;
			e->immutable = immutable;
		}
	}
	raw_spin_unlock_irqrestore(&rmp_lock, flags);
	return ret;
}

/**
 * softsev_rmpupdate() - RMPUPDATE: the new entry is neither validated nor a VMSA
 * @pfn: the page, or the first of a 2M page
 * @gpa: its guest address
 * @asid: its guest, or 0
 * @assigned: false gives it back to the hypervisor, whatever the rest says
 * @large: a 2M entry
 * @immutable: only the firmware may change it again
 *
 * Context: may sleep.
 * Return: 0, or the instruction's error.
 */
int softsev_rmpupdate(u64 pfn, u64 gpa, u32 asid, bool assigned, bool large, bool immutable)
{
	struct softsev_rmp old;
	int ret;

	if (large && (pfn % CHUNK_PAGES || (assigned && !IS_ALIGNED(gpa, PMD_SIZE))))
		return SOFTSEV_RMP_FAIL_INPUT;
	if (!assigned && !rmp_entry(pfn))
		return SOFTSEV_RMP_OK;
	if (!rmp_entry_make(pfn))
		return SOFTSEV_RMP_FAIL_INUSE;

	softsev_rmp_read(pfn, &old);
	ret = rmp_update(pfn, gpa, asid, assigned, large, immutable);
	if (!ret && old.assigned && !assigned)
		softsev_host_may_write(pfn, old.large, true);
	if (!ret && assigned && softsev_host_may_write(pfn, large, false)) {
		rmp_update(pfn, 0, 0, false, large, false);
		return SOFTSEV_RMP_FAIL_INUSE;
	}
	if (ret)
		pr_warn("RMPUPDATE of PFN %#llx (%s, %s) fails with %d\n", pfn, large ? "2M" : "4K",
			assigned ? "assigned" : "shared", ret);
	/* The kernel repeats an overlap for ever, expecting another processor to resolve it: there is none here. */
	return ret == SOFTSEV_RMP_FAIL_OVERLAP ? SOFTSEV_RMP_FAIL_INUSE : ret;
}

/**
 * softsev_psmash() - PSMASH: a 2M entry becomes 512 that keep its validation and permissions
 * @pfn: its first page
 *
 * Return: 0, or the instruction's error.
 */
int softsev_psmash(u64 pfn)
{
	struct softsev_rmp *e, one;
	unsigned long flags;
	int i, ret = SOFTSEV_RMP_FAIL_BADADDR;

	if (pfn % CHUNK_PAGES)
		return SOFTSEV_RMP_FAIL_INPUT;
	raw_spin_lock_irqsave(&rmp_lock, flags);
	e = rmp_entry(pfn);
	if (e && e->assigned && e->large && !e->immutable) {
		one = *e;
		one.large = 0;
		for (i = 0; i < CHUNK_PAGES; i++, one.gpa += PAGE_SIZE)
			e[i] = one;
		rmp_generation++;
		ret = SOFTSEV_RMP_OK;
	}
	raw_spin_unlock_irqrestore(&rmp_lock, flags);
	return ret;
}

static void rmp_clear(struct softsev_rmp *e)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&rmp_lock, flags);
	memset(e, 0, sizeof(*e));
	rmp_generation++;
	raw_spin_unlock_irqrestore(&rmp_lock, flags);
}

/**
 * softsev_rmp_reset() - what SNP_INIT does: every page is the hypervisor's
 *
 * Context: may sleep.
 */
void softsev_rmp_reset(void)
{
	struct rmp_chunk *chunk;
	struct softsev_rmp old;
	unsigned long at;
	int i;

	xa_for_each(&rmp_chunks, at, chunk) {
		for (i = 0; i < CHUNK_PAGES; i++) {
			old = chunk->e[i];
			if (!memchr_inv(&old, 0, sizeof(old)))
				continue;
			rmp_clear(&chunk->e[i]);
			if (old.assigned)
				softsev_host_may_write(at * CHUNK_PAGES + i, old.large, true);
		}
	}
}
EXPORT_SYMBOL_GPL(softsev_rmp_reset);

/**
 * softsev_rmp_show() - print the entries of all assigned pages: PFN, guest address, ASID, size, what else holds
 * @m: where to
 */
int softsev_rmp_show(struct seq_file *m)
{
	struct rmp_chunk *chunk;
	struct softsev_rmp e;
	unsigned long at;
	int i;

	xa_for_each(&rmp_chunks, at, chunk) {
		for (i = 0; i < CHUNK_PAGES; i++) {
			e = chunk->e[i];
			if (e.assigned)
				seq_printf(m, "%#lx %#llx %u %s%s%s%s\n", at * CHUNK_PAGES + i, e.gpa, e.asid,
					   e.large ? "2M" : "4K", e.validated ? " validated" : "",
					   e.immutable ? " immutable" : "", e.vmsa ? " vmsa" : "");
		}
	}
	return 0;
}
EXPORT_SYMBOL_GPL(softsev_rmp_show);
