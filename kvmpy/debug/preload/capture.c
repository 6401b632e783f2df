/* SPDX-License-Identifier: Apache-2.0 */
/* The capture engine in a preloaded library: memory of its own for each thread, frames into the ring. */
#define _GNU_SOURCE
#include "recorder.h"

#include "../../uapi/native/capture.c"
#include "../../uapi/native/objects.c"

#define SCRATCH (64UL << 10)

const struct kvmpy_source this_process = { .fd = -1 };

static __thread uint8_t *scratch __attribute__((tls_model("initial-exec")));
static __thread bool scratch_busy __attribute__((tls_model("initial-exec")));

bool string_readable(const char *text)
{
	return readable((uint64_t)text, 1);
}

void capture_begin(struct kvmpy_capture *c, struct object *object, int fd, uint32_t request, uint64_t arg)
{
	c->source = &this_process;
	c->scratch = NULL;
	c->scratch_size = 0;
	/* A signal handler on top of an ioctl of the same thread maps memory of its own where it needs some. */
	if (!scratch_busy) {
		if (!scratch)
			scratch = map_anonymous(SCRATCH);
		if (scratch) {
			scratch_busy = true;
			c->scratch = scratch;
			c->scratch_size = SCRATCH;
		}
	}
	kvmpy_capture_enter(c, object ? &object->known : NULL, fd, request, NULL, arg);
	c->order = next_order();
	c->start_ns = now_ns();
}

void capture_finish(struct kvmpy_capture *c)
{
	kvmpy_capture_end(c);
	if (c->scratch)
		scratch_busy = false;
}

void record_ioctl(struct kvmpy_capture *c, uint16_t type, int64_t result, int error)
{
	bool done = type == KVMPY_REC_IOCTL;
	uint8_t *place;

	if (done)
		kvmpy_capture_exit(c, result);
	uint64_t end_order = done ? next_order() : 0, end_ns = done ? now_ns() : 0;

	place = frame_begin(type, kvmpy_capture_size(c), c->order, c->start_ns);
	if (!place)
		return;
	/* Fewer bytes than reserved, where memory could not be read after all: readers stop at the count of chunks. */
	kvmpy_capture_fill(c, place, result, error, end_order, end_ns);
	frame_commit(place);
}
