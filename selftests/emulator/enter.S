/* SPDX-License-Identifier: Apache-2.0 */
/* Into a run with every register given, and out of it by an exception. */
#include <kvmpy/frame.h>
#include <kvmpy/layout.h>

#include "pairs.h"

	.text
	/* void pairs_enter(const struct exception_frame *start): returns behind the exception that ends the run. */
	.globl	pairs_enter
	.type	pairs_enter, @function
pairs_enter:
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rsp, pairs_stack(%rip)
	testb	$3, FRAME_CS(%rdi)
	jz	1f
	swapgs
1:	movq	%rdi, %rsp
	restore_registers
	iretq
	.size	pairs_enter, . - pairs_enter

	.balign	16
	.globl	pairs_stubs
	.type	pairs_stubs, @function
pairs_stubs:
	.set	vector, 0
	.rept	32
	.balign	16, 0xcc
	.if	!((ERROR_CODE_VECTORS >> vector) & 1)
	pushq	$0
	.endif
	pushq	$vector
	jmp	taken
	.set	vector, vector + 1
	.endr
	.size	pairs_stubs, . - pairs_stubs

	.type	taken, @function
taken:
	save_registers
	testb	$3, FRAME_CS(%rsp)
	jz	1f
	swapgs
1:	cmpq	$0, pairs_stack(%rip)
	je	2f
	/* Where the host puts RIP when the emulator gave up. */
	.globl	pairs_leave
pairs_leave:
	movq	pairs_stack(%rip), %rsp
	movq	$0, pairs_stack(%rip)
	cld
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbp
	popq	%rbx
	ret
	/* Not of a run: tell the host. */
2:	cld
	movq	%rsp, %rdi
	call	guest_exception_unexpected
	.size	taken, . - taken

	.macro	vectors name, insn, register, load
	.globl	\name
	.type	\name, @function
\name:
	.irp	number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	.if	\load
	\insn	32 * \number(%rdi), %\register\number
	.else
	\insn	%\register\number, 32 * \number(%rdi)
	.endif
	.endr
	ret
	.size	\name, . - \name
	.endm

	vectors	pairs_load_xmm, movdqu, xmm, 1
	vectors	pairs_save_xmm, movdqu, xmm, 0
	vectors	pairs_load_ymm, vmovdqu, ymm, 1
	vectors	pairs_save_ymm, vmovdqu, ymm, 0

	.section .data
	.balign	8
	.globl	pairs_stack
pairs_stack:
	.quad	0

	.section .note.GNU-stack, "", @progbits
