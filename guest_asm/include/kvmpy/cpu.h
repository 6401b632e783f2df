/* SPDX-License-Identifier: Apache-2.0 */
/* The per-CPU area behind GS. */
#ifndef KVMPY_CPU_H
#define KVMPY_CPU_H

#include <kvmpy/layout.h>
#include <kvmpy/types.h>

/* How one instruction ended; see GUEST_TRY(). Without a fault, only the last two mean anything. */
struct guest_fault {
	u64 error_code;
	u64 rip;
	u64 cr2;
	u8 vector;		/* NO_VECTOR without a fault */
	bool faulted;
};

_Static_assert(offsetof(struct guest_fault, faulted) == offsetof(struct guest_fault, vector) + 1,
	       "GUEST_TRY() resets both with one store");

struct guest_l2;
struct guest_ucall_slot;

/* Written by the host before the first run. */
struct guest_cpu {
	GUEST_POINTER(struct guest_cpu, self);
	u32 index;
	u32 apic_id;
	GUEST_POINTER(struct guest_ucall_slot, ucall_slot);	/* the current one */
	u64 stack_top;
	u64 entry;
	u64 args[KVMPY_CPU_NR_ARGS];
	struct guest_fault fault;
	u64 user_rsp;		/* where guest_user_run() left its stack, or 0 */
	u64 user_exit;		/* its struct guest_user_exit */
	u32 x2apic;
	u32 reserved;
	GUEST_POINTER(void, ghcb);	/* this vCPU's GHCB, or NULL where there are none */
	u64 ghcb_gpa;
	u32 sev;		/* KVMPY_SEV_* */
	u32 ghcb_depth;		/* uses of the GHCB and its MSR that go on */
	u64 encryption_mask;	/* of page-table entries, 0 without an encryption bit */
	u64 ghcb_msr;		/* what the GHCB MSR holds, as far as this vCPU knows */
	u64 dr7;		/* as written last, 0 before that: hypervisors of SEV-ES do not read it */
	u64 call_rsp;		/* where guest_try_call() left its stack, or 0 */
	u64 call_exit;		/* its struct guest_user_exit */
	GUEST_POINTER(struct guest_l2, l2);	/* the nested guest that the host made for this vCPU, or NULL */
	u64 unused[5];
};

#define KVMPY_CHECK_OFFSET(type, member, offset) \
	_Static_assert(offsetof(type, member) == (offset), #type "." #member)

KVMPY_CHECK_OFFSET(struct guest_cpu, index, KVMPY_CPU_INDEX);
KVMPY_CHECK_OFFSET(struct guest_cpu, apic_id, KVMPY_CPU_APIC_ID);
KVMPY_CHECK_OFFSET(struct guest_cpu, ucall_slot, KVMPY_CPU_UCALL_SLOT);
KVMPY_CHECK_OFFSET(struct guest_cpu, stack_top, KVMPY_CPU_STACK_TOP);
KVMPY_CHECK_OFFSET(struct guest_cpu, entry, KVMPY_CPU_ENTRY);
KVMPY_CHECK_OFFSET(struct guest_cpu, args, KVMPY_CPU_ARGS);
KVMPY_CHECK_OFFSET(struct guest_cpu, fault, KVMPY_CPU_FAULT);
KVMPY_CHECK_OFFSET(struct guest_cpu, user_rsp, KVMPY_CPU_USER_RSP);
KVMPY_CHECK_OFFSET(struct guest_cpu, user_exit, KVMPY_CPU_USER_EXIT);
KVMPY_CHECK_OFFSET(struct guest_cpu, x2apic, KVMPY_CPU_X2APIC);
KVMPY_CHECK_OFFSET(struct guest_cpu, ghcb, KVMPY_CPU_GHCB);
KVMPY_CHECK_OFFSET(struct guest_cpu, ghcb_gpa, KVMPY_CPU_GHCB_GPA);
KVMPY_CHECK_OFFSET(struct guest_cpu, sev, KVMPY_CPU_SEV);
KVMPY_CHECK_OFFSET(struct guest_cpu, ghcb_depth, KVMPY_CPU_GHCB_DEPTH);
KVMPY_CHECK_OFFSET(struct guest_cpu, encryption_mask, KVMPY_CPU_ENC_MASK);
KVMPY_CHECK_OFFSET(struct guest_cpu, ghcb_msr, KVMPY_CPU_GHCB_MSR);
KVMPY_CHECK_OFFSET(struct guest_cpu, call_rsp, KVMPY_CPU_CALL_RSP);
KVMPY_CHECK_OFFSET(struct guest_cpu, l2, KVMPY_CPU_L2);
_Static_assert(sizeof(struct guest_cpu) == KVMPY_CPU_SIZE, "struct guest_cpu");

static __always_inline struct guest_cpu *guest_cpu(void)
{
	struct guest_cpu *cpu;

	asm volatile("mov %%gs:%c1, %0" : "=r"(cpu) : "i"(KVMPY_CPU_SELF));
	return cpu;
}

/* The index of this vCPU in the host's vm.vcpus. */
static __always_inline u32 guest_cpu_index(void)
{
	u32 index;

	asm volatile("movl %%gs:%c1, %0" : "=r"(index) : "i"(KVMPY_CPU_INDEX));
	return index;
}

#endif /* KVMPY_CPU_H */
