// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the instructions with which an SNP guest changes the RMP's entries of its own pages (APM volume 3).
 */
#include <linux/bitfield.h>
#include <linux/bitops.h>
#include <linux/kvm_host.h>
#include "x86.h"
#include "softsev.h"

#define INSN_LEN		4
/* Sizes in RCX; RMPQUERY asks for none. */
#define PAGE_2M			1
#define ANY_SIZE		-1

#define RMPADJUST_VMPL		GENMASK(7, 0)
#define RMPADJUST_PERMS		GENMASK(15, 8)
#define RMPADJUST_VMSA		BIT(16)
#define VMPLS			4

static void insn_flags(struct sev_es_save_area *v, u32 result, bool carry)
{
	v->rflags &= ~(X86_EFLAGS_CF | X86_EFLAGS_PF | X86_EFLAGS_AF | X86_EFLAGS_ZF | X86_EFLAGS_SF | X86_EFLAGS_OF);
	if (carry)
		v->rflags |= X86_EFLAGS_CF;
	if (!result)
		v->rflags |= X86_EFLAGS_ZF;
	if (!(hweight8(result) & 1))
		v->rflags |= X86_EFLAGS_PF;
}

static int insn_done(struct kvm_vcpu *vcpu, u32 result, bool carry)
{
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));

	v->rax = result;
	insn_flags(v, result, carry);
	v->rip += INSN_LEN;
	return 1;
}

static int insn_general_protection(struct kvm_vcpu *vcpu)
{
	kvm_queue_exception_e(vcpu, GP_VECTOR, 0);
	return 1;
}

static int insn_page_fault(struct kvm_vcpu *vcpu, u64 gva, u32 error)
{
	softsev_vmsa(to_svm(vcpu))->cr2 = gva;
	kvm_queue_exception_e(vcpu, PF_VECTOR, error);
	return 1;
}

/*
 * Find the page of the guest that the instruction names, and its RMP entry. Return 0, or 1 and in *@result what the exit
 * handler returns: the instruction faulted. That a page is not validated is no fault of PVALIDATE. A @size of 4K is one
 * in an entry of 2M, however the page is mapped: the hypervisor splits the entry.
 */
static int insn_page(struct kvm_vcpu *vcpu, int size, bool may_be_unvalidated, u64 *pfn, struct softsev_rmp *e,
		     int *result)
{
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));
	struct softsev_fault *fault = &to_svm(vcpu)->softsev->fault;
	u64 gva = v->rax & PAGE_MASK, raw;
	u32 pf_error;
	int ret;

	ret = softsev_guest_walk(vcpu, gva, false, &raw, &pf_error);
	if (ret == -ENOENT) {
		*result = insn_page_fault(vcpu, gva, pf_error);
		return 1;
	}
	if (!ret) {
		ret = softsev_guest_entry(vcpu, raw, 0, pfn);
		if (!ret || fault->unvalidated) {
			softsev_rmp_read(*pfn, e);
			if ((raw & softsev_cmask()) && e->large && size != PAGE_2M && size != ANY_SIZE) {
				fault->error |= PFERR_GUEST_RMP_MASK | PFERR_GUEST_SIZEM_MASK;
				fault->unvalidated = false;
				ret = -EFAULT;
			}
		}
		if (ret == -EFAULT && fault->unvalidated && may_be_unvalidated)
			ret = 0;
		/* Without the encryption bit the page is the hypervisor's, and no entry of the guest's. */
		if (!ret && !(raw & softsev_cmask())) {
			fault->error |= PFERR_PRESENT_MASK | PFERR_GUEST_RMP_MASK;
			ret = -EFAULT;
		}
	}
	if (ret == -EFAULT) {
		*result = softsev_guest_fault(vcpu);
		return 1;
	}
	if (ret) {
		*result = insn_general_protection(vcpu);
		return 1;
	}
	return 0;
}

int softsev_pvalidate(struct kvm_vcpu *vcpu)
{
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));
	bool large = (v->rcx & 1) == PAGE_2M, validate = v->rdx & 1;
	struct softsev_rmp e;
	int result;
	u64 pfn;

	if (v->cpl)
		return insn_general_protection(vcpu);
	if (((u32)v->rcx & ~1u) || ((u32)v->rdx & ~1u) || (large && !IS_ALIGNED(v->rax & PAGE_MASK, PMD_SIZE)))
		return insn_done(vcpu, SOFTSEV_RMP_FAIL_INPUT, false);
	if (v->vmpl)
		return insn_done(vcpu, SOFTSEV_RMP_FAIL_PERMISSION, false);
	if (insn_page(vcpu, large, true, &pfn, &e, &result))
		return result;
	if (large && !e.large)
		return insn_done(vcpu, SOFTSEV_RMP_FAIL_SIZEMISMATCH, false);
	if (e.validated == validate)
		return insn_done(vcpu, SOFTSEV_RMP_OK, true);
	e.validated = validate;
	softsev_rmp_write(pfn, &e);
	/* Others may run with the translation: make them come out, and drop it. */
	if (!validate)
		kvm_make_all_cpus_request(vcpu->kvm, KVM_REQ_OUTSIDE_GUEST_MODE);
	return insn_done(vcpu, SOFTSEV_RMP_OK, false);
}

int softsev_rmpadjust(struct kvm_vcpu *vcpu)
{
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));
	u32 attrs = v->rdx, vmpl = attrs & RMPADJUST_VMPL;
	bool large = (v->rcx & 1) == PAGE_2M;
	struct softsev_rmp e;
	int result;
	u64 pfn;

	if (v->cpl)
		return insn_general_protection(vcpu);
	if (((u32)v->rcx & ~1u) || vmpl >= VMPLS || (large && !IS_ALIGNED(v->rax & PAGE_MASK, PMD_SIZE)) ||
	    (attrs & ~(RMPADJUST_VMPL | RMPADJUST_PERMS | RMPADJUST_VMSA)))
		return insn_done(vcpu, SOFTSEV_RMP_FAIL_INPUT, false);
	if (vmpl <= v->vmpl || ((attrs & RMPADJUST_VMSA) && v->vmpl))
		return insn_done(vcpu, SOFTSEV_RMP_FAIL_PERMISSION, false);
	if (insn_page(vcpu, large, false, &pfn, &e, &result))
		return result;
	if (large && !e.large)
		return insn_done(vcpu, SOFTSEV_RMP_FAIL_SIZEMISMATCH, false);
	e.perms[vmpl - 1] = FIELD_GET(RMPADJUST_PERMS, attrs);
	if (!v->vmpl)
		e.vmsa = !!(attrs & RMPADJUST_VMSA);
	softsev_rmp_write(pfn, &e);
	return insn_done(vcpu, SOFTSEV_RMP_OK, false);
}

int softsev_rmpquery(struct kvm_vcpu *vcpu)
{
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));
	u32 vmpl = v->rdx & RMPADJUST_VMPL;
	struct softsev_rmp e;
	int result;
	u64 pfn;

	if (v->cpl)
		return insn_general_protection(vcpu);
	if (vmpl >= VMPLS)
		return insn_done(vcpu, SOFTSEV_RMP_FAIL_INPUT, false);
	if (vmpl <= v->vmpl)
		return insn_done(vcpu, SOFTSEV_RMP_FAIL_PERMISSION, false);
	if (insn_page(vcpu, ANY_SIZE, false, &pfn, &e, &result))
		return result;
	v->rdx = vmpl | FIELD_PREP(RMPADJUST_PERMS, e.perms[vmpl - 1]) | (e.vmsa ? RMPADJUST_VMSA : 0);
	v->rcx = e.large;
	return insn_done(vcpu, SOFTSEV_RMP_OK, false);
}
