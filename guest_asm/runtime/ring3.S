/* SPDX-License-Identifier: Apache-2.0 */
/* The ways to ring 3 and back. */
#include <kvmpy/layout.h>

#include "saved.h"

#define RFLAGS_IN_USER		0x202

	.text
	/*
	 * void guest_user_enter(function, arg, stack): returns when
	 * guest_user_resume() is called, on the stack that it left.
	 */
	.globl	guest_user_enter
	.type	guest_user_enter, @function
guest_user_enter:
	push_saved
	pushfq
	/* An exception handler of an outer run may be what starts this one. */
	pushq	%gs:KVMPY_CPU_USER_RSP
	pushq	%gs:KVMPY_TSS_RSP0
	cli
	movq	%rsp, %gs:KVMPY_CPU_USER_RSP
	movq	%rsp, %gs:KVMPY_TSS_RSP0

	pushq	$KVMPY_USER_DS
	pushq	%rdx
	pushq	$RFLAGS_IN_USER
	pushq	$KVMPY_USER_CS
	pushq	%rdi
	movq	%rsi, %rdi
	xorl	%ebp, %ebp
	swapgs
	iretq
	.size	guest_user_enter, . - guest_user_enter

	.globl	guest_user_resume
	.type	guest_user_resume, @function
guest_user_resume:
	movq	%gs:KVMPY_CPU_USER_RSP, %rsp
	popq	%gs:KVMPY_TSS_RSP0
	popq	%gs:KVMPY_CPU_USER_RSP
	popfq
	pop_saved
	ret
	.size	guest_user_resume, . - guest_user_resume

	/* Where functions in ring 3 return to: the exception at this address is the way back. */
	.section .user.text, "ax", @progbits
	.globl	guest_user_return
	.type	guest_user_return, @function
guest_user_return:
	ud2
	.size	guest_user_return, . - guest_user_return

	.section .note.GNU-stack, "", @progbits
