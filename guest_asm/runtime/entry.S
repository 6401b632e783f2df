/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where every vCPU starts: in 64-bit mode, with descriptor tables, GS base and
 * stack set up by the host, and its struct guest_cpu in RDI.
 */
#include <kvmpy/layout.h>

	.text
	.globl	_start
	.type	_start, @function
_start:
	/* The chain of frame pointers ends here. */
	xorl	%ebp, %ebp
	movq	%rdi, %rbx
	movq	KVMPY_CPU_ARGS + 0(%rbx), %rdi
	movq	KVMPY_CPU_ARGS + 8(%rbx), %rsi
	movq	KVMPY_CPU_ARGS + 16(%rbx), %rdx
	movq	KVMPY_CPU_ARGS + 24(%rbx), %rcx
	movq	KVMPY_CPU_ARGS + 32(%rbx), %r8
	movq	KVMPY_CPU_ARGS + 40(%rbx), %r9
	call	*KVMPY_CPU_ENTRY(%rbx)

	/* A host that runs a vCPU again after its end is told so again. */
1:	movq	%gs:KVMPY_CPU_UCALL_SLOT, %rdx
	movl	$KVMPY_UCALL_CMD_DONE, KVMPY_UCALL_CMD(%rdx)
	movl	KVMPY_UCALL_ID(%rdx), %eax
	outl	%eax, $KVMPY_UCALL_PORT
	jmp	1b
	.size	_start, . - _start

	.section .note.GNU-stack, "", @progbits
