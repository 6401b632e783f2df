# SPDX-License-Identifier: Apache-2.0
"""Locks, barriers and atomics of guest code, on vCPUs that run at the same time."""

from __future__ import annotations

from kvmpy import MakeVm

VCPUS = 4

LOCKED = """
#include <kvmpy/guest.h>

static struct spinlock lock;
static struct guest_barrier barrier;
static volatile u64 total, inside, most;
static u64 sum, bits, words[4];

void guest_main(u64 vcpus, u64 rounds)
{
	u32 me = guest_cpu_index();
	u64 before;

	for (int phase = 0; phase < 3; phase++) {
		guest_barrier_wait(&barrier, vcpus);
		GUEST_ASSERT_EQ(READ_ONCE(words[me]), (u64)phase);
		words[me]++;
		guest_barrier_wait(&barrier, vcpus);
		for (u32 i = 0; i < vcpus; i++)
			GUEST_ASSERT_EQ(READ_ONCE(words[i]), (u64)phase + 1);
	}

	for (u64 i = 0; i < rounds; i++) {
		spin_lock(&lock);
		if (++inside > most)
			most = inside;
		before = total;
		for (int spin = 0; spin < 50; spin++)
			cpu_relax();
		total = before + 1;
		inside--;
		spin_unlock(&lock);
		atomic_fetch_add(&sum, i);
		atomic_or(&bits, BIT(me));
	}
	guest_barrier_wait(&barrier, vcpus);
	GUEST_SYNC(total, most, atomic_read(&sum), bits);
}
"""


def test_locks_barriers_and_atomics(make_vm: MakeVm) -> None:
    """A spin lock lets one vCPU in at a time, a barrier lets all go on at once, atomics lose no update."""
    rounds = 100
    vm = make_vm.start(LOCKED, "guest_main", VCPUS, rounds, vcpus=VCPUS)
    seen: list[tuple[int, ...]] = []
    vm.run_all(on_sync=lambda _vcpu, call: seen.append(call.args))
    expected = (VCPUS * rounds, 1, VCPUS * sum(range(rounds)), (1 << VCPUS) - 1)
    assert seen == [expected] * VCPUS


SINGLE = """
#include <kvmpy/guest.h>

static u8 byte = 250;
static u16 half;
static u32 word = 5;
static u64 quad = 7;

void guest_main(void)
{
	struct spinlock lock = { 0 };

	GUEST_ASSERT_EQ(atomic_add_return(&byte, 10), 4);
	GUEST_ASSERT_EQ(atomic_xchg(&half, 0xbeef), 0);
	GUEST_ASSERT_EQ(atomic_read(&half), 0xbeef);
	GUEST_ASSERT(atomic_cmpxchg(&word, 5, 6));
	GUEST_ASSERT(!atomic_cmpxchg(&word, 5, 9));
	GUEST_ASSERT_EQ(word, 6u);
	atomic_inc(&quad);
	atomic_inc(&quad);
	atomic_dec(&quad);
	GUEST_ASSERT_EQ(quad, 8u);
	atomic_and(&quad, 0xcull);
	GUEST_ASSERT_EQ(quad, 8u);
	atomic_set(&quad, 3);
	GUEST_ASSERT_EQ(atomic_fetch_add(&quad, 2), 3u);

	GUEST_ASSERT(spin_trylock(&lock));
	GUEST_ASSERT(!spin_trylock(&lock));
	spin_unlock(&lock);
	GUEST_ASSERT(spin_trylock(&lock));
}
"""


def test_atomics_of_each_size(make_vm: MakeVm) -> None:
    """Atomics return what they say and work on integers of each size; a held lock cannot be taken."""
    vm = make_vm.run(SINGLE)
    assert vm.vcpus[0].done
