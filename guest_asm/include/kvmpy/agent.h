/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that does as the host orders: it runs a few instructions with the
 * registers that the host gives, in ring 0 or 3, and shows what they left.
 * kvmpy/guest/agent.py is the host's side.
 */
#ifndef KVMPY_AGENT_H
#define KVMPY_AGENT_H

#define GUEST_AGENT_CPUS	64
#define GUEST_AGENT_MAX_CODE	56

/* Offsets in struct guest_agent_call. */
#define GUEST_AGENT_RDI		48
#define GUEST_AGENT_FLAGS	120
#define GUEST_AGENT_CODE	128

#ifndef __ASSEMBLER__
#include <kvmpy/user.h>

struct guest_agent_registers {
	u64 rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15;
	u64 rflags;
};

struct guest_agent_call {
	struct guest_agent_registers registers;
	u64 code;
};

_Static_assert(offsetof(struct guest_agent_call, registers.rdi) == GUEST_AGENT_RDI, "rdi");
_Static_assert(offsetof(struct guest_agent_call, registers.rflags) == GUEST_AGENT_FLAGS, "flags");
_Static_assert(offsetof(struct guest_agent_call, code) == GUEST_AGENT_CODE, "code");

/* Written by the host. */
struct guest_agent_order {
	struct guest_agent_registers registers;	/* rflags is not loaded */
	u64 ring;
	u64 where;		/* call this address; else copy @code to @room and call that */
	u64 room;
	u64 size;
	u8 code[GUEST_AGENT_MAX_CODE];
} __aligned(256);		/* none crosses a page */

/* What came of it.  After a fault the registers mean nothing. */
struct guest_agent_reply {
	struct guest_agent_registers registers;
	u64 faulted, vector, error_code, rip, cr2;
} __aligned(256);

extern struct guest_agent_order guest_agent_orders[GUEST_AGENT_CPUS];
extern struct guest_agent_reply guest_agent_replies[GUEST_AGENT_CPUS];

/* Carry out this vCPU's order. */
void guest_agent_do(void);

/* SYNC, carry out the order, and again, for ever. */
__noreturn void guest_agent(void);

#endif /* __ASSEMBLER__ */
#endif /* KVMPY_AGENT_H */
