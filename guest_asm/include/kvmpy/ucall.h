/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls to the host.
 *
 * Each vCPU owns a chain of slots in memory shared with the host.  A call fills
 * the current slot and writes the slot's id to a port; the host reads the slot
 * through its own mapping.  An exception handler runs with the next slot of the
 * chain as the current one, so a call that it makes in the middle of another
 * call does no harm.  The last slot of the chain is its own successor and has
 * the id KVMPY_UCALL_NO_SLOT, which the host reports.
 *
 * Keep this path short: some hosts emulate ring 0 one instruction at a time.
 */
#ifndef KVMPY_UCALL_H
#define KVMPY_UCALL_H

#include <kvmpy/cpu.h>

struct guest_ucall_slot {
	u64 gpa;
	u32 id;
	u32 cmd;
	u64 args[KVMPY_UCALL_NR_ARGS];
	GUEST_POINTER(struct guest_ucall_slot, next);
	u64 reserved;
	char text[KVMPY_UCALL_TEXT_SIZE];
};

KVMPY_CHECK_OFFSET(struct guest_ucall_slot, id, KVMPY_UCALL_ID);
KVMPY_CHECK_OFFSET(struct guest_ucall_slot, cmd, KVMPY_UCALL_CMD);
KVMPY_CHECK_OFFSET(struct guest_ucall_slot, args, KVMPY_UCALL_ARGS);
KVMPY_CHECK_OFFSET(struct guest_ucall_slot, next, KVMPY_UCALL_NEXT);
KVMPY_CHECK_OFFSET(struct guest_ucall_slot, text, KVMPY_UCALL_TEXT);
_Static_assert(sizeof(struct guest_ucall_slot) == KVMPY_UCALL_SLOT_SIZE, "slot");

static __always_inline struct guest_ucall_slot *guest_ucall_current(void)
{
	struct guest_ucall_slot *slot;

	asm volatile("mov %%gs:%c1, %0" : "=r"(slot) : "i"(KVMPY_CPU_UCALL_SLOT));
	return slot;
}

/* Hand the slot to the host, wait for it to go on, and return its reply. */
static __always_inline u64 guest_ucall_send(struct guest_ucall_slot *slot)
{
	asm volatile("outl %0, %1" : : "a"(slot->id), "N"(KVMPY_UCALL_PORT) : "memory");
	return slot->args[0];
}

/* @nr is a constant, so that only the stores remain of this. */
static __always_inline u64 __guest_ucall(u32 cmd, u32 nr, const u64 *args)
{
	struct guest_ucall_slot *slot = guest_ucall_current();

	slot->cmd = cmd | nr << KVMPY_UCALL_NARGS_SHIFT;
	if (nr > 0)
		slot->args[0] = args[0];
	if (nr > 1)
		slot->args[1] = args[1];
	if (nr > 2)
		slot->args[2] = args[2];
	if (nr > 3)
		slot->args[3] = args[3];
	if (nr > 4)
		slot->args[4] = args[4];
	if (nr > 5)
		slot->args[5] = args[5];
	if (nr > 6)
		slot->args[6] = args[6];
	if (nr > 7)
		slot->args[7] = args[7];
	return guest_ucall_send(slot);
}

/* Zero to eight values of any integer or pointer type, from left to right. */
#define __UCALL_NR(...)		__UCALL_NR_(0, ##__VA_ARGS__, 8, 7, 6, 5, 4, 3, 2, 1, 0)
#define __UCALL_NR_(z, a, b, c, d, e, f, g, h, n, ...)	n
#define __UCALL_PASTE(a, b)		__UCALL_PASTE_(a, b)
#define __UCALL_PASTE_(a, b)		a##b
#define __UCALL_0()			0
#define __UCALL_1(a)			(u64)(a)
#define __UCALL_2(a, ...)		(u64)(a), __UCALL_1(__VA_ARGS__)
#define __UCALL_3(a, ...)		(u64)(a), __UCALL_2(__VA_ARGS__)
#define __UCALL_4(a, ...)		(u64)(a), __UCALL_3(__VA_ARGS__)
#define __UCALL_5(a, ...)		(u64)(a), __UCALL_4(__VA_ARGS__)
#define __UCALL_6(a, ...)		(u64)(a), __UCALL_5(__VA_ARGS__)
#define __UCALL_7(a, ...)		(u64)(a), __UCALL_6(__VA_ARGS__)
#define __UCALL_8(a, ...)		(u64)(a), __UCALL_7(__VA_ARGS__)

#define __GUEST_UCALL(cmd, ...)							\
({										\
	const u64 __args[] = {							\
		__UCALL_PASTE(__UCALL_, __UCALL_NR(__VA_ARGS__))(__VA_ARGS__)	\
	};									\
	__guest_ucall(cmd, __UCALL_NR(__VA_ARGS__), __args);			\
})

/* Call the host with up to eight values and a command from KVMPY_UCALL_CMD_USER up. */
#define GUEST_UCALL(cmd, ...)	((void)__GUEST_UCALL(cmd, ##__VA_ARGS__))
/* The same, and return what the host put into the first argument (call.reply() there). */
#define GUEST_ASK(cmd, ...)	__GUEST_UCALL(cmd, ##__VA_ARGS__)
/* Show the host up to eight values and go on when it says so. */
#define GUEST_SYNC(...)		GUEST_UCALL(KVMPY_UCALL_CMD_SYNC, ##__VA_ARGS__)
/* The test is over for this vCPU; returning from guest_main() does the same. */
#define GUEST_DONE()		GUEST_UCALL(KVMPY_UCALL_CMD_DONE)

#endif /* KVMPY_UCALL_H */
