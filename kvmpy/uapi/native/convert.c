/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A conversion between private and shared pages in one step: check, KVM_SET_MEMORY_ATTRIBUTES, and notes of the
 * change. KVM leaves the TLBs cold, and each page of the interpreter that is touched behind it costs (docs/bench.md).
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define CONVERT_PAGE 4096u
#define CONVERT_NOTES (sizeof(((struct kvmpy_notes *)0)->note) / sizeof(struct kvmpy_note))

struct kvmpy_conversions {
	pthread_mutex_t lock;
	/* Where any page may be converted; nowhere when equal. */
	uint64_t start;
	uint64_t end;
};

static void notes_lock(struct kvmpy_notes *n)
{
	while (__atomic_exchange_n(&n->lock, 1, __ATOMIC_ACQUIRE))
		sched_yield();
}

static void notes_unlock(struct kvmpy_notes *n)
{
	__atomic_store_n(&n->lock, 0, __ATOMIC_RELEASE);
}

/* Waits for room: who finds KVMPY_NOTES_MANY is about to take some out. */
void kvmpy_note(struct kvmpy_notes *n, uint64_t gpa, uint64_t size, int there)
{
	for (;;) {
		notes_lock(n);
		uint32_t at = n->count;

		if (at < CONVERT_NOTES) {
			n->note[at] = (struct kvmpy_note){ .gpa = gpa, .size = size, .there = there };
			/* Readers look without the lock. */
			__atomic_store_n(&n->count, at + 1, __ATOMIC_RELEASE);
			notes_unlock(n);
			return;
		}
		notes_unlock(n);
		sched_yield();
	}
}

/* Forget the oldest @count. */
void kvmpy_notes_drop(struct kvmpy_notes *n, uint32_t count)
{
	notes_lock(n);
	memmove(n->note, n->note + count, (n->count - count) * sizeof(struct kvmpy_note));
	__atomic_store_n(&n->count, n->count - count, __ATOMIC_RELEASE);
	notes_unlock(n);
}

struct kvmpy_conversions *kvmpy_conversions_new(void)
{
	struct kvmpy_conversions *c = calloc(1, sizeof *c);
	pthread_mutexattr_t recursive;

	if (!c)
		return NULL;
	pthread_mutexattr_init(&recursive);
	pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
	pthread_mutex_init(&c->lock, &recursive);
	pthread_mutexattr_destroy(&recursive);
	return c;
}

void kvmpy_conversions_free(struct kvmpy_conversions *c)
{
	pthread_mutex_destroy(&c->lock);
	free(c);
}

int kvmpy_conversions_acquire(struct kvmpy_conversions *c, int blocking)
{
	return (blocking ? pthread_mutex_lock(&c->lock) : pthread_mutex_trylock(&c->lock)) == 0;
}

void kvmpy_conversions_release(struct kvmpy_conversions *c)
{
	pthread_mutex_unlock(&c->lock);
}

void kvmpy_conversions_allow(struct kvmpy_conversions *c, uint64_t start, uint64_t end)
{
	pthread_mutex_lock(&c->lock);
	c->start = start;
	c->end = end;
	pthread_mutex_unlock(&c->lock);
}

/*
 * Convert where the last look said that it may be done. Returns 0, -1 with errno, or KVMPY_CONVERT_ELSEWHERE with
 * nothing done: the range is another one, or the notes must be carried out first.
 */
int kvmpy_convert(struct kvmpy_conversions *c, int fd, unsigned long request, uint64_t gpa, uint64_t size, uint64_t attributes, struct kvmpy_notes *accepted, struct kvmpy_notes *frames)
{
	uint64_t words[4] = { gpa, size, attributes, 0 };
	int result = KVMPY_CONVERT_ELSEWHERE, error = 0;

	pthread_mutex_lock(&c->lock);
	if (size && !((gpa | size) & (CONVERT_PAGE - 1)) && c->start <= gpa && gpa < c->end && size <= c->end - gpa &&
	    accepted->count < KVMPY_NOTES_MANY && frames->count < KVMPY_NOTES_MANY) {
		result = ioctl(fd, request, words);
		error = errno;
		if (result >= 0) {
			kvmpy_note(accepted, gpa, size, attributes != 0);
			kvmpy_note(frames, gpa, size, attributes != 0);
			result = 0;
		}
	}
	pthread_mutex_unlock(&c->lock);
	errno = error;
	return result;
}
