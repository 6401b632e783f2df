// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: guest memory by virtual address, and delivery of #VC.
 */
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <asm/trapnr.h>
#include "softsev.h"

#define PT_PRESENT	BIT_ULL(0)
#define PT_WRITE	BIT_ULL(1)
#define PT_LARGE	BIT_ULL(7)
#define PT_ADDR		GENMASK_ULL(51, 12)

#define TSS_RSP0	0x04
#define TSS_IST1	0x24

/**
 * softsev_guest_walk() - a virtual address of the guest as its page tables have it
 * @vcpu: whose tables
 * @gva: the virtual address
 * @write: for a write
 * @raw: becomes the guest-physical address with the encryption bit
 * @pf_error: becomes the error code of the page fault, when it is one
 *
 * Return: 0; -EFAULT for a nested fault (in the vCPU's fault); -ENOENT for a page fault; -EOPNOTSUPP in a paging mode
 * that is not modelled.
 */
int softsev_guest_walk(struct kvm_vcpu *vcpu, u64 gva, bool write, u64 *raw, u32 *pf_error)
{
	struct vmcb_save_area *s = softsev_state(to_svm(vcpu));
	int level = s->cr4 & X86_CR4_LA57 ? 5 : 4, ret;
	u64 table = s->cr3 & PT_ADDR, pte;

	if (!(s->cr0 & X86_CR0_PG)) {
		*raw = (gva & U32_MAX) | softsev_cmask();
		return 0;
	}
	if (!(s->efer & EFER_LMA))
		return -EOPNOTSUPP;
	*pf_error = write ? PFERR_WRITE_MASK : 0;
	for (;; level--) {
		int shift = 3 + 9 * level;

		ret = softsev_guest_copy(vcpu, table + ((gva >> shift) & 511) * 8, PFERR_GUEST_PAGE_MASK, &pte, 8);
		if (ret)
			return ret;
		if (!(pte & PT_PRESENT))
			return -ENOENT;
		if (write && !(pte & PT_WRITE) && (s->cr0 & X86_CR0_WP)) {
			*pf_error |= PFERR_PRESENT_MASK;
			return -ENOENT;
		}
		if (level == 1 || (level <= 3 && (pte & PT_LARGE))) {
			*raw = (pte & PT_ADDR & ~(BIT_ULL(shift) - 1)) | (gva & (BIT_ULL(shift) - 1));
			return 0;
		}
		table = pte & PT_ADDR;
	}
}

static int guest_rw(struct kvm_vcpu *vcpu, u64 gva, void *buf, unsigned int len, u64 access, u32 *pf_error)
{
	while (len) {
		unsigned int n = min_t(unsigned int, len, PAGE_SIZE - offset_in_page(gva));
		u64 raw;
		int ret;

		ret = softsev_guest_walk(vcpu, gva, access & PFERR_WRITE_MASK, &raw, pf_error);
		if (!ret)
			ret = softsev_guest_copy(vcpu, raw, access, buf, n);
		if (ret)
			return ret;
		gva += n;
		buf += n;
		len -= n;
	}
	return 0;
}

int softsev_guest_rw(struct kvm_vcpu *vcpu, u64 gva, void *buf, unsigned int len, bool write, u32 *pf_error)
{
	return guest_rw(vcpu, gva, buf, len, write ? PFERR_WRITE_MASK : 0, pf_error);
}

/**
 * softsev_guest_fetch() - the bytes at the instruction pointer
 * @vcpu: whose instruction
 * @insn: becomes the bytes
 * @len: how many at most
 *
 * Return: how many, fewer where the page ends and the next one cannot be read, or an error.
 */
int softsev_guest_fetch(struct kvm_vcpu *vcpu, u8 *insn, unsigned int len)
{
	struct vmcb_save_area *s = softsev_state(to_svm(vcpu));
	bool flat = s->efer & EFER_LMA && s->cs.attrib & BIT(9);
	u64 rip = s->rip + (flat ? 0 : s->cs.base);
	unsigned int first = min_t(unsigned int, len, PAGE_SIZE - offset_in_page(rip));
	u32 pf_error;
	int ret;

	ret = guest_rw(vcpu, rip, insn, first, PFERR_FETCH_MASK, &pf_error);
	if (ret)
		return ret;
	if (first < len && !guest_rw(vcpu, rip + first, insn + first, len - first, PFERR_FETCH_MASK, &pf_error))
		return len;
	return first;
}

struct idt_gate {
	u16 offset_low, selector;
	u8 ist, type;
	u16 offset_mid;
	u32 offset_high, reserved;
} __packed;

/* Return 0, or -EFAULT with a nested fault, or another error where the processor would shut down. */
static int vc_stack(struct kvm_vcpu *vcpu, struct sev_es_save_area *v, u8 ist, u64 *rsp)
{
	u32 pf_error;

	*rsp = v->rsp;
	if (ist)
		return softsev_guest_rw(vcpu, v->tr.base + TSS_IST1 + (ist - 1) * 8, rsp, 8, false, &pf_error);
	if (v->cpl)
		return softsev_guest_rw(vcpu, v->tr.base + TSS_RSP0, rsp, 8, false, &pf_error);
	return 0;
}

/**
 * softsev_deliver_vc() - #VC, as the processor delivers it in 64-bit mode
 * @vcpu: who gets it
 * @error: its error code
 *
 * Emulators push no error code for vector 29, so the frame is built here.
 *
 * Return: 0, or as softsev_guest_walk().
 */
int softsev_deliver_vc(struct kvm_vcpu *vcpu, u32 error)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	struct sev_es_save_area *v = softsev_vmsa(svm);
	u64 at = v->idtr.base + X86_TRAP_VC * sizeof(struct idt_gate), frame[6], rsp;
	struct idt_gate gate;
	u32 pf_error;
	int ret;

	if (!(v->efer & EFER_LMA) || v->idtr.limit < (X86_TRAP_VC + 1) * sizeof(gate) - 1)
		return -EOPNOTSUPP;
	ret = softsev_guest_rw(vcpu, at, &gate, sizeof(gate), false, &pf_error);
	if (ret)
		return ret;
	if (!(gate.type & BIT(7)) || ((gate.type & 0xf) != 0xe && (gate.type & 0xf) != 0xf))
		return -ENOENT;
	ret = vc_stack(vcpu, v, gate.ist & 7, &rsp);
	if (ret)
		return ret;

	rsp = (rsp & ~0xfULL) - sizeof(frame);
	frame[0] = error;
	frame[1] = v->rip;
	frame[2] = v->cs.selector;
	frame[3] = v->rflags;
	frame[4] = v->rsp;
	frame[5] = v->ss.selector;
	ret = softsev_guest_rw(vcpu, rsp, frame, sizeof(frame), true, &pf_error);
	if (ret)
		return ret;

	v->rsp = rsp;
	v->rip = gate.offset_low | (u64)gate.offset_mid << 16 | (u64)gate.offset_high << 32;
	v->cs.selector = gate.selector & ~3;
	v->cs.attrib = 0xa9b;
	v->cs.base = 0;
	v->cs.limit = U32_MAX;
	if (v->cpl) {
		v->ss.selector = 0;
		v->ss.attrib = 0xc93;
		v->cpl = 0;
	}
	v->rflags &= ~(X86_EFLAGS_TF | X86_EFLAGS_NT | X86_EFLAGS_RF);
	if ((gate.type & 0xf) == 0xe) {
		v->rflags &= ~X86_EFLAGS_IF;
		svm->vmcb->control.int_state &= ~SVM_GUEST_INTERRUPT_MASK;
	}
	svm->vmcb->control.int_state &= ~SVM_INTERRUPT_SHADOW_MASK;
	return 0;
}
