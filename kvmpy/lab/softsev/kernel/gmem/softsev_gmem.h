/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * guest_memfd with folios of 2M, for tests: off unless the kernel is booted with kvm.large_gmem=Y.
 *
 * A 2M folio is used where the whole of it lies in the file, none of its pages exists yet, and memory allows it; else
 * the file has 4K folios as ever. A large folio is zeroed and up to date before anybody finds it, so that what KVM
 * knows of whole folios holds for each of its pages. Files that user space can map keep 4K folios.
 */
#include <linux/huge_mm.h>
#include <linux/moduleparam.h>

#define SOFTSEV_GMEM_ORDER	HPAGE_PMD_ORDER
#define SOFTSEV_GMEM_PAGES	(1UL << SOFTSEV_GMEM_ORDER)

static bool large_gmem __ro_after_init;
module_param(large_gmem, bool, 0444);
MODULE_PARM_DESC(large_gmem, "2M folios in guest_memfd, by kvmpy's hook");

/* Whether the file has large folios is decided when it is made. */
static void softsev_gmem_create(struct address_space *mapping, bool can_map)
{
	if (large_gmem && !can_map)
		mapping_set_large_folios(mapping);
}

/**
 * softsev_gmem_folio() - the folio of a page that the file did not have a moment ago
 * @mapping: the file's
 * @index: the page
 * @policy: where the memory is to come from
 *
 * Return: a locked 2M folio, or whatever somebody else has put there meanwhile; NULL where a 4K one is to be made.
 */
static struct folio *softsev_gmem_folio(struct address_space *mapping, pgoff_t index, struct mempolicy *policy)
{
	pgoff_t first = ALIGN_DOWN(index, SOFTSEV_GMEM_PAGES), end = first + SOFTSEV_GMEM_PAGES;
	gfp_t gfp = mapping_gfp_mask(mapping) | __GFP_NORETRY | __GFP_NOWARN;
	struct folio *folio;
	unsigned long i;
	int ret;

	if (!mapping_large_folio_support(mapping) || end > i_size_read(mapping->host) >> PAGE_SHIFT ||
	    filemap_range_has_page(mapping, (loff_t)first << PAGE_SHIFT, ((loff_t)end << PAGE_SHIFT) - 1))
		return NULL;
	folio = filemap_alloc_folio(gfp, SOFTSEV_GMEM_ORDER, policy);
	if (!folio)
		return NULL;
	for (i = 0; i < SOFTSEV_GMEM_PAGES; i++) {
		clear_highpage(folio_page(folio, i));
		cond_resched();
	}
	folio_mark_uptodate(folio);
	ret = filemap_add_folio(mapping, folio, first, gfp);
	if (!ret)
		return folio;
	folio_put(folio);
	folio = ret == -EEXIST ? filemap_lock_folio(mapping, index) : NULL;
	return IS_ERR(folio) ? NULL : folio;
}

/**
 * softsev_gmem_order() - how much of a folio the guest can have in one piece around a page
 * @slot: where the guest has the file
 * @index: the page, in the file
 * @folio: its folio
 *
 * Return: the order: 2M if all of the folio lies in the slot, at a guest address that is aligned as it is; else 0.
 */
static int softsev_gmem_order(struct kvm_memory_slot *slot, pgoff_t index, struct folio *folio)
{
	pgoff_t first = ALIGN_DOWN(index, SOFTSEV_GMEM_PAGES), at = slot->gmem.pgoff;

	if (folio_order(folio) != SOFTSEV_GMEM_ORDER || !IS_ALIGNED(slot->base_gfn - at, SOFTSEV_GMEM_PAGES) ||
	    first < at || first + SOFTSEV_GMEM_PAGES > at + slot->npages)
		return 0;
	return SOFTSEV_GMEM_ORDER;
}

/* Whoever holds a folio besides us lets go soon: a fault that is being resolved. */
static int softsev_gmem_split_at(struct address_space *mapping, pgoff_t index)
{
	struct folio *folio;
	int ret;

	do {
		cond_resched();
		folio = filemap_lock_folio(mapping, index);
		if (IS_ERR(folio))
			return 0;
		ret = folio->index == index || !folio_test_large(folio) ? 0 : split_folio(folio);
		folio_unlock(folio);
		folio_put(folio);
	} while (ret == -EAGAIN && !fatal_signal_pending(current));
	return ret;
}

/**
 * softsev_gmem_split() - split the folios of which only a part is to go
 * @mapping: the file's, with its invalidate lock held for writing
 * @start: the first page that goes
 * @end: the page behind the last
 *
 * truncate_inode_pages_range() would drop all of a folio that it cannot split: the guest's neighbouring pages, too.
 *
 * Return: 0, or an error; then nothing may be dropped.
 */
static int softsev_gmem_split(struct address_space *mapping, pgoff_t start, pgoff_t end)
{
	return softsev_gmem_split_at(mapping, start) ?: softsev_gmem_split_at(mapping, end);
}
