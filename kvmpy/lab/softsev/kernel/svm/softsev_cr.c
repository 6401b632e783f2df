// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: CR0 and CR4.
 *
 * An emulated CPU ends VMRUN, or goes on in a state that no processor has, where a guest writes a value that must be
 * refused. So the writes are intercepted: SEV-ES and SNP guests get what a processor would do with them, a SEV guest's go
 * to KVM as with decode assists, for KVM cannot read its instructions. The same for what a SEV guest reads.
 */
#include <linux/bitops.h>
#include <linux/kvm_host.h>
#include <asm/processor.h>
#if __has_include(<asm/cpuid/api.h>)
#include <asm/cpuid/api.h>
#endif
#include "x86.h"
#include "softsev.h"

#define INSN_MAX	15
#define PREFIX_OPERAND	0x66
#define CR_REX_B	BIT(0)
#define CR_REX_R	BIT(2)

/* The offsets of the general registers in a VMSA, in the order of their numbers. */
static const u16 vmsa_gpr[] = {
#define GPR(name) offsetof(struct sev_es_save_area, name)
	GPR(rax), GPR(rcx), GPR(rdx), GPR(rbx), GPR(rsp), GPR(rbp), GPR(rsi), GPR(rdi),
	GPR(r8), GPR(r9), GPR(r10), GPR(r11), GPR(r12), GPR(r13), GPR(r14), GPR(r15),
#undef GPR
};

#define MOV_FROM_CR	0x20
#define MOV_TO_CR	0x22

/* @opcode of control register @cr in the @len bytes at @insn: its length, or 0; @reg is the general register. */
static int cr_decode(const u8 *insn, int len, u8 opcode, int cr, int *reg)
{
	int at = 0, rex = 0;
	u8 modrm;

	while (at < len && insn[at] == PREFIX_OPERAND)
		at++;
	if (at < len && (insn[at] & 0xf0) == 0x40)
		rex = insn[at++];
	if (at + 3 > len || insn[at] != 0x0f || insn[at + 1] != opcode)
		return 0;
	modrm = insn[at + 2];
	if (((modrm >> 3 & 7) | (rex & CR_REX_R ? 8 : 0)) != cr)
		return 0;
	*reg = (modrm & 7) | (rex & CR_REX_B ? 8 : 0);
	return at + 3;
}

/* cr_decode() of what the guest is about to execute; -EFAULT where the guest cannot fetch it */
static int cr_fetch(struct kvm_vcpu *vcpu, u8 opcode, int cr, int *reg)
{
	u8 insn[INSN_MAX];
	int len = softsev_guest_fetch(vcpu, insn, sizeof(insn));

	return len == -EFAULT ? len : cr_decode(insn, max(len, 0), opcode, cr, reg);
}

/* The bits of CR4 that this processor knows (APM volume 2, 3.1.3), whether this kernel uses them or not. */
static u64 cr4_known(void)
{
	u64 known = X86_CR4_VME | X86_CR4_PVI | X86_CR4_TSD | X86_CR4_DE | X86_CR4_PSE | X86_CR4_PAE | X86_CR4_MCE |
		    X86_CR4_PGE | X86_CR4_PCE | X86_CR4_OSFXSR | X86_CR4_OSXMMEXCPT;
	u32 eax, ebx, ecx, edx;

	cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
	known |= ebx & BIT(0) ? X86_CR4_FSGSBASE : 0;
	known |= ebx & BIT(7) ? X86_CR4_SMEP : 0;
	known |= ebx & BIT(20) ? X86_CR4_SMAP : 0;
	known |= ecx & BIT(2) ? X86_CR4_UMIP : 0;
	known |= ecx & BIT(3) ? X86_CR4_PKE : 0;
	known |= ecx & BIT(7) ? X86_CR4_CET : 0;
	known |= ecx & BIT(16) ? X86_CR4_LA57 : 0;
	ecx = cpuid_ecx(1);
	known |= ecx & BIT(17) ? X86_CR4_PCIDE : 0;
	known |= ecx & BIT(26) ? X86_CR4_OSXSAVE : 0;
	return known;
}

/* The other bits of the lower half of CR0 stay zero (APM volume 2, 3.1.1). */
#define CR0_KNOWN (X86_CR0_PE | X86_CR0_MP | X86_CR0_EM | X86_CR0_TS | X86_CR0_ET | X86_CR0_NE | X86_CR0_WP | \
		   X86_CR0_AM | X86_CR0_NW | X86_CR0_CD | X86_CR0_PG)

/* What MOV to CR0 and CR4 refuse with #GP (APM volume 3, "MOV CRn"; volume 2, 3.1 and 5.5.1). */
static bool cr0_refused(struct sev_es_save_area *v, u64 value)
{
	bool paging = value & X86_CR0_PG;

	if (value >> 32 || (paging && !(value & X86_CR0_PE)) || ((value & X86_CR0_NW) && !(value & X86_CR0_CD)))
		return true;
	if (paging && !(v->cr0 & X86_CR0_PG) && (v->efer & EFER_LME))
		return !(v->cr4 & X86_CR4_PAE) || (v->cs.attrib & BIT(9));
	if (!paging && (v->cr0 & X86_CR0_PG))
		return (v->cr4 & X86_CR4_PCIDE) || ((v->efer & EFER_LMA) && (v->cs.attrib & BIT(9)));
	return !(value & X86_CR0_WP) && (v->cr4 & X86_CR4_CET);
}

static bool cr4_refused(struct sev_es_save_area *v, u64 value)
{
	u64 changed = v->cr4 ^ value;

	if (value & ~cr4_known())
		return true;
	if ((v->efer & EFER_LMA) && (changed & (X86_CR4_PAE | X86_CR4_LA57)))
		return true;
	if ((changed & value & X86_CR4_PCIDE) && (!(v->efer & EFER_LMA) || (v->cr3 & X86_CR3_PCID_MASK)))
		return true;
	return (value & X86_CR4_CET) && !(v->cr0 & X86_CR0_WP);
}

static int cr_write_es(struct kvm_vcpu *vcpu, int cr, u64 value, int len)
{
	struct sev_es_save_area *v = softsev_vmsa(to_svm(vcpu));
	u64 old;

	if (cr ? cr4_refused(v, value) : cr0_refused(v, value)) {
		kvm_queue_exception_e(vcpu, GP_VECTOR, 0);
		return 1;
	}
	v->rip += len;
	if (cr) {
		old = v->cr4;
		v->cr4 = value;
		softsev_trap(vcpu, SVM_EXIT_CR4_WRITE_TRAP, TRAP_CR4_WRITE, old, value);
	} else {
		old = v->cr0;
		v->cr0 = (value & CR0_KNOWN) | X86_CR0_ET;
		if ((value & X86_CR0_PG) && (v->efer & EFER_LME))
			v->efer |= EFER_LMA;
		else if (!(value & X86_CR0_PG))
			v->efer &= ~EFER_LMA;
		softsev_trap(vcpu, SVM_EXIT_CR0_WRITE_TRAP, TRAP_CR0_WRITE, old, v->cr0);
	}
	/* Translations that the CPU keeps of the guest's own tables. */
	to_svm(vcpu)->vmcb->control.tlb_ctl = TLB_CONTROL_FLUSH_ALL_ASID;
	return 1;
}

/**
 * softsev_cr_write() - MOV to CR0 or CR4
 * @vcpu: who writes
 * @cr: 0 or 4
 *
 * Return: as softsev_handle_exit(); SOFTSEV_PASS for instructions not known here.
 */
int softsev_cr_write(struct kvm_vcpu *vcpu, int cr)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	int reg, size;
	bool wide;
	u64 value;

	size = cr_fetch(vcpu, MOV_TO_CR, cr, &reg);
	if (size <= 0)
		return size ? softsev_guest_fault(vcpu) : SOFTSEV_PASS;
	if (softsev_is_es(svm)) {
		struct sev_es_save_area *v = softsev_vmsa(svm);

		value = *(u64 *)((u8 *)v + vmsa_gpr[reg]);
		wide = (v->efer & EFER_LMA) && (v->cs.attrib & BIT(9));
		return cr_write_es(vcpu, cr, wide ? value : (u32)value, size);
	}
	value = kvm_register_read(vcpu, reg);
	svm->next_rip = kvm_rip_read(vcpu) + size;
	return kvm_complete_insn_gp(vcpu, cr ? kvm_set_cr4(vcpu, value) : kvm_set_cr0(vcpu, value));
}

/**
 * softsev_cr_read() - MOV from CR0 or CR4 of a SEV guest, where KVM shows another value than it lets the CPU have
 * @vcpu: who reads
 * @cr: 0 or 4
 *
 * Return: as softsev_handle_exit().
 */
int softsev_cr_read(struct kvm_vcpu *vcpu, int cr)
{
	int reg, size;

	size = cr_fetch(vcpu, MOV_FROM_CR, cr, &reg);
	if (size <= 0)
		return size ? softsev_guest_fault(vcpu) : SOFTSEV_PASS;
	kvm_register_write(vcpu, reg, cr ? kvm_read_cr4(vcpu) : kvm_read_cr0(vcpu));
	to_svm(vcpu)->next_rip = kvm_rip_read(vcpu) + size;
	return kvm_skip_emulated_instruction(vcpu);
}
