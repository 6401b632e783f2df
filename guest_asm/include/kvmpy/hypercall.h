/* SPDX-License-Identifier: Apache-2.0 */
/* Hypercalls in KVM's own convention: number in RAX, arguments in RBX, RCX, RDX, RSI. */
#ifndef KVMPY_HYPERCALL_H
#define KVMPY_HYPERCALL_H

#include <kvmpy/processor.h>

#define KVMPY_HC_MAP_GPA_RANGE		12
#define KVMPY_MAP_GPA_ENCRYPTED		(1 << 4)

/* AMD and Hygon have an instruction of their own; CPUID is an exit, so it is asked once. */
static inline bool guest_has_vmmcall(void)
{
	static volatile u8 known;

	if (!known) {
		u32 name = cpuid(0, 0).ebx;

		known = name == 0x68747541 || name == 0x6f677948 ? 2 : 1;
	}
	return known == 2;
}

static inline u64 guest_hypercall(u64 nr, u64 a0, u64 a1, u64 a2, u64 a3)
{
	u64 result;

	if (guest_has_vmmcall())
		asm volatile("vmmcall" : "=a"(result)
			     : "a"(nr), "b"(a0), "c"(a1), "d"(a2), "S"(a3) : "memory");
	else
		asm volatile("vmcall" : "=a"(result)
			     : "a"(nr), "b"(a0), "c"(a1), "d"(a2), "S"(a3) : "memory");
	return result;
}

/*
 * Asks the host to make whole pages private or shared.  Returns 0 or a
 * negative KVM error number; the guest's own page tables are its business.
 */
static inline s64 guest_map_gpa_range(u64 gpa, u64 size, bool private)
{
	return guest_hypercall(KVMPY_HC_MAP_GPA_RANGE, gpa, size >> 12,
			       private ? KVMPY_MAP_GPA_ENCRYPTED : 0, 0);
}

#endif /* KVMPY_HYPERCALL_H */
