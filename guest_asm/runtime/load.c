// SPDX-License-Identifier: Apache-2.0
#include <kvmpy/load.h>
#include <kvmpy/ucall.h>
#include <kvmpy/user.h>

/* The words of a page that carry a generation; the middle one is the operand of an instruction. */
#define FIRST_WORD	0
#define CODE_WORD	257
#define LAST_WORD	511
#define WORDS_SHIFT	9
#define GENERATION_SHIFT	32

#define MOV_IMM64_RAX	0xb848000000000000ull	/* its last two bytes, before the operand */
#define RET		0xc3ull

static u64 user_stacks[GUEST_LOAD_CPUS][128] GUEST_USER_DATA;

static __always_inline u64 generation_word(u64 page, u64 word, u64 generation)
{
	return generation << GENERATION_SHIFT | page << WORDS_SHIFT | word;
}

static __always_inline volatile u64 *words_of(const struct guest_load *load, u64 page)
{
	return (volatile u64 *)(uintptr_t)(load->region + page * PAGE_SIZE);
}

/* A word of generation 0 was never written: it is 0. */
static __always_inline bool right(struct guest_load *load, u64 found, u64 page, u64 word, u64 low,
				  u64 high, bool executed)
{
	u64 generation = found >> GENERATION_SHIFT;

	if (load->loss == GUEST_LOAD_OLDER)
		low = 0;
	if (found ? found == generation_word(page, word, generation) && generation >= low &&
		    generation <= high && generation : !low || load->loss)
		return true;
	load->executed = executed;
	load->page = page;
	load->word = word;
	load->low = low;
	load->high = high;
	load->found = found;
	return false;
}

static __always_inline u64 next_index(const struct guest_load *load, u64 index)
{
	index += load->stride;
	return index < load->count ? index : index - load->count;
}

/* Nobody else writes its own pages: each holds exactly the generation before. */
static __always_inline bool visit(struct guest_load *load, u64 generation)
{
	u64 page = load->first + load->index * load->step;
	volatile u64 *words = words_of(load, page);
	u64 old = generation - 1;

	if (!right(load, words[FIRST_WORD], page, FIRST_WORD, old, old, false) ||
	    !right(load, words[CODE_WORD], page, CODE_WORD, old, old, false) ||
	    !right(load, words[LAST_WORD], page, LAST_WORD, old, old, false))
		return false;
	if (load->execute) {
		u64 (*code)(void) = (u64 (*)(void))((uintptr_t)&words[CODE_WORD] - 2);

		if (old && !right(load, code(), page, CODE_WORD, old, old, true))
			return false;
		words[CODE_WORD - 1] = MOV_IMM64_RAX;
		words[CODE_WORD + 1] = RET;
	}
	words[FIRST_WORD] = generation_word(page, FIRST_WORD, generation);
	words[CODE_WORD] = generation_word(page, CODE_WORD, generation);
	words[LAST_WORD] = generation_word(page, LAST_WORD, generation);
	load->index = next_index(load, load->index);
	return true;
}

/* How often visit number @at of each round is over when @visits are. */
static __always_inline u64 times(const struct guest_load *load, u64 visits, u64 at)
{
	return (visits + load->count - 1 - at) / load->count;
}

/* Another vCPU's page holds what its writer did before this looked, or does meanwhile. */
static __always_inline bool look(struct guest_load *load)
{
	const struct guest_load *peer = (struct guest_load *)(uintptr_t)load->peer;
	u64 at = load->peer_visit;
	u64 page = peer->first + load->peer_index * peer->step;
	u64 low = times(peer, READ_ONCE(peer->visits), at);
	u64 found = words_of(load, page)[LAST_WORD];
	u64 high = times(peer, READ_ONCE(peer->visits) + 1, at);

	if (!right(load, found, page, LAST_WORD, low, high, false))
		return false;
	load->peer_visit = at + 1 < peer->count ? at + 1 : 0;
	load->peer_index = load->peer_visit ? next_index(peer, load->peer_index) : 0;
	return true;
}

static __always_inline u64 run(u64 arg)
{
	struct guest_load *load = (struct guest_load *)(uintptr_t)arg;
	u64 visits = load->visits;
	u64 generation = load->count ? visits / load->count + 1 : 0;
	u64 left = load->count - (generation ? visits - (generation - 1) * load->count : 0);

	while (!READ_ONCE(load->stop)) {
		if (generation) {
			if (!visit(load, generation))
				return GUEST_LOAD_FAILED;
			if (!--left) {
				left = load->count;
				generation++;
			}
		}
		WRITE_ONCE(load->visits, ++visits);
		if (!look(load))
			return GUEST_LOAD_FAILED;
		for (u64 rest = load->pace; rest; rest--)
			barrier();
	}
	return GUEST_LOAD_STOPPED;
}

static GUEST_USER u64 run_user(u64 arg)
{
	return run(arg);
}

static __noinline u64 run_kernel(u64 arg)
{
	return run(arg);
}

__noreturn void guest_load(struct guest_load *loads, u64 ring)
{
	u32 me = guest_cpu_index();
	struct guest_user_exit exit;

	GUEST_SYNC();
	for (;;) {
		if (ring)
			exit = guest_user_run(run_user, (uintptr_t)&loads[me],
					      user_stacks[me] + ARRAY_SIZE(user_stacks[me]));
		else
			exit = guest_try_call(run_kernel, (uintptr_t)&loads[me]);
		GUEST_SYNC(exit.returned, exit.value, exit.fault.vector, exit.fault.error_code,
			   exit.fault.rip, exit.fault.cr2);
	}
}
