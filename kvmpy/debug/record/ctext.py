# SPDX-License-Identifier: Apache-2.0
"""The parts of a C reproducer that are the same in all of them; each is written only where it is used."""

from __future__ import annotations

CHECK = """\
static int differences;

/* Prints what ioctl @step did when it was recorded, and now, where that is not the same. */
static int same(int step, const char *what, long now, long recorded, int error)
{
	int number = now < 0 ? errno : 0;

	if (number == error && (now == recorded || (now >= 0 && recorded == ANY)))
		return 1;
	printf("step %d, %s: recorded %s%s, now %s%s\\n", step, what, error ? "failure: " : "success",
		error ? strerror(error) : "", number ? "failure: " : "result ", number ? strerror(number) : "");
	if (!number)
		printf("\\tresult %ld, recorded %ld\\n", now, recorded);
	differences++;
	return 0;
}
"""

NEED = """\
/* A step on the way: what worked when it was recorded has to work now, or there is no point in going on. */
static long need(int step, const char *what, long now, long recorded, int error)
{
	if (!same(step, what, now, recorded, error) && now < 0 && !error) {
		printf("could not get to the point of this file\\n");
		exit(2);
	}
	return now;
}
"""

VALUE = """\
/* Compares one number of what came back. */
static int value(int step, const char *what, unsigned long long now, unsigned long long recorded)
{
	if (now == recorded)
		return 1;
	printf("step %d, %s: recorded %#llx, now %#llx\\n", step, what, recorded, now);
	differences++;
	return 0;
}
"""

MEMORY = """\
static unsigned char *map_memory(size_t size, int rights, int flags)
{
	void *p = mmap(NULL, size, rights, flags | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED) {
		perror("mmap");
		exit(2);
	}
	return p;
}
"""

MAP_FD = """\
static void *map_fd(int fd, size_t size, off_t offset)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);

	if (p == MAP_FAILED) {
		perror("mmap of a file descriptor");
		exit(2);
	}
	return p;
}
"""

WORDS = """\
struct word {
	unsigned long offset;
	unsigned long long value;
};

static void put_words(unsigned char *memory, const struct word *words, size_t count)
{
	for (size_t i = 0; i < count; i++)
		memcpy(memory + words[i].offset, &words[i].value, sizeof(words[i].value));
}
"""

INTERRUPT = """\
struct interruption {
	pthread_t thread;
	struct kvm_run *run;
	int ms;
};

static void *interrupt(void *arg)
{
	struct interruption *i = arg;

	usleep(i->ms * 1000);
	i->run->immediate_exit = 1;
	pthread_kill(i->thread, SIGUSR1);
	return NULL;
}

/* KVM_RUN that is made to end with EINTR after some time. */
static int run_for(int vcpu, struct kvm_run *run, int ms)
{
	struct interruption i = { pthread_self(), run, ms };
	pthread_t thread;
	int ret, error;

	if (pthread_create(&thread, NULL, interrupt, &i)) {
		perror("pthread_create");
		exit(2);
	}
	ret = ioctl(vcpu, KVM_RUN, NULL);
	error = errno;
	pthread_join(thread, NULL);
	run->immediate_exit = 0;
	errno = error;
	return ret;
}
"""

KICK = """\
static void kick(struct kvm_run *run, pthread_t thread, int signalled)
{
	run->immediate_exit = 1;
	if (signalled)
		pthread_kill(thread, SIGUSR1);
}
"""

ORDER = """\
/* The recorded order between threads. */
static pthread_mutex_t order_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t order_changed = PTHREAD_COND_INITIALIZER;

static void set(unsigned char *flag)
{
	pthread_mutex_lock(&order_lock);
	*flag = 1;
	pthread_cond_broadcast(&order_changed);
	pthread_mutex_unlock(&order_lock);
}

static void await(const unsigned char *flag)
{
	pthread_mutex_lock(&order_lock);
	while (!*flag)
		pthread_cond_wait(&order_changed, &order_lock);
	pthread_mutex_unlock(&order_lock);
}
"""

SIGNALS = """\
static void woken(int sig)
{
	(void)sig;
}
"""

LATE = """\
static void late(int sig)
{
	static const char text[] = "not reproduced: it was still running after " LIMIT_TEXT " seconds\\n";
	ssize_t done = write(STDOUT_FILENO, text, sizeof(text) - 1);

	(void)sig;
	(void)done;
	_exit(1);
}
"""

FAULT = """\
/* run->memory_fault, which the headers of Linux 6.7 and older lack. */
struct memory_fault {
	__u64 flags;
	__u64 gpa;
	__u64 size;
};

static struct memory_fault memory_fault(const struct kvm_run *run)
{
	struct memory_fault fault;

	memcpy(&fault, (const char *)run + offsetof(struct kvm_run, hw), sizeof(fault));
	return fault;
}
"""

RESET_RING = """\
/* What a program does that collects entries of a dirty ring: marks them, here the first @count of them. */
static long collect(struct kvm_dirty_gfn *ring, size_t size, long count)
{
	for (size_t i = 0; i < size / sizeof(*ring) && count > 0; i++) {
		if (ring[i].flags == KVM_DIRTY_GFN_F_DIRTY) {
			ring[i].flags |= KVM_DIRTY_GFN_F_RESET;
			count--;
		}
	}
	return count;
}
"""
