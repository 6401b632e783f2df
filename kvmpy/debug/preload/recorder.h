/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the preloaded recorder know of one another. */
#ifndef KVMPY_PRELOAD_RECORDER_H
#define KVMPY_PRELOAD_RECORDER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../record/format.h"
#include "ring.h"
#include "tables.h"

#define HIDDEN __attribute__((visibility("hidden")))
#define PAGE 4096UL

#define ROWS(table) (sizeof(table) / sizeof *(table))

/* the part of struct kvm_run that every exit may have written, and what kvm_valid_regs asks for */
#define RUN_HEAD AT_kvm_run_kvm_valid_regs
#define RUN_SYNC_OFFSET AT_kvm_run_kvm_valid_regs
#define RUN_SYNC_SIZE (SIZE_kvm_run - RUN_SYNC_OFFSET)

struct slot {
	uint32_t id;
	uint32_t used;
	uint64_t hva;
	uint64_t size;
};

#define MAX_SLOTS 1024

struct object {
	uint32_t id;
	uint32_t kind;
	struct object *vm; /* the VM of a vCPU, a device, a guest_memfd */
	_Atomic uint32_t refs;
	uint32_t vm_type;
	uint32_t next_gmem;
	_Atomic uint32_t dumped; /* 0: not yet, 1: being done, 2: its initial memory was told */
	_Atomic uint32_t memory_lock;
	uint32_t running; /* vCPUs in the guest */
	struct memory_state *memory;
	_Atomic(struct slot *) slots; /* MAX_SLOTS of a VM */
	uint64_t xsave_size;
	uint8_t *_Atomic run;
	uint64_t run_length;
	uint8_t shadow[RUN_HEAD]; /* the run area as the last KVM_RUN left it */
	uint64_t valid_regs; /* which registers the host asks for with KVM_RUN */
	_Atomic uint64_t coalesced; /* of a VM: the ends of its ring as the last KVM_RUN left them */
	_Atomic uint32_t entered; /* of a VM: vCPUs that are in KVM_RUN */
	char name[48];
};

struct chunk_list {
	uint8_t *data; /* chunks as they stand in a frame */
	uint64_t length;
	uint64_t room;
	uint32_t count;
	uint64_t mapped; /* bytes of data that were mapped for this call alone */
};

struct pending {
	const struct kvmpy_plan_node *node;
	uint64_t address;
	uint64_t length;
};

#define MAX_PENDING 24

struct capture {
	struct chunk_list in;
	struct pending out[MAX_PENDING];
	uint32_t nr_out;
	bool owns_scratch;
};

/* frames.c */
extern HIDDEN struct kvmpy_control *control;
HIDDEN bool frames_start(const char *directory);
HIDDEN bool recording(void);
HIDDEN uint64_t next_order(void);
HIDDEN uint64_t now_ns(void);
HIDDEN uint8_t *frame_begin(uint16_t type, uint64_t length, uint64_t order, uint64_t time_ns);
HIDDEN void frame_commit(uint8_t *payload);
HIDDEN void frame_simple(uint16_t type, const void *head, uint64_t head_length, const void *rest, uint64_t length);

/* capture.c */
HIDDEN bool capture_start(const char *directory);
HIDDEN uint64_t readable(const void *address, uint64_t length);
HIDDEN const struct kvmpy_plan_node *plan_find(uint64_t request, const struct object *object);
HIDDEN bool plan_guess(uint64_t request, struct kvmpy_plan_node *node);
HIDDEN void capture_begin(struct capture *capture);
HIDDEN void capture_end(struct capture *capture);
HIDDEN void capture_in(struct capture *capture, const struct kvmpy_plan_node *node, uint64_t address,
		       const struct object *object);
HIDDEN void capture_run_in(struct capture *capture, struct object *vcpu);
HIDDEN void record_ioctl(uint16_t type, const struct object *object, int fd, uint64_t request, uint64_t arg,
			 int64_t result, int error, uint64_t order, uint64_t start, struct capture *capture,
			 struct object *vcpu);
HIDDEN uint64_t copy_from(void *to, uint64_t address, uint64_t length);

/* memory.c */
HIDDEN void memory_before_run(struct object *vm);
HIDDEN void memory_after_run(struct object *vm);
HIDDEN void memory_forget(struct object *vm);

/* objects.c */
HIDDEN struct object *object_of(int fd);
HIDDEN struct object *object_find(int fd, bool foreign);
HIDDEN struct object *object_new(int fd, uint32_t kind, struct object *vm, uint64_t order, const char *name);
HIDDEN void object_dup(int from, int to);
HIDDEN void object_close(int fd);
HIDDEN void objects_inherited(void);
HIDDEN void object_opened(int fd, const char *path);
HIDDEN void slot_set(struct object *vm, uint32_t id, uint64_t hva, uint64_t size);
HIDDEN uint64_t slot_pages(const struct object *object, uint32_t id);
HIDDEN void note_created(struct object *object, uint64_t request, uint64_t arg, long result, uint64_t order);
HIDDEN void run_mapped(int fd, void *address, uint64_t length, uint64_t offset, int flags);
HIDDEN void run_unmapped(void *address, uint64_t length);

/* system calls past every interposer */
static inline long raw6(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

#define raw(number, a, b, c, d) raw6(number, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

#endif
