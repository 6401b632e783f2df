/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KVMPY_FRAME_H
#define KVMPY_FRAME_H

/* For assembly: struct exception_frame (exception.h) on the stack, below what the CPU pushed and the vector. */
#ifdef __ASSEMBLER__

#define FRAME_CS		(18 * 8)
/* A bit for each vector that comes with an error code: 8, 10 to 14, 17, 21, 29 and 30. */
#define ERROR_CODE_VECTORS	0x60227d00

	.macro	save_registers
	pushq	%rax
	pushq	%rcx
	pushq	%rdx
	pushq	%rbx
	pushq	%rbp
	pushq	%rsi
	pushq	%rdi
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	.endm

	.macro	restore_registers
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%r11
	popq	%r10
	popq	%r9
	popq	%r8
	popq	%rdi
	popq	%rsi
	popq	%rbp
	popq	%rbx
	popq	%rdx
	popq	%rcx
	popq	%rax
	/* The vector and the error code. */
	addq	$16, %rsp
	.endm

#endif

#endif
