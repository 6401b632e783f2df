/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A kernel's gcov counters (/sys/kernel/debug/gcov), packed: nearly all are zero, and an emulated Python would take
 * longer over them than over a test. Lengths in a file are in bytes since gcc 12, in words of 4 before that.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define GCOV_DATA 0x67636461U
#define GCOV_FUNCTION 0x01000000U
#define GCOV_COUNTERS 0x01a10000U
#define GCOV_VARINT 10 /* bytes that a number may take */
#define GCOV_HEAD 12

static uint8_t *gcov_varint(uint8_t *out, uint64_t value)
{
	for (; value >= 0x80; value >>= 7)
		*out++ = (uint8_t)(value | 0x80);
	*out++ = (uint8_t)value;
	return out;
}

static uint32_t gcov_word(const uint8_t *at)
{
	uint32_t word;

	memcpy(&word, at, sizeof(word));
	return word;
}

static int64_t gcov_read_file(const char *path, uint8_t *buffer, uint64_t size)
{
	uint64_t have = 0;
	ssize_t got;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	do {
		got = read(fd, buffer + have, size - have);
		have += got > 0 ? (uint64_t)got : 0;
	} while (got > 0 && have < size);
	if (got < 0)
		got = -errno;
	else
		got = have == size ? -EFBIG : 0;
	close(fd);
	return got ? got : (int64_t)have;
}

/* Write a function's ident, how many of its counters are not zero, and gap and value of each of them. */
static uint8_t *gcov_pack_function(uint32_t ident, const uint8_t *counters, uint64_t count, uint8_t *out, const uint8_t *end)
{
	uint64_t used = 0, gap = 0, value;

	for (uint64_t index = 0; index < count; index++) {
		memcpy(&value, counters + 8 * index, sizeof(value));
		used += value != 0;
	}
	if (!used)
		return out;
	if ((uint64_t)(end - out) < 2 * GCOV_VARINT * (used + 1))
		return NULL;
	out = gcov_varint(gcov_varint(out, ident), used);
	for (uint64_t index = 0; index < count; index++, gap++) {
		memcpy(&value, counters + 8 * index, sizeof(value));
		if (!value)
			continue;
		out = gcov_varint(gcov_varint(out, gap), value);
		gap = UINT64_MAX; /* counts from the next one */
	}
	return out;
}

/* Write each function that has counters other than zero; NULL where there is no room. */
static uint8_t *gcov_pack(const uint8_t *file, uint64_t length, uint8_t *out, const uint8_t *end)
{
	/* The first letter of the version: A is gcc 9 and below, B is 10 and above; then the second digit. */
	bool bytes = file[7] > 'B' || (file[7] == 'B' && file[6] >= '2');
	uint64_t at = bytes ? 16 : 12;
	uint32_t ident = 0;

	while (at + 8 <= length) {
		uint32_t tag = gcov_word(file + at);
		uint32_t given = gcov_word(file + at + 4);
		/* gcc's own library leaves out counters that are all zero: their number is there, negative. */
		uint64_t size = given >> 31 ? 0 : (uint64_t)given * (bytes ? 1 : 4);

		at += 8;
		if (!tag || size > length - at)
			break;
		if (tag == GCOV_FUNCTION && size >= sizeof(ident))
			ident = gcov_word(file + at);
		else if (tag == GCOV_COUNTERS)
			out = gcov_pack_function(ident, file + at, size / 8, out, end);
		if (!out)
			return NULL;
		at += size;
	}
	return out;
}

/*
 * Write an entry for each of the files that has a counter other than zero: its number, its stamp, the length of what
 * follows, and the functions. Return the number of bytes, or minus errno: ENOSPC without room in out, EFBIG without
 * room in buffer, EINVAL for a file that is none of gcov's.
 */
int64_t kvmpy_gcov_collect(const char *const *paths, uint32_t count, void *buffer, uint64_t size, void *out, uint64_t max)
{
	uint8_t *next = out, *end = next + max;

	for (uint32_t number = 0; number < count; number++) {
		int64_t length = gcov_read_file(paths[number], buffer, size);
		uint8_t *packed;
		uint32_t head[3];

		if (length < 0)
			return length;
		if (length < 12 || gcov_word(buffer) != GCOV_DATA)
			return -EINVAL;
		if (end - next < GCOV_HEAD)
			return -ENOSPC;
		packed = gcov_pack(buffer, (uint64_t)length, next + GCOV_HEAD, end);
		if (!packed)
			return -ENOSPC;
		if (packed == next + GCOV_HEAD)
			continue;
		head[0] = number;
		head[1] = gcov_word((uint8_t *)buffer + 8);
		head[2] = (uint32_t)(packed - next - GCOV_HEAD);
		memcpy(next, head, sizeof(head));
		next = packed;
	}
	return next - (uint8_t *)out;
}
