/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an ioctl reads and writes, as the chunks of a record (kvmpy/debug/record/format.h): with objects.c, which it
 * comes before, the engine of the preloaded recorder, of the one inside kvmpy, and of ptrace. It allocates nothing and
 * takes no locks, for it may run in a signal handler; it holds no file descriptor, and leaves errno alone.
 *
 * Pointers may be wrong. In this process rt_sigprocmask() with an operation that does not exist tells: it reads 8 bytes
 * at an address, changes nothing, and says EFAULT where it could not.
 */
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "../../debug/preload/rawcall.h"
#include "../../debug/preload/tables.h"
#include "../../debug/record/format.h"

#define CAPTURE_PAGE 4096UL
#define CAPTURE_ROWS(table) (sizeof(table) / sizeof *(table))
#define NO_OPERATION 99
#define PROBE_PAGES 16
#define RUN_RING (2 * CAPTURE_PAGE) /* struct kvm_coalesced_mmio_ring: first, last, both modulo its size */
#define RUN_SYNC_OFFSET AT_kvm_run_kvm_valid_regs
#define RUN_SYNC_SIZE (SIZE_kvm_run - RUN_SYNC_OFFSET)

_Static_assert(KVMPY_RUN_HEAD == RUN_SYNC_OFFSET, "struct kvmpy_object");

/* Memory. */

static bool page_readable(uint64_t address)
{
	/* A null pointer means to it that there is no operation. */
	return address >= 8 && raw(SYS_rt_sigprocmask, NO_OPERATION, address & ~7ULL, NULL, 8) != -EFAULT;
}

/* How many of the bytes can be read in this process. */
static uint64_t readable(uint64_t address, uint64_t length)
{
	uint64_t end = address + length;

	if (end < address)
		return 0;
	for (uint64_t page = address & ~(CAPTURE_PAGE - 1); page < end; page += CAPTURE_PAGE)
		if (!page_readable(page < address ? address : page))
			return page <= address ? 0 : page - address;
	return length;
}

static uint64_t read_own(void *to, uint64_t address, uint64_t length)
{
	if (length > PROBE_PAGES * CAPTURE_PAGE) {
		struct iovec local = { to, length }, remote = { (void *)address, length };
		long pid = raw(SYS_getpid, 0, 0, 0, 0);
		long got = raw6(SYS_process_vm_readv, pid, (long)&local, 1, (long)&remote, 1, 0);

		if (got >= 0 || got == -EFAULT)
			return got < 0 ? 0 : (uint64_t)got;
	}
	length = readable(address, length);
	memcpy(to, (const void *)address, length);
	return length;
}

/* Copy what can be read; return how much that was. */
uint64_t kvmpy_source_read(const struct kvmpy_source *source, void *to, uint64_t address, uint64_t length)
{
	uint64_t done = 0;

	if (source->fd < 0)
		return read_own(to, address, length);
	while (done < length) {
		long got = raw(SYS_pread64, source->fd, (uint8_t *)to + done, length - done, address + done);

		if (got == -EINTR)
			continue;
		if (got <= 0)
			break;
		done += (uint64_t)got;
	}
	return done;
}

static bool is_held(const struct kvmpy_source *source, uint64_t address)
{
	for (uint32_t i = 0; i < source->nr_held; i++)
		if (address - source->held[i].address < source->held[i].size)
			return true;
	return false;
}

static uint64_t number_at(const uint8_t *place, uint32_t size)
{
	uint64_t value = 0;

	memcpy(&value, place, size < 8 ? size : 8);
	return value;
}

static uint64_t read_number(const struct kvmpy_source *source, uint64_t address, uint32_t size)
{
	uint8_t bytes[8] = { 0 };

	return kvmpy_source_read(source, bytes, address, size) == size ? number_at(bytes, size) : 0;
}

static void *map_anonymous(uint64_t size)
{
	long made = raw6(SYS_mmap, 0, (long)size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			 -1, 0);

	return made < 0 && made > -4096 ? NULL : (void *)made;
}

/* The plan. */

static const struct kvmpy_plan_node *plan_find(uint32_t request, struct kvmpy_object *object)
{
	size_t low = 0, high = CAPTURE_ROWS(kvmpy_plan_root_table);

	if (request == KVM_MEMORY_ENCRYPT_OP && object && kvmpy_object_owner(object)->vm_type == KVM_X86_TDX_VM)
		return &kvmpy_plan_node_table[KVMPY_PLAN_TDX];
	while (low < high) {
		size_t middle = (low + high) / 2;

		if (kvmpy_plan_root_table[middle].request < request)
			low = middle + 1;
		else
			high = middle;
	}
	if (low == CAPTURE_ROWS(kvmpy_plan_root_table) || kvmpy_plan_root_table[low].request != request)
		return NULL;
	return &kvmpy_plan_node_table[kvmpy_plan_root_table[low].node];
}

/* A request that the plan lacks: its number tells size and direction of the argument. */
static struct kvmpy_plan_node plan_guess(uint32_t request)
{
	return (struct kvmpy_plan_node){
		.direction = request >> 30 & 3,
		.base = request >> 16 & 0x3fff,
		.count = KVMPY_PLAN_NO_FIELD,
		.unit = 1,
		.per = 1,
		.round = 1,
		.reads = KVMPY_PLAN_NO_FIELD,
		.when = KVMPY_PLAN_NO_FIELD,
		.select = KVMPY_PLAN_NO_FIELD,
	};
}

static uint64_t length_of(const struct kvmpy_plan_node *node, uint64_t count)
{
	uint64_t length;

	if (count > KVMPY_CAPTURE_MOST * 8)
		count = KVMPY_CAPTURE_MOST * 8;
	length = node->base + (count * node->unit + node->per - 1) / node->per;
	length = (length + node->round - 1) / node->round * node->round;
	return length < node->least ? node->least : length;
}

static uint64_t special_length(const struct kvmpy_plan_node *node, const uint8_t *parent, struct kvmpy_object *object)
{
	const struct kvmpy_object *vm = kvmpy_object_owner(object);

	switch (node->special) {
	case KVMPY_PLAN_SLOT_BITMAP:
		return (kvmpy_slot_pages(vm, (uint32_t)number_at(parent, 4)) + 63) / 64 * 8;
	case KVMPY_PLAN_XSAVE:
		return vm && vm->xsave_size > node->base ? vm->xsave_size : node->base;
	default:
		return 1ULL << (number_at(parent, 8) >> 52 & 15);
	}
}

/* Chunks. */

static uint64_t cut(uint64_t length)
{
	return length < KVMPY_CAPTURE_MOST ? length : KVMPY_CAPTURE_MOST;
}

static uint64_t padded(uint64_t length)
{
	return sizeof(struct kvmpy_rec_chunk) + ((length + 7) & ~7ULL);
}

static bool make_room(struct kvmpy_capture *c, uint64_t length)
{
	uint64_t needed = c->length + padded(length);

	if (needed <= c->room)
		return true;
	uint64_t room = (needed * 2 + CAPTURE_PAGE - 1) & ~(CAPTURE_PAGE - 1);
	uint8_t *larger = map_anonymous(room);

	if (!larger)
		return false;
	if (c->length)
		memcpy(larger, c->data, c->length);
	if (c->mapped)
		raw(SYS_munmap, c->data, c->mapped, 0, 0);
	c->data = larger;
	c->room = c->mapped = room;
	return true;
}

/* Write a chunk to @place; return its length with padding. */
static uint64_t put_chunk(const struct kvmpy_capture *c, uint8_t *place, uint64_t address, uint64_t length,
			  uint8_t when, uint8_t what)
{
	struct kvmpy_rec_chunk *chunk = (struct kvmpy_rec_chunk *)place;
	uint8_t *data = place + sizeof *chunk;
	uint64_t got = cut(length);

	if (address == c->arg && got <= c->sure)
		memcpy(data, (const void *)address, got);
	else
		got = kvmpy_source_read(c->source, data, address, got);
	*chunk = (struct kvmpy_rec_chunk){ .address = address, .length = (uint32_t)got, .when = when, .what = what };
	if (got < length)
		chunk->flags = KVMPY_REC_CUT;
	memset(data + got, 0, -got & 7);
	return padded(got);
}

/* Append what the kernel is about to read; return how much of it that is. */
static uint64_t append(struct kvmpy_capture *c, uint64_t address, uint64_t length, uint8_t what)
{
	uint64_t before = c->length;

	if (!make_room(c, cut(length)))
		return 0;
	c->length += put_chunk(c, c->data + before, address, length, KVMPY_REC_WHEN_IN, what);
	c->count++;
	return ((struct kvmpy_rec_chunk *)(c->data + before))->length;
}

static void tell_after(struct kvmpy_capture *c, const struct kvmpy_plan_node *node, uint64_t address, uint64_t length,
		       uint32_t what)
{
	if (c->nr_out < KVMPY_MOST_PIECES)
		c->out[c->nr_out++] = (struct kvmpy_piece){ node, address, length, what };
}

/* The parent's content may move while this appends: @parent is where it is now, or NULL for the argument. */
static void walk(struct kvmpy_capture *c, const struct kvmpy_plan_node *node, uint64_t address, const uint8_t *parent,
		 int depth)
{
	uint8_t what = depth ? KVMPY_REC_WHAT_NESTED : KVMPY_REC_WHAT_ARGUMENT;
	uint64_t length, count = 0, got;

	if (node->flags & KVMPY_PLAN_GUEST || (depth && is_held(c->source, address)))
		return;
	if (node->special) {
		length = depth || !c->sure ? special_length(node, parent, c->object) : c->sure;
	} else {
		if (node->flags & KVMPY_PLAN_OWN)
			count = read_number(c->source, address + node->count, node->count_size);
		else if (node->count != KVMPY_PLAN_NO_FIELD)
			count = number_at(parent + node->count, node->count_size);
		length = length_of(node, count);
	}
	/* A count may promise more than there is. */
	if (!depth && c->sure && length > c->sure)
		length = c->sure;
	if (!length && !depth)
		return;
	if (node->direction & KVMPY_PLAN_OUT)
		tell_after(c, node, address, length, what);
	/* What is only written is not read here; nor is an argument without pointers to follow. */
	if (!(node->direction & KVMPY_PLAN_IN) || !length)
		return;
	uint64_t before = c->length;

	got = append(c, address, length < node->reads ? length : node->reads, what);
	if (depth > 2 || got < length)
		return;
	uint32_t first[2] = { node->children, 0 }, number[2] = { node->nr_children, 0 };

	if (node->select != KVMPY_PLAN_NO_FIELD) {
		uint64_t selected = number_at(c->data + before + sizeof(struct kvmpy_rec_chunk) + node->select, 4);

		for (uint32_t i = 0; i < node->nr_cases; i++) {
			const struct kvmpy_plan_case *row = &kvmpy_plan_case_table[node->cases + i];

			if (row->value == selected) {
				first[1] = row->children;
				number[1] = row->nr_children;
			}
		}
	}
	for (int set = 0; set < 2; set++)
		for (uint32_t i = 0; i < number[set]; i++) {
			const struct kvmpy_plan_node *child = &kvmpy_plan_node_table[first[set] + i];
			const uint8_t *content = c->data + before + sizeof(struct kvmpy_rec_chunk);
			uint64_t pointer = number_at(content + child->pointer, 8);

			if (pointer && (child->when == KVMPY_PLAN_NO_FIELD || content[child->when]))
				walk(c, child, pointer, content, depth + 1);
		}
}

/* The run area. */

/* Where the data of the last KVM_EXIT_IO lies in the run area, and how much it is. */
static uint64_t io_data(const struct kvmpy_object *vcpu, uint64_t *offset, bool *out)
{
	const uint8_t *head = vcpu->shadow;
	uint64_t length;

	if (number_at(head + AT_kvm_run_exit_reason, 4) != KVM_EXIT_IO)
		return 0;
	length = number_at(head + AT_kvm_run_io_size, 1) * number_at(head + AT_kvm_run_io_count, 4);
	*offset = number_at(head + AT_kvm_run_io_data_offset, 8);
	*out = head[AT_kvm_run_io_direction];
	if (*offset < CAPTURE_PAGE || *offset >= vcpu->run_length || length > vcpu->run_length - *offset)
		return 0;
	return length;
}

/* The head of the run area, and the two bitmaps of synchronised registers behind it: kvm_valid_regs asks,
 * kvm_dirty_regs gives.
 */
struct run_head {
	uint8_t head[KVMPY_RUN_HEAD];
	uint64_t valid_regs;
	uint64_t dirty_regs;
};

static uint64_t read_run(const struct kvmpy_capture *c, struct run_head *now)
{
	uint64_t run = __atomic_load_n(&c->object->run, __ATOMIC_ACQUIRE);

	return run && kvmpy_source_read(c->source, now, run, sizeof *now) == sizeof *now ? run : 0;
}

static bool has_ring(const struct kvmpy_object *vcpu)
{
	return vcpu->vm && vcpu->run_length >= RUN_RING + CAPTURE_PAGE;
}

static void run_before(struct kvmpy_capture *c)
{
	struct kvmpy_object *vcpu = c->object;
	struct run_head now;
	uint64_t run = read_run(c, &now), offset, length;
	bool out;

	if (!run)
		return;
	if (memcmp(now.head, vcpu->shadow, KVMPY_RUN_HEAD))
		append(c, run, KVMPY_RUN_HEAD, KVMPY_REC_WHAT_RUN);
	length = io_data(vcpu, &offset, &out);
	if (length && !out)
		append(c, run + offset, length, KVMPY_REC_WHAT_RUN);
	if (has_ring(vcpu)) {
		uint64_t ring = read_number(c->source, run + RUN_RING, 8);
		uint64_t before = __atomic_load_n(&vcpu->vm->coalesced, __ATOMIC_SEQ_CST);
		/* The host takes writes out of it; where it sets the end, too, no vCPU is about to write there. */
		bool alone = !__atomic_fetch_add(&vcpu->vm->entered, 1, __ATOMIC_SEQ_CST);

		c->entered = vcpu->vm;
		if (ring != before && (alone || (uint32_t)ring != (uint32_t)before))
			append(c, run + RUN_RING, alone && ring >> 32 != before >> 32 ? 8 : 4, KVMPY_REC_WHAT_RUN);
	}
	if (now.valid_regs != vcpu->valid_regs || now.dirty_regs) {
		vcpu->valid_regs = now.valid_regs;
		append(c, run + RUN_SYNC_OFFSET, RUN_SYNC_SIZE, KVMPY_REC_WHAT_RUN);
	}
}

static void run_left(struct kvmpy_capture *c)
{
	if (c->entered)
		__atomic_fetch_sub(&c->entered->entered, 1, __ATOMIC_SEQ_CST);
	c->entered = NULL;
}

static void run_after(struct kvmpy_capture *c)
{
	struct kvmpy_object *vcpu = c->object;
	struct run_head now;
	uint64_t run = read_run(c, &now), offset, length;
	bool out;

	if (run) {
		memcpy(vcpu->shadow, now.head, KVMPY_RUN_HEAD);
		if (has_ring(vcpu)) {
			uint64_t ring = read_number(c->source, run + RUN_RING, 8);

			__atomic_store_n(&vcpu->vm->coalesced, ring, __ATOMIC_SEQ_CST);
		}
		tell_after(c, NULL, run, KVMPY_RUN_HEAD, KVMPY_REC_WHAT_RUN);
		length = io_data(vcpu, &offset, &out);
		if (length)
			tell_after(c, NULL, run + offset, length, KVMPY_REC_WHAT_RUN);
		if (now.valid_regs)
			tell_after(c, NULL, run + RUN_SYNC_OFFSET, RUN_SYNC_SIZE, KVMPY_REC_WHAT_RUN);
	}
	run_left(c);
}

/* An ioctl. */

static bool is_run(const struct kvmpy_capture *c)
{
	return c->request == KVM_RUN && c->object && c->object->kind == KVMPY_REC_KIND_VCPU;
}

/* The argument is at @place, @number bytes that can be read; without a place it is @number. */
void kvmpy_capture_enter(struct kvmpy_capture *c, struct kvmpy_object *object, int fd, uint32_t request,
			 const void *place, uint64_t number)
{
	const struct kvmpy_plan_node *node = plan_find(request, object);

	c->object = object;
	c->fd = fd;
	c->request = request;
	c->arg = place ? (uint64_t)place : number;
	c->sure = place ? number : 0;
	c->data = c->scratch;
	c->room = c->scratch_size;
	c->length = c->mapped = 0;
	c->count = c->nr_out = c->done = 0;
	c->entered = NULL;
	if (is_run(c)) {
		run_before(c);
		return;
	}
	if (!node) {
		c->guess = plan_guess(request);
		node = &c->guess;
	}
	if (c->arg)
		walk(c, node, c->arg, NULL, 0);
}

/* After the ioctl: learn what it wrote, and how much that is. */
void kvmpy_capture_exit(struct kvmpy_capture *c, int64_t result)
{
	uint32_t number = 0;

	c->done = 1;
	if (is_run(c)) {
		run_after(c);
		return;
	}
	for (uint32_t i = 0; i < c->nr_out; i++) {
		struct kvmpy_piece piece = c->out[i];
		const struct kvmpy_plan_node *node = piece.node;

		/* What failed wrote nothing; but that a pointer led somewhere is part of what was asked. */
		if (result < 0 && !(node->direction & KVMPY_PLAN_IN) && piece.what == KVMPY_REC_WHAT_ARGUMENT)
			continue;
		if (node->flags & KVMPY_PLAN_OWN) {
			uint64_t count = read_number(c->source, piece.address + node->count, node->count_size);
			uint64_t now = result < 0 ? node->reads : length_of(node, count);

			piece.length = now < piece.length ? now : piece.length;
		}
		c->out[number++] = piece;
	}
	c->nr_out = number;
}

void kvmpy_capture_end(struct kvmpy_capture *c)
{
	run_left(c);
	if (c->mapped)
		raw(SYS_munmap, c->data, c->mapped, 0, 0);
	c->mapped = 0;
}

/* The most bytes that the frame's payload takes; after kvmpy_capture_exit() with what the ioctl wrote. */
uint64_t kvmpy_capture_size(const struct kvmpy_capture *c)
{
	uint64_t size = sizeof(struct kvmpy_rec_ioctl) + c->length;

	for (uint32_t i = 0; c->done && i < c->nr_out; i++)
		size += padded(cut(c->out[i].length));
	return size;
}

/* Write the payload; return its length. Both ends are 0 where the ioctl is in flight. */
uint64_t kvmpy_capture_fill(const struct kvmpy_capture *c, uint8_t *place, int64_t result, int error,
			    uint64_t end_order, uint64_t end_ns)
{
	uint32_t number = c->done ? c->nr_out : 0;
	struct kvmpy_rec_ioctl head = {
		.object = c->object ? c->object->id : 0,
		.fd = c->fd,
		.request = c->request,
		.arg = c->arg,
		.result = result,
		.error = (uint32_t)error,
		.chunks = (uint16_t)(c->count + number),
		.end_order = end_order,
		.end_ns = end_ns,
	};
	uint8_t *at = place + sizeof head;

	memcpy(place, &head, sizeof head);
	if (c->length)
		memcpy(at, c->data, c->length);
	at += c->length;
	for (uint32_t i = 0; i < number; i++) {
		const struct kvmpy_piece *piece = &c->out[i];

		at += put_chunk(c, at, piece->address, piece->length, KVMPY_REC_WHEN_OUT, (uint8_t)piece->what);
	}
	return (uint64_t)(at - place);
}
