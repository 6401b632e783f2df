/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KVMPY_SPINLOCK_H
#define KVMPY_SPINLOCK_H

#include <kvmpy/processor.h>

struct spinlock {
	u32 held;
};

static inline bool spin_trylock(struct spinlock *lock)
{
	return !__atomic_exchange_n(&lock->held, 1, __ATOMIC_ACQUIRE);
}

static inline void spin_lock(struct spinlock *lock)
{
	while (!spin_trylock(lock)) {
		while (READ_ONCE(lock->held))
			cpu_relax();
	}
}

static inline void spin_unlock(struct spinlock *lock)
{
	__atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE);
}

/* A meeting point that can be used again. */
struct guest_barrier {
	u32 waiting;
	u32 generation;
};

/* Wait until @nr vCPUs are here. */
static inline void guest_barrier_wait(struct guest_barrier *b, u32 nr)
{
	u32 generation = __atomic_load_n(&b->generation, __ATOMIC_ACQUIRE);

	if (__atomic_add_fetch(&b->waiting, 1, __ATOMIC_ACQ_REL) == nr) {
		b->waiting = 0;
		__atomic_store_n(&b->generation, generation + 1, __ATOMIC_RELEASE);
		return;
	}
	while (__atomic_load_n(&b->generation, __ATOMIC_ACQUIRE) == generation)
		cpu_relax();
}

#endif /* KVMPY_SPINLOCK_H */
