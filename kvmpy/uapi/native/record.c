/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames of a record (kvmpy/debug/record/format.h), each with one write(2). Those of ioctls are made here since some
 * leave the caches cold: behind them the interpreter takes several times as long for the same work.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../debug/record/format.h"

#define RECORD_ROUND(size) (((size) + 7u) & ~7u)

static uint32_t record_table[4][256];
static pthread_once_t record_once = PTHREAD_ONCE_INIT;

/* CRC-32 of zlib and Ethernet, four bytes at a time: reflected polynomial 0xEDB88320. */
static void record_tables(void)
{
	for (uint32_t n = 0; n < 256; n++) {
		uint32_t crc = n;

		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
		record_table[0][n] = crc;
	}
	for (uint32_t n = 0; n < 256; n++)
		for (int t = 1; t < 4; t++)
			record_table[t][n] = record_table[t - 1][n] >> 8 ^
					     record_table[0][record_table[t - 1][n] & 0xff];
}

static uint32_t record_crc(const void *data, size_t size)
{
	const uint8_t *at = data;
	uint32_t crc = ~0u;

	for (; size >= 4; size -= 4, at += 4) {
		uint32_t word;

		memcpy(&word, at, 4);
		word ^= crc;
		crc = record_table[3][word & 0xff] ^ record_table[2][word >> 8 & 0xff] ^
		      record_table[1][word >> 16 & 0xff] ^ record_table[0][word >> 24];
	}
	while (size--)
		crc = crc >> 8 ^ record_table[0][(crc ^ *at++) & 0xff];
	return ~crc;
}

uint64_t kvmpy_record_order(struct kvmpy_record *r)
{
	return __atomic_fetch_add(&r->order, 1, __ATOMIC_SEQ_CST);
}

/* The frame lies at @raw with its payload behind the header, and room for the padding behind that. */
static bool record_put(struct kvmpy_record *r, uint8_t *raw, uint32_t type, uint32_t flags, uint32_t tid,
		       uint64_t order, uint64_t time_ns, uint32_t length)
{
	struct kvmpy_rec_frame head = {
		.magic = KVMPY_REC_FRAME_MAGIC,
		.length = length,
		.type = type,
		.flags = flags,
		.tid = tid,
		.pid = r->pid,
		.order = order,
		.time_ns = time_ns,
	};
	size_t whole = sizeof head + RECORD_ROUND(length);

	pthread_once(&record_once, record_tables);
	memset(raw + sizeof head + length, 0, RECORD_ROUND(length) - length);
	memcpy(raw, &head, sizeof head);
	head.crc = record_crc(raw + KVMPY_REC_CHECKED_FROM, sizeof head - KVMPY_REC_CHECKED_FROM + length);
	memcpy(raw + offsetof(struct kvmpy_rec_frame, crc), &head.crc, sizeof head.crc);

	bool written = write(r->fd, raw, whole) == (ssize_t)whole;

	__atomic_fetch_add(written ? &r->frames : &r->lost, 1, __ATOMIC_SEQ_CST);
	return written;
}

/* Room for a frame with @length bytes of payload: @small where they fit, NULL where the frame is lost. */
static uint8_t *record_room(struct kvmpy_record *r, uint8_t *small, uint64_t length)
{
	if (length <= KVMPY_RECORD_SMALL)
		return small;
	uint8_t *raw = malloc(sizeof(struct kvmpy_rec_frame) + RECORD_ROUND(length));

	if (!raw)
		__atomic_fetch_add(&r->lost, 1, __ATOMIC_SEQ_CST);
	return raw;
}

/* Returns 0, or -1 where the frame is lost: no space left, no memory, or the record was closed meanwhile. */
int kvmpy_record_frame(struct kvmpy_record *r, uint32_t type, uint32_t flags, uint32_t tid, uint64_t order,
		       uint64_t time_ns, const void *payload, uint32_t length)
{
	uint8_t small[sizeof(struct kvmpy_rec_frame) + KVMPY_RECORD_SMALL];
	uint8_t *raw = record_room(r, small, length);

	if (!raw)
		return -1;
	memcpy(raw + sizeof(struct kvmpy_rec_frame), payload, length);
	bool written = record_put(r, raw, type, flags, tid, order, time_ns, length);

	if (raw != small)
		free(raw);
	return written ? 0 : -1;
}

/* Begin to record an ioctl: copy what the kernel is about to read (see kvmpy_capture_enter()). */
void kvmpy_record_enter(struct kvmpy_capture *c, struct kvmpy_object *object, int fd, uint32_t request,
			const void *place, uint64_t number)
{
	kvmpy_capture_enter(c, object, fd, request, place, number);
	c->order = kvmpy_record_order(c->record);
	c->start_ns = kvmpy_monotonic_ns();
}

/* Write its frame: KVMPY_REC_ENTER as it is in flight, or KVMPY_REC_IOCTL once it returned, and that is its end. */
void kvmpy_record_ioctl(struct kvmpy_capture *c, uint32_t type, int64_t result, int error)
{
	struct kvmpy_record *r = c->record;
	bool done = type == KVMPY_REC_IOCTL;
	uint64_t end_ns = done ? kvmpy_monotonic_ns() : 0;

	if (done)
		kvmpy_capture_exit(c, result);
	uint64_t size = kvmpy_capture_size(c);
	uint64_t end_order = done ? kvmpy_record_order(r) : 0;
	uint8_t small[sizeof(struct kvmpy_rec_frame) + KVMPY_RECORD_SMALL];
	uint8_t *raw = record_room(r, small, size);

	if (raw) {
		size = kvmpy_capture_fill(c, raw + sizeof(struct kvmpy_rec_frame), result, error, end_order, end_ns);
		record_put(r, raw, type, r->flags, c->tid, c->order, c->start_ns, (uint32_t)size);
	}
	if (raw != small)
		free(raw);
	if (done)
		kvmpy_capture_end(c);
}
