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
	struct kvmpy_rec_close payload = { .object = object->known.id };

	if (atomic_load(&object->refs) == 1) {
		frame_simple(KVMPY_REC_CLOSE, &payload, sizeof payload, NULL, 0);
		kvmpy_object_end(&object->known);
		memory_forget(object);
	}
	atomic_fetch_sub(&object->refs, 1);
}

static void fd_set_object(int fd, uint16_t index)
{
	uint16_t old = atomic_exchange(&fds[fd], index);

	if (old && old != NOT_KVM)
		object_release(&objects[old - 1]);
}

static void object_new(int fd, uint32_t kind, struct kvmpy_object *maker, uint32_t vm_type, uint64_t order,
		       const char *name)
{
	struct object *object = in_table(fd) ? object_take() : NULL;
	struct kvmpy_rec_object payload = { .fd = fd, .kind = kind, .made_by = order };

	payload.id = atomic_fetch_add(&control->objects, 1) + 1;
	payload.parent = maker ? maker->id : 0;
	if (object) {
		kvmpy_object_init(&object->known, payload.id, kind, maker, vm_type, name);
		atomic_store(&object->dumped, 0);
		fd_set_object(fd, (uint16_t)(object - objects + 1));
	}
	frame_simple(KVMPY_REC_OBJECT, &payload, sizeof payload, name, strlen(name));
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
		snprintf(name, sizeof name, "%s", target);
	else if (row->kind == KVMPY_REC_KIND_VM)
		snprintf(name, sizeof name, "vm%u", atomic_fetch_add(&control->vms, 1));
	else
		snprintf(name, sizeof name, "%s%s%s", row->of_vm ? "vm?/" : "", row->name, target + row->length);
	object_new(fd, row ? row->kind : KVMPY_REC_KIND_OTHER, NULL, 0, 0, name);
	return object_of(fd);
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
			object_new(fd, KVMPY_REC_KIND_SYSTEM, NULL, 0, 0, "kvm");
	} else if (!strcmp(path, "/dev/sev")) {
		if (recording())
			object_new(fd, KVMPY_REC_KIND_SEV, NULL, 0, 0, "sev");
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

void note_created(struct kvmpy_capture *c, int64_t result)
{
	struct kvmpy_made made;

	if (kvmpy_capture_made(c, result, (uint32_t *)&control->vms, &made))
		object_new(made.fd, made.kind, c->object, (uint32_t)c->arg, c->order, made.name);
}

void run_mapped(int fd, void *address, uint64_t length, uint64_t offset, int flags)
{
	struct object *object = object_of(fd);
	struct kvmpy_rec_map payload = { .address = (uint64_t)address, .length = length, .offset = offset };

	if (!object || !recording())
		return;
	payload.object = object->known.id;
	payload.flags = flags & MAP_SHARED ? KVMPY_REC_MAP_SHARED : 0;
	frame_simple(KVMPY_REC_MAP, &payload, sizeof payload, NULL, 0);
	if (object->known.kind == KVMPY_REC_KIND_VCPU && offset == 0 && length >= SIZE_kvm_run) {
		object->known.run_length = length;
		__atomic_store_n(&object->known.run, (uint64_t)address, __ATOMIC_RELEASE);
	}
}

void run_unmapped(void *address, uint64_t length)
{
	for (size_t i = 0; i < atomic_load_explicit(&nr_objects, memory_order_relaxed); i++) {
		uint64_t run = __atomic_load_n(&objects[i].known.run, __ATOMIC_RELAXED);

		if (!run || run - (uint64_t)address >= length)
			continue;
		struct kvmpy_rec_map payload = { .address = (uint64_t)address, .length = length };

		__atomic_store_n(&objects[i].known.run, 0, __ATOMIC_RELEASE);
		if (recording())
			frame_simple(KVMPY_REC_UNMAP, &payload, sizeof payload, NULL, 0);
	}
}
