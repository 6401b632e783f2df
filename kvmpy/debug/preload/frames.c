/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames into this process's ring. Any thread and any signal handler may write: room is reserved by one atomic
 * addition to the head, and a frame counts once its magic number is stored. No lock is ever held.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "recorder.h"

#define WAIT_NS 200000L

HIDDEN struct kvmpy_control *control;

static char ring_directory[PATH_MAX];

/* One page that a forked child finds empty (MADV_WIPEONFORK), however it was forked. */
struct process {
	_Atomic uint32_t state; /* 0 new, 1 being set up, 2 has a ring, 3 has none */
	uint32_t pid;
	struct kvmpy_ring *ring;
	uint8_t *data;
};

static struct process *process;

static __thread uint32_t thread_id __attribute__((tls_model("initial-exec")));
static __thread uint32_t thread_pid __attribute__((tls_model("initial-exec")));

static void *map_file(const char *name, uint64_t size, bool create)
{
	char path[PATH_MAX];
	int flags = create ? O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC : O_RDWR | O_CLOEXEC;

	if (snprintf(path, sizeof path, "%s/%s", ring_directory, name) >= (int)sizeof path)
		return NULL;
	long fd = raw(SYS_openat, AT_FDCWD, path, flags, 0600);

	if (fd < 0)
		return NULL;
	void *map = NULL;

	if (!create) {
		map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, (int)fd, 0);
	} else if (raw(SYS_ftruncate, fd, KVMPY_RING_HEADER + size, 0, 0) == 0 &&
		   raw(SYS_fallocate, fd, 0, 0, KVMPY_RING_HEADER + size) != -ENOSPC) {
		/* The data is mapped twice, one behind the other, so that no frame is ever split. */
		uint8_t *place = mmap(NULL, KVMPY_RING_HEADER + 2 * size, PROT_NONE,
				      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		int protection = PROT_READ | PROT_WRITE;
		/* Populated: page faults would be part of what an ioctl costs. */
		int shared = MAP_SHARED | MAP_FIXED | MAP_POPULATE;

		if (place != MAP_FAILED &&
		    mmap(place, KVMPY_RING_HEADER + size, protection, shared, (int)fd, 0) != MAP_FAILED &&
		    mmap(place + KVMPY_RING_HEADER + size, size, protection, shared, (int)fd, KVMPY_RING_HEADER) !=
			    MAP_FAILED)
			map = place;
		/* Children have rings of their own, and kvmpy asks who has this one mapped. */
		if (map)
			madvise(map, KVMPY_RING_HEADER + 2 * size, MADV_DONTFORK);
	}
	raw(SYS_close, fd, 0, 0, 0);
	if (!map && create)
		raw(SYS_unlinkat, AT_FDCWD, path, 0, 0);
	return map == MAP_FAILED ? NULL : map;
}

bool frames_start(const char *directory)
{
	if (strlen(directory) >= sizeof ring_directory)
		return false;
	strcpy(ring_directory, directory);
	process = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (process == MAP_FAILED)
		return false;
	madvise(process, PAGE, MADV_WIPEONFORK);
	process->pid = (uint32_t)raw(SYS_getpid, 0, 0, 0, 0);
	control = map_file("control", PAGE, false);
	return control != NULL;
}

static void make_ring(void)
{
	char name[64];
	uint64_t size = control->ring_size;
	uint32_t number = atomic_fetch_add(&control->rings, 1);

	/* Known already but in a forked child. The child of a vfork() runs in its parent's memory, for the parent. */
	if (!process->pid)
		process->pid = (uint32_t)raw(SYS_getpid, 0, 0, 0, 0);
	snprintf(name, sizeof name, "ring.%u.%u", process->pid, number);
	uint8_t *map = map_file(name, size, true);

	if (!map) {
		atomic_fetch_add(&control->refused, 1);
		atomic_store_explicit(&process->state, 3, memory_order_release);
		return;
	}
	struct kvmpy_ring *ring = (struct kvmpy_ring *)map;

	ring->size = size;
	ring->pid = process->pid;
	ring->ppid = (uint32_t)raw(SYS_getppid, 0, 0, 0, 0);
	long fd = raw(SYS_openat, AT_FDCWD, "/proc/self/comm", O_RDONLY | O_CLOEXEC, 0);

	if (fd >= 0) {
		raw(SYS_read, fd, ring->name, sizeof ring->name - 1, 0);
		raw(SYS_close, fd, 0, 0, 0);
	}
	process->ring = ring;
	process->data = map + KVMPY_RING_HEADER;
	ring->magic = KVMPY_RING_MAGIC;
	atomic_store_explicit(&process->state, 2, memory_order_release);
}

bool recording(void)
{
	if (!control)
		return false;
	uint32_t state = atomic_load_explicit(&process->state, memory_order_acquire);

	if (state == 2)
		return true;
	if (state == 0 && atomic_compare_exchange_strong(&process->state, &state, 1)) {
		make_ring();
		return atomic_load(&process->state) == 2;
	}
	/* Another thread is at it: wait, unless this is a signal handler on top of that very thread. */
	for (int i = 0; i < 1000 && atomic_load(&process->state) == 1; i++)
		raw(SYS_sched_yield, 0, 0, 0, 0);
	return atomic_load(&process->state) == 2;
}

uint64_t next_order(void)
{
	return atomic_fetch_add_explicit(&control->order, 1, memory_order_relaxed) + 1;
}

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

/* Whether a frame that ends there does not fit. Others may have moved head and tail beyond it meanwhile. */
static bool lacks_room(struct kvmpy_ring *ring, uint64_t end)
{
	return (int64_t)(end - atomic_load_explicit(&ring->tail, memory_order_acquire)) > (int64_t)ring->size;
}

/* Whether somebody empties the rings: told by the kernel, however kvmpy ended, in every PID namespace. */
static bool kvmpy_lives(void)
{
	uint32_t holder = atomic_load_explicit(&control->holder, memory_order_relaxed);

	return (holder & KVMPY_HOLDER_TID) && !(holder & KVMPY_HOLDER_DIED);
}

/* Wait until kvmpy made room, for as long as it lives. */
static bool wait_for_room(struct kvmpy_ring *ring, uint64_t end)
{
	while (lacks_room(ring, end)) {
		struct timespec pause = { 0, WAIT_NS };

		if (!kvmpy_lives())
			return false;
		raw(SYS_nanosleep, &pause, 0, 0, 0);
	}
	return true;
}

/* Return where the payload goes, NULL when the frame is lost. */
static uint8_t *reserve(uint16_t type, uint64_t length, uint64_t order, uint64_t time_ns, uint32_t tid)
{
	struct kvmpy_ring *ring = process->ring;
	uint64_t whole = (sizeof(struct kvmpy_rec_frame) + length + 7) & ~7ULL;
	uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);

	do {
		if (whole > ring->size ||
		    (lacks_room(ring, head + whole) && !wait_for_room(ring, head + whole))) {
			atomic_fetch_add(&ring->lost, 1);
			return NULL;
		}
	} while (!atomic_compare_exchange_weak_explicit(&ring->head, &head, head + whole, memory_order_acq_rel,
							memory_order_relaxed));
	uint8_t *place = process->data + (head & (ring->size - 1));
	struct kvmpy_rec_frame *frame = (struct kvmpy_rec_frame *)place;

	frame->length = (uint32_t)length;
	frame->type = type;
	frame->flags = 0;
	frame->tid = tid;
	frame->pid = process->pid;
	frame->order = order;
	frame->time_ns = time_ns;
	return place + sizeof *frame;
}

static void announce_thread(void)
{
	char name[17] = "";
	struct kvmpy_rec_thread thread = { .pid = process->pid, .ppid = process->ring->ppid };

	thread_pid = process->pid;
	thread_id = thread.tid = (uint32_t)raw(SYS_gettid, 0, 0, 0, 0);
	raw(SYS_prctl, 16 /* PR_GET_NAME */, name, 0, 0);
	uint8_t *place = reserve(KVMPY_REC_THREAD, sizeof thread + strlen(name), next_order(), now_ns(), thread_id);

	if (place) {
		memcpy(place, &thread, sizeof thread);
		memcpy(place + sizeof thread, name, strlen(name));
		frame_commit(place);
	}
}

uint8_t *frame_begin(uint16_t type, uint64_t length, uint64_t order, uint64_t time_ns)
{
	/* A forked child that only closes what it inherited needs none. */
	if (atomic_load_explicit(&process->state, memory_order_acquire) != 2)
		return NULL;
	if (thread_pid != process->pid) {
		if ((uint32_t)raw(SYS_getpid, 0, 0, 0, 0) != process->pid)
			return reserve(type, length, order, time_ns, process->pid);
		announce_thread();
	}
	return reserve(type, length, order, time_ns, thread_id);
}

void frame_commit(uint8_t *payload)
{
	struct kvmpy_rec_frame *frame = (struct kvmpy_rec_frame *)(payload - sizeof *frame);

	__atomic_store_n(&frame->magic, KVMPY_REC_FRAME_MAGIC, __ATOMIC_RELEASE);
}

void frame_simple(uint16_t type, const void *head, uint64_t head_length, const void *rest, uint64_t length)
{
	uint8_t *place = frame_begin(type, head_length + length, next_order(), now_ns());

	if (!place)
		return;
	memcpy(place, head, head_length);
	if (length)
		memcpy(place + head_length, rest, length);
	frame_commit(place);
}
