/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an ioctl reads and writes, by the plan. The program's pointers may be wrong: rt_sigprocmask() with an
 * operation that does not exist reads 8 bytes at an address, changes nothing, and says EFAULT where it could not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "recorder.h"

#define SCRATCH (64UL << 10)
#define MOST_BYTES (1UL << 20) /* of one chunk; what is longer is cut */
#define NO_OPERATION 99
#define PROBE_PAGES 16
#define RUN_RING (2 * PAGE) /* struct kvm_coalesced_mmio_ring: first, last, both modulo its size */

static const struct kvmpy_plan *plan;
static const struct kvmpy_plan_root *roots;
static const struct kvmpy_plan_node *nodes;
static const struct kvmpy_plan_case *cases;

static __thread uint8_t *scratch __attribute__((tls_model("initial-exec")));
static __thread bool scratch_busy __attribute__((tls_model("initial-exec")));

bool capture_start(const char *directory)
{
	char path[PATH_MAX];
	struct stat info;

	if (snprintf(path, sizeof path, "%s/plan", directory) >= (int)sizeof path)
		return false;
	int fd = (int)raw(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);

	if (fd < 0)
		return false;
	if (fstat(fd, &info) == 0 && info.st_size > (off_t)sizeof *plan)
		plan = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	raw(SYS_close, fd, 0, 0, 0);
	if (!plan || plan == MAP_FAILED || plan->magic != KVMPY_PLAN_MAGIC) {
		plan = NULL;
		return false;
	}
	roots = (const void *)(plan + 1);
	nodes = (const void *)(roots + plan->nr_roots);
	cases = (const void *)(nodes + plan->nr_nodes);
	return true;
}

const struct kvmpy_plan_node *plan_find(uint64_t request, const struct object *object)
{
	size_t low = 0, high = plan->nr_roots;

	if (request == KVM_MEMORY_ENCRYPT_OP && object && object->vm_type == KVM_X86_TDX_VM)
		return &nodes[plan->tdx_node];
	while (low < high) {
		size_t middle = (low + high) / 2;

		if (roots[middle].request < request)
			low = middle + 1;
		else
			high = middle;
	}
	return low < plan->nr_roots && roots[low].request == request ? &nodes[roots[low].node] : NULL;
}

/* A request that the plan lacks: its number tells size and direction of the argument. */
bool plan_guess(uint64_t request, struct kvmpy_plan_node *node)
{
	*node = (struct kvmpy_plan_node){
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
	return node->direction && node->base;
}

static bool page_readable(uint64_t address)
{
	return raw(SYS_rt_sigprocmask, NO_OPERATION, address & ~7ULL, NULL, 8) != -EFAULT;
}

/* How many of the bytes can be read. */
uint64_t readable(const void *pointer, uint64_t length)
{
	uint64_t address = (uint64_t)pointer, end = address + length;

	if (end < address)
		return 0;
	for (uint64_t page = address & ~(PAGE - 1); page < end; page += PAGE)
		if (!page_readable(page < address ? address : page))
			return page <= address ? 0 : page - address;
	return length;
}

/* Copy what can be read; return how much that was. */
uint64_t copy_from(void *to, uint64_t address, uint64_t length)
{
	if (length > PROBE_PAGES * PAGE) {
		struct iovec local = { to, length }, remote = { (void *)address, length };
		long got = raw6(SYS_process_vm_readv, raw(SYS_getpid, 0, 0, 0, 0), (long)&local, 1, (long)&remote, 1, 0);

		if (got >= 0 || got == -EFAULT)
			return got < 0 ? 0 : (uint64_t)got;
	}
	length = readable((const void *)address, length);
	memcpy(to, (const void *)address, length);
	return length;
}

static uint64_t number_at(const uint8_t *place, uint32_t size)
{
	uint64_t value = 0;

	memcpy(&value, place, size < 8 ? size : 8);
	return value;
}

static uint64_t length_of(const struct kvmpy_plan_node *node, uint64_t count)
{
	uint64_t length;

	if (count > MOST_BYTES * 8)
		count = MOST_BYTES * 8;
	length = node->base + (count * node->unit + node->per - 1) / node->per;
	length = (length + node->round - 1) / node->round * node->round;
	return length < node->least ? node->least : length;
}

static uint8_t *room_for(struct chunk_list *list, uint64_t length)
{
	uint64_t needed = list->length + sizeof(struct kvmpy_rec_chunk) + ((length + 7) & ~7ULL);

	if (needed > list->room) {
		uint64_t room = (needed * 2 + PAGE - 1) & ~(PAGE - 1);
		uint8_t *larger = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (larger == MAP_FAILED)
			return NULL;
		memcpy(larger, list->data, list->length);
		if (list->mapped)
			raw(SYS_munmap, list->data, list->mapped, 0, 0);
		list->data = larger;
		list->room = list->mapped = room;
	}
	return list->data + list->length;
}

/* Write a chunk to *place*; return its length with padding. */
static uint64_t put_chunk(uint8_t *place, uint64_t address, uint64_t length, uint8_t when, uint8_t what)
{
	struct kvmpy_rec_chunk *chunk = (struct kvmpy_rec_chunk *)place;
	uint8_t *data = place + sizeof *chunk;
	uint64_t wanted = length, got;

	if (length > MOST_BYTES)
		length = MOST_BYTES;
	got = copy_from(data, address, length);
	*chunk = (struct kvmpy_rec_chunk){ .address = address, .length = (uint32_t)got, .when = when, .what = what };
	if (got < wanted)
		chunk->flags = KVMPY_REC_CUT;
	memset(data + got, 0, -got & 7);
	return sizeof *chunk + ((got + 7) & ~7ULL);
}

/* Append a chunk; return where its content is, NULL for nowhere. */
static const uint8_t *append(struct chunk_list *list, uint64_t address, uint64_t length, uint8_t when, uint8_t what,
			     uint64_t *got)
{
	uint8_t *place = room_for(list, length > MOST_BYTES ? MOST_BYTES : length);

	*got = 0;
	if (!place)
		return NULL;
	list->length += put_chunk(place, address, length, when, what);
	list->count++;
	*got = ((struct kvmpy_rec_chunk *)place)->length;
	return place + sizeof(struct kvmpy_rec_chunk);
}

void capture_begin(struct capture *capture)
{
	capture->nr_out = 0;
	capture->in = (struct chunk_list){ 0 };
	capture->owns_scratch = false;
	/* A signal handler on top of an ioctl of the same thread maps memory of its own where it needs some. */
	if (scratch_busy)
		return;
	if (!scratch) {
		uint8_t *made = mmap(NULL, SCRATCH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (made == MAP_FAILED)
			return;
		scratch = made;
	}
	scratch_busy = capture->owns_scratch = true;
	capture->in.data = scratch;
	capture->in.room = SCRATCH;
}

void capture_end(struct capture *capture)
{
	if (capture->in.mapped)
		raw(SYS_munmap, capture->in.data, capture->in.mapped, 0, 0);
	if (capture->owns_scratch)
		scratch_busy = false;
}

static uint64_t special_length(const struct kvmpy_plan_node *node, const uint8_t *parent, const struct object *object)
{
	const struct object *vm = object && object->vm && object->kind == KVMPY_REC_KIND_VCPU ? object->vm : object;

	switch (node->special) {
	case KVMPY_PLAN_SLOT_BITMAP:
		return (slot_pages(vm, (uint32_t)number_at(parent, 4)) + 63) / 64 * 8;
	case KVMPY_PLAN_XSAVE:
		return vm && vm->xsave_size > node->base ? vm->xsave_size : node->base;
	default:
		return 1ULL << (number_at(parent, 8) >> 52 & 15);
	}
}

static void walk(struct capture *capture, const struct kvmpy_plan_node *node, uint64_t address, const uint8_t *parent,
		 const struct object *object, int depth)
{
	uint8_t head[8], what = depth ? KVMPY_REC_WHAT_NESTED : KVMPY_REC_WHAT_ARGUMENT;
	uint64_t length, count = 0, got = 0;
	const uint8_t *content;

	if (node->flags & KVMPY_PLAN_GUEST)
		return;
	if (node->special) {
		length = special_length(node, parent, object);
	} else {
		if (node->count != KVMPY_PLAN_NO_FIELD) {
			if (!(node->flags & KVMPY_PLAN_OWN))
				count = number_at(parent + node->count, node->count_size);
			else if (copy_from(head, address + node->count, node->count_size) == node->count_size)
				count = number_at(head, node->count_size);
		}
		length = length_of(node, count);
	}
	if (!length && !depth)
		return;
	if (node->direction & KVMPY_PLAN_OUT && capture->nr_out < MAX_PENDING)
		capture->out[capture->nr_out++] = (struct pending){ node, address, length };
	/* What is only written is not read here; nor is an argument without pointers to follow. */
	if (!(node->direction & KVMPY_PLAN_IN) || !length)
		return;
	uint64_t before = capture->in.length;

	content = append(&capture->in, address, length < node->reads ? length : node->reads, KVMPY_REC_WHEN_IN, what, &got);
	if (!content || depth > 2 || got < length)
		return;
	uint32_t first[2] = { node->children, 0 }, number[2] = { node->nr_children, 0 };

	if (node->select != KVMPY_PLAN_NO_FIELD) {
		uint64_t selected = number_at(content + node->select, 4);

		for (uint32_t i = 0; i < node->nr_cases; i++)
			if (cases[node->cases + i].value == selected) {
				first[1] = cases[node->cases + i].children;
				number[1] = cases[node->cases + i].nr_children;
			}
	}
	for (int set = 0; set < 2; set++)
		for (uint32_t i = 0; i < number[set]; i++) {
			const struct kvmpy_plan_node *child = &nodes[first[set] + i];

			/* The list may have moved. */
			content = capture->in.data + before + sizeof(struct kvmpy_rec_chunk);
			uint64_t pointer = number_at(content + child->pointer, 8);

			if (pointer && (child->when == KVMPY_PLAN_NO_FIELD || content[child->when]))
				walk(capture, child, pointer, content, object, depth + 1);
		}
}

void capture_in(struct capture *capture, const struct kvmpy_plan_node *node, uint64_t address,
		const struct object *object)
{
	if (address)
		walk(capture, node, address, NULL, object, 0);
}

/* Where the data of the last KVM_EXIT_IO lies in the run area, and how much it is. */
static uint64_t io_data(const uint8_t *head, uint64_t run_length, uint64_t *offset, bool *out)
{
	uint64_t length;

	if (number_at(head + AT_kvm_run_exit_reason, 4) != KVM_EXIT_IO)
		return 0;
	length = number_at(head + AT_kvm_run_io_size, 1) * number_at(head + AT_kvm_run_io_count, 4);
	*offset = number_at(head + AT_kvm_run_io_data_offset, 8);
	*out = head[AT_kvm_run_io_direction];
	return *offset >= PAGE && *offset < run_length && length <= run_length - *offset ? length : 0;
}

void capture_run_in(struct capture *capture, struct object *vcpu)
{
	uint8_t *run = atomic_load_explicit(&vcpu->run, memory_order_acquire);
	uint64_t offset, length, got;
	bool out;

	if (!run || !readable(run, RUN_HEAD))
		return;
	if (memcmp(run, vcpu->shadow, RUN_HEAD))
		append(&capture->in, (uint64_t)run, RUN_HEAD, KVMPY_REC_WHEN_IN, KVMPY_REC_WHAT_RUN, &got);
	length = io_data(vcpu->shadow, vcpu->run_length, &offset, &out);
	if (length && !out)
		append(&capture->in, (uint64_t)run + offset, length, KVMPY_REC_WHEN_IN, KVMPY_REC_WHAT_RUN, &got);
	if (vcpu->vm && vcpu->run_length >= RUN_RING + PAGE) {
		uint64_t ring = number_at(run + RUN_RING, 8), before = atomic_load(&vcpu->vm->coalesced);
		/* The host takes writes out of it; where it sets the end, too, no vCPU is about to write there. */
		bool alone = !atomic_fetch_add(&vcpu->vm->entered, 1);

		if (ring != before && (alone || (uint32_t)ring != (uint32_t)before))
			append(&capture->in, (uint64_t)run + RUN_RING, alone && ring >> 32 != before >> 32 ? 8 : 4,
			       KVMPY_REC_WHEN_IN, KVMPY_REC_WHAT_RUN, &got);
	}
	/* kvm_valid_regs asks, kvm_dirty_regs gives. */
	if (number_at(run + RUN_SYNC_OFFSET, 8) != vcpu->valid_regs || number_at(run + RUN_SYNC_OFFSET + 8, 8)) {
		vcpu->valid_regs = number_at(run + RUN_SYNC_OFFSET, 8);
		append(&capture->in, (uint64_t)run + RUN_SYNC_OFFSET, RUN_SYNC_SIZE, KVMPY_REC_WHEN_IN, KVMPY_REC_WHAT_RUN,
		       &got);
	}
}

struct piece {
	uint64_t address;
	uint64_t length;
	uint8_t what;
};

static uint32_t run_pieces(struct object *vcpu, struct piece *pieces)
{
	uint8_t *run = atomic_load_explicit(&vcpu->run, memory_order_acquire);
	uint64_t offset, length;
	uint32_t number = 0;
	bool out;

	if (!run || !readable(run, RUN_HEAD))
		return 0;
	memcpy(vcpu->shadow, run, RUN_HEAD);
	if (vcpu->vm && vcpu->run_length >= RUN_RING + PAGE) {
		atomic_store(&vcpu->vm->coalesced, number_at(run + RUN_RING, 8));
		atomic_fetch_sub(&vcpu->vm->entered, 1);
	}
	pieces[number++] = (struct piece){ (uint64_t)run, RUN_HEAD, KVMPY_REC_WHAT_RUN };
	length = io_data(vcpu->shadow, vcpu->run_length, &offset, &out);
	if (length)
		pieces[number++] = (struct piece){ (uint64_t)run + offset, length, KVMPY_REC_WHAT_RUN };
	if (number_at(run + RUN_SYNC_OFFSET, 8)) /* kvm_valid_regs */
		pieces[number++] = (struct piece){ (uint64_t)run + RUN_SYNC_OFFSET, RUN_SYNC_SIZE, KVMPY_REC_WHAT_RUN };
	return number;
}

static uint32_t out_pieces(struct capture *capture, int64_t result, uint64_t arg, struct piece *pieces)
{
	uint32_t number = 0;
	uint8_t head[8];

	for (uint32_t i = 0; i < capture->nr_out; i++) {
		const struct pending *out = &capture->out[i];
		const struct kvmpy_plan_node *node = out->node;
		uint64_t length = out->length;

		if (result < 0 && !(node->direction & KVMPY_PLAN_IN))
			continue;
		if (node->flags & KVMPY_PLAN_OWN) {
			uint64_t count = 0;

			if (copy_from(head, out->address + node->count, node->count_size) == node->count_size)
				count = number_at(head, node->count_size);
			uint64_t now = result < 0 ? node->reads : length_of(node, count);

			length = now < length ? now : length;
		}
		pieces[number++] = (struct piece){ out->address, length,
						   out->address == arg ? KVMPY_REC_WHAT_ARGUMENT : KVMPY_REC_WHAT_NESTED };
	}
	return number;
}

void record_ioctl(uint16_t type, const struct object *object, int fd, uint64_t request, uint64_t arg, int64_t result,
		  int error, uint64_t order, uint64_t start, struct capture *capture, struct object *vcpu)
{
	struct piece pieces[MAX_PENDING + 4];
	uint32_t number = 0;
	uint64_t size = sizeof(struct kvmpy_rec_ioctl) + capture->in.length;
	bool done = type == KVMPY_REC_IOCTL;

	if (done)
		number = vcpu ? run_pieces(vcpu, pieces) : out_pieces(capture, result, arg, pieces);
	for (uint32_t i = 0; i < number; i++)
		size += sizeof(struct kvmpy_rec_chunk) + (((pieces[i].length < MOST_BYTES ? pieces[i].length : MOST_BYTES) + 7) & ~7ULL);
	struct kvmpy_rec_ioctl head = {
		.object = object ? object->id : 0,
		.fd = fd,
		.request = request,
		.arg = arg,
		.result = result,
		.error = (uint32_t)error,
		.chunks = (uint16_t)(capture->in.count + number),
		.end_order = done ? next_order() : 0,
		.end_ns = done ? now_ns() : 0,
	};
	uint8_t *place = frame_begin(type, size, order, start), *payload = place;

	if (!place)
		return;
	memcpy(place, &head, sizeof head);
	place += sizeof head;
	if (capture->in.length)
		memcpy(place, capture->in.data, capture->in.length);
	place += capture->in.length;
	for (uint32_t i = 0; i < number; i++)
		place += put_chunk(place, pieces[i].address, pieces[i].length, KVMPY_REC_WHEN_OUT, pieces[i].what);
	/* Fewer bytes than reserved, where memory could not be read after all: readers stop at the count of chunks. */
	frame_commit(payload);
}
