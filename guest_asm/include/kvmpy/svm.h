/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that runs a guest of its own, on AMD's SVM.  The host makes the pages
 * that this takes (kvmpy.L2); guest_l2() finds them.
 *
 *	static void l2_main(void)
 *	{
 *		GUEST_SYNC(rdmsr(MSR));
 *	}
 *
 *	void guest_main(void)
 *	{
 *		struct guest_l2 *l2 = guest_l2();
 *
 *		l2_reset(l2, l2_main);
 *		GUEST_ASSERT_EQ(l2_run(l2), SVM_EXIT_VMMCALL);
 *		GUEST_DONE();
 *	}
 *
 * L2 has L1's address space, descriptor tables and per-CPU area, so ucalls,
 * assertions, printf and GUEST_TRY() work in it as in L1.
 */
#ifndef KVMPY_SVM_H
#define KVMPY_SVM_H

/* Offsets in struct guest_l2. */
#define GUEST_L2_VMCB_PA	8
#define GUEST_L2_HOST_PA	16
#define GUEST_L2_REGS		72
#define GUEST_L2_RDI		112

#ifndef __ASSEMBLER__
#include <kvmpy/processor.h>
#include <kvmpy/user.h>
#include <kvmpy/vmcb.h>

#define MSR_VM_CR		0xc0010114
#define MSR_VM_HSAVE_PA		0xc0010117

/* RAX and RSP are in the VMCB. */
struct guest_l2_regs {
	u64 rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15;
};

/* What of struct guest_cpu goes on in each of the two guests by itself. */
struct guest_l2_context {
	struct guest_ucall_slot *ucall_slot;
	struct guest_fault fault;
	u64 user_rsp, user_exit, call_rsp, call_exit;
};

/* Written by the host; addresses ending in _pa are as the processor takes them, with an encryption bit. */
struct guest_l2 {
	struct vmcb *vmcb;
	u64 vmcb_pa;
	u64 host_pa;		/* for L1's own VMSAVE */
	u64 hsave_pa;
	u8 *msrpm, *iopm;
	u64 msrpm_pa, iopm_pa;
	u64 nested_cr3;		/* root of nested page tables, 0 without */
	struct guest_l2_regs regs;	/* L2's: loaded by l2_run(), and what the exit left */
	void *stack_top;
	u64 (*function)(u64 arg);	/* what l2_try() calls */
	u64 arg;
	struct guest_user_exit tried;	/* how that ended */
	struct guest_l2_context context;	/* L2's while L1 runs, and L1's while L2 does */
};

_Static_assert(offsetof(struct guest_l2, vmcb_pa) == GUEST_L2_VMCB_PA, "vmcb_pa");
_Static_assert(offsetof(struct guest_l2, host_pa) == GUEST_L2_HOST_PA, "host_pa");
_Static_assert(offsetof(struct guest_l2, regs) == GUEST_L2_REGS, "regs");
_Static_assert(offsetof(struct guest_l2, regs.rdi) == GUEST_L2_RDI, "rdi");

static __always_inline struct guest_l2 *guest_l2(void)
{
	return guest_cpu()->l2;
}

static __always_inline void clgi(void)
{
	asm volatile("clgi" : : : "memory");
}

static __always_inline void stgi(void)
{
	asm volatile("stgi" : : : "memory");
}

static __always_inline void vmload(u64 pa)
{
	asm volatile("vmload %0" : : "a"(pa) : "memory");
}

static __always_inline void vmsave(u64 pa)
{
	asm volatile("vmsave %0" : : "a"(pa) : "memory");
}

static __always_inline void vmmcall(void)
{
	asm volatile("vmmcall" : : : "memory");
}

static __always_inline void vmcb_intercept(struct vmcb *vmcb, u32 exit, bool on)
{
	u8 *byte = (u8 *)vmcb + exit / 8;

	*byte = (*byte & ~BIT(exit % 8)) | (u64)on << exit % 8;
}

/* Let the next VMRUN deliver an event; @type is SVM_EVENT_*. */
static __always_inline void vmcb_inject(struct vmcb *vmcb, u32 type, u8 vector)
{
	vmcb->event_inj = BIT(31) | type << 8 | vector;
	vmcb->event_inj_err = 0;
}

static __always_inline void vmcb_inject_error_code(struct vmcb *vmcb, u8 vector, u32 error_code)
{
	vmcb->event_inj = BIT(31) | BIT(11) | SVM_EVENT_EXCEPTION << 8 | vector;
	vmcb->event_inj_err = error_code;
}

/*
 * Switch SVM on and let L2 begin in @entry, in L1's state, with registers of 0,
 * interrupts off and its own stack. When @entry returns, L2 executes VMMCALL.
 * L1 intercepts VMRUN, which it must, VMMCALL and shutdown.
 */
void l2_reset(struct guest_l2 *l2, void (*entry)(void));

/*
 * Run L2 to its next exit, and return the exit's code. With SVM_EXIT_IOIO
 * intercepted L1 makes L2's ucalls in its place.
 */
u64 l2_run(struct guest_l2 *l2);

/* What L2 may be at: calls l2->function, tells l2->tried how that ended, and executes VMMCALL. */
void l2_try(void);

/* Read or write intercepts of an MSR that the map has, and the intercept of MSRs as such. */
void l2_intercept_msr(struct guest_l2 *l2, u32 msr, bool read, bool write);

/* The same for a port. */
void l2_intercept_port(struct guest_l2 *l2, u16 port, bool on);

#endif /* __ASSEMBLER__ */
#endif /* KVMPY_SVM_H */
