/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Software AMD-SP, the processor's side: VMRUN of SEV, SEV-ES and SNP guests on a CPU that only has plain SVM.
 *
 * svm.c calls the two run functions instead of the assembly, and softsev_handle_exit() before its own handlers.
 */
#ifndef __SVM_SOFTSEV_H
#define __SVM_SOFTSEV_H

#include <linux/kvm_host.h>
#include <linux/list.h>
#include <asm/softsev.h>
#include "svm.h"

#define SOFTSEV_PASS	2	/* the exit is KVM's */

/* Whether a nested fault met the guest's own access, or the walk of its page tables. */
#define SOFTSEV_FAULT_STAGE	(PFERR_GUEST_FINAL_MASK | PFERR_GUEST_PAGE_MASK)

/* Error code of #VC where a private page was not validated (APM 15.36.10). */
#define SOFTSEV_VC_NOT_VALIDATED	0x404

/* What a VMSA that the firmware has encrypted ends with. */
#define SOFTSEV_VMSA_MARK		0x41534d5674666f53ULL

/* The registers that the x87, SSE and AVX state have in memory, in XSAVE's standard form. */
struct softsev_fpu {
	u8 legacy[512];
	u8 header[64];
	u8 ymm[256];
} __aligned(64);

/* Why an access of the guest did not reach memory. */
struct softsev_fault {
	u64 gpa;
	u64 error;
	bool unvalidated;
};

/* What the software keeps of a vCPU, besides the VMSA. */
struct softsev_vcpu {
	/* The translations that a CPU would cache: nested page tables of its own, filled from KVM's. */
	u64 *root;
	struct list_head tables;
	struct list_head spare;
	u64 kvm_root;
	u64 generation;

	struct softsev_fault fault;
	u64 cr0, cr4, efer;
	struct vmcb_save_area save;
	typeof_member(struct kvm_vcpu_arch, regs) regs;
	struct softsev_fpu fpu;
};

static inline bool softsev_is_sev(struct vcpu_svm *svm)
{
	/* Bits 1 and 2 of the VMCB's 0x90 are SEV and SEV-ES; kernels disagree on the field's name. */
	return *(u64 *)((u8 *)svm->vmcb + 0x90) & BIT(1);
}

static inline bool softsev_is_es(struct vcpu_svm *svm)
{
	return *(u64 *)((u8 *)svm->vmcb + 0x90) & BIT(2);
}

static inline bool softsev_is_snp(struct kvm_vcpu *vcpu)
{
	return vcpu->kvm->arch.vm_type == KVM_X86_SNP_VM;
}

static inline u64 softsev_cmask(void)
{
	return BIT_ULL(softsev_cbit());
}

static inline struct sev_es_save_area *softsev_vmsa(struct vcpu_svm *svm)
{
	return softsev_mem(svm->vmcb->control.vmsa_pa);
}

/* The state that both kinds of guest have at the same place: in the VMSA, or in the VMCB. */
static inline struct vmcb_save_area *softsev_state(struct vcpu_svm *svm)
{
	return softsev_is_es(svm) ? (struct vmcb_save_area *)softsev_vmsa(svm) : &svm->vmcb->save;
}

/* softsev_run.c */
int softsev_pre_run(struct kvm_vcpu *vcpu);
void softsev_vcpu_run(struct vcpu_svm *svm, unsigned int flags);
void softsev_es_vcpu_run(struct vcpu_svm *svm, unsigned int flags);
void softsev_free_vcpu(struct kvm_vcpu *vcpu);

/* softsev_tlb.c */
bool softsev_tlb_init(struct softsev_vcpu *sv);
void softsev_tlb_flush(struct softsev_vcpu *sv);
void softsev_tlb_free(struct softsev_vcpu *sv);
int softsev_tlb_fill(struct kvm_vcpu *vcpu, u64 raw, u64 access);
int softsev_guest_entry(struct kvm_vcpu *vcpu, u64 raw, u64 access, u64 *pfn);
int softsev_guest_copy(struct kvm_vcpu *vcpu, u64 raw, u64 access, void *buf, unsigned int len);

/* softsev_guest.c */
int softsev_guest_walk(struct kvm_vcpu *vcpu, u64 gva, bool write, u64 *raw, u32 *pf_error);
int softsev_guest_rw(struct kvm_vcpu *vcpu, u64 gva, void *buf, unsigned int len, bool write, u32 *pf_error);
int softsev_guest_fetch(struct kvm_vcpu *vcpu, u8 *insn, unsigned int len);
int softsev_deliver_vc(struct kvm_vcpu *vcpu, u32 error);

/* softsev_exit.c */
int softsev_handle_exit(struct kvm_vcpu *vcpu);
int softsev_guest_fault(struct kvm_vcpu *vcpu);
void softsev_trap(struct kvm_vcpu *vcpu, u32 code, int intercept, u64 old, u64 new);

/* softsev_cr.c */
int softsev_cr_write(struct kvm_vcpu *vcpu, int cr);
int softsev_cr_read(struct kvm_vcpu *vcpu, int cr);

/* softsev_msr.c */
void softsev_msr_prepare(struct vcpu_svm *svm);
int softsev_msr(struct kvm_vcpu *vcpu);

/* softsev_rmpinsn.c */
int softsev_pvalidate(struct kvm_vcpu *vcpu);
int softsev_rmpadjust(struct kvm_vcpu *vcpu);
int softsev_rmpquery(struct kvm_vcpu *vcpu);

#endif
