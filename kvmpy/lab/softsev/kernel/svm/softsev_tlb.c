// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: nested translation with the encryption bit and the RMP checks.
 *
 * The CPU gets nested page tables that stand for its TLB. They start empty; an access that misses comes here, is looked
 * up in KVM's own tables without the encryption bit, checked against the RMP, and entered at the address that the guest
 * used. They are dropped whenever KVM asks for a flush, so KVM's MMU needs no change, and a flush that KVM forgets
 * shows up as it would on a processor.
 */
#include <linux/gfp.h>
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include "mmu.h"
#include "softsev.h"

#define NPT_P		BIT_ULL(0)
#define NPT_W		BIT_ULL(1)
#define NPT_U		BIT_ULL(2)
#define NPT_A		BIT_ULL(5)
#define NPT_D		BIT_ULL(6)
#define NPT_PS		BIT_ULL(7)
#define NPT_NX		BIT_ULL(63)
#define NPT_ADDR	GENMASK_ULL(51, 12)
#define NPT_TABLE	(NPT_P | NPT_W | NPT_U | NPT_A)
#define NPT_INDEX(gpa, level)	(((gpa) >> (3 + 9 * (level))) & 511)
#define NPT_LEVELS	4

#define FILL_AROUND	16	/* pages entered at once */

/* A translation that KVM's tables give. */
struct npt_leaf {
	u64 *sptep;
	u64 spte;
	int level;
	bool writable, nx;
};

bool softsev_tlb_init(struct softsev_vcpu *sv)
{
	INIT_LIST_HEAD(&sv->tables);
	INIT_LIST_HEAD(&sv->spare);
	sv->root = (u64 *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	return sv->root;
}

void softsev_tlb_flush(struct softsev_vcpu *sv)
{
	memset(sv->root, 0, PAGE_SIZE);
	list_splice_init(&sv->tables, &sv->spare);
}

static void tlb_free_list(struct list_head *list)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, list, lru) {
		list_del(&page->lru);
		__free_page(page);
	}
}

void softsev_tlb_free(struct softsev_vcpu *sv)
{
	tlb_free_list(&sv->tables);
	tlb_free_list(&sv->spare);
	free_page((unsigned long)sv->root);
}

static bool tlb_top_up(struct softsev_vcpu *sv)
{
	unsigned int nth;
	struct page *page;
	int have = 0;

	list_for_each_entry(page, &sv->spare, lru)
		if (++have >= NPT_LEVELS)
			return true;
	nth = softsev_own_memory_begin();
	for (; have < NPT_LEVELS; have++) {
		page = alloc_page(GFP_KERNEL_ACCOUNT);
		if (!page)
			break;
		list_add(&page->lru, &sv->spare);
	}
	softsev_own_memory_end(nth);
	return have == NPT_LEVELS;
}

static u64 *tlb_slot(struct softsev_vcpu *sv, u64 raw, int level)
{
	u64 *table = sv->root;
	int at;

	for (at = NPT_LEVELS; at > level; at--) {
		u64 *e = &table[NPT_INDEX(raw, at)];

		if (*e & NPT_PS)
			*e = 0;
		if (!(*e & NPT_P)) {
			struct page *page = list_first_entry_or_null(&sv->spare, struct page, lru);

			if (!page)
				return NULL;
			list_move(&page->lru, &sv->tables);
			clear_page(page_address(page));
			*e = page_to_phys(page) | NPT_TABLE;
		}
		table = __va(*e & NPT_ADDR);
	}
	return &table[NPT_INDEX(raw, level)];
}

/* Between these two, what KVM's tables map cannot be freed: its flush waits for this CPU's interrupts. */
static void npt_walk_begin(struct kvm_vcpu *vcpu)
{
	local_irq_disable();
	smp_store_mb(vcpu->mode, READING_SHADOW_PAGE_TABLES);
}

static void npt_walk_end(struct kvm_vcpu *vcpu)
{
	smp_store_release(&vcpu->mode, OUTSIDE_GUEST_MODE);
	local_irq_enable();
}

static u64 npt_reserved(void)
{
	return GENMASK_ULL(51, boot_cpu_data.x86_phys_bits);
}

/* Returns 0 with a leaf, else the bits of a nested page fault's error code. */
static u64 npt_walk(struct kvm_vcpu *vcpu, u64 gpa, struct npt_leaf *leaf)
{
	hpa_t root = vcpu->arch.mmu->root.hpa;
	int level = vcpu->arch.mmu->root_role.level;
	u64 *table;

	leaf->writable = true;
	leaf->nx = false;
	if (!VALID_PAGE(root))
		return PFERR_USER_MASK;
	for (table = __va(root & NPT_ADDR);; table = __va(leaf->spte & NPT_ADDR), level--) {
		leaf->sptep = &table[NPT_INDEX(gpa, level)];
		leaf->spte = READ_ONCE(*leaf->sptep);
		if (!(leaf->spte & NPT_P))
			return PFERR_USER_MASK;
		if (leaf->spte & npt_reserved())
			return PFERR_USER_MASK | PFERR_PRESENT_MASK | PFERR_RSVD_MASK;
		leaf->writable &= !!(leaf->spte & NPT_W);
		leaf->nx |= !!(leaf->spte & NPT_NX);
		if (level == 1 || (leaf->spte & NPT_PS))
			break;
	}
	leaf->level = level;
	return 0;
}

static u64 npt_leaf_hpa(struct npt_leaf *leaf, u64 gpa)
{
	u64 mask = GENMASK_ULL(12 + 9 * (leaf->level - 1) - 1, 0);

	return (leaf->spte & NPT_ADDR & ~mask) | (gpa & mask);
}

/* Set the bits that a processor sets; false when KVM changed the entry meanwhile. */
static bool npt_touch(struct npt_leaf *leaf, bool write)
{
	u64 want = leaf->spte | NPT_A | (write ? NPT_D : 0), old = leaf->spte;

	if (want == old)
		return true;
	if (!try_cmpxchg64(leaf->sptep, &old, want))
		return false;
	leaf->spte = want;
	return true;
}

/* Walks of the guest's tables and its instruction fetches are private whatever the bit says (APM 15.34.5). */
static bool access_private(u64 raw, u64 access)
{
	return (raw & softsev_cmask()) || (access & (PFERR_FETCH_MASK | PFERR_GUEST_PAGE_MASK));
}

/* The RMP check of a guest's access (APM 15.36.10): 0, or the bits to add to the error code. */
static u64 rmp_check(struct kvm_vcpu *vcpu, u64 raw, u64 hpa, u64 access, int level, bool *unvalidated)
{
	u64 gpa = raw & ~softsev_cmask() & PAGE_MASK;
	struct softsev_rmp e;

	*unvalidated = false;
	softsev_rmp_read(PHYS_PFN(hpa), &e);
	if (!softsev_is_snp(vcpu))
		return e.assigned && (access & PFERR_WRITE_MASK) ? PFERR_GUEST_RMP_MASK : 0;
	if (!access_private(raw, access))
		return e.assigned ? PFERR_GUEST_RMP_MASK : 0;
	if (!e.assigned || e.immutable || e.asid != to_svm(vcpu)->vmcb->control.asid || e.gpa != gpa)
		return PFERR_GUEST_RMP_MASK | PFERR_GUEST_ENC_MASK;
	if (e.large && level == PG_LEVEL_4K)
		return PFERR_GUEST_RMP_MASK | PFERR_GUEST_ENC_MASK | PFERR_GUEST_SIZEM_MASK;
	*unvalidated = !e.validated;
	return 0;
}

/* Find the memory behind a guest-physical address. Called with KVM's tables held; sets the fault when it fails. */
static int npt_translate(struct kvm_vcpu *vcpu, u64 raw, u64 access, struct npt_leaf *leaf, u64 *hpa)
{
	struct softsev_fault *fault = &to_svm(vcpu)->softsev->fault;
	u64 stage = access & SOFTSEV_FAULT_STAGE, gpa = raw & ~softsev_cmask();
	u64 kind = access & (PFERR_WRITE_MASK | PFERR_FETCH_MASK);
	u64 error;

	memset(fault, 0, sizeof(*fault));
	fault->gpa = gpa;
	fault->error = kind | (stage ?: PFERR_GUEST_FINAL_MASK) | PFERR_USER_MASK;
	if (softsev_is_snp(vcpu) && access_private(raw, access))
		fault->error |= PFERR_GUEST_ENC_MASK;

	error = npt_walk(vcpu, gpa, leaf);
	if (error) {
		fault->error |= error;
		return -EFAULT;
	}
	fault->error |= PFERR_PRESENT_MASK;
	*hpa = npt_leaf_hpa(leaf, gpa);
	error = rmp_check(vcpu, raw, *hpa, access, leaf->level, &fault->unvalidated);
	fault->error |= error;
	if (error || fault->unvalidated)
		return -EFAULT;
	if (((access & PFERR_WRITE_MASK) && !leaf->writable) || ((access & PFERR_FETCH_MASK) && leaf->nx))
		return -EFAULT;
	return npt_touch(leaf, access & PFERR_WRITE_MASK) ? 0 : -EAGAIN;
}

static void tlb_enter(struct kvm_vcpu *vcpu, u64 raw, u64 access, struct npt_leaf *leaf, u64 hpa, int level)
{
	u64 *slot = tlb_slot(to_svm(vcpu)->softsev, raw, level), e;

	if (!slot)
		return;
	e = (hpa & NPT_ADDR) | NPT_P | NPT_U | NPT_A | NPT_D;
	/* A page that is clean in KVM's tables must fault again at the first write. */
	if (leaf->writable && (leaf->spte & NPT_D))
		e |= NPT_W;
	/* Shared data of an SNP guest can not be executed: a fetch is private, and must come here first. */
	if (leaf->nx || (softsev_is_snp(vcpu) && !access_private(raw, access)))
		e |= NPT_NX;
	if (level > PG_LEVEL_4K)
		e |= NPT_PS;
	*slot = e;
}

static void tlb_enter_around(struct kvm_vcpu *vcpu, u64 raw, u64 access, struct npt_leaf *hit)
{
	u64 *table = (u64 *)((unsigned long)hit->sptep & PAGE_MASK);
	int at = NPT_INDEX(raw, PG_LEVEL_4K), first = ALIGN_DOWN(at, FILL_AROUND), i;

	for (i = first; i < first + FILL_AROUND; i++) {
		struct npt_leaf leaf = *hit;
		u64 near = (raw & PAGE_MASK) + (i - at) * PAGE_SIZE, hpa;
		bool unvalidated;

		leaf.spte = READ_ONCE(table[i]);
		if (i == at || (leaf.spte & (NPT_P | NPT_A)) != (NPT_P | NPT_A) || (leaf.spte & npt_reserved()))
			continue;
		leaf.writable = leaf.spte & NPT_W;
		leaf.nx = leaf.spte & NPT_NX;
		hpa = leaf.spte & NPT_ADDR;
		if (rmp_check(vcpu, near, hpa, access & ~(u64)PFERR_WRITE_MASK, PG_LEVEL_4K, &unvalidated) || unvalidated)
			continue;
		tlb_enter(vcpu, near, access, &leaf, hpa, PG_LEVEL_4K);
	}
}

/**
 * softsev_tlb_fill() - enter the translation that an access missed
 * @vcpu: whose access it was
 * @raw: guest-physical address with the encryption bit
 * @access: of a nested page fault's error code: write, fetch, and which stage
 *
 * Return: 0, or -EFAULT with the reason in the vCPU's fault.
 */
int softsev_tlb_fill(struct kvm_vcpu *vcpu, u64 raw, u64 access)
{
	struct softsev_vcpu *sv = to_svm(vcpu)->softsev;
	struct npt_leaf leaf;
	u64 hpa;
	int ret;

	if (!tlb_top_up(sv))
		return -ENOMEM;
	npt_walk_begin(vcpu);
	do {
		ret = npt_translate(vcpu, raw, access, &leaf, &hpa);
	} while (ret == -EAGAIN);
	if (!ret) {
		bool large = leaf.level == PG_LEVEL_2M && !softsev_is_snp(vcpu);

		tlb_enter(vcpu, raw, access, &leaf, large ? hpa & PMD_MASK : hpa, large ? PG_LEVEL_2M : PG_LEVEL_4K);
		if (leaf.level == PG_LEVEL_4K)
			tlb_enter_around(vcpu, raw, access, &leaf);
	}
	npt_walk_end(vcpu);
	return ret;
}

/**
 * softsev_guest_entry() - the page that an access would reach; for instructions that work on the RMP's entry of it
 * @vcpu: whose access it is
 * @raw: guest-physical address with the encryption bit
 * @access: of a nested page fault's error code
 * @pfn: becomes the page, also when it is not validated
 *
 * Return: 0, or -EFAULT with the reason in the vCPU's fault.
 */
int softsev_guest_entry(struct kvm_vcpu *vcpu, u64 raw, u64 access, u64 *pfn)
{
	struct npt_leaf leaf;
	u64 hpa;
	int ret;

	npt_walk_begin(vcpu);
	do {
		ret = npt_translate(vcpu, raw, access, &leaf, &hpa);
	} while (ret == -EAGAIN);
	npt_walk_end(vcpu);
	if (!ret || to_svm(vcpu)->softsev->fault.unvalidated)
		*pfn = PHYS_PFN(hpa);
	return ret;
}

/**
 * softsev_guest_copy() - read or write guest memory, inside one page, as an access of the guest would
 * @vcpu: whose access it is
 * @raw: guest-physical address with the encryption bit
 * @access: of a nested page fault's error code
 * @buf: what is written, or becomes what is read
 * @len: how many bytes
 *
 * Return: 0, or -EFAULT with the reason in the vCPU's fault.
 */
int softsev_guest_copy(struct kvm_vcpu *vcpu, u64 raw, u64 access, void *buf, unsigned int len)
{
	struct npt_leaf leaf;
	u64 hpa;
	int ret;

	npt_walk_begin(vcpu);
	do {
		ret = npt_translate(vcpu, raw, access, &leaf, &hpa);
	} while (ret == -EAGAIN);
	if (!ret && !pfn_valid(PHYS_PFN(hpa)))
		ret = -EFAULT;
	if (!ret) {
		if (access & PFERR_WRITE_MASK)
			memcpy(softsev_mem(hpa), buf, len);
		else
			memcpy(buf, __va(hpa), len);
	}
	npt_walk_end(vcpu);
	return ret;
}
