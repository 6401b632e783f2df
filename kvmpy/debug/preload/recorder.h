/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the preloaded recorder know of one another. */
#ifndef KVMPY_PRELOAD_RECORDER_H
#define KVMPY_PRELOAD_RECORDER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../uapi/native/capture.h"
#include "../record/format.h"
#include "rawcall.h"
#include "ring.h"
#include "tables.h"

#define HIDDEN __attribute__((visibility("hidden")))
#define PAGE 4096UL

#define ROWS(table) (sizeof(table) / sizeof *(table))

struct object {
	struct kvmpy_object known; /* first: it leads to the VM's */
	_Atomic uint32_t refs;
	_Atomic uint32_t dumped; /* 0: not yet, 1: being done, 2: its initial memory was told */
	_Atomic uint32_t memory_lock;
	uint32_t running; /* vCPUs in the guest */
	struct memory_state *memory;
};

static inline struct object *vm_of(const struct object *object)
{
	return (struct object *)object->known.vm;
}

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
extern HIDDEN const struct kvmpy_source this_process;
HIDDEN bool string_readable(const char *text);
HIDDEN void capture_begin(struct kvmpy_capture *c, struct object *object, int fd, uint32_t request, uint64_t arg);
HIDDEN void capture_finish(struct kvmpy_capture *c);
HIDDEN void record_ioctl(struct kvmpy_capture *c, uint16_t type, int64_t result, int error);

/* memory.c */
HIDDEN void memory_before_run(struct object *vm);
HIDDEN void memory_after_run(struct object *vm);
HIDDEN void memory_forget(struct object *vm);

/* objects.c */
HIDDEN struct object *object_of(int fd);
HIDDEN struct object *object_find(int fd, bool foreign);
HIDDEN void note_created(struct kvmpy_capture *c, int64_t result);
HIDDEN void object_dup(int from, int to);
HIDDEN void object_close(int fd);
HIDDEN void objects_inherited(void);
HIDDEN void object_opened(int fd, const char *path);
HIDDEN void run_mapped(int fd, void *address, uint64_t length, uint64_t offset, int flags);
HIDDEN void run_unmapped(void *address, uint64_t length);

#endif
