/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the memory slots of a VM hold before it runs first and, where kvmpy asks for it, what the program changes
 * between runs: pages whose hash is another one than it was when the last vCPU left the guest.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "recorder.h"

#define RUN_PAGES 64
#define LONGEST_WAIT_NS 5000000000ULL

struct page_hash {
	uint64_t address; /* 0: nothing */
	uint64_t hash;
};

/* Pages as the last vCPU left them: an open hash table of *room* places, a power of two. */
struct memory_state {
	struct page_hash *pages;
	uint64_t room;
	uint64_t used;
	uint8_t *copy; /* RUN_PAGES pages */
};

typedef void (*run_function)(struct object *vm, uint64_t address, uint32_t count);

static bool page_has_content(uint64_t entry, uint64_t address)
{
	uint8_t resident = 0;

	if (entry >> 62) /* present or swapped out */
		return true;
	return raw(SYS_mincore, address, PAGE, &resident, 0) == 0 && resident & 1;
}

/* Call *function* for each run of pages of the VM's slots that have content. */
static void each_run(struct object *vm, run_function function)
{
	const struct kvmpy_slot *slots = __atomic_load_n(&vm->known.slots, __ATOMIC_ACQUIRE);
	uint32_t most = __atomic_load_n(&vm->known.nr_slots, __ATOMIC_ACQUIRE);
	uint64_t entries[RUN_PAGES];
	int map = (int)raw(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);

	for (uint32_t i = 0; slots && map >= 0 && i < most; i++) {
		uint64_t end = slots[i].hva + (slots[i].size & ~(PAGE - 1));

		for (uint64_t page = slots[i].hva; page < end; page += RUN_PAGES * PAGE) {
			uint64_t left = (end - page) / PAGE, run = 0;
			uint32_t now = left < RUN_PAGES ? (uint32_t)left : RUN_PAGES;

			if (raw(SYS_pread64, map, entries, now * 8, page / PAGE * 8) != now * 8)
				memset(entries, 0xff, sizeof entries);
			for (uint32_t j = 0; j <= now; j++) {
				if (j < now && page_has_content(entries[j], page + j * PAGE)) {
					run++;
				} else if (run) {
					function(vm, page + (j - run) * PAGE, (uint32_t)run);
					run = 0;
				}
			}
		}
	}
	if (map >= 0)
		raw(SYS_close, map, 0, 0, 0);
}

/* Copy *count* pages; what cannot be read is zero. */
static void copy_pages(uint8_t *to, uint64_t address, uint32_t count)
{
	uint64_t got = kvmpy_source_read(&this_process, to, address, count * PAGE);

	memset(to + got, 0, count * PAGE - got);
}

static void put_pages(uint64_t address, uint32_t count, uint32_t flags)
{
	struct kvmpy_rec_memory head = { .address = address, .count = count, .flags = flags };
	uint8_t *place = frame_begin(KVMPY_RING_DUMP, sizeof head + count * PAGE, next_order(), now_ns());

	if (!place)
		return;
	memcpy(place, &head, sizeof head);
	copy_pages(place + sizeof head, address, count);
	frame_commit(place);
}

static void put_initial(struct object *vm, uint64_t address, uint32_t count)
{
	(void)vm;
	put_pages(address, count, KVMPY_REC_MEMORY_INITIAL);
}

/* Whoever runs a vCPU first copies the memory; the others wait, for what a guest writes is not what it began with. */
static void copy_initial(struct object *vm)
{
	uint32_t none = 0;

	if (atomic_load(&vm->dumped) == 2)
		return;
	if (atomic_compare_exchange_strong(&vm->dumped, &none, 1)) {
		each_run(vm, put_initial);
		atomic_store(&vm->dumped, 2);
		return;
	}
	/* In a signal handler on top of the very thread that copies, waiting would be for ever. */
	for (uint64_t since = now_ns(); atomic_load(&vm->dumped) == 1 && now_ns() - since < LONGEST_WAIT_NS;)
		raw(SYS_sched_yield, 0, 0, 0, 0);
}

/* Four lanes, so that one multiplication need not wait for the other. */
static uint64_t hash_of(const uint8_t *page)
{
	uint64_t lanes[4] = { 0x9e3779b97f4a7c15ULL, 0xbf58476d1ce4e5b9ULL, 0x94d049bb133111ebULL, 0xd6e8feb86659fd93ULL };
	uint64_t hash = 0;

	for (size_t at = 0; at < PAGE; at += 32)
		for (int lane = 0; lane < 4; lane++) {
			uint64_t word;

			memcpy(&word, page + at + lane * 8, 8);
			lanes[lane] = (lanes[lane] ^ word) * 0xff51afd7ed558ccdULL;
			lanes[lane] ^= lanes[lane] >> 29;
		}
	for (int lane = 0; lane < 4; lane++)
		hash = (hash ^ lanes[lane]) * 0xc4ceb9fe1a85ec53ULL;
	return hash;
}

static struct page_hash *place_of(const struct memory_state *state, uint64_t address)
{
	uint64_t at = (address / PAGE) * 0x9e3779b97f4a7c15ULL >> 32;

	for (;; at++) {
		struct page_hash *place = &state->pages[at & (state->room - 1)];

		if (!place->address || place->address == address)
			return place;
	}
}

static void *anonymous(uint64_t size)
{
	void *made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return made == MAP_FAILED ? NULL : made;
}

/* Make room for *more* pages; false where there is no memory. */
static bool grow(struct memory_state *state, uint64_t more)
{
	uint64_t room = state->room ? state->room : 1024;

	while ((state->used + more) * 2 > room)
		room *= 2;
	if (room == state->room)
		return true;
	struct memory_state larger = { .room = room, .pages = anonymous(room * sizeof *larger.pages) };

	if (!larger.pages)
		return false;
	for (uint64_t i = 0; i < state->room; i++)
		if (state->pages[i].address)
			*place_of(&larger, state->pages[i].address) = state->pages[i];
	if (state->pages)
		raw(SYS_munmap, state->pages, state->room * sizeof *state->pages, 0, 0);
	state->pages = larger.pages;
	state->room = room;
	return true;
}

static void remember_run(struct object *vm, uint64_t address, uint32_t count)
{
	struct memory_state *state = vm->memory;

	copy_pages(state->copy, address, count);
	if (!grow(state, count))
		return;
	for (uint32_t i = 0; i < count; i++) {
		struct page_hash *place = place_of(state, address + i * PAGE);

		state->used += !place->address;
		*place = (struct page_hash){ address + i * PAGE, hash_of(state->copy + i * PAGE) };
	}
}

static void compare_run(struct object *vm, uint64_t address, uint32_t count)
{
	struct memory_state *state = vm->memory;
	uint32_t changed = 0;

	copy_pages(state->copy, address, count);
	for (uint32_t i = 0; i <= count; i++) {
		const struct page_hash *place = i < count ? place_of(state, address + i * PAGE) : NULL;

		if (place && (!place->address || place->hash != hash_of(state->copy + i * PAGE))) {
			changed++;
		} else if (changed) {
			put_pages(address + (i - changed) * PAGE, changed, 0);
			changed = 0;
		}
	}
}

/* False where another thread does not let go: a signal handler on top of the one that holds the lock. */
static bool lock(struct object *vm)
{
	for (uint64_t since = now_ns(); atomic_exchange_explicit(&vm->memory_lock, 1, memory_order_acquire);) {
		if (now_ns() - since > LONGEST_WAIT_NS)
			return false;
		raw(SYS_sched_yield, 0, 0, 0, 0);
	}
	return true;
}

static void unlock(struct object *vm)
{
	atomic_store_explicit(&vm->memory_lock, 0, memory_order_release);
}

static bool make_state(struct object *vm)
{
	if (vm->memory)
		return true;
	struct memory_state *made = anonymous(PAGE);

	if (!made)
		return false;
	made->copy = anonymous(RUN_PAGES * PAGE);
	if (!made->copy || !grow(made, 1))
		return false;
	vm->memory = made;
	return true;
}

void memory_before_run(struct object *vm)
{
	if (!(control->flags & KVMPY_FLAG_MEMORY))
		return;
	copy_initial(vm);
	if (!(control->flags & KVMPY_FLAG_WRITES) || !lock(vm))
		return;
	/* While a vCPU is in the guest nobody can tell whose writes they are. */
	if (!vm->running && vm->memory)
		each_run(vm, compare_run);
	vm->running++;
	unlock(vm);
}

void memory_after_run(struct object *vm)
{
	if (!(control->flags & KVMPY_FLAG_WRITES) || !lock(vm))
		return;
	/* Where the VM's descriptor was closed under its vCPUs, there is nothing to remember. */
	if (vm->running && !--vm->running && make_state(vm))
		each_run(vm, remember_run);
	unlock(vm);
}

void memory_forget(struct object *vm)
{
	if (!vm->memory || !lock(vm))
		return;
	struct memory_state *state = vm->memory;

	vm->memory = NULL;
	vm->running = 0;
	unlock(vm);
	raw(SYS_munmap, state->pages, state->room * sizeof *state->pages, 0, 0);
	raw(SYS_munmap, state->copy, RUN_PAGES * PAGE, 0, 0);
	raw(SYS_munmap, state, PAGE, 0, 0);
}
