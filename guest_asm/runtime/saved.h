/* SPDX-License-Identifier: Apache-2.0 */
/* The registers that a function of the System V ABI keeps for its caller. */
	.macro	push_saved
	.irp	reg, rbx, rbp, r12, r13, r14, r15
	pushq	%\reg
	.endr
	.endm

	.macro	pop_saved
	.irp	reg, r15, r14, r13, r12, rbp, rbx
	popq	%\reg
	.endr
	.endm
