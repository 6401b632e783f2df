/* SPDX-License-Identifier: Apache-2.0 */
/*
 * userfaultfd(2) with fixed signatures, and a watchdog for handlers that live in Python.
 *
 * A Python thread that touches registered memory itself keeps the interpreter lock while it waits for the handler,
 * which needs that lock: nothing in Python could end that. The watchdog is no Python thread. When faults wait and the
 * handler takes none for the length of its patience, it unregisters all ranges; the waiting threads then go on with
 * ordinary pages, and the handler reports what happened.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../../debug/preload/tables.h"

#define UFFD_WATCH_RANGES 64
#define UFFD_WATCH_TICK_NS 50000000ULL

struct uffd_raw_msg {
	uint8_t event;
	uint8_t pad[7];
	uint64_t arg[3];
};

int kvmpy_uffd_open(int flags)
{
#ifdef SYS_userfaultfd
	return (int)syscall(SYS_userfaultfd, flags);
#else
	return (int)syscall(323, flags);
#endif
}

int kvmpy_uffd_open_dev(const char *path, int flags)
{
	int fd, saved, dev = open(path, O_RDWR | O_CLOEXEC);

	if (dev < 0)
		return -1;
	fd = ioctl(dev, 0xaa00UL, flags);
	saved = errno;
	close(dev);
	errno = saved;
	return fd;
}

int kvmpy_uffd_api(int fd, uint64_t features, uint64_t *offered)
{
	uint64_t arg[3] = { UFFD_API, features, 0 };
	int ret = ioctl(fd, UFFDIO_API, arg);

	*offered = arg[1];
	return ret;
}

int kvmpy_uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
	uint64_t arg[4] = { start, len, mode, 0 };
	int ret = ioctl(fd, UFFDIO_REGISTER, arg);

	*ioctls = arg[3];
	return ret;
}

int kvmpy_uffd_unregister(int fd, uint64_t start, uint64_t len)
{
	uint64_t arg[2] = { start, len };

	return ioctl(fd, UFFDIO_UNREGISTER, arg);
}

int kvmpy_uffd_wake(int fd, uint64_t start, uint64_t len)
{
	uint64_t arg[2] = { start, len };

	return ioctl(fd, UFFDIO_WAKE, arg);
}

/* The kernel puts the number of bytes done, or a negative errno, into the last field. */
int64_t kvmpy_uffd_copy(int fd, uint64_t dst, const void *src, uint64_t len, uint64_t mode)
{
	uint64_t arg[5] = { dst, (uint64_t)(uintptr_t)src, len, mode, 0 };

	return ioctl(fd, UFFDIO_COPY, arg) < 0 ? -1 : (int64_t)arg[4];
}

static int64_t uffd_range_op(int fd, unsigned long request, uint64_t start, uint64_t len, uint64_t mode)
{
	uint64_t arg[4] = { start, len, mode, 0 };

	return ioctl(fd, request, arg) < 0 ? -1 : (int64_t)arg[3];
}

int64_t kvmpy_uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return uffd_range_op(fd, UFFDIO_ZEROPAGE, start, len, mode);
}

int64_t kvmpy_uffd_continue(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return uffd_range_op(fd, UFFDIO_CONTINUE, start, len, mode);
}

int64_t kvmpy_uffd_poison(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	return uffd_range_op(fd, UFFDIO_POISON, start, len, mode);
}

int kvmpy_uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
	uint64_t arg[3] = { start, len, mode };

	return ioctl(fd, UFFDIO_WRITEPROTECT, arg);
}

int kvmpy_uffd_read(int fd, struct kvmpy_uffd_event *out, int max)
{
	struct uffd_raw_msg msgs[16];
	ssize_t got;
	int i, count;

	if (max > 16)
		max = 16;
	got = read(fd, msgs, (size_t)max * sizeof(msgs[0]));
	if (got < 0)
		return -1;
	count = (int)((size_t)got / sizeof(msgs[0]));
	for (i = 0; i < count; i++) {
		out[i].event = msgs[i].event;
		out[i].thread_id = 0;
		out[i].flags = 0;
		out[i].address = msgs[i].arg[0];
		out[i].end = msgs[i].arg[1];
		if (msgs[i].event == UFFD_EVENT_PAGEFAULT) {
			out[i].flags = msgs[i].arg[0];
			out[i].address = msgs[i].arg[1];
			out[i].end = 0;
			out[i].thread_id = (uint32_t)msgs[i].arg[2];
		}
	}
	return count;
}

/* Read, or write back what is there, one byte every step bytes. */
void kvmpy_touch(uint64_t start, uint64_t len, uint64_t step, int write)
{
	uint64_t at;

	for (at = 0; at < len; at += step) {
		volatile uint8_t *p = (volatile uint8_t *)(uintptr_t)(start + at);

		if (write)
			__atomic_fetch_or((uint8_t *)p, 0, __ATOMIC_RELAXED);
		else
			(void)*p;
	}
}

struct kvmpy_uffd_watch {
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t wake;
	int fd;
	int stop;
	int fired;
	uint64_t patience_ns;
	uint64_t beats;
	uint32_t ranges;
	uint64_t start[UFFD_WATCH_RANGES];
	uint64_t len[UFFD_WATCH_RANGES];
};

static void *uffd_watch_main(void *arg)
{
	struct kvmpy_uffd_watch *w = arg;
	struct pollfd p = { .fd = w->fd, .events = POLLIN };
	uint64_t seen = 0, stuck = 0;
	uint32_t i;

	pthread_mutex_lock(&w->lock);
	while (!w->stop) {
		struct timespec ts;

		clock_gettime(CLOCK_MONOTONIC, &ts);
		ts.tv_nsec += UFFD_WATCH_TICK_NS;
		ts.tv_sec += ts.tv_nsec / 1000000000;
		ts.tv_nsec %= 1000000000;
		pthread_cond_timedwait(&w->wake, &w->lock, &ts);
		if (w->beats != seen || poll(&p, 1, 0) <= 0 || !(p.revents & POLLIN)) {
			seen = w->beats;
			stuck = 0;
			continue;
		}
		stuck += UFFD_WATCH_TICK_NS;
		if (stuck < w->patience_ns)
			continue;
		for (i = 0; i < w->ranges; i++)
			kvmpy_uffd_unregister(w->fd, w->start[i], w->len[i]);
		w->fired = 1;
		break;
	}
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

struct kvmpy_uffd_watch *kvmpy_uffd_watch_new(int fd, uint64_t patience_ns)
{
	struct kvmpy_uffd_watch *w = calloc(1, sizeof(*w));
	pthread_condattr_t attr;
	sigset_t all, old;
	int ret;

	if (!w)
		return NULL;
	w->fd = fd;
	w->patience_ns = patience_ns;
	pthread_mutex_init(&w->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&w->wake, &attr);
	pthread_condattr_destroy(&attr);
	/* Signals are for Python's threads, and kicks for those that run vCPUs. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	ret = pthread_create(&w->thread, NULL, uffd_watch_main, w);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (ret) {
		free(w);
		errno = ret;
		return NULL;
	}
	return w;
}

int kvmpy_uffd_watch_add(struct kvmpy_uffd_watch *w, uint64_t start, uint64_t len)
{
	int ret = -1;

	pthread_mutex_lock(&w->lock);
	if (w->ranges < UFFD_WATCH_RANGES) {
		w->start[w->ranges] = start;
		w->len[w->ranges++] = len;
		ret = 0;
	}
	pthread_mutex_unlock(&w->lock);
	return ret;
}

void kvmpy_uffd_watch_beat(struct kvmpy_uffd_watch *w)
{
	pthread_mutex_lock(&w->lock);
	w->beats++;
	pthread_mutex_unlock(&w->lock);
}

/* End the watchdog and return whether it had to act; the handle is gone afterwards. */
int kvmpy_uffd_watch_stop(struct kvmpy_uffd_watch *w)
{
	int fired;

	pthread_mutex_lock(&w->lock);
	w->stop = 1;
	pthread_cond_signal(&w->wake);
	pthread_mutex_unlock(&w->lock);
	pthread_join(w->thread, NULL);
	fired = w->fired;
	pthread_cond_destroy(&w->wake);
	pthread_mutex_destroy(&w->lock);
	free(w);
	return fired;
}
