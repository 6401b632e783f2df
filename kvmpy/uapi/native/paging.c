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

/* Two levels: 1024 entries of 32 bits. Three: PAE, whose four entries of the top level have no rights. */
static int pt_narrow(const struct kvmpy_pt *pt)
{
	return pt->levels == 2;
}

static unsigned int pt_shift(const struct kvmpy_pt *pt, unsigned int level)
{
	return 12 + (pt_narrow(pt) ? 10 : 9) * (level - 1);
}

static uint64_t pt_span(const struct kvmpy_pt *pt, unsigned int level)
{
	return 1ull << pt_shift(pt, level);
}

static unsigned int pt_entries(const struct kvmpy_pt *pt)
{
	return pt_narrow(pt) ? 1024 : 512;
}

static unsigned int pt_index(const struct kvmpy_pt *pt, uint64_t gva, unsigned int level)
{
	return (gva >> pt_shift(pt, level)) & (pt_entries(pt) - 1);
}

static uint64_t pt_get(const struct kvmpy_pt *pt, const void *table, unsigned int index)
{
	return pt_narrow(pt) ? ((const uint32_t *)table)[index] : ((const uint64_t *)table)[index];
}

static void pt_put(const struct kvmpy_pt *pt, void *table, unsigned int index, uint64_t entry)
{
	if (pt_narrow(pt))
		__atomic_store_n((uint32_t *)table + index, entry, __ATOMIC_RELEASE);
	else
		__atomic_store_n((uint64_t *)table + index, entry, __ATOMIC_RELEASE);
}

static int pt_is_leaf(const struct kvmpy_pt *pt, uint64_t entry, unsigned int level)
{
	return level == 1 || (level <= (pt->levels < 4 ? 2 : 3) && (entry & PT_PS));
}

static uint64_t pt_leaf_address(const struct kvmpy_pt *pt, unsigned int level)
{
	return PT_ADDRESS & ~(pt_span(pt, level) - 1) & ~pt->enc_mask;
}

static uint64_t pt_raw(const struct kvmpy_pt *pt, uint64_t gpa)
{
	return !!pt->tables_private == !!pt->enc_private ? gpa | pt->enc_mask : gpa;
}

/* Find the host address of the table that an entry (or the root) points to. */
static int pt_table(struct kvmpy_pt *pt, uint64_t entry, void **table)
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
	*table = (void *)(uintptr_t)(hva + (gpa - seg->gpa));
	return KVMPY_PT_OK;
}

/* For an entry of @level. */
static int pt_new_table(struct kvmpy_pt *pt, unsigned int level, uint64_t *entry, void **table)
{
	struct kvmpy_pt_run *run;

	while (pt->npool && !pt->pool[pt->npool - 1].pages)
		pt->npool--;
	if (!pt->npool)
		return KVMPY_PT_NO_TABLE;
	run = pt->pool + pt->npool - 1;
	*entry = pt_raw(pt, run->gpa) | (pt->levels == 3 && level == 3 ? PT_P : PT_TABLE);
	run->gpa += 4096;
	run->pages--;
	pt->pool_pages--;
	return pt_table(pt, *entry, table);
}

/* Replace a leaf by a table of leaves of the next smaller size that map the same. */
static int pt_split_leaf(struct kvmpy_pt *pt, void *upper, unsigned int index, unsigned int level)
{
	uint64_t mask = pt_leaf_address(pt, level), leaf = pt_get(pt, upper, index), step = pt_span(pt, level - 1), entry;
	uint64_t flags = leaf & ~mask;
	void *table;
	int ret = pt_new_table(pt, level, &entry, &table);

	if (ret)
		return ret;
	if (level == 2) {
		flags &= ~(PT_PS | PT_PAT_HUGE);
		flags |= (leaf & PT_PAT_HUGE) ? PT_PS : 0; /* bit 7 of a 4 KiB leaf is PAT */
	}
	for (unsigned int i = 0; i < pt_entries(pt); i++)
		pt_put(pt, table, i, flags | ((leaf & mask) + i * step));
	pt_put(pt, upper, index, entry);
	return KVMPY_PT_OK;
}

/* Give a table and all below it back, zeroed. */
static int pt_free(struct kvmpy_pt *pt, uint64_t entry, unsigned int level)
{
	void *table;
	int ret = pt_table(pt, entry, &table);

	if (ret)
		return ret;
	for (unsigned int i = 0; level > 1 && i < pt_entries(pt); i++) {
		uint64_t below = pt_get(pt, table, i);

		if ((below & PT_P) && !pt_is_leaf(pt, below, level)) {
			ret = pt_free(pt, below, level - 1);
			if (ret)
				return ret;
		}
	}
	if (pt->npool >= pt->pool_max)
		return KVMPY_PT_NO_ROOM;
	memset(table, 0, 4096);
	pt->pool[pt->npool++] = (struct kvmpy_pt_run){entry & PT_ADDRESS & ~pt->enc_mask, 1};
	pt->pool_pages++;
	return KVMPY_PT_OK;
}

/* Count the tables of levels bottom..top that cover [lo, hi); neighbouring pieces of work share theirs. */
static void pt_count(const struct kvmpy_pt *pt, struct kvmpy_pt_survey *out, unsigned int bottom, unsigned int top,
		     uint64_t lo, uint64_t hi)
{
	for (unsigned int level = bottom; level <= top; level++) {
		uint64_t first = lo >> pt_shift(pt, level + 1), last = (hi - 1) >> pt_shift(pt, level + 1);

		out->missing += last - first + (out->last[level] != first + 1);
		out->last[level] = last + 1;
	}
}

static int pt_must_split(const struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, int op, unsigned int level,
			 uint64_t lo, uint64_t hi)
{
	if (level == 1)
		return 0;
	if (op == KVMPY_PT_FILL || op == KVMPY_PT_SPLIT)
		return level > c->level;
	if (hi - lo < pt_span(pt, level))
		return 1;
	return op == KVMPY_PT_RETARGET && ((c->gpa + (lo - c->gva)) & (pt_span(pt, level) - 1));
}

static void pt_count_splits(const struct kvmpy_pt *pt, struct kvmpy_pt_survey *out, const struct kvmpy_pt_chunk *c,
			    int op, unsigned int level, uint64_t lo, uint64_t hi)
{
	uint64_t next;

	if (!pt_must_split(pt, c, op, level, lo, hi))
		return;
	pt_count(pt, out, level - 1, level - 1, lo, hi);
	for (uint64_t at = lo; at < hi; at = next) {
		next = (at | (pt_span(pt, level - 1) - 1)) + 1;
		next = next < hi ? next : hi;
		pt_count_splits(pt, out, c, op, level - 1, at, next);
	}
}

static int pt_look(struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, int op, struct kvmpy_pt_survey *out,
		   uint64_t pointer, unsigned int level, uint64_t lo, uint64_t hi)
{
	uint64_t next;
	void *table;
	int ret = pt_table(pt, pointer, &table);

	if (ret)
		return ret;
	for (uint64_t at = lo; at < hi; at = next) {
		uint64_t entry = pt_get(pt, table, pt_index(pt, at, level));

		next = (at | (pt_span(pt, level) - 1)) + 1;
		next = next < hi ? next : hi;
		if (!(entry & PT_P)) {
			if (!out->holes)
				out->hole_gva = at;
			out->holes += next - at;
			if (op == KVMPY_PT_FILL)
				pt_count(pt, out, c->level, level - 1, at, next);
		} else if (pt_is_leaf(pt, entry, level)) {
			if (!out->found++) {
				out->found_gva = at & ~(pt_span(pt, level) - 1);
				out->found_entry = entry;
				out->found_level = level;
			}
			out->mapped += next - at;
			pt_count_splits(pt, out, c, op, level, at, next);
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

static int pt_fill_leaves(struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, void *table, uint64_t lo, uint64_t hi)
{
	unsigned int level = c->level, first = pt_index(pt, lo, level);
	uint64_t entry = c->set | (c->gpa + (lo - c->gva)), step = pt_span(pt, level), count = (hi - lo) / step;
	int ret;

	if (level == 1) {
		uint64_t *slot = (uint64_t *)table + first;

		for (uint64_t i = 0; pt_narrow(pt) && i < count; i++)
			pt_put(pt, table, first + i, entry + i * 4096);
		for (uint64_t i = 0; !pt_narrow(pt) && i < count; i++)
			slot[i] = entry + i * 4096;
		return KVMPY_PT_OK;
	}
	for (uint64_t i = 0; i < count; i++) {
		uint64_t old = pt_get(pt, table, first + i);

		pt_put(pt, table, first + i, entry + i * step);
		if ((old & PT_P) && !pt_is_leaf(pt, old, level)) {
			ret = pt_free(pt, old, level - 1);
			if (ret)
				return ret;
		}
	}
	return KVMPY_PT_OK;
}

static int pt_fill(struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, void *table, unsigned int level, uint64_t lo,
		   uint64_t hi)
{
	uint64_t next, entry;
	void *child;
	int ret;

	if (level == c->level)
		return pt_fill_leaves(pt, c, table, lo, hi);
	for (uint64_t at = lo; at < hi; at = next) {
		unsigned int index = pt_index(pt, at, level);
		uint64_t old = pt_get(pt, table, index);
		int fresh = !(old & PT_P);

		next = (at | (pt_span(pt, level) - 1)) + 1;
		next = next < hi ? next : hi;
		if (fresh) {
			ret = pt_new_table(pt, level, &entry, &child);
		} else {
			ret = pt_is_leaf(pt, old, level) ? pt_split_leaf(pt, table, index, level) : KVMPY_PT_OK;
			if (!ret)
				ret = pt_table(pt, pt_get(pt, table, index), &child);
		}
		if (!ret)
			ret = pt_fill(pt, c, child, level - 1, at, next);
		if (ret)
			return ret;
		if (fresh)
			pt_put(pt, table, index, entry);
	}
	return KVMPY_PT_OK;
}

int kvmpy_pt_fill(struct kvmpy_pt *pt, struct kvmpy_pt_chunk *chunks, uint64_t count)
{
	void *root;
	int ret = pt_table(pt, pt->root, &root);

	for (uint64_t i = 0; !ret && i < count; i++)
		ret = pt_fill(pt, chunks + i, root, pt->levels, chunks[i].gva, chunks[i].gva + chunks[i].size);
	return ret;
}

static int pt_is_empty(const struct kvmpy_pt *pt, const void *table)
{
	uint64_t present = 0;

	for (unsigned int i = 0; i < pt_entries(pt); i++)
		present |= pt_get(pt, table, i);
	return !(present & PT_P);
}

static int pt_edit(struct kvmpy_pt *pt, const struct kvmpy_pt_chunk *c, int op, void *table, unsigned int level,
		   uint64_t lo, uint64_t hi)
{
	uint64_t next;
	void *child;
	int ret;

	for (uint64_t at = lo; at < hi; at = next) {
		unsigned int index = pt_index(pt, at, level);
		uint64_t entry = pt_get(pt, table, index);

		next = (at | (pt_span(pt, level) - 1)) + 1;
		next = next < hi ? next : hi;
		if (!(entry & PT_P))
			continue;
		if (pt_is_leaf(pt, entry, level)) {
			if (!pt_must_split(pt, c, op, level, at, next)) {
				if (op == KVMPY_PT_CLEAR)
					entry = 0;
				else if (op != KVMPY_PT_SPLIT)
					entry = (entry & ~c->clear) | c->set;
				if (op == KVMPY_PT_RETARGET)
					entry = (entry & ~pt_leaf_address(pt, level)) | (c->gpa + (at - c->gva));
				pt_put(pt, table, index, entry);
				continue;
			}
			ret = pt_split_leaf(pt, table, index, level);
			if (ret)
				return ret;
		}
		ret = pt_table(pt, pt_get(pt, table, index), &child);
		if (!ret)
			ret = pt_edit(pt, c, op, child, level - 1, at, next);
		if (!ret && op == KVMPY_PT_CLEAR && pt_is_empty(pt, child)) {
			entry = pt_get(pt, table, index);
			pt_put(pt, table, index, 0);
			ret = pt_free(pt, entry, level - 1);
		}
		if (ret)
			return ret;
	}
	return KVMPY_PT_OK;
}

int kvmpy_pt_edit(struct kvmpy_pt *pt, struct kvmpy_pt_chunk *chunks, uint64_t count, int op)
{
	void *root;
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
	uint64_t next;
	void *table;
	int ret = pt_table(pt, pointer, &table);

	for (uint64_t at = lo; !ret && at < hi; at = next) {
		uint64_t entry = pt_get(pt, table, pt_index(pt, at, level)), span = pt_span(pt, level);
		struct kvmpy_pt_mapping *last = to->count ? to->out + to->count - 1 : NULL;

		next = (at | (span - 1)) + 1;
		next = next < hi ? next : hi;
		if (!(entry & PT_P))
			continue;
		if (!pt_is_leaf(pt, entry, level)) {
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
	uint64_t pointer = pt->root;
	void *table;
	int count = 0;

	for (unsigned int level = pt->levels; level; level--) {
		uint64_t index = pt_index(pt, gva, level);
		int ret = pt_table(pt, pointer, &table);

		if (ret)
			return count ? count : ret;
		/* The four entries of PAE's root may lie anywhere in a page. */
		if (level == 3 && pt->levels == 3)
			index += (pt->root & 0xfe0) / 8;
		steps[count] = (struct kvmpy_pt_step){pointer & PT_ADDRESS, index, pt_get(pt, table, index), level};
		pointer = steps[count++].entry;
		if (!(pointer & PT_P) || pt_is_leaf(pt, pointer, level))
			break;
	}
	return count;
}
