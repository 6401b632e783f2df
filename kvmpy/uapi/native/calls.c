/* SPDX-License-Identifier: Apache-2.0 */
/* The funnel's ioctl, and the ring of the last ones: every one is kept, so keeping one must cost nothing. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

/* The exit reason in kvm_run. */
#define CALL_REASON 8

static struct {
	pthread_mutex_t lock;
	uint64_t next;
	uint64_t first;
	struct {
		struct kvmpy_call call;
		unsigned char *arg;
		size_t room;
	} entries[KVMPY_CALLS];
} calls = { .lock = PTHREAD_MUTEX_INITIALIZER };

static __thread int call_inspections;

static void calls_lock(void)
{
	pthread_mutex_lock(&calls.lock);
}

static void calls_unlock(void)
{
	pthread_mutex_unlock(&calls.lock);
}

/* A child of fork() has no other thread that could unlock it. */
__attribute__((constructor)) static void calls_init(void)
{
	pthread_atfork(calls_lock, calls_unlock, calls_unlock);
}

/* Change how deep this thread is in a tool's own look at a VM, and return that; its ioctls are not kept. */
int kvmpy_inspect(int change)
{
	return call_inspections += change;
}

static int call_is_repeated(const char *label, unsigned char *head, int result, int error)
{
	uint64_t last = calls.next - 1;
	struct kvmpy_call *c = &calls.entries[last % KVMPY_CALLS].call;

	return calls.next > calls.first && c->kind == KVMPY_CALL_RUN && c->result == result &&
	       c->error == error && !strncmp(c->label, label, sizeof(c->label) - 1) &&
	       !memcmp(calls.entries[last % KVMPY_CALLS].arg + CALL_REASON, head + CALL_REASON, 4);
}

void kvmpy_call_note(const char *label, unsigned long request, uint64_t value, void *arg, uint32_t size,
		     uint32_t kind, int result, int error)
{
	struct timespec now;
	uint64_t place;
	struct kvmpy_call *c;

	if (call_inspections)
		return;
	calls_lock();
	clock_gettime(CLOCK_MONOTONIC, &now);
	if (kind == KVMPY_CALL_RUN && call_is_repeated(label, arg, result, error)) {
		place = (calls.next - 1) % KVMPY_CALLS;
		calls.entries[place].call.times++;
		memcpy(calls.entries[place].arg, arg, size);
		calls_unlock();
		return;
	}
	place = calls.next % KVMPY_CALLS;
	if (size > calls.entries[place].room) {
		void *larger = realloc(calls.entries[place].arg, size);

		if (!larger) {
			calls_unlock();
			return;
		}
		calls.entries[place].arg = larger;
		calls.entries[place].room = size;
	}
	if (size)
		memcpy(calls.entries[place].arg, arg, size);
	c = &calls.entries[place].call;
	c->ns = now.tv_sec * 1000000000ULL + now.tv_nsec;
	c->thread = (uintptr_t)pthread_self();
	c->request = request;
	c->value = value;
	c->result = result;
	c->error = error;
	c->kind = kind;
	c->size = size;
	c->times = 1;
	c->label[0] = 0;
	strncat(c->label, label, sizeof(c->label) - 1);
	calls.next++;
	if (calls.next - calls.first > KVMPY_CALLS)
		calls.first = calls.next - KVMPY_CALLS;
	calls_unlock();
}

/* Without a label nothing is kept. errno is that of the ioctl. */
int kvmpy_ioctl_ptr(const char *label, int fd, unsigned long request, void *arg, uint32_t size, uint32_t kind)
{
	int result = ioctl(fd, request, arg);
	int error = result < 0 ? errno : 0;

	if (label)
		kvmpy_call_note(label, request, 0, arg, size, kind, result, error);
	errno = error;
	return result;
}

int kvmpy_ioctl(const char *label, int fd, unsigned long request, uintptr_t value)
{
	int result = ioctl(fd, request, value);
	int error = result < 0 ? errno : 0;

	if (label)
		kvmpy_call_note(label, request, value, NULL, 0, 0, result, error);
	errno = error;
	return result;
}

/* Write the calls, the oldest first, where room bytes suffice; return how many it takes. */
size_t kvmpy_calls_read(void *buffer, size_t room)
{
	unsigned char *to = buffer;
	size_t need = 0;

	calls_lock();
	for (uint64_t n = calls.first; n < calls.next; n++)
		need += sizeof(struct kvmpy_call) + ((calls.entries[n % KVMPY_CALLS].call.size + 7) & ~7UL);
	for (uint64_t n = calls.first; need <= room && n < calls.next; n++) {
		struct kvmpy_call *c = &calls.entries[n % KVMPY_CALLS].call;

		memcpy(to, c, sizeof(*c));
		if (c->size)
			memcpy(to + sizeof(*c), calls.entries[n % KVMPY_CALLS].arg, c->size);
		to += sizeof(*c) + ((c->size + 7) & ~7UL);
	}
	calls_unlock();
	return need;
}

void kvmpy_calls_clear(void)
{
	calls_lock();
	calls.first = calls.next;
	calls_unlock();
}
