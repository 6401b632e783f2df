/* SPDX-License-Identifier: Apache-2.0 */
/* kvmclock as a guest reads it (Documentation/virt/kvm/x86/msr.rst). */
#ifndef SELFTESTS_PVCLOCK_H
#define SELFTESTS_PVCLOCK_H

#include <kvmpy/guest.h>

#define MSR_KVM_WALL_CLOCK	0x4b564d00
#define MSR_KVM_SYSTEM_TIME	0x4b564d01
#define MSR_KVM_STEAL_TIME	0x4b564d03
#define MSR_KVM_OLD_WALL_CLOCK	0x11
#define MSR_KVM_OLD_SYSTEM_TIME	0x12
#define PVCLOCK_TSC_STABLE	BIT(0)
#define PVCLOCK_GUEST_STOPPED	BIT(1)

struct pvclock {
	u32 version;
	u32 pad0;
	u64 tsc_timestamp;
	u64 system_time;
	u32 tsc_to_system_mul;
	s8 tsc_shift;
	u8 flags;
	u8 pad[2];
};

struct pvclock_wall {
	u32 version;
	u32 sec;
	u32 nsec;
};

/* Nanoseconds; @flags may be NULL. */
static inline u64 pvclock_read(volatile struct pvclock *clock, u8 *flags)
{
	u64 delta, time;
	u32 version;

	do {
		do
			version = clock->version;
		while (version & 1);
		barrier();
		delta = rdtsc() - clock->tsc_timestamp;
		if (clock->tsc_shift >= 0)
			delta <<= clock->tsc_shift;
		else
			delta >>= -clock->tsc_shift;
		time = (u64)((unsigned __int128)delta * clock->tsc_to_system_mul >> 32);
		time += clock->system_time;
		if (flags)
			*flags = clock->flags;
		barrier();
	} while (clock->version != version);
	return time;
}

#endif /* SELFTESTS_PVCLOCK_H */
