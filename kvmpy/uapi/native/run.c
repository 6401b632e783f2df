/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The vCPU run path: one KVM_RUN, classified, with a deadline and kicks that cannot get lost.
 *
 * A kick sets run->immediate_exit and then signals the thread, so it is seen whether it comes before, during or
 * after the ioctl. A deadline is compared with the clock before the ioctl, and is a POSIX timer aimed at the
 * running thread during it. Arming one costs a system call, so a timer that would fire too early is left armed,
 * and its handler moves it on; one that fired outside of a run is armed again by the next.
 *
 * Who runs, stops or closes a vCPU claims it in one word, @busy. The interpreter gives its lock up before it
 * calls in here: a vCPU that was there a moment ago may be closed by now.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RUN_KVM_RUN 0xae80UL
#define RUN_EXIT_IO 2
#define RUN_EXIT_MMIO 6
#define RUN_IO_OUT 1
#define RUN_UCALL_PORT 0xe6

#define KICK_ASKED 1u
#define KICK_DEADLINE 2u

#define FALLOCATE_STRETCH (256ll << 10)

/* The bits of @busy. No run begins unless the word is zero. */
#define RUN_IN 1u
#define RUN_STOPPED 2u
#define RUN_CLOSED 4u

struct run_node {
	struct kvmpy_vcpu v;
	timer_t timer;
	/* Held by a kick, so that the run area stays mapped meanwhile. */
	pthread_mutex_t lock;
	struct run_node *next;
};

static pthread_mutex_t run_lock = PTHREAD_MUTEX_INITIALIZER;
static struct run_node *run_free;
static __thread struct kvmpy_vcpu *volatile run_current;
static int run_signal;

uint64_t kvmpy_monotonic_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ULL + (uint64_t)ts.tv_nsec;
}

/* Map @fd in place of what is mapped at @place now; -1 with errno, and that is as it was, where it cannot be. */
int kvmpy_map_over(void *place, uint64_t size, int fd, int64_t offset)
{
	void *map = mmap(place, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset);

	return map == MAP_FAILED ? -1 : 0;
}

/* Let what is mapped at @place go, and have its content there as memory of our own; -1 where there is none. */
int kvmpy_map_keep(void *place, uint64_t size)
{
	void *copy = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (copy == MAP_FAILED)
		return -1;
	memcpy(copy, place, size);
	if (mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, place) != MAP_FAILED)
		return 0;
	munmap(copy, size);
	return -1;
}

/*
 * guest_memfd gives up when it sees a signal. What was interrupted is done again, in stretches that get done
 * between two signals.
 */
int kvmpy_fallocate(int fd, int mode, int64_t offset, int64_t length)
{
	if (!fallocate(fd, mode, offset, length))
		return 0;
	if (errno != EINTR)
		return -1;
	for (int64_t done = 0; done < length;) {
		int64_t part = length - done < FALLOCATE_STRETCH ? length - done : FALLOCATE_STRETCH;

		if (!fallocate(fd, mode, offset + done, part))
			done += part;
		else if (errno != EINTR)
			return -1;
	}
	return 0;
}

static void run_timer_at(struct run_node *n, uint64_t ns)
{
	struct itimerspec its = {
		.it_value = { .tv_sec = ns / 1000000000ULL, .tv_nsec = ns % 1000000000ULL },
	};

	timer_settime(n->timer, TIMER_ABSTIME, &its, NULL);
	n->v.armed_ns = ns;
}

static void run_handler(int sig, siginfo_t *info, void *context)
{
	struct kvmpy_vcpu *v = run_current;
	int saved = errno;

	(void)sig;
	(void)context;
	if (v) {
		if (info->si_code == SI_TIMER && info->si_value.sival_ptr == v) {
			uint64_t deadline = v->deadline_ns;

			if (deadline && kvmpy_monotonic_ns() >= deadline) {
				__atomic_fetch_or(&v->kick, KICK_DEADLINE, __ATOMIC_SEQ_CST);
				v->run->immediate_exit = 1;
			} else if (deadline) {
				run_timer_at((struct run_node *)v, deadline);
			} else {
				v->armed_ns = 0;
			}
		} else if (info->si_code != SI_TIMER && v->kick) {
			v->run->immediate_exit = 1;
		}
	}
	errno = saved;
}

int kvmpy_run_init(void)
{
	struct sigaction sa = { .sa_sigaction = run_handler, .sa_flags = SA_SIGINFO | SA_RESTART };
	int ret = 0;

	pthread_mutex_lock(&run_lock);
	if (!run_signal) {
		/*
		 * Not a real-time signal: each of those needs a place in the queue, and tgkill(2) fails when
		 * RLIMIT_SIGPENDING is used up. Linux itself never sends this one.
		 */
		run_signal = SIGSTKFLT;
		sigfillset(&sa.sa_mask);
		ret = sigaction(run_signal, &sa, NULL);
	}
	pthread_mutex_unlock(&run_lock);
	return ret;
}

int kvmpy_kick_signal(void)
{
	return run_signal;
}

/*
 * Nodes are never given back to the heap: a late signal may still name one. One serves another vCPU only when
 * nobody holds it any more: see kvmpy_vcpu_free().
 */
struct kvmpy_vcpu *kvmpy_vcpu_new(int fd, void *run)
{
	struct run_node *n;

	if (kvmpy_run_init())
		return NULL;
	pthread_mutex_lock(&run_lock);
	n = run_free;
	if (n)
		run_free = n->next;
	pthread_mutex_unlock(&run_lock);
	if (!n) {
		n = malloc(sizeof(*n));
		if (!n)
			return NULL;
		pthread_mutex_init(&n->lock, NULL);
	}
	memset(&n->v, 0, sizeof(n->v));
	n->v.fd = fd;
	n->v.run = run;
	return &n->v;
}

static void run_timer_drop(struct run_node *n)
{
	if (n->v.timer_tid)
		timer_delete(n->timer);
	n->v.timer_tid = 0;
	n->v.armed_ns = 0;
}

/* The caller is the last one that knows @v. */
void kvmpy_vcpu_free(struct kvmpy_vcpu *v)
{
	struct run_node *n = (struct run_node *)v;

	run_timer_drop(n);
	v->run = NULL;
	v->deadline_ns = 0;
	pthread_mutex_lock(&run_lock);
	n->next = run_free;
	run_free = n;
	pthread_mutex_unlock(&run_lock);
}

/* After this no run begins and no kick touches the run area. Returns -1, with nothing done, during a run. */
int kvmpy_vcpu_close(struct kvmpy_vcpu *v)
{
	struct run_node *n = (struct run_node *)v;
	uint32_t state = __atomic_load_n(&v->busy, __ATOMIC_SEQ_CST);
	int ret = 0;

	pthread_mutex_lock(&n->lock);
	do {
		if (state & RUN_IN)
			ret = -1;
	} while (!ret && !__atomic_compare_exchange_n(&v->busy, &state, RUN_CLOSED, false, __ATOMIC_SEQ_CST,
						      __ATOMIC_SEQ_CST));
	pthread_mutex_unlock(&n->lock);
	return ret;
}

/* After this no run begins; one that has begun goes on until it is kicked. */
void kvmpy_vcpu_stop(struct kvmpy_vcpu *v)
{
	__atomic_fetch_or(&v->busy, RUN_STOPPED, __ATOMIC_SEQ_CST);
}

void kvmpy_vcpu_deadline(struct kvmpy_vcpu *v, uint64_t timeout_ns)
{
	v->deadline_ns = timeout_ns ? kvmpy_monotonic_ns() + timeout_ns : 0;
}

/* Returns -1, with nothing done, when the vCPU is closed. */
int kvmpy_vcpu_kick(struct kvmpy_vcpu *v)
{
	struct run_node *n = (struct run_node *)v;
	int ret = -1;

	pthread_mutex_lock(&n->lock);
	if (!(__atomic_load_n(&v->busy, __ATOMIC_SEQ_CST) & RUN_CLOSED)) {
		/*
		 * The flag last: a run takes it and immediate_exit back together, and what came later would stay for
		 * ever.
		 */
		v->run->immediate_exit = 1;
		__atomic_fetch_or(&v->kick, KICK_ASKED, __ATOMIC_SEQ_CST);
		/* It fails only when the thread has just ended: then the flag is there for the next one. */
		if (__atomic_load_n(&v->busy, __ATOMIC_SEQ_CST) & RUN_IN && v->tid)
			syscall(SYS_tgkill, getpid(), v->tid, run_signal);
		ret = 0;
	}
	pthread_mutex_unlock(&n->lock);
	return ret;
}

static int run_arm(struct run_node *n, int32_t tid)
{
	struct sigevent ev = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = run_signal };

	if (n->v.timer_tid != tid) {
		run_timer_drop(n);
		ev.sigev_value.sival_ptr = &n->v;
#ifdef sigev_notify_thread_id
		ev.sigev_notify_thread_id = tid;
#else
		ev._sigev_un._tid = tid;
#endif
		if (timer_create(CLOCK_MONOTONIC, &ev, &n->timer))
			return -1;
		n->v.timer_tid = tid;
	}
	run_timer_at(n, n->v.deadline_ns);
	return 0;
}

static int run_classify(struct kvmpy_vcpu *v)
{
	struct kvm_run *run = v->run;
	struct kvmpy_trail *t = &v->trail[v->trail_next++ % 16];

	v->exits++;
	t->exit_reason = run->exit_reason;
	t->what = 0;
	if (run->exit_reason != RUN_EXIT_IO) {
		memcpy(t->data, (char *)run + offsetof(struct kvm_run, io), sizeof(t->data));
		return KVMPY_RUN_EXIT;
	}
	t->data[0] = run->io.port;
	t->data[1] = run->io.direction | run->io.size << 8;
	t->data[2] = run->io.count;
	if (run->io.port == RUN_UCALL_PORT && run->io.direction == RUN_IO_OUT && run->io.size == 4 &&
	    run->io.count == 1 && v->ucall_hva) {
		uint32_t id = *(uint32_t *)((char *)run + run->io.data_offset);
		uint32_t slot = id - v->ucall_first;

		if (slot < v->ucall_count) {
			char *p = (char *)v->ucall_hva + slot * 512;

			v->ucall_slot = slot;
			v->ucalls++;
			t->what = *(uint32_t *)(p + 12) | 1u << 31;
			memcpy(t->data, p + 16, sizeof(t->data));
			return KVMPY_RUN_UCALL;
		}
	}
	memcpy(&t->data[3], (char *)run + run->io.data_offset, 8);
	return KVMPY_RUN_EXIT;
}

/* A deadline that has passed ends KVM_RUN before the guest goes on; another one gets its timer. -1: there is none. */
static int run_deadline(struct kvmpy_vcpu *v, int32_t tid)
{
	uint64_t now = kvmpy_monotonic_ns();

	if (now >= v->deadline_ns) {
		__atomic_fetch_or(&v->kick, KICK_DEADLINE, __ATOMIC_SEQ_CST);
		return 0;
	}
	if (v->timer_tid == tid && v->armed_ns > now && v->armed_ns <= v->deadline_ns)
		return 0;
	return run_arm((struct run_node *)v, tid);
}

/* @ran may be NULL. The fields of @v are another thread's where that runs it. */
int kvmpy_vcpu_run(struct kvmpy_vcpu *v, struct kvmpy_ran *ran)
{
	static __thread int32_t tid;
	struct kvmpy_vcpu *outer = run_current;
	uint32_t kick, state = 0;
	int ret, result;

	if (ran)
		*ran = (struct kvmpy_ran){ 0 };
	if (!__atomic_compare_exchange_n(&v->busy, &state, RUN_IN, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
		if (state & RUN_CLOSED)
			return KVMPY_RUN_CLOSED;
		return state & RUN_IN ? KVMPY_RUN_BUSY : KVMPY_RUN_STOPPED;
	}
	if (!tid || (v->tid != tid))
		tid = (int32_t)syscall(SYS_gettid);
	/* Before the look at the flag, so that who sets it later finds the thread to signal. */
	__atomic_store_n(&v->tid, tid, __ATOMIC_SEQ_CST);
	run_current = v;
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	if (v->deadline_ns && run_deadline(v, tid)) {
		v->err = errno;
		result = KVMPY_RUN_NO_TIMER;
		goto out;
	}
	/* One that came while the last run was giving up the vCPU found neither a thread to signal nor this flag kept. */
	if (__atomic_load_n(&v->kick, __ATOMIC_SEQ_CST))
		v->run->immediate_exit = 1;
	ret = ioctl(v->fd, RUN_KVM_RUN, 0);
	v->err = ret < 0 ? errno : 0;
	if (ran)
		*ran = (struct kvmpy_ran){ .issued = 1, .result = ret, .error = v->err };
	kick = __atomic_load_n(&v->kick, __ATOMIC_SEQ_CST);
	if (ret == 0) {
		result = run_classify(v);
	} else if (v->err == EINTR || v->err == EAGAIN) {
		/* EAGAIN: an application processor has left its wait for INIT, and wants to be run again. */
		if (kick) {
			kick = __atomic_exchange_n(&v->kick, 0, __ATOMIC_SEQ_CST);
			v->run->immediate_exit = 0;
			if (kick & KICK_ASKED)
				result = KVMPY_RUN_KICKED;
			else if (v->deadline_ns && kvmpy_monotonic_ns() >= v->deadline_ns)
				result = KVMPY_RUN_DEADLINE;
			else
				result = KVMPY_RUN_EINTR;	/* it was an earlier run's, which ended just then */
		} else {
			result = KVMPY_RUN_EINTR;
		}
	} else {
		run_classify(v);
		result = KVMPY_RUN_ERROR;
	}
out:
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	run_current = outer;
	__atomic_fetch_and(&v->busy, ~RUN_IN, __ATOMIC_SEQ_CST);
	return result;
}
