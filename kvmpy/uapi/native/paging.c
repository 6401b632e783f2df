/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bulk edits of x86 page tables through host mappings. The caller has checked addresses and allocated the tables that a
 * survey asked for, so that an edit never stops half-way; a new table is filled before it is linked, since vCPUs may run.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifndef KVMPY_PT_ABI
#include "paging.h"
#endif

#define PT_P 0x1ull
#define PT_TABLE 0x7ull /* present, writable, user: the leaf decides */
#define PT_PS 0x80ull
#define PT_PAT_HUGE 0x1000ull
#define PT_ADDRESS 0x000ffffffffff000ull

static unsigned int pt_shift(unsigned int level)
{
	return 12 + 9 * (level - 1);
}

static uint64_t pt_span(unsigned int level)
{
	return 1ull << pt_shift(level);
}

static int pt_is_leaf(uint64_t entry, unsigned int level)
{
	return level == 1 || (level <= 3 && (entry & PT_PS));
}

static uint64_t pt_leaf_address(const struct kvmpy_pt *pt, unsigned int level)
{
	return PT_ADDRESS & ~(pt_span(level) - 1) & ~pt->enc_mask;
}

static uint64_t pt_raw(const struct kvmpy_pt *pt, uint64_t gpa)
{
	return !!pt->tables_private == !!pt->enc_private ? gpa | pt->enc_mask : gpa;
}

/* Find the host address of the table that an entry (or the root) points to. */
static int pt_table(struct kvmpy_pt *pt, uint64_t entry, uint64_t **table)
{
	uint64_t gpa = entry & PT_ADDRESS & ~pt->enc_mask, low = 0, high = pt->nsegments, hva;
	const struct kvmpy_pt_segment *seg = pt->segments + pt->hint;
	int private = pt->enc_mask ? !!(entry & pt->enc_mask) == !!pt->enc_private : !!pt->tables_private;

	if (pt->hint >= pt->nsegments || gpa < seg->gpa || gpa - seg->gpa >= seg->size) {
		while (low < high) {
			uint64_t middle = (low + high) / 2;

			if (pt->segments[middle].gpa <= gpa)
				low = middle + 1;
			else
				high = middle;
		}
		seg = pt->segments + low - 1;
		pt->fault_gpa = gpa;
		pt->fault_private = private;
		if (!low || gpa - seg->gpa >= seg->size)
			return KVMPY_PT_OUTSIDE;
		pt->hint = low - 1;
	}
	hva = private ? seg->private_hva : seg->shared_hva;
	if (!hva) {
		pt->fault_gpa = gpa;
		pt->fault_private = private;
		return KVMPY_PT_HIDDEN;
	}
	*table = (uint64_t *)(uintptr_t)(hva + (gpa - seg->gpa));
	return KVMPY_PT_OK;
}

static int pt_new_table(struct kvmpy_pt *pt, uint64_t *entry, uint64_t **table)
{
	struct kvmpy_pt_run *run;

	while (pt->npool && !pt->pool[pt->npool - 1].pages)
		pt->npool--;
	if (!pt->npool)
		return KVMPY_PT_NO_TABLE;
	run = pt->pool + pt->npool - 1;
	*entry = pt_raw(pt, run->gpa) | PT_TABLE;
	run->gpa += 4096;
	run->pages--;
	pt->pool_pages--;
	return pt_table(pt, *entry, table);
}

static void pt_link(uint64_t *slot, uint64_t entry)
{
	__atomic_store_n(slot, entry, __ATOMIC_RELEASE);
}

/* Replace the leaf in *slot by a table of 512 leaves of the next smaller size that map the same. */
static int pt_split_leaf(struct kvmpy_pt *pt, uint64_t *slot, unsigned int level)
{
	uint64_t mask = pt_leaf_address(pt, level), leaf = *slot, step = pt_span(level - 1), entry, *table;
	uint64_t flags = leaf & ~mask;
	int ret = pt_new_table(pt, &entry, &table);

	if (ret)
		return ret;
	if (level == 2) {
		flags &= ~(PT_PS | PT_PAT_HUGE);
		flags |= (leaf & PT_PAT_HUGE) ? PT_PS : 0; /* bit 7 of a 4 KiB leaf is PAT */
	}
	for (unsigned int i = 0; i < 512; i++)
		table[i] = flags | ((leaf & mask) + i * step);
	pt_link(slot, entry);
	return KVMPY_PT_OK;
}

/* Give a table and all below it back, zeroed. */
static int pt_free(struct kvmpy_pt *pt, uint64_t entry, unsigned int level)
{
	uint64_t *table;
	int ret = pt_table(pt, entry, &table);

	if (ret)
		return ret;
	for (unsigned int i = 0; level > 1 && i < 512; i++)
		if ((table[i] & PT_P) && !pt_is_leaf(table[i], level)) {
			ret = pt_free(pt, table[i], level - 1);
			if (ret)
				return ret;
		}
	if (pt->npool >= pt->pool_max)
		return KVMPY_PT_NO_ROOM;
	memset(table, 0, 4096);
	pt->pool[pt->npool++] = (struct kvmpy_pt_run){entry & PT_ADDRESS & ~pt->enc_mask, 1};
	pt->pool_pages++;
	return KVMPY_PT_OK;
}

/* Count the tables of levels bottom..top that cover [lo, hi); neighbouring pieces of work share theirs. */
static void pt_count(struct kvmpy_pt_survey *out, unsigned int bottom, unsigned int top, uint64_t lo, uint64_t hi)
{
	for (unsigned int level = bottom; level <= top; level++) {
		uint64_t first = lo >> pt_shift(level + 1), last = (hi - 1) >> pt_shift(level + 1);

		out->missing += last - first + (out->last[level] != first + 1);
		out->last[level] = last + 1;
	}
}

static int pt_must_split(const struct kvmpy_pt_chunk *c, int op, unsigned int level, uint64_t lo, uint64_t hi)
{
	if (level == 1)
		return 0;
	if (op == KVMPY_PT_FILL || op == KVMPY_PT_SPLIT)
		return level > c->level;
	if (hi - lo < pt_span(level))
		return 1;
	return op == KVMPY_PT_RETARGET && ((c->gpa + (lo - c->gva)) & (pt_span(level) - 1));
}

static void pt_count_splits(struct kvmpy_pt_survey *out, const struct kvmpy_pt_chunk *c, int op, unsigned int level,
			    uint64_t lo, uint64_t hi)
{
	uint64_t next;

	if (!pt_must_split(c, op, level, lo, hi))
		return;
	pt_count(out, level - 1, level - 1, lo, hi);
	for (uint64_t at = lo; at < hi; at = next) {
		next = (at | (pt_span(level - 1) - 1)) + 1;
		next = next < hi ? next : hi;
		pt_count_splits(out, c, op, level - 1, at, next);
	}
}

static int pt_look(struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, int op, struct kvmpy_pt_survey *out,
		   uint64_t pointer, unsigned int level, uint64_t lo, uint64_t hi)
{
	uint64_t *table, next;
	int ret = pt_table(pt, pointer, &table);

	if (ret)
		return ret;
	for (uint64_t at = lo; at < hi; at = next) {
		uint64_t entry = table[(at >> pt_shift(level)) & 511];

		next = (at | (pt_span(level) - 1)) + 1;
		next = next < hi ? next : hi;
		if (!(entry & PT_P)) {
			if (!out->holes)
				out->hole_gva = at;
			out->holes += next - at;
			if (op == KVMPY_PT_FILL)
				pt_count(out, c->level, level - 1, at, next);
		} else if (pt_is_leaf(entry, level)) {
			if (!out->found++) {
				out->found_gva = at & ~(pt_span(level) - 1);
				out->found_entry = entry;
				out->found_level = level;
			}
			out->mapped += next - at;
			pt_count_splits(out, c, op, level, at, next);
		} else {
			out->tables++;
			ret = pt_look(pt, c, op, out, entry, level - 1, at, next);
			if (ret)
				return ret;
		}
	}
	return KVMPY_PT_OK;
}

/* The caller zeroes *out. Chunks come in the order of their addresses. */
int kvmpy_pt_survey(struct kvmpy_pt *pt, struct kvmpy_pt_chunk *chunks, uint64_t count, int op,
		    struct kvmpy_pt_survey *out)
{
	for (uint64_t i = 0; i < count; i++) {
		const struct kvmpy_pt_chunk *c = chunks + i;
		int ret = pt_look(pt, c, op, out, pt->root, pt->levels, c->gva, c->gva + c->size);

		if (ret)
			return ret;
	}
	return KVMPY_PT_OK;
}

static int pt_fill_leaves(struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, uint64_t *table, uint64_t lo, uint64_t hi)
{
	unsigned int level = c->level, shift = pt_shift(level), first = (lo >> shift) & 511;
	uint64_t entry = c->set | (c->gpa + (lo - c->gva)), step = pt_span(level), count = (hi - lo) >> shift;
	uint64_t *slot = table + first;
	int ret;

	if (level == 1) {
		for (uint64_t i = 0; i < count; i++)
			slot[i] = entry + i * 4096;
		return KVMPY_PT_OK;
	}
	for (uint64_t i = 0; i < count; i++) {
		uint64_t old = slot[i];

		pt_link(slot + i, entry + i * step);
		if ((old & PT_P) && !pt_is_leaf(old, level)) {
			ret = pt_free(pt, old, level - 1);
			if (ret)
				return ret;
		}
	}
	return KVMPY_PT_OK;
}

static int pt_fill(struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, uint64_t *table, unsigned int level, uint64_t lo,
		   uint64_t hi)
{
	uint64_t next, entry, *child;
	int ret;

	if (level == c->level)
		return pt_fill_leaves(pt, c, table, lo, hi);
	for (uint64_t at = lo; at < hi; at = next) {
		uint64_t *slot = table + ((at >> pt_shift(level)) & 511);
		int fresh = !(*slot & PT_P);

		next = (at | (pt_span(level) - 1)) + 1;
		next = next < hi ? next : hi;
		if (fresh) {
			ret = pt_new_table(pt, &entry, &child);
		} else {
			ret = pt_is_leaf(*slot, level) ? pt_split_leaf(pt, slot, level) : KVMPY_PT_OK;
			if (!ret)
				ret = pt_table(pt, *slot, &child);
		}
		if (!ret)
			ret = pt_fill(pt, c, child, level - 1, at, next);
		if (ret)
			return ret;
		if (fresh)
			pt_link(slot, entry);
	}
	return KVMPY_PT_OK;
}

int kvmpy_pt_fill(struct kvmpy_pt *pt, struct kvmpy_pt_chunk *chunks, uint64_t count)
{
	uint64_t *root;
	int ret = pt_table(pt, pt->root, &root);

	for (uint64_t i = 0; !ret && i < count; i++)
		ret = pt_fill(pt, chunks + i, root, pt->levels, chunks[i].gva, chunks[i].gva + chunks[i].size);
	return ret;
}

static int pt_is_empty(const uint64_t *table)
{
	uint64_t present = 0;

	for (unsigned int i = 0; i < 512; i++)
		present |= table[i];
	return !(present & PT_P);
}

static int pt_edit(struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, int op, uint64_t *table, unsigned int level,
		   uint64_t lo, uint64_t hi)
{
	uint64_t next, *child;
	int ret;

	for (uint64_t at = lo; at < hi; at = next) {
		uint64_t *slot = table + ((at >> pt_shift(level)) & 511), entry = *slot;

		next = (at | (pt_span(level) - 1)) + 1;
		next = next < hi ? next : hi;
		if (!(entry & PT_P))
			continue;
		if (pt_is_leaf(entry, level)) {
			if (!pt_must_split(c, op, level, at, next)) {
				if (op == KVMPY_PT_CLEAR)
					entry = 0;
				else if (op != KVMPY_PT_SPLIT)
					entry = (entry & ~c->clear) | c->set;
				if (op == KVMPY_PT_RETARGET)
					entry = (entry & ~pt_leaf_address(pt, level)) | (c->gpa + (at - c->gva));
				pt_link(slot, entry);
				continue;
			}
			ret = pt_split_leaf(pt, slot, level);
			if (ret)
				return ret;
		}
		ret = pt_table(pt, *slot, &child);
		if (!ret)
			ret = pt_edit(pt, c, op, child, level - 1, at, next);
		if (!ret && op == KVMPY_PT_CLEAR && pt_is_empty(child)) {
			entry = *slot;
			pt_link(slot, 0);
			ret = pt_free(pt, entry, level - 1);
		}
		if (ret)
			return ret;
	}
	return KVMPY_PT_OK;
}

int kvmpy_pt_edit(struct kvmpy_pt *pt, struct kvmpy_pt_chunk *chunks, uint64_t count, int op)
{
	uint64_t *root;
	int ret = pt_table(pt, pt->root, &root);

	for (uint64_t i = 0; !ret && i < count; i++)
		ret = pt_edit(pt, chunks + i, op, root, pt->levels, chunks[i].gva, chunks[i].gva + chunks[i].size);
	return ret;
}

struct pt_collector {
	struct kvmpy_pt_mapping *out;
	uint64_t count;
	uint64_t max;
	uint64_t ignore;
};

static int pt_collect(struct kvmpy_pt *pt, struct pt_collector *to, uint64_t pointer, unsigned int level, uint64_t lo,
		      uint64_t hi)
{
	uint64_t *table, next;
	int ret = pt_table(pt, pointer, &table);

	for (uint64_t at = lo; !ret && at < hi; at = next) {
		uint64_t entry = table[(at >> pt_shift(level)) & 511], span = pt_span(level);
		struct kvmpy_pt_mapping *last = to->count ? to->out + to->count - 1 : NULL;

		next = (at | (span - 1)) + 1;
		next = next < hi ? next : hi;
		if (!(entry & PT_P))
			continue;
		if (!pt_is_leaf(entry, level)) {
			ret = pt_collect(pt, to, entry, level - 1, at, next);
			continue;
		}
		at &= ~(span - 1);
		if (last && last->level == level && last->gva + last->size == at &&
		    !(((last->entry + last->size) ^ entry) & ~to->ignore)) {
			last->size += span;
			continue;
		}
		if (to->count == to->max) {
			pt->cursor = at;
			return KVMPY_PT_NO_ROOM;
		}
		to->out[to->count++] = (struct kvmpy_pt_mapping){at, span, entry, level};
	}
	return ret;
}

/* Return how many mappings were written; when they are max, pt->cursor says where to go on (0: nowhere). */
int64_t kvmpy_pt_collect(struct kvmpy_pt *pt, uint64_t gva, uint64_t size, uint64_t ignore,
			 struct kvmpy_pt_mapping *out, uint64_t max)
{
	struct pt_collector to = {out, 0, max, ignore};
	int ret;

	pt->cursor = 0;
	ret = pt_collect(pt, &to, pt->root, pt->levels, gva, gva + size);
	return ret && ret != KVMPY_PT_NO_ROOM ? ret : (int64_t)to.count;
}

/* Return how many steps were taken; the last one is a leaf or not present. */
int kvmpy_pt_walk(struct kvmpy_pt *pt, uint64_t gva, struct kvmpy_pt_step *steps)
{
	uint64_t pointer = pt->root, *table;
	int count = 0;

	for (unsigned int level = pt->levels; level; level--) {
		uint64_t index = (gva >> pt_shift(level)) & 511;
		int ret = pt_table(pt, pointer, &table);

		if (ret)
			return count ? count : ret;
		steps[count++] = (struct kvmpy_pt_step){pointer & PT_ADDRESS, index, table[index], level};
		pointer = table[index];
		if (!(pointer & PT_P) || pt_is_leaf(pointer, level))
			break;
	}
	return count;
}
