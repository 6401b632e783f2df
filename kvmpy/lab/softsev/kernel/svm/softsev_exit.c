// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: exits that the hardware would not make, or would turn into #VC inside the guest.
 *
 * Automatic exits (AE) go to KVM as they are; for the others (NAE) the guest gets #VC and talks through its GHCB.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/kvm_host.h>
#include <asm/svm.h>
#include "x86.h"
#include "softsev.h"

#define VC_MMIO		SVM_EXIT_NPF
#define INSN_MAX	15

static int softsev_shutdown(struct kvm_vcpu *vcpu, const char *why)
{
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));

	pr_info_ratelimited("vCPU %d shuts down: %s, RIP %#llx, exit %#llx\n", vcpu->vcpu_id, why, v->rip,
			    (u64)to_svm(vcpu)->vmcb->control.exit_code);
	to_svm(vcpu)->vmcb->control.exit_code = SVM_EXIT_SHUTDOWN;
	return SOFTSEV_PASS;
}

/* The fault that an access of the software met becomes that of the guest; it repeats its instruction afterwards. */
static int softsev_pass_fault(struct kvm_vcpu *vcpu)
{
	struct vmcb_control_area *c = &to_svm(vcpu)->vmcb->control;
	struct softsev_fault *fault = &to_svm(vcpu)->softsev->fault;

	c->exit_code = SVM_EXIT_NPF;
	c->exit_info_1 = fault->error;
	c->exit_info_2 = fault->gpa;
	c->insn_len = 0;
	return SOFTSEV_PASS;
}

static int softsev_vc(struct kvm_vcpu *vcpu, u32 code)
{
	int ret = softsev_deliver_vc(vcpu, code);

	if (!ret)
		return 1;
	if (ret == -EFAULT && !to_svm(vcpu)->softsev->fault.unvalidated)
		return softsev_pass_fault(vcpu);
	return softsev_shutdown(vcpu, "#VC cannot be delivered");
}

/**
 * softsev_guest_fault() - what follows from the fault of an access: #VC in the guest, or an exit to KVM
 * @vcpu: whose access it was
 *
 * Return: as softsev_handle_exit().
 */
int softsev_guest_fault(struct kvm_vcpu *vcpu)
{
	if (to_svm(vcpu)->softsev->fault.unvalidated)
		return softsev_vc(vcpu, SOFTSEV_VC_NOT_VALIDATED);
	return softsev_pass_fault(vcpu);
}

static int softsev_npf(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	struct vmcb_control_area *c = &svm->vmcb->control;
	u64 access = c->exit_info_1 & (PFERR_WRITE_MASK | PFERR_FETCH_MASK | SOFTSEV_FAULT_STAGE);
	int ret;

	ret = softsev_tlb_fill(vcpu, c->exit_info_2, access);
	if (!ret)
		return 1;
	if (ret != -EFAULT)
		return ret;
	if (softsev_is_es(svm) && (svm->softsev->fault.error & PFERR_RSVD_MASK))
		return softsev_vc(vcpu, VC_MMIO);
	ret = softsev_guest_fault(vcpu);
	if (ret == SOFTSEV_PASS && c->exit_code == SVM_EXIT_NPF && !softsev_is_es(svm)) {
		/* Decode assist: KVM cannot read the instructions of an SEV guest. */
		struct softsev_fault fault = svm->softsev->fault;
		int len = softsev_guest_fetch(vcpu, c->insn_bytes, INSN_MAX);

		c->insn_len = max(len, 0);
		svm->softsev->fault = fault;
	}
	return ret;
}

/* KVM cannot decode the instructions of an SEV guest, and the CPU does not say where the next one is. */
static void softsev_next_rip(struct kvm_vcpu *vcpu, u32 code)
{
	static const struct {
		u32 code;
		u8 len;
	} lengths[] = {
		{ SVM_EXIT_CPUID, 2 }, { SVM_EXIT_MSR, 2 }, { SVM_EXIT_HLT, 1 }, { SVM_EXIT_VMMCALL, 3 },
		{ SVM_EXIT_RDTSC, 2 }, { SVM_EXIT_RDTSCP, 3 }, { SVM_EXIT_RDPMC, 2 }, { SVM_EXIT_INVD, 2 },
		{ SVM_EXIT_WBINVD, 2 }, { SVM_EXIT_XSETBV, 3 }, { SVM_EXIT_PAUSE, 2 }, { SVM_EXIT_MONITOR, 3 },
		{ SVM_EXIT_MWAIT, 3 },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(lengths); i++)
		if (lengths[i].code == code)
			to_svm(vcpu)->next_rip = kvm_rip_read(vcpu) + lengths[i].len;
}

/**
 * softsev_trap() - the exit behind a write that changed a control register, where KVM asked for it
 * @vcpu: who wrote
 * @code: the exit's code
 * @intercept: how KVM asks for it
 * @old: the register's value before
 * @new: the register's value now
 */
void softsev_trap(struct kvm_vcpu *vcpu, u32 code, int intercept, u64 old, u64 new)
{
	struct vmcb_control_area *c = &to_svm(vcpu)->vmcb->control;
	struct { u64 info_1; typeof(c->exit_code) code; } keep = { c->exit_info_1, c->exit_code };

	if (old == new || !vmcb_is_intercept(c, intercept))
		return;
	c->exit_code = code;
	c->exit_info_1 = new;
	svm_invoke_exit_handler(vcpu, code);
	c->exit_code = keep.code;
	c->exit_info_1 = keep.info_1;
}

/* The CPU does not know the traps that follow a write of a control register: KVM is told at the next exit. */
static void softsev_traps(struct kvm_vcpu *vcpu)
{
	struct softsev_vcpu *sv = to_svm(vcpu)->softsev;
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));

	softsev_trap(vcpu, SVM_EXIT_CR0_WRITE_TRAP, TRAP_CR0_WRITE, sv->cr0, v->cr0);
	softsev_trap(vcpu, SVM_EXIT_CR4_WRITE_TRAP, TRAP_CR4_WRITE, sv->cr4, v->cr4);
	softsev_trap(vcpu, SVM_EXIT_EFER_WRITE_TRAP, TRAP_EFER_WRITE, sv->efer, v->efer);
	sv->cr0 = v->cr0;
	sv->cr4 = v->cr4;
	sv->efer = v->efer;
}

/* VMMCALL with a REP prefix is VMGEXIT; without one it is for the guest's #VC handler. */
static int softsev_vmmcall(struct kvm_vcpu *vcpu)
{
	struct vmcb_control_area *c = &to_svm(vcpu)->vmcb->control;
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));
	u8 insn[4];
	int len = softsev_guest_fetch(vcpu, insn, sizeof(insn));

	if (len == -EFAULT)
		return softsev_guest_fault(vcpu);
	if (len < 3)
		return softsev_shutdown(vcpu, "its instruction cannot be read");
	if (len == 4 && (insn[0] == 0xf3 || insn[0] == 0xf2) && insn[1] == 0x0f && insn[2] == 0x01 && insn[3] == 0xd9) {
		v->rip += 4;
		c->exit_code = SVM_EXIT_VMGEXIT;
		return SOFTSEV_PASS;
	}
	return softsev_vc(vcpu, SVM_EXIT_VMMCALL);
}

/* #UD: PVALIDATE, RMPADJUST and RMPQUERY, or the guest's own. */
static int softsev_ud(struct kvm_vcpu *vcpu)
{
	u8 insn[4];
	int len = softsev_guest_fetch(vcpu, insn, sizeof(insn));

	if (len == -EFAULT)
		return softsev_guest_fault(vcpu);
	if (len == 4 && insn[1] == 0x0f && insn[2] == 0x01) {
		if (insn[0] == 0xf2 && insn[3] == 0xff)
			return softsev_pvalidate(vcpu);
		if (insn[0] == 0xf3 && insn[3] == 0xfe)
			return softsev_rmpadjust(vcpu);
		if (insn[0] == 0xf3 && insn[3] == 0xfd)
			return softsev_rmpquery(vcpu);
	}
	kvm_queue_exception(vcpu, UD_VECTOR);
	return 1;
}

static int softsev_es_exit(struct kvm_vcpu *vcpu, u32 code)
{
	switch (code) {
	case SVM_EXIT_VMMCALL:
		return softsev_vmmcall(vcpu);
	case SVM_EXIT_HLT:
		softsev_vmsa(to_svm(vcpu))->rip += 1;
		return SOFTSEV_PASS;
	case SVM_EXIT_EXCP_BASE + UD_VECTOR:
		return softsev_is_snp(vcpu) ? softsev_ud(vcpu) : SOFTSEV_PASS;
	case SVM_EXIT_READ_DR7:
	case SVM_EXIT_WRITE_DR7:
	case SVM_EXIT_RDTSC:
	case SVM_EXIT_RDTSCP:
	case SVM_EXIT_RDPMC:
	case SVM_EXIT_CPUID:
	case SVM_EXIT_INVD:
	case SVM_EXIT_WBINVD:
	case SVM_EXIT_IOIO:
	case SVM_EXIT_MSR:
	case SVM_EXIT_MONITOR:
	case SVM_EXIT_MWAIT:
		return softsev_vc(vcpu, code);
	}
	return SOFTSEV_PASS;
}

/**
 * softsev_handle_exit() - called before KVM's handlers
 * @vcpu: who came out
 *
 * Return: SOFTSEV_PASS when the exit, as it now stands in the VMCB, is KVM's; else what the handler returns.
 */
int softsev_handle_exit(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	u32 code = svm->vmcb->control.exit_code;
	int ret;

	if (!softsev_enabled() || !svm->softsev || !softsev_is_sev(svm))
		return SOFTSEV_PASS;
	if (softsev_is_es(svm))
		softsev_traps(vcpu);
	if (code == SVM_EXIT_NPF)
		return softsev_npf(vcpu);
	if (code == SVM_EXIT_MSR) {
		ret = softsev_msr(vcpu);
		if (ret != SOFTSEV_PASS)
			return ret;
	}
	if (code == SVM_EXIT_CR0_SEL_WRITE || code == SVM_EXIT_WRITE_CR0 || code == SVM_EXIT_WRITE_CR4)
		return softsev_cr_write(vcpu, code == SVM_EXIT_WRITE_CR4 ? 4 : 0);
	if (code == SVM_EXIT_READ_CR0 || code == SVM_EXIT_READ_CR4)
		return softsev_cr_read(vcpu, code == SVM_EXIT_READ_CR4 ? 4 : 0);
	if (softsev_is_es(svm))
		return softsev_es_exit(vcpu, code);
	softsev_next_rip(vcpu, code);
	return SOFTSEV_PASS;
}
