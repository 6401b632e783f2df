/* SPDX-License-Identifier: Apache-2.0 */
/* The 256 interrupt stubs of 32-bit programs, and the way into C and back. */
#include <kvmpy/frame.h>
#include <kvmpy/layout.h>

	.text
	.balign	KVMPY_VECTOR_STRIDE
	.globl	guest_vectors
	.type	guest_vectors, @function
guest_vectors:
	.set	vector, 0
	.rept	256
	.balign	KVMPY_VECTOR_STRIDE, 0xcc
	.if	vector >= 32 || !((ERROR_CODE_VECTORS >> (vector & 31)) & 1)
	pushl	$0
	.endif
	pushl	$vector
	jmp	entry_common
	.set	vector, vector + 1
	.endr
	.size	guest_vectors, . - guest_vectors

	.type	entry_common, @function
entry_common:
	pushal
	cld
	pushl	%esp
	call	guest_exception
	addl	$4, %esp
	popal
	/* The vector and the error code. */
	addl	$8, %esp
	iretl
	.size	entry_common, . - entry_common

	.section .note.GNU-stack, "", @progbits
