/* SPDX-License-Identifier: Apache-2.0 */
/* Scans of dirty bitmaps and harvests of dirty rings: millions of bits, so not in Python. */
#include <string.h>

#include "../../debug/preload/tables.h"

static uint64_t dirty_word(const void *bitmap, uint64_t word, uint64_t npages)
{
	uint64_t left = npages - word * 64, bits;

	memcpy(&bits, (const char *)bitmap + word * 8, sizeof(bits));
	return left < 64 ? bits & ((1ULL << left) - 1) : bits;
}

uint64_t kvmpy_dirty_count(const void *bitmap, uint64_t npages)
{
	uint64_t count = 0, word;

	for (word = 0; word * 64 < npages; word++)
		count += (uint64_t)__builtin_popcountll(dirty_word(bitmap, word, npages));
	return count;
}

/* Write the numbers of the set bits to out, in order, at most max of them; return how many. */
size_t kvmpy_dirty_scan(const void *bitmap, uint64_t npages, uint32_t *out, size_t max)
{
	size_t found = 0;
	uint64_t word, bits;

	for (word = 0; word * 64 < npages; word++) {
		for (bits = dirty_word(bitmap, word, npages); bits; bits &= bits - 1) {
			if (found == max)
				return found;
			out[found++] = (uint32_t)(word * 64 + (uint64_t)__builtin_ctzll(bits));
		}
	}
	return found;
}

/*
 * Take dirty entries out of a ring of kvm_dirty_gfn, from the running index on, and mark each as harvested. KVM publishes
 * an entry by its flags, so they are read before and written after the rest of it.
 */
uint32_t kvmpy_dirty_harvest(void *ring, uint32_t entries, uint32_t index, uint32_t *slots, uint32_t *offsets, uint32_t max)
{
	struct kvm_dirty_gfn *gfns = ring;
	uint32_t taken = 0;

	while (taken < max) {
		struct kvm_dirty_gfn *gfn = &gfns[(index + taken) & (entries - 1)];

		if ((__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_MASK) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		slots[taken] = gfn->slot;
		offsets[taken] = (uint32_t)gfn->offset;
		__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		taken++;
	}
	return taken;
}
