/* SPDX-License-Identifier: Apache-2.0 */
/* Which file descriptor is what: objects are learned from open() and from the results of KVM's ioctls. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "recorder.h"

#define MAX_FDS 65536
#define MAX_OBJECTS 4096
#define NOT_KVM 0xffff

static struct object objects[MAX_OBJECTS];
static _Atomic uint32_t nr_objects; /* none was ever used at or beyond this index */
static _Atomic uint16_t fds[MAX_FDS]; /* index of the object + 1, 0 unknown */

static bool in_table(int fd)
{
	return fd >= 0 && fd < MAX_FDS;
}

struct object *object_of(int fd)
{
	uint16_t index = in_table(fd) ? atomic_load_explicit(&fds[fd], memory_order_acquire) : 0;

	return index && index != NOT_KVM ? &objects[index - 1] : NULL;
}

static struct object *object_take(void)
{
	for (size_t i = 0; i < MAX_OBJECTS; i++) {
		uint32_t none = 0;

		if (!atomic_compare_exchange_strong(&objects[i].refs, &none, 1))
			continue;
		uint32_t most = atomic_load(&nr_objects);

		while (most < i + 1 && !atomic_compare_exchange_weak(&nr_objects, &most, (uint32_t)i + 1))
			;
		return &objects[i];
	}
	return NULL;
}

static void object_release(struct object *object)
{
	struct kvmpy_rec_close payload = { .object = object->id };

	if (atomic_load(&object->refs) == 1) {
		frame_simple(KVMPY_REC_CLOSE, &payload, sizeof payload, NULL, 0);
		struct slot *slots = atomic_exchange(&object->slots, NULL);

		if (slots)
			raw(SYS_munmap, slots, MAX_SLOTS * sizeof *slots, 0, 0);
		memory_forget(object);
		atomic_store(&object->run, NULL);
	}
	atomic_fetch_sub(&object->refs, 1);
}

static void fd_set_object(int fd, uint16_t index)
{
	uint16_t old = atomic_exchange(&fds[fd], index);

	if (old && old != NOT_KVM)
		object_release(&objects[old - 1]);
}

struct object *object_new(int fd, uint32_t kind, struct object *vm, uint64_t order, const char *name)
{
	struct object *object = in_table(fd) ? object_take() : NULL;
	struct kvmpy_rec_object payload = { .fd = fd, .kind = kind, .made_by = order };

	payload.id = atomic_fetch_add(&control->objects, 1) + 1;
	payload.parent = vm ? vm->id : 0;
	if (object) {
		object->id = payload.id;
		object->kind = kind;
		object->vm = vm;
		object->vm_type = vm ? vm->vm_type : 0;
		object->next_gmem = 0;
		atomic_store(&object->dumped, 0);
		object->xsave_size = vm ? vm->xsave_size : 0;
		atomic_store(&object->run, NULL);
		object->run_length = 0;
		memset(object->shadow, 0, sizeof object->shadow);
		object->coalesced = 0;
		object->entered = 0;
		object->valid_regs = 0;
		snprintf(object->name, sizeof object->name, "%s", name);
		fd_set_object(fd, (uint16_t)(object - objects + 1));
	}
	frame_simple(KVMPY_REC_OBJECT, &payload, sizeof payload, name, strlen(name));
	return object;
}

/* Read what /proc says of a descriptor; return the row of the table, NULL for another file. */
static const struct kvmpy_link *link_of(int fd, char target[64])
{
	char path[64];

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	long length = raw(SYS_readlinkat, AT_FDCWD, path, target, 63);

	target[length < 0 ? 0 : length] = 0;
	if (length > 10 && !strcmp(target + length - 10, " (deleted)"))
		target[length - 10] = 0;
	for (size_t i = 0; i < ROWS(kvmpy_link_table); i++) {
		const struct kvmpy_link *row = &kvmpy_link_table[i];

		if (row->is_open ? !strncmp(target, row->text, row->length) : !strcmp(target, row->text))
			return row;
	}
	return NULL;
}

/* A descriptor nobody saw being made; with foreign also what takes no ioctls of KVM. */
struct object *object_find(int fd, bool foreign)
{
	char target[64], name[80];
	uint16_t unknown = 0;

	if (!in_table(fd) || (!foreign && atomic_load(&fds[fd]) == NOT_KVM))
		return NULL;
	const struct kvmpy_link *row = link_of(fd, target);

	if (!target[0])
		return NULL;
	if (!foreign && !(row && row->kvm)) {
		atomic_compare_exchange_strong(&fds[fd], &unknown, NOT_KVM);
		return NULL;
	}
	if (!row)
		return object_new(fd, KVMPY_REC_KIND_OTHER, NULL, 0, target);
	if (row->kind == KVMPY_REC_KIND_VM)
		snprintf(name, sizeof name, "vm%u", atomic_fetch_add(&control->vms, 1));
	else
		snprintf(name, sizeof name, "%s%s%s", row->of_vm ? "vm?/" : "", row->name, target + row->length);
	return object_new(fd, row->kind, NULL, 0, name);
}

void objects_inherited(void)
{
	for (int fd = 0; fd < 256; fd++) {
		char target[64];
		const struct kvmpy_link *row = link_of(fd, target);

		if (row && row->kvm && recording())
			object_find(fd, false);
	}
}

void object_opened(int fd, const char *path)
{
	if (fd < 0)
		return;
	if (!strcmp(path, "/dev/kvm")) {
		if (recording())
			object_new(fd, KVMPY_REC_KIND_SYSTEM, NULL, 0, "kvm");
	} else if (!strcmp(path, "/dev/sev")) {
		if (recording())
			object_new(fd, KVMPY_REC_KIND_SEV, NULL, 0, "sev");
	} else if (in_table(fd) && atomic_load_explicit(&fds[fd], memory_order_relaxed)) {
		/* The number was closed behind our back. */
		fd_set_object(fd, 0);
	}
}

void object_dup(int from, int to)
{
	uint16_t index = in_table(from) ? atomic_load(&fds[from]) : 0;

	if (from == to || !in_table(to))
		return;
	if (index && index != NOT_KVM)
		atomic_fetch_add(&objects[index - 1].refs, 1);
	fd_set_object(to, index);
}

void object_close(int fd)
{
	if (in_table(fd) && atomic_load_explicit(&fds[fd], memory_order_relaxed))
		fd_set_object(fd, 0);
}

void slot_set(struct object *vm, uint32_t id, uint64_t hva, uint64_t size)
{
	struct slot *slots = atomic_load(&vm->slots), *place = NULL;

	if (!slots) {
		struct slot *none = NULL, *made = mmap(NULL, MAX_SLOTS * sizeof *slots, PROT_READ | PROT_WRITE,
						       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (made == MAP_FAILED)
			return;
		if (!atomic_compare_exchange_strong(&vm->slots, &none, made))
			raw(SYS_munmap, made, MAX_SLOTS * sizeof *slots, 0, 0);
		slots = atomic_load(&vm->slots);
	}
	for (size_t i = 0; i < MAX_SLOTS; i++) {
		if (slots[i].used && slots[i].id == id) {
			place = &slots[i];
			break;
		}
		if (!slots[i].used && !place)
			place = &slots[i];
	}
	if (place)
		*place = (struct slot){ .id = id, .used = size != 0, .hva = hva, .size = size };
}

uint64_t slot_pages(const struct object *object, uint32_t id)
{
	const struct slot *slots = object ? atomic_load(&object->slots) : NULL;

	for (size_t i = 0; slots && i < MAX_SLOTS; i++)
		if (slots[i].used && slots[i].id == id)
			return slots[i].size / PAGE;
	return 0;
}

void note_created(struct object *object, uint64_t request, uint64_t arg, long result, uint64_t order)
{
	struct object *vm = object->kind == KVMPY_REC_KIND_VM ? object : object->vm;
	const uint8_t *argument = (const uint8_t *)arg;
	const struct kvmpy_maker *maker = NULL;
	char name[64];

	if (vm && (request == KVM_SET_USER_MEMORY_REGION || request == KVM_SET_USER_MEMORY_REGION2))
		slot_set(vm, *(const uint32_t *)(argument + AT_kvm_userspace_memory_region_slot),
			 *(const uint64_t *)(argument + AT_kvm_userspace_memory_region_userspace_addr),
			 *(const uint64_t *)(argument + AT_kvm_userspace_memory_region_memory_size));
	if (request == KVM_CHECK_EXTENSION && arg == KVM_CAP_XSAVE2)
		object->xsave_size = (uint64_t)result;
	for (size_t i = 0; i < ROWS(kvmpy_maker_table) && !maker; i++)
		if (kvmpy_maker_table[i].request == request)
			maker = &kvmpy_maker_table[i];
	if (!maker)
		return;
	switch (maker->kind) {
	case KVMPY_REC_KIND_VM:
		snprintf(name, sizeof name, "vm%u", atomic_fetch_add(&control->vms, 1));
		break;
	case KVMPY_REC_KIND_VCPU:
		snprintf(name, sizeof name, "%s/vcpu%lu", object->name, (unsigned long)arg);
		break;
	case KVMPY_REC_KIND_GMEM:
		snprintf(name, sizeof name, "%s/gmem%u", object->name, object->next_gmem++);
		break;
	case KVMPY_REC_KIND_DEVICE:
		if (*(const uint32_t *)(argument + AT_kvm_create_device_flags) & KVM_CREATE_DEVICE_TEST)
			return;
		snprintf(name, sizeof name, "%s/device%u", object->name,
			 *(const uint32_t *)(argument + AT_kvm_create_device_type));
		break;
	default:
		snprintf(name, sizeof name, "%s/stats", object->name);
	}
	if (maker->offset >= 0)
		result = *(const int *)(argument + maker->offset);
	object = object_new((int)result, maker->kind, object, order, name);
	if (object && maker->kind == KVMPY_REC_KIND_VM) {
		object->vm = NULL;
		object->vm_type = (uint32_t)arg;
	}
}

void run_mapped(int fd, void *address, uint64_t length, uint64_t offset, int flags)
{
	struct object *object = object_of(fd);
	struct kvmpy_rec_map payload = { .address = (uint64_t)address, .length = length, .offset = offset };

	if (!object || !recording())
		return;
	payload.object = object->id;
	payload.flags = flags & MAP_SHARED ? KVMPY_REC_MAP_SHARED : 0;
	frame_simple(KVMPY_REC_MAP, &payload, sizeof payload, NULL, 0);
	if (object->kind == KVMPY_REC_KIND_VCPU && offset == 0 && length >= RUN_SYNC_OFFSET + RUN_SYNC_SIZE) {
		object->run_length = length;
		atomic_store_explicit(&object->run, address, memory_order_release);
	}
}

void run_unmapped(void *address, uint64_t length)
{
	for (size_t i = 0; i < atomic_load_explicit(&nr_objects, memory_order_relaxed); i++) {
		uint8_t *run = atomic_load_explicit(&objects[i].run, memory_order_relaxed);

		if (!run || run < (uint8_t *)address || run >= (uint8_t *)address + length)
			continue;
		struct kvmpy_rec_map payload = { .address = (uint64_t)address, .length = length };

		atomic_store(&objects[i].run, NULL);
		if (recording())
			frame_simple(KVMPY_REC_UNMAP, &payload, sizeof payload, NULL, 0);
	}
}
