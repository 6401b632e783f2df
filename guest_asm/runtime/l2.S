/* SPDX-License-Identifier: Apache-2.0 */
/* VMRUN with every general register. */
#include <kvmpy/svm.h>

#include "saved.h"

	.text
	/*
	 * void guest_l2_enter(struct guest_l2 *l2): one VMRUN. What VMRUN leaves
	 * alone (FS, GS, TR, LDTR, the MSRs of system calls) is L2's in between, too.
	 */
	.globl	guest_l2_enter
	.type	guest_l2_enter, @function
guest_l2_enter:
	push_saved
	pushq	%rdi
	clgi
	movq	GUEST_L2_HOST_PA(%rdi), %rax
	vmsave	%rax
	movq	GUEST_L2_VMCB_PA(%rdi), %rax
	vmload	%rax
	.set	place, GUEST_L2_REGS
	.irp	reg, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
	.ifnc	\reg, rdi
	movq	place(%rdi), %\reg
	.endif
	.set	place, place + 8
	.endr
	movq	GUEST_L2_RDI(%rdi), %rdi
	vmrun	%rax
	pushq	%rdi
	movq	8(%rsp), %rdi
	.set	place, GUEST_L2_REGS
	.irp	reg, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
	.ifnc	\reg, rdi
	movq	%\reg, place(%rdi)
	.endif
	.set	place, place + 8
	.endr
	popq	GUEST_L2_RDI(%rdi)
	vmsave	%rax
	movq	GUEST_L2_HOST_PA(%rdi), %rax
	vmload	%rax
	popq	%rdi
	stgi
	pop_saved
	ret
	.size	guest_l2_enter, . - guest_l2_enter

	/* Where L2's first function returns to. */
	.globl	guest_l2_end
	.type	guest_l2_end, @function
guest_l2_end:
	vmmcall
	jmp	guest_l2_end
	.size	guest_l2_end, . - guest_l2_end

	.section .note.GNU-stack, "", @progbits
