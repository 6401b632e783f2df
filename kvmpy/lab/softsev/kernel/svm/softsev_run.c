// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: VMRUN. The state of an SEV-ES guest comes from its VMSA and goes back to it, FPU included, and what
 * KVM has of the guest's registers (what the GHCB told it) stays as it was.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/gfp.h>
#include <linux/kvm_host.h>
#include <linux/slab.h>
#include "x86.h"
#include "softsev.h"

/**
 * softsev_pre_run() - make what the software keeps of a vCPU of a SEV guest, before it first runs
 * @vcpu: the vCPU
 *
 * Context: may sleep: VMRUN itself has interrupts off, and could not.
 * Return: 0, or -ENOMEM.
 */
int softsev_pre_run(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	struct softsev_vcpu *sv;
	unsigned int nth;

	if (svm->softsev || !softsev_enabled() || !softsev_is_sev(svm))
		return 0;
	nth = softsev_own_memory_begin();
	sv = kzalloc(sizeof(*sv), GFP_KERNEL_ACCOUNT);
	if (sv && !softsev_tlb_init(sv)) {
		kfree(sv);
		sv = NULL;
	}
	softsev_own_memory_end(nth);
	if (!sv)
		return -ENOMEM;
	svm->softsev = sv;
	return 0;
}

void softsev_free_vcpu(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);

	if (!svm->softsev)
		return;
	softsev_tlb_free(svm->softsev);
	kfree(svm->softsev);
	svm->softsev = NULL;
}

static void softsev_entry_fails(struct vmcb_control_area *c)
{
	c->exit_code = SVM_EXIT_ERR;
	c->exit_info_1 = 0;
	c->exit_info_2 = 0;
	c->exit_int_info = 0;
}

static bool softsev_has_xsave(void)
{
	return boot_cpu_has(X86_FEATURE_OSXSAVE);
}

static u64 softsev_xgetbv(void)
{
	u32 lo, hi;

	asm volatile("xgetbv" : "=a" (lo), "=d" (hi) : "c" (0));
	return lo | (u64)hi << 32;
}

static void softsev_xsetbv(u64 value)
{
	asm volatile("xsetbv" : : "a" ((u32)value), "d" ((u32)(value >> 32)), "c" (0));
}

/* The x87 registers of a VMSA: eight times the low 8 bytes, then eight times the two high ones. */
static void softsev_fpu_load(struct softsev_fpu *f, struct sev_es_save_area *v)
{
	int i;

	memset(f, 0, sizeof(*f));
	*(u16 *)&f->legacy[0] = v->x87_fcw;
	*(u16 *)&f->legacy[2] = v->x87_fsw;
	f->legacy[4] = v->x87_ftw;
	*(u16 *)&f->legacy[6] = v->x87_fop;
	*(u64 *)&f->legacy[8] = v->x87_rip;
	*(u64 *)&f->legacy[16] = v->x87_dp;
	*(u32 *)&f->legacy[24] = v->mxcsr & 0xffff;
	for (i = 0; i < 8; i++) {
		memcpy(&f->legacy[32 + 16 * i], v->fpreg_x87 + 8 * i, 8);
		memcpy(&f->legacy[40 + 16 * i], v->fpreg_x87 + 64 + 2 * i, 2);
	}
	memcpy(&f->legacy[160], v->fpreg_xmm, 256);
	memcpy(f->ymm, v->fpreg_ymm, 256);
	*(u64 *)f->header = 7;
	if (softsev_has_xsave())
		asm volatile("xrstor64 (%0)" : : "r" (f), "a" (7), "d" (0) : "memory");
	else
		asm volatile("fxrstor64 (%0)" : : "r" (f) : "memory");
}

static void softsev_fpu_store(struct softsev_fpu *f, struct sev_es_save_area *v)
{
	int i;

	if (softsev_has_xsave())
		asm volatile("xsave64 (%0)" : : "r" (f), "a" (7), "d" (0) : "memory");
	else
		asm volatile("fxsave64 (%0)" : : "r" (f) : "memory");
	v->x87_fcw = *(u16 *)&f->legacy[0];
	v->x87_fsw = *(u16 *)&f->legacy[2];
	v->x87_ftw = f->legacy[4];
	v->x87_fop = *(u16 *)&f->legacy[6];
	v->x87_rip = *(u64 *)&f->legacy[8];
	v->x87_dp = *(u64 *)&f->legacy[16];
	v->mxcsr = *(u32 *)&f->legacy[24];
	for (i = 0; i < 8; i++) {
		memcpy(v->fpreg_x87 + 8 * i, &f->legacy[32 + 16 * i], 8);
		memcpy(v->fpreg_x87 + 64 + 2 * i, &f->legacy[40 + 16 * i], 2);
	}
	memcpy(v->fpreg_xmm, &f->legacy[160], 256);
	/* A component in its initial state is not written. */
	if (softsev_has_xsave() && !(f->header[0] & BIT(1)))
		memset(v->fpreg_xmm, 0, 256);
	if (softsev_has_xsave() && (f->header[0] & BIT(2)))
		memcpy(v->fpreg_ymm, f->ymm, 256);
	else
		memset(v->fpreg_ymm, 0, 256);
}

/* VMCB and VMSA share the layout of what VMRUN loads; the general registers follow further up in the VMSA. */
#define SOFTSEV_GPRS(x) \
	x(RBX, rbx) x(RCX, rcx) x(RDX, rdx) x(RBP, rbp) x(RSI, rsi) x(RDI, rdi) x(R8, r8) x(R9, r9) \
	x(R10, r10) x(R11, r11) x(R12, r12) x(R13, r13) x(R14, r14) x(R15, r15)

static void softsev_gprs_load(unsigned long *regs, struct sev_es_save_area *v)
{
#define LOAD(reg, field) regs[VCPU_REGS_##reg] = v->field;
	SOFTSEV_GPRS(LOAD)
#undef LOAD
}

static void softsev_gprs_store(unsigned long *regs, struct sev_es_save_area *v)
{
#define STORE(reg, field) v->field = regs[VCPU_REGS_##reg];
	SOFTSEV_GPRS(STORE)
#undef STORE
}

/* What VMRUN asks of a VMSA page: the firmware made it, or the guest did with RMPADJUST (APM 15.36.12). */
static bool softsev_vmsa_usable(struct vcpu_svm *svm)
{
	u64 pa = svm->vmcb->control.vmsa_pa;
	struct softsev_rmp e;

	if (!pa || !PAGE_ALIGNED(pa) || !pfn_valid(PHYS_PFN(pa)))
		return false;
	if (!softsev_is_snp(&svm->vcpu))
		return *(u64 *)(softsev_mem(pa) + PAGE_SIZE - 8) == SOFTSEV_VMSA_MARK;
	softsev_rmp_read(PHYS_PFN(pa), &e);
	return e.assigned && e.vmsa && e.validated && !e.immutable && e.asid == svm->vmcb->control.asid &&
	       (softsev_vmsa(svm)->sev_features & SVM_SEV_FEAT_SNP_ACTIVE);
}

static void softsev_prepare(struct vcpu_svm *svm, struct softsev_vcpu *sv)
{
	struct vmcb_control_area *c = &svm->vmcb->control;
	u64 generation = softsev_rmp_generation();

	softsev_msr_prepare(svm);

	/* Control registers are the guest's own, but for values that the CPU would not refuse: softsev_cr.c. */
	if (softsev_is_es(svm)) {
		vmcb_clr_intercept(c, INTERCEPT_CR0_READ);
		vmcb_clr_intercept(c, INTERCEPT_CR0_WRITE);
		vmcb_clr_intercept(c, INTERCEPT_CR4_READ);
	}
	vmcb_clr_intercept(c, INTERCEPT_CR8_READ);
	vmcb_clr_intercept(c, INTERCEPT_CR8_WRITE);
	vmcb_set_intercept(c, INTERCEPT_CR4_WRITE);
	vmcb_set_intercept(c, INTERCEPT_SELECTIVE_CR0);
	/* The CPU does not know PVALIDATE and RMPADJUST. */
	if (softsev_is_snp(&svm->vcpu))
		vmcb_set_intercept(c, INTERCEPT_EXCEPTION_OFFSET + UD_VECTOR);

	if (c->tlb_ctl != TLB_CONTROL_DO_NOTHING || sv->kvm_root != c->nested_cr3 || sv->generation != generation) {
		softsev_tlb_flush(sv);
		sv->kvm_root = c->nested_cr3;
		sv->generation = generation;
		c->tlb_ctl = TLB_CONTROL_FLUSH_ALL_ASID;
	}
	c->clean = 0;
}

static void softsev_enter(struct vcpu_svm *svm, struct softsev_vcpu *sv, unsigned int flags)
{
	struct vmcb_control_area *c = &svm->vmcb->control;

	c->nested_cr3 = __pa(sv->root);
	__svm_vcpu_run(svm, flags);
	c->nested_cr3 = sv->kvm_root;
}

/*
 * INT n and INT3 whose delivery met a nested fault: KVM gives them back, for the processor knows where the next instruction
 * is. This one would push the address of the instruction itself, so the guest repeats it instead.
 */
static void softsev_repeat_soft_event(struct vmcb_control_area *c, u32 injected)
{
	u32 event = c->exit_int_info, type = event & SVM_EXITINTINFO_TYPE_MASK;
	u32 same = SVM_EXITINTINFO_VALID | SVM_EXITINTINFO_TYPE_MASK | SVM_EXITINTINFO_VEC_MASK;
	bool soft = type == SVM_EXITINTINFO_TYPE_SOFT ||
		    (type == SVM_EXITINTINFO_TYPE_EXEPT && (event & SVM_EXITINTINFO_VEC_MASK) == BP_VECTOR);

	if ((event & SVM_EXITINTINFO_VALID) && soft && (event & same) != (injected & same))
		c->exit_int_info = 0;
}

/**
 * softsev_vcpu_run() - VMRUN for guests without SEV, and with plain SEV
 * @svm: the vCPU
 * @flags: as for KVM's own
 */
void softsev_vcpu_run(struct vcpu_svm *svm, unsigned int flags)
{
	struct vmcb_control_area *c = &svm->vmcb->control;
	struct softsev_vcpu *sv;

	/* KVM believes that the CPU can flush one ASID. */
	if (softsev_enabled() && c->tlb_ctl != TLB_CONTROL_DO_NOTHING)
		c->tlb_ctl = TLB_CONTROL_FLUSH_ALL_ASID;
	if (!softsev_enabled() || !softsev_is_sev(svm)) {
		__svm_vcpu_run(svm, flags);
		return;
	}
	sv = svm->softsev;
	if (!sv) {
		softsev_entry_fails(c);
		return;
	}
	softsev_prepare(svm, sv);
	softsev_enter(svm, sv, flags);
}

/**
 * softsev_es_vcpu_run() - VMRUN for SEV-ES and SNP guests
 * @svm: the vCPU
 * @flags: as for KVM's own
 */
void softsev_es_vcpu_run(struct vcpu_svm *svm, unsigned int flags)
{
	struct vmcb_control_area *c = &svm->vmcb->control;
	unsigned long *regs = svm->vcpu.arch.regs;
	struct softsev_vcpu *sv = svm->softsev;
	u64 host_xcr0 = softsev_has_xsave() ? softsev_xgetbv() : 1;
	struct sev_es_save_area *v;
	u32 injected;
	u64 xcr0;

	if (!sv || !softsev_vmsa_usable(svm)) {
		softsev_entry_fails(c);
		return;
	}
	v = softsev_vmsa(svm);
	xcr0 = v->xcr0 ?: 1;
	if ((xcr0 & ~host_xcr0) || !(xcr0 & 1) || (xcr0 & 6) == 4) {
		softsev_entry_fails(c);
		return;
	}
	softsev_prepare(svm, sv);

	memcpy(sv->regs, regs, sizeof(sv->regs));
	memcpy(&sv->save, &svm->vmcb->save, sizeof(sv->save));
	memcpy(&svm->vmcb->save, v, sizeof(svm->vmcb->save));
	softsev_gprs_load(regs, v);
	sv->cr0 = v->cr0;
	sv->cr4 = v->cr4;
	sv->efer = v->efer;
	softsev_fpu_load(&sv->fpu, v);
	if (softsev_has_xsave() && xcr0 != host_xcr0)
		softsev_xsetbv(xcr0);

	injected = c->event_inj;
	softsev_enter(svm, sv, flags);
	softsev_repeat_soft_event(c, injected);

	if (softsev_has_xsave()) {
		v->xcr0 = softsev_xgetbv();
		if (v->xcr0 != host_xcr0)
			softsev_xsetbv(host_xcr0);
	}
	softsev_fpu_store(&sv->fpu, v);
	memcpy(v, &svm->vmcb->save, sizeof(svm->vmcb->save));
	softsev_gprs_store(regs, v);
	memcpy(&svm->vmcb->save, &sv->save, sizeof(sv->save));
	memcpy(regs, sv->regs, sizeof(sv->regs));

	/* All that KVM may know of RFLAGS. */
	c->int_state &= ~SVM_GUEST_INTERRUPT_MASK;
	if (v->rflags & X86_EFLAGS_IF)
		c->int_state |= SVM_GUEST_INTERRUPT_MASK;
}
