/* SPDX-License-Identifier: Apache-2.0 */
/* The 256 interrupt stubs, and the way into C and back. */
#include <kvmpy/frame.h>
#include <kvmpy/layout.h>

#define MSR_GS_BASE		0xc0000101

	.text
	.balign	KVMPY_VECTOR_STRIDE
	.globl	guest_vectors
	.type	guest_vectors, @function
guest_vectors:
	.set	vector, 0
	.rept	256
	.balign	KVMPY_VECTOR_STRIDE, 0xcc
	.if	vector >= 32 || !((ERROR_CODE_VECTORS >> (vector & 31)) & 1)
	pushq	$0
	.endif
	pushq	$vector
	/* What may arrive between an entry from ring 3 and its swapgs. */
	.if	vector == 1 || vector == 8 || vector == 18
	jmp	entry_paranoid
	.elseif	vector == 2
	jmp	entry_nmi
	.elseif	vector == 29
	jmp	entry_vc
	.else
	jmp	entry_common
	.endif
	.set	vector, vector + 1
	.endr
	.size	guest_vectors, . - guest_vectors

	.macro	entry name, handler
	.type	\name, @function
\name:
	save_registers
	testb	$3, FRAME_CS(%rsp)
	jz	1f
	swapgs
1:	cld
	movq	%rsp, %rdi
	call	\handler
	testb	$3, FRAME_CS(%rsp)
	jz	2f
	swapgs
2:	restore_registers
	iretq
	.size	\name, . - \name
	.endm

	entry	entry_common, guest_exception
	entry	entry_vc, guest_vc

	.macro	paranoid_entry name, handler
	.type	\name, @function
\name:
	save_registers
	/* Is GS the per-CPU area already? */
	movl	$MSR_GS_BASE, %ecx
	rdmsr
	xorl	%ebx, %ebx
	testl	%edx, %edx
	jnz	1f
	subl	$KVMPY_PERCPU_BASE, %eax
	cmpl	$KVMPY_MAX_VCPUS * KVMPY_PERCPU_SIZE, %eax
	jb	2f
1:	swapgs
	incl	%ebx
2:	cld
	movq	%rsp, %rdi
	call	\handler
	testl	%ebx, %ebx
	jz	3f
	swapgs
3:	restore_registers
	iretq
	.size	\name, . - \name
	.endm

	paranoid_entry	entry_paranoid, guest_exception
	paranoid_entry	entry_nmi, guest_nmi

	.section .note.GNU-stack, "", @progbits
