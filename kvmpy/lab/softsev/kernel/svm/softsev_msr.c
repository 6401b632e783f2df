// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: MSRs that are between the guest and the processor.
 *
 * The SEV status and the GHCB's MSR are unknown to an emulated CPU. PAT and EFER of SEV-ES and SNP guests are a part of
 * the VMSA, and KVM intercepts neither: such a CPU takes any value for them, and has one PAT for the host and all guests.
 */
#include <linux/kvm_host.h>
#include <asm/cpufeature.h>
#include <asm/svm.h>
#include "x86.h"
#include "softsev.h"

/* Two bits of the permission map, for reads and writes, of an MSR whose range begins at byte @base of the map. */
#define MSRPM_BYTE(base, msr)	((base) + ((msr) & 0x1fff) / 4)
#define MSRPM_BITS(msr, bits)	((bits) << ((msr) & 3) * 2)
#define MSRPM_READ		1
#define MSRPM_WRITE		2
#define MSRPM_RANGE_0		0
#define MSRPM_RANGE_C0000000	0x800
#define MSRPM_RANGE_C0010000	0x1000

static void intercept(u8 *map, u32 range, u32 msr, u8 bits)
{
	map[MSRPM_BYTE(range, msr)] |= MSRPM_BITS(msr, bits);
}

/**
 * softsev_msr_prepare() - before VMRUN: let these MSRs come here
 * @svm: the vCPU
 */
void softsev_msr_prepare(struct vcpu_svm *svm)
{
	u8 *map = (u8 *)svm->msrpm;

	intercept(map, MSRPM_RANGE_C0010000, MSR_AMD64_SEV, MSRPM_READ | MSRPM_WRITE);
	intercept(map, MSRPM_RANGE_C0010000, MSR_AMD64_SEV_ES_GHCB, MSRPM_READ | MSRPM_WRITE);
	if (!softsev_is_es(svm))
		return;
	intercept(map, MSRPM_RANGE_0, MSR_IA32_CR_PAT, MSRPM_READ | MSRPM_WRITE);
	intercept(map, MSRPM_RANGE_C0000000, MSR_EFER, MSRPM_WRITE);
}

/* The bits of EFER that this processor lets a guest set (APM volume 2, 3.1.7); LMA is ignored. */
static u64 efer_known(void)
{
	u64 known = EFER_SCE | EFER_LME | EFER_LMA | EFER_SVME;

	known |= boot_cpu_has(X86_FEATURE_NX) ? EFER_NX : 0;
	known |= boot_cpu_has(X86_FEATURE_FXSR_OPT) ? EFER_FFXSR : 0;
#ifdef EFER_TCE
	known |= boot_cpu_has(X86_FEATURE_TCE) ? EFER_TCE : 0;
#endif
	known |= boot_cpu_has(X86_FEATURE_AUTOIBRS) ? EFER_AUTOIBRS : 0;
	return known;
}

static bool efer_write(struct kvm_vcpu *vcpu, struct sev_es_save_area *v, u64 value)
{
	u64 old = v->efer;

	if ((value & ~efer_known()) || (((value ^ old) & EFER_LME) && (v->cr0 & X86_CR0_PG)))
		return false;
	/* SVME is the hypervisor's: VMRUN would fail without it. */
	v->efer = (value & ~(u64)(EFER_LMA | EFER_SVME)) | (old & (EFER_LMA | EFER_SVME));
	softsev_trap(vcpu, SVM_EXIT_EFER_WRITE_TRAP, TRAP_EFER_WRITE, old, v->efer);
	return true;
}

/* WRMSR: 0, or -EINVAL for #GP, or SOFTSEV_PASS for an MSR that is not ours */
static int msr_write(struct kvm_vcpu *vcpu, struct sev_es_save_area *v, u32 msr, u64 value)
{
	switch (v ? msr : 0) {
	case MSR_AMD64_SEV_ES_GHCB:
		to_svm(vcpu)->vmcb->control.ghcb_gpa = value;
		return 0;
	case MSR_IA32_CR_PAT:
		if (!kvm_pat_valid(value))
			return -EINVAL;
		v->g_pat = value;
		return 0;
	case MSR_EFER:
		return efer_write(vcpu, v, value) ? 0 : -EINVAL;
	}
	return SOFTSEV_PASS;
}

static int msr_read(struct kvm_vcpu *vcpu, struct sev_es_save_area *v, u32 msr, u64 *value)
{
	if (msr == MSR_AMD64_SEV)
		*value = MSR_AMD64_SEV_ENABLED | (v ? MSR_AMD64_SEV_ES_ENABLED | v->sev_features << 2 : 0);
	else if (v && msr == MSR_AMD64_SEV_ES_GHCB)
		*value = to_svm(vcpu)->vmcb->control.ghcb_gpa;
	else if (v && msr == MSR_IA32_CR_PAT)
		*value = v->g_pat;
	else
		return SOFTSEV_PASS;
	return 0;
}

/**
 * softsev_msr() - RDMSR and WRMSR
 * @vcpu: who executes it
 *
 * Return: as softsev_handle_exit().
 */
int softsev_msr(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	struct sev_es_save_area *v = softsev_is_es(svm) ? softsev_vmsa(svm) : NULL;
	unsigned long *regs = vcpu->arch.regs;
	u32 msr = v ? v->rcx : regs[VCPU_REGS_RCX];
	u64 value;
	int ret;

	if (svm->vmcb->control.exit_info_1) {
		value = v ? v->rdx << 32 | (u32)v->rax : 0;
		ret = msr_write(vcpu, v, msr, value);
	} else {
		ret = msr_read(vcpu, v, msr, &value);
		if (!ret && v) {
			v->rax = (u32)value;
			v->rdx = value >> 32;
		} else if (!ret) {
			regs[VCPU_REGS_RAX] = (u32)value;
			regs[VCPU_REGS_RDX] = value >> 32;
		}
	}
	if (ret == -EINVAL)
		kvm_queue_exception_e(vcpu, GP_VECTOR, 0);
	else if (!ret && v)
		v->rip += 2;
	else if (!ret)
		kvm_rip_write(vcpu, kvm_rip_read(vcpu) + 2);
	return ret == SOFTSEV_PASS ? SOFTSEV_PASS : 1;
}
