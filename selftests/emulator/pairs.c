// SPDX-License-Identifier: Apache-2.0
/*
 * Runs each instruction twice with the same registers and memory: as the CPU
 * executes it, and as KVM's emulator does. What differs is kept for the host.
 */
#include "pairs.h"

#define PREFIX_SIZE	5
#define SKIPPED		2		/* a value of pair_given_up: the pair says nothing */
#define MSR_FS_BASE	0xc0000100

struct pair_case pair_cases[CASES] GUEST_SHARED;
u64 pair_pool[POOL + WINDOW + VECTOR_WORDS] GUEST_SHARED;
struct pair_difference pair_differences[SHOWN] GUEST_SHARED;
u64 pair_count GUEST_SHARED;		/* of cases */
u64 pair_seed GUEST_SHARED, pair_fs_base GUEST_SHARED;
u64 pair_fill GUEST_SHARED;		/* eight bytes of what lies where no instruction is */
u64 pair_way GUEST_SHARED;
u64 pair_done GUEST_SHARED, pair_different GUEST_SHARED;
u64 pair_ignored_error GUEST_SHARED;	/* bits of a page fault's error code that are not compared */
u64 pair_ignored_flags GUEST_SHARED;	/* bits of RFLAGS */
u64 pair_show_all GUEST_SHARED;		/* take every pair for one that differs */
u64 pair_given_up GUEST_SHARED;		/* set by the host when KVM gave up in the run under way */
/* Page-table entries of the memory, and how they look when it is MMIO. */
u64 pair_entry_at GUEST_SHARED, pair_entries GUEST_SHARED, pair_mmio GUEST_SHARED;

static u8 idt[4096] __aligned(4096);
/* The frames of the two runs, and of what both begin with, lie at the tops of their stacks. */
static u8 stacks[3][1024] __aligned(1024);
static struct pair_state states[2];
static u64 random_state;

static struct exception_frame *frame_of(int run)
{
	return (struct exception_frame *)(stacks[run + 1] - sizeof(struct exception_frame));
}

static void use_stack(int run)
{
	u64 *ist = (u64 *)((u8 *)guest_cpu() + KVMPY_PERCPU_TSS + 36 + 8 * (RUN_IST - 1));

	*ist = (uintptr_t)stacks[run + 1];
}

static void take_exceptions(void)
{
	struct __packed {
		u16 limit;
		u64 base;
	} table;
	u64 stub;

	asm volatile("sidt %0" : "=m"(table));
	memcpy(idt, (void *)(uintptr_t)table.base, sizeof(idt));
	for (int vector = 0; vector < 32; vector++) {
		u8 *gate = idt + 16 * vector;

		if (vector == NMI_VECTOR || vector == MC_VECTOR)
			continue;
		stub = (uintptr_t)pairs_stubs + 16 * vector;
		*(u16 *)gate = stub;
		*(u16 *)(gate + 6) = stub >> 16;
		*(u32 *)(gate + 8) = stub >> 32;
		gate[4] = RUN_IST;
	}
	table.base = (uintptr_t)idt;
	asm volatile("lidt %0" : : "m"(table));
}

static __always_inline void copy(u64 *to, const u64 *from, int words)
{
	for (int i = 0; i < words; i++)
		to[i] = from[i];
}

static __always_inline bool differ(const u64 *a, const u64 *b, int words)
{
	for (int i = 0; i < words; i++)
		if (a[i] != b[i])
			return true;
	return false;
}

static void use_segments(void)
{
	asm volatile("movl %0, %%ds; movl %0, %%es; movl %0, %%fs" : : "r"(KVMPY_USER_DS));
	wrmsr(MSR_FS_BASE, pair_fs_base);
}

static void set_mmio(bool on)
{
	u64 *entry = (u64 *)(uintptr_t)pair_entry_at;

	for (u64 i = 0; i < pair_entries; i++)
		entry[i] ^= pair_mmio;
	flush_tlb();
}

static void run(const struct pair_case *c, const u64 *memory, int number)
{
	static struct exception_frame start;
	bool emulated = number == 1;
	u64 *window = (u64 *)(uintptr_t)c->window;

	start = *frame_of(2);
	if (c->vectors == SEGMENTS)
		use_segments();
	start.rip = c->rip - (emulated && pair_way == BY_PREFIX ? PREFIX_SIZE : 0);
	start.cs = emulated && pair_way == BY_RING ? KVMPY_KERNEL_CS : c->cs;
	start.ss = emulated && pair_way == BY_RING ? KVMPY_KERNEL_DS : c->ss;
	if (window)
		copy(window, memory, WINDOW);
	if (c->vectors == XMM)
		pairs_load_xmm(memory + WINDOW);
	else if (c->vectors == YMM)
		pairs_load_ymm(memory + WINDOW);
	use_stack(number);
	if (emulated && pair_way == BY_MMIO)
		set_mmio(true);
	pairs_enter(&start);
	if (emulated && pair_way == BY_MMIO)
		set_mmio(false);
	if (c->vectors == XMM)
		pairs_save_xmm(states[number].vectors);
	else if (c->vectors == YMM)
		pairs_save_ymm(states[number].vectors);
	states[number].cr2 = frame_of(number)->vector == PF_VECTOR ? read_cr2() : 0;
	if (window)
		copy(states[number].memory, window, WINDOW);
}

static void show(struct pair_state *to, const struct exception_frame *frame, const struct pair_state *from)
{
	if (from)
		*to = *from;
	memcpy(to->registers, frame, sizeof(*frame));
}

static bool same(const struct pair_case *c)
{
	struct exception_frame *plain = frame_of(0), *emulated = frame_of(1);
	u64 ignored = plain->vector == PF_VECTOR ? pair_ignored_error : 0;

	if (pair_given_up || pair_show_all)
		return false;
	if (pair_way != BY_RING && (plain->cs != emulated->cs || plain->ss != emulated->ss))
		return false;
	if (differ((u64 *)plain, (u64 *)emulated, REGISTERS + 1))
		return false;
	if ((plain->error_code ^ emulated->error_code) & ~ignored)
		return false;
	if (plain->rip != emulated->rip || plain->rsp != emulated->rsp)
		return false;
	if ((plain->rflags ^ emulated->rflags) & ~(c->undefined | pair_ignored_flags))
		return false;
	if (states[0].cr2 != states[1].cr2)
		return false;
	if (c->window && differ(states[0].memory, states[1].memory, WINDOW))
		return false;
	return c->vectors == NO_VECTORS || c->vectors == SEGMENTS || !differ(states[0].vectors, states[1].vectors, VECTOR_WORDS);
}

static u64 next_random(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static void pair(u64 number)
{
	const struct pair_case *c = &pair_cases[number];
	struct exception_frame *start = frame_of(2);
	const u64 *pool = &pair_pool[next_random() % POOL], *memory;
	u64 *registers = (u64 *)start, random = next_random();
	struct pair_difference *difference;

	for (int i = 0; i < REGISTERS; i++, random = random >> 4 | random << 60)
		registers[i] = c->base[i] ^ (pool[random % WINDOW] & c->mask[i]);
	start->rsp = c->base[REGISTERS] ^ (pool[random % WINDOW] & c->mask[REGISTERS]);
	start->rflags = c->rflags ^ (pool[random / WINDOW % WINDOW] & c->flags_mask);
	memory = c->given ? c->memory : &pair_pool[next_random() % POOL];
	pair_given_up = 0;
	run(c, memory, 0);
	run(c, memory, 1);
	if (pair_given_up == SKIPPED)
		return;
	pair_done++;
	if (same(c))
		return;
	if (pair_different < SHOWN) {
		difference = &pair_differences[pair_different];
		difference->number = number;
		show(&difference->before, start, NULL);
		copy(difference->before.memory, memory, WINDOW);
		if (c->vectors == XMM || c->vectors == YMM)
			copy(difference->before.vectors, memory + WINDOW, VECTOR_WORDS);
		show(&difference->plain, frame_of(0), &states[0]);
		show(&difference->emulated, frame_of(1), &states[1]);
		if (pair_given_up)
			difference->emulated.vector = NO_VECTOR;
	}
	pair_different++;
}

void guest_main(void)
{
	use_stack(0);
	take_exceptions();
	for (;;) {
		GUEST_SYNC();
		use_segments();
		random_state = pair_seed;
		for (u64 number = 0; number < pair_count; number++) {
			const struct pair_case *c = &pair_cases[number];

			copy((u64 *)(uintptr_t)c->image_at, c->image, IMAGE);
			for (u64 i = 0; i < c->pairs; i++)
				pair(number);
			for (int i = 0; i < IMAGE; i++)
				((u64 *)(uintptr_t)c->image_at)[i] = pair_fill;
		}
	}
}
