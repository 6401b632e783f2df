/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exceptions and interrupts: a handler per vector for all vCPUs, and fix-ups
 * for instructions that a test expects to fault.  What nobody expects ends the
 * test with KVMPY_UCALL_CMD_EXCEPTION.
 */
#ifndef KVMPY_EXCEPTION_H
#define KVMPY_EXCEPTION_H

#include <kvmpy/cpu.h>

#define DE_VECTOR	0
#define DB_VECTOR	1
#define NMI_VECTOR	2
#define BP_VECTOR	3
#define OF_VECTOR	4
#define BR_VECTOR	5
#define UD_VECTOR	6
#define NM_VECTOR	7
#define DF_VECTOR	8
#define TS_VECTOR	10
#define NP_VECTOR	11
#define SS_VECTOR	12
#define GP_VECTOR	13
#define PF_VECTOR	14
#define MF_VECTOR	16
#define AC_VECTOR	17
#define MC_VECTOR	18
#define XM_VECTOR	19
#define VE_VECTOR	20
#define CP_VECTOR	21
#define HV_VECTOR	28
#define VC_VECTOR	29
#define SX_VECTOR	30

/* fault.vector of an instruction that did not fault. */
#define NO_VECTOR	0xff

/* What the vector stubs leave on the stack. A handler may change it. */
#ifdef __i386__
/* The CPU pushes rsp and ss at an exception of ring 3 only. */
struct exception_frame {
	u32 rdi, rsi, rbp, pusha_rsp, rbx, rdx, rcx, rax;
	u32 vector;
	u32 error_code;
	u32 rip, cs, rflags, rsp, ss;
};
#else
struct exception_frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8;
	u64 rdi, rsi, rbp, rbx, rdx, rcx, rax;
	u64 vector;
	u64 error_code;
	u64 rip, cs, rflags, rsp, ss;
};
#endif

typedef void (*guest_handler)(struct exception_frame *frame);

/*
 * Run @handler at each @vector, or give the vector back with NULL. Returning
 * from a fault's handler runs the instruction again unless it moves frame->rip.
 */
void guest_exception_install(u8 vector, guest_handler handler);

/* End the test as for a vector without a handler. */
__noreturn void guest_exception_unexpected(struct exception_frame *frame);

static __always_inline bool exception_from_user(const struct exception_frame *frame)
{
	return frame->cs & 3;
}

static __always_inline void __guest_try_begin(void)
{
	asm volatile("movw %0, %%gs:%c1"
		     : : "i"(NO_VECTOR), "i"(KVMPY_CPU_FAULT + offsetof(struct guest_fault, vector))
		     : "memory");
}

static __always_inline struct guest_fault __guest_try_end(void)
{
	barrier();
	return guest_cpu()->fault;
}

#define __GUEST_TRY_OPERANDS(...)	__VA_OPT__(__VA_ARGS__)

/*
 * Run @insn, and tell whether and how it faulted:
 *
 *	struct guest_fault fault = GUEST_TRY("rdmsr", : "=a"(low), "=d"(high) : "c"(msr));
 *
 * The operands are those of an asm statement; outputs mean nothing after a
 * fault. A fault ends @insn at once, also when it is several instructions.
 * Exceptions only: interrupts and NMIs that arrive meanwhile are not taken.
 */
#define GUEST_TRY(insn, ...)							\
({										\
	__guest_try_begin();							\
	asm volatile("771: " insn "\n772:\n"					\
		     ".pushsection .guest_fixup, \"a\", @progbits\n"		\
		     ".long 771b, 772b\n"					\
		     ".popsection\n"						\
		     __GUEST_TRY_OPERANDS(__VA_ARGS__));			\
	__guest_try_end();							\
})

#endif /* KVMPY_EXCEPTION_H */
