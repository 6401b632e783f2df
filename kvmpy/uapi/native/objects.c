/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is remembered of KVM's objects from one ioctl to the next, and what an ioctl means for them: the second part of
 * the engine that capture.c begins.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>

/* KVM has fewer than 32768 slots in each of two address spaces: those of one number lie side by side. */
#define MOST_SLOTS 65536U

/* The VM that an object belongs to: a vCPU's statistics are two steps away from it. No more are taken, since the
 * preloaded recorder may use the room of a VM that was closed under its vCPUs for what these make.
 */
struct kvmpy_object *kvmpy_object_owner(struct kvmpy_object *object)
{
	for (int step = 0; step < 2 && object && object->vm; step++)
		object = object->vm;
	return object;
}

void kvmpy_object_init(struct kvmpy_object *object, uint32_t id, uint32_t kind, struct kvmpy_object *maker,
		       uint32_t vm_type, const char *name)
{
	*object = (struct kvmpy_object){
		.id = id,
		.kind = kind,
		.vm = kind == KVMPY_REC_KIND_VM ? NULL : maker,
		.vm_type = vm_type,
		.xsave_size = maker ? maker->xsave_size : 0,
	};
	snprintf(object->name, sizeof object->name, "%s", name);
}

void kvmpy_object_end(struct kvmpy_object *object)
{
	struct kvmpy_slot *slots = __atomic_exchange_n(&object->slots, NULL, __ATOMIC_ACQ_REL);

	if (slots)
		raw(SYS_munmap, slots, MOST_SLOTS * sizeof *slots, 0, 0);
	__atomic_store_n(&object->run, 0, __ATOMIC_RELEASE);
}

static uint32_t slot_index(uint32_t id)
{
	return (id & 0x7fff) << 1 | (id >> 16 & 1);
}

static void slot_set(struct kvmpy_object *vm, uint32_t id, struct kvmpy_slot slot)
{
	struct kvmpy_slot *slots = __atomic_load_n(&vm->slots, __ATOMIC_ACQUIRE), *none = NULL;
	uint32_t index = slot_index(id), most = __atomic_load_n(&vm->nr_slots, __ATOMIC_RELAXED);

	if (!slots) {
		slots = map_anonymous(MOST_SLOTS * sizeof *slots);
		if (!slots)
			return;
		if (!__atomic_compare_exchange_n(&vm->slots, &none, slots, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
			raw(SYS_munmap, slots, MOST_SLOTS * sizeof *slots, 0, 0);
			slots = none;
		}
	}
	slots[index] = slot;
	while (most <= index && !__atomic_compare_exchange_n(&vm->nr_slots, &most, index + 1, false, __ATOMIC_RELEASE,
							     __ATOMIC_RELAXED))
		;
}

uint64_t kvmpy_slot_pages(const struct kvmpy_object *vm, uint32_t id)
{
	const struct kvmpy_slot *slots = vm ? __atomic_load_n(&vm->slots, __ATOMIC_ACQUIRE) : NULL;
	uint32_t index = slot_index(id);

	return slots && index < vm->nr_slots ? slots[index].size / CAPTURE_PAGE : 0;
}

static uint32_t word(const struct kvmpy_capture *c, uint32_t offset)
{
	return (uint32_t)read_number(c->source, c->arg + offset, 4);
}

static void learn_slot(const struct kvmpy_capture *c)
{
	uint64_t hva = read_number(c->source, c->arg + AT_kvm_userspace_memory_region_userspace_addr, 8);
	uint64_t size = read_number(c->source, c->arg + AT_kvm_userspace_memory_region_memory_size, 8);

	slot_set(kvmpy_object_owner(c->object), word(c, AT_kvm_userspace_memory_region_slot),
		 (struct kvmpy_slot){ hva, size });
}

/*
 * Learn from an ioctl that succeeded; return whether it made an object. @vms counts the VMs that got a name, NULL for
 * those that @c->object made.
 */
int kvmpy_capture_made(const struct kvmpy_capture *c, int64_t result, uint32_t *vms, struct kvmpy_made *made)
{
	struct kvmpy_object *object = c->object;
	const struct kvmpy_maker *maker = NULL;
	char above[sizeof object->name + 1] = "", number[12] = "";
	uint32_t *count;

	if (!object)
		return 0;
	for (size_t i = 0; i < CAPTURE_ROWS(kvmpy_slot_setter_table); i++)
		if (kvmpy_slot_setter_table[i].request == c->request)
			learn_slot(c);
	if (c->request == KVM_CHECK_EXTENSION && c->arg == KVM_CAP_XSAVE2)
		object->xsave_size = (uint64_t)result;
	for (size_t i = 0; i < CAPTURE_ROWS(kvmpy_maker_table) && !maker; i++)
		if (kvmpy_maker_table[i].request == c->request)
			maker = &kvmpy_maker_table[i];
	if (!maker || (maker->mask && word(c, maker->unless) & maker->mask))
		return 0;
	switch (maker->number) {
	case KVMPY_MADE_ALONE:
		break;
	case KVMPY_MADE_ARG:
		snprintf(number, sizeof number, "%u", (uint32_t)c->arg);
		break;
	case KVMPY_MADE_COUNT:
		count = maker->kind == KVMPY_REC_KIND_VM && vms ? vms : &object->made;
		snprintf(number, sizeof number, "%u", __atomic_fetch_add(count, 1, __ATOMIC_SEQ_CST));
		break;
	default:
		snprintf(number, sizeof number, "%u", word(c, (uint32_t)maker->number));
	}
	if (object->kind != KVMPY_REC_KIND_SYSTEM)
		snprintf(above, sizeof above, "%s/", object->name);
	made->kind = maker->kind;
	made->fd = maker->offset < 0 ? (int32_t)result : (int32_t)word(c, (uint32_t)maker->offset);
	snprintf(made->name, sizeof made->name, "%s%s%s", above, maker->name, number);
	return 1;
}

/* The descriptors in an argument whose objects no recorder saw being opened or made. */
uint32_t kvmpy_foreign_fds(const struct kvmpy_source *source, uint32_t request, uint64_t arg, int32_t *fds,
			   uint32_t most)
{
	uint32_t number = 0;

	for (size_t i = 0; i < CAPTURE_ROWS(kvmpy_fd_field_table) && number < most; i++) {
		const struct kvmpy_fd_field *row = &kvmpy_fd_field_table[i];

		if (row->request == request && (read_number(source, arg + row->where, 4) & row->mask) == row->value &&
		    kvmpy_source_read(source, &fds[number], arg + row->offset, 4) == 4)
			number++;
	}
	return number;
}
