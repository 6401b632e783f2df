/* SPDX-License-Identifier: Apache-2.0 */
/* Calls in ring 0 that an exception may end, and calls with every general register given. */
#include <kvmpy/agent.h>
#include <kvmpy/layout.h>

#include "saved.h"

	.text
	/* u64 guest_call_enter(function, arg): also returns when guest_call_resume() is jumped to. */
	.globl	guest_call_enter
	.type	guest_call_enter, @function
guest_call_enter:
	push_saved
	pushfq
	pushq	%gs:KVMPY_CPU_CALL_RSP
	movq	%rsp, %gs:KVMPY_CPU_CALL_RSP
	movq	%rdi, %rax
	movq	%rsi, %rdi
	subq	$8, %rsp
	call	*%rax
	.globl	guest_call_resume
guest_call_resume:
	movq	%gs:KVMPY_CPU_CALL_RSP, %rsp
	popq	%gs:KVMPY_CPU_CALL_RSP
	popfq
	pop_saved
	ret
	.size	guest_call_enter, . - guest_call_enter

	/*
	 * u64 NAME(struct guest_agent_call *call): loads the registers, calls the
	 * code, and stores the registers and flags that it leaves.
	 */
	.macro	agent_call name
	.globl	\name
	.type	\name, @function
\name:
	push_saved
	pushq	%rdi
	pushq	GUEST_AGENT_CODE(%rdi)
	.set	place, 0
	.irp	reg, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
	.ifnc	\reg, rdi
	movq	place(%rdi), %\reg
	.endif
	.set	place, place + 8
	.endr
	movq	GUEST_AGENT_RDI(%rdi), %rdi
	call	*(%rsp)
	pushfq
	pushq	%rdi
	movq	24(%rsp), %rdi
	.set	place, 0
	.irp	reg, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
	.ifnc	\reg, rdi
	movq	%\reg, place(%rdi)
	.endif
	.set	place, place + 8
	.endr
	popq	GUEST_AGENT_RDI(%rdi)
	popq	GUEST_AGENT_FLAGS(%rdi)
	addq	$16, %rsp
	pop_saved
	cld
	ret
	.size	\name, . - \name
	.endm

	agent_call guest_agent_call_kernel

	.section .user.text, "ax", @progbits
	agent_call guest_agent_call_user

	.section .note.GNU-stack, "", @progbits
