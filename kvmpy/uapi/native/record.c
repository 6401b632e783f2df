/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames of a record (kvmpy/debug/record/format.h), each with one write(2), and an ioctl that is recorded as it is
 * issued. The copies are made here since some KVM ioctls leave the caches cold: behind them the interpreter
 * takes several times as long for the same work.
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
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

/* Returns 0, or -1 where the frame is lost: no space left, no memory, or the record was closed meanwhile. */
int kvmpy_record_frame(struct kvmpy_record *r, uint32_t type, uint32_t flags, uint32_t tid, uint64_t order,
		       uint64_t time_ns, const void *payload, uint32_t length)
{
	uint8_t small[sizeof(struct kvmpy_rec_frame) + KVMPY_RECORD_SMALL];
	uint8_t *raw = length <= KVMPY_RECORD_SMALL ?
			       small :
			       malloc(sizeof(struct kvmpy_rec_frame) + RECORD_ROUND((size_t)length));

	if (!raw) {
		__atomic_fetch_add(&r->lost, 1, __ATOMIC_SEQ_CST);
		return -1;
	}
	memcpy(raw + sizeof(struct kvmpy_rec_frame), payload, length);
	bool written = record_put(r, raw, type, flags, tid, order, time_ns, length);

	if (raw != small)
		free(raw);
	return written ? 0 : -1;
}

static uint8_t *record_chunk(uint8_t *at, const void *arg, uint32_t size, uint32_t when)
{
	struct kvmpy_rec_chunk chunk = {
		.address = (uintptr_t)arg,
		.length = size,
		.when = when,
		.what = KVMPY_REC_WHAT_ARGUMENT,
	};

	memcpy(at, &chunk, sizeof chunk);
	memcpy(at + sizeof chunk, arg, size);
	memset(at + sizeof chunk + size, 0, RECORD_ROUND(size) - size);
	return at + sizeof chunk + RECORD_ROUND(size);
}

/*
 * Issue an ioctl, with errno as it leaves it, and write the frame. @size bytes of memory at @arg are copied
 * before it (1 in @when), after it (2), or once for both (4); at most KVMPY_RECORD_SMALL.
 */
int kvmpy_record_ioctl(struct kvmpy_record *r, uint32_t object, uint32_t tid, int fd, unsigned long request,
		       void *arg, uint32_t size, uint32_t when)
{
	uint8_t raw[sizeof(struct kvmpy_rec_frame) + sizeof(struct kvmpy_rec_ioctl) +
		    2 * (sizeof(struct kvmpy_rec_chunk) + KVMPY_RECORD_SMALL)];
	uint8_t *payload = raw + sizeof(struct kvmpy_rec_frame);
	uint8_t *at = payload + sizeof(struct kvmpy_rec_ioctl);
	struct kvmpy_rec_ioctl what = {
		.object = object,
		.fd = fd,
		.request = request,
		.arg = (uintptr_t)arg,
	};

	if (size > KVMPY_RECORD_SMALL) {
		errno = E2BIG;
		return -1;
	}
	if (size && when & 5) {
		at = record_chunk(at, arg, size, when & 4 ? KVMPY_REC_WHEN_BOTH : KVMPY_REC_WHEN_IN);
		what.chunks++;
	}
	uint64_t order = kvmpy_record_order(r);
	uint64_t begin = kvmpy_monotonic_ns();
	int result = ioctl(fd, request, arg);
	int error = errno;

	what.end_ns = kvmpy_monotonic_ns();
	if (size && when & 2) {
		at = record_chunk(at, arg, size, KVMPY_REC_WHEN_OUT);
		what.chunks++;
	}
	what.result = result;
	what.error = result < 0 ? (uint32_t)error : 0;
	what.end_order = kvmpy_record_order(r);
	memcpy(payload, &what, sizeof what);
	record_put(r, raw, KVMPY_REC_IOCTL, 0, tid, order, begin, at - payload);
	errno = error;
	return result;
}
