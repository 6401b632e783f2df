/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where every vCPU of a 32-bit program starts: in flat protected mode, with
 * descriptor tables, GS and stack set up by the host, and its struct guest_cpu
 * in EDI.  Arguments go on the stack, each as wide as in 64-bit programs.
 */
#include <kvmpy/layout.h>

	.text
	.globl	_start
	.type	_start, @function
_start:
	/* The chain of frame pointers ends here. */
	xorl	%ebp, %ebp
	movl	%edi, %ebx
	.set	place, KVMPY_CPU_NR_ARGS * 8
	.rept	KVMPY_CPU_NR_ARGS * 2
	.set	place, place - 4
	pushl	KVMPY_CPU_ARGS + place(%ebx)
	.endr
	call	*KVMPY_CPU_ENTRY(%ebx)

	/* A host that runs a vCPU again after its end is told so again. */
1:	movl	%gs:KVMPY_CPU_UCALL_SLOT, %edx
	movl	$KVMPY_UCALL_CMD_DONE, KVMPY_UCALL_CMD(%edx)
	movl	KVMPY_UCALL_ID(%edx), %eax
	outl	%eax, $KVMPY_UCALL_PORT
	jmp	1b
	.size	_start, . - _start

	.section .note.GNU-stack, "", @progbits
