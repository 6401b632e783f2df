/* SPDX-License-Identifier: Apache-2.0 */
/* Programs to trace: each mode issues known ioctls, so that a test can say what a trace of it must hold. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "regs.h"
#include "cpuid_msr.h"
#include "events.h"
#include "memory.h"
#include "irq.h"
#include "xen.h"
#include "nested.h"
#include "device.h"
#include "run.h"

#define KVM_CREATE_VM 0xae01
#define KVM_CHECK_EXTENSION 0xae03
#define KVM_CREATE_VCPU 0xae41
#define KVM_GET_SUPPORTED_CPUID 0xc008ae05
#define KVM_SET_MEMORY 0x4020ae46
#define KVM_GET_DIRTY_LOG 0x4010ae42
#define KVM_RUN 0xae80
#define KVM_GET_REGS 0x8090ae81
#define KVM_SET_REGS 0x4090ae82
#define KVM_GET_SREGS 0x8138ae83
#define KVM_SET_SREGS 0x4138ae84
#define KVM_GET_MSRS 0xc008ae88
#define KVM_ENCRYPT_OP 0xc008aeba
#define UNKNOWN 0xc018aefeUL
#define RUN_SIZE 0x3000
#define MEMORY 0x108000

/* mov $0x42, %al; out %al, $0x10; in $0x11, %al; hlt */
static const uint8_t code[] = { 0xb0, 0x42, 0xe6, 0x10, 0xe4, 0x11, 0xf4 };

static void check(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static int make_vm(uint8_t **memory)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	check(kvm >= 0, "/dev/kvm");
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	check(vm >= 0, "KVM_CREATE_VM");
	*memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(*memory != MAP_FAILED, "mmap");
	memcpy(*memory + 0x1000, code, sizeof code);
	struct kvm_userspace_memory_region region = {
		.slot = 3, .flags = 1, .memory_size = MEMORY, .userspace_addr = (uint64_t)*memory,
	};
	check(ioctl(vm, KVM_SET_MEMORY, &region) == 0, "KVM_SET_USER_MEMORY_REGION");
	close(kvm);
	return vm;
}

static int make_vcpu(int vm, long id, struct kvm_run **run)
{
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, id);
	check(vcpu >= 0, "KVM_CREATE_VCPU");
	*run = mmap(NULL, RUN_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	check(*run != MAP_FAILED, "mmap of the vCPU");
	struct kvm_sregs sregs;
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0, "KVM_GET_SREGS");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0, "KVM_SET_SREGS");
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	check(ioctl(vcpu, KVM_SET_REGS, &regs) == 0, "KVM_SET_REGS");
	return vcpu;
}

static void run_to_halt(int vcpu, struct kvm_run *run)
{
	for (;;) {
		/* A tracer that comes or goes interrupts it, as a signal does. */
		if (ioctl(vcpu, KVM_RUN, 0) != 0) {
			check(errno == EINTR, "KVM_RUN");
			continue;
		}
		if (run->exit_reason == 5)
			return;
		check(run->exit_reason == 2, "KVM_EXIT_IO");
		if (run->io.direction == 0)
			*((uint8_t *)run + run->io.data_offset) = 0x99;
	}
}

static void basic(void)
{
	uint8_t *memory;
	struct kvm_run *run;
	int vm = make_vm(&memory), vcpu = make_vcpu(vm, 0, &run);
	run_to_halt(vcpu, run);
	int copy = dup(vcpu);
	struct kvm_regs regs;
	check(ioctl(copy, KVM_GET_REGS, &regs) == 0 && (regs.rax & 0xff) == 0x99, "KVM_GET_REGS of the copy");
	close(copy);
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry[1];
	} msrs = { .head.nmsrs = 1, .entry[0].index = 0xc0000080 };
	check(ioctl(vcpu, KVM_GET_MSRS, &msrs) == 1, "KVM_GET_MSRS");
	uint64_t bitmap[5] = { 0 };
	struct kvm_dirty_log log = { .slot = 3, .dirty_bitmap = (uint64_t)bitmap };
	check(ioctl(vm, KVM_GET_DIRTY_LOG, &log) == 0, "KVM_GET_DIRTY_LOG");
	struct kvm_userspace_memory_region bad = { .slot = 4, .guest_phys_addr = 1, .memory_size = 4096 };
	check(ioctl(vm, KVM_SET_MEMORY, &bad) == -1 && errno == EINVAL, "an unaligned slot");
	check(ioctl(vcpu, KVM_SET_REGS, 8) == -1 && errno == EFAULT, "a bad pointer");
	uint64_t unknown[3] = { 0x1122334455667788, 2, 3 };
	check(ioctl(vm, UNKNOWN, unknown) == -1 && errno == ENOTTY, "an unknown ioctl");
	struct { uint32_t id, pad; uint64_t data; uint32_t error, fd; } command = { .id = 100, .fd = 7 };
	uint64_t start[16] = { 0x30000 };
	command.data = (uint64_t)start;
	check(ioctl(vm, KVM_ENCRYPT_OP, &command) == -1, "a SEV command on a plain VM");
	check(syscall(SYS_ioctl, vcpu, KVM_GET_REGS, &regs) == 0, "ioctl through syscall()");
	munmap(run, RUN_SIZE);
	close(vcpu);
	close(vm);
}

/* The host writes a byte before each run, the guest sends it back, and counts in a page of its own. */
static void answers(void)
{
	static const uint8_t code[] = {
		0xa0, 0x00, 0x20, /* mov 0x2000, %al */
		0xe6, 0x10, /* out %al, $0x10 */
		0xfe, 0x06, 0x00, 0x30, /* incb 0x3000 */
		0xeb, 0xf5, /* jmp to the first */
	};
	uint8_t *memory;
	struct kvm_run *run;
	int vm = make_vm(&memory), vcpu = make_vcpu(vm, 0, &run);

	memcpy(memory + 0x1000, code, sizeof code);
	for (int i = 1; i <= 4; i++) {
		memory[0x2000] = (uint8_t)(0x10 * i);
		check(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == 2, "KVM_RUN");
		check(*((uint8_t *)run + run->io.data_offset) == 0x10 * i, "what the guest read");
	}
	check(memory[0x3000] == 3, "what the guest counted");
}

/* The code was written by way of the file: this process never touched the pages that the guest executes. */
static void elsewhere(void)
{
	uint8_t *memory;
	struct kvm_run *run;
	int file = memfd_create("guest", 0), vm = make_vm(&memory);
	check(file >= 0 && ftruncate(file, MEMORY) == 0, "memfd_create");
	check(pwrite(file, code, sizeof code, 0x1000) == (ssize_t)sizeof code, "pwrite");
	check(mmap(memory, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == memory, "mmap");
	int vcpu = make_vcpu(vm, 0, &run);
	run_to_halt(vcpu, run);
}

/* Rules of memory slots, MSRs and system registers, broken one by one. */
static void refusals(void)
{
	uint8_t *memory;
	struct kvm_run *run;
	int vm = make_vm(&memory), vcpu = make_vcpu(vm, 0, &run);
	struct kvm_userspace_memory_region whole = {
		.slot = 3, .flags = 1, .memory_size = MEMORY, .userspace_addr = (uint64_t)memory,
	}, region = whole;

	region.memory_size = 4096;
	check(ioctl(vm, KVM_SET_MEMORY, &region) == -1 && errno == EINVAL, "a live slot resized");
	region = whole;
	region.userspace_addr += 4096;
	check(ioctl(vm, KVM_SET_MEMORY, &region) == -1 && errno == EINVAL, "a live slot elsewhere");
	region = (struct kvm_userspace_memory_region){ .slot = 9 };
	check(ioctl(vm, KVM_SET_MEMORY, &region) == -1 && errno == EINVAL, "an absent slot deleted");
	region = whole;
	region.slot = 4;
	check(ioctl(vm, KVM_SET_MEMORY, &region) == -1 && errno == EEXIST, "an overlap");
	region.guest_phys_addr = 1ULL << 60;
	check(ioctl(vm, KVM_SET_MEMORY, &region) == -1 && errno == EINVAL, "beyond MAXPHYADDR");
	region.flags = 1 << 20;
	check(ioctl(vm, KVM_SET_MEMORY, &region) == -1 && errno == EINVAL, "an unknown flag");
	struct kvm_sregs sregs, wrong;
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0, "KVM_GET_SREGS");
	wrong = sregs;
	wrong.cr0 |= 1U << 31;
	wrong.cr0 &= ~1ULL;
	check(ioctl(vcpu, KVM_SET_SREGS, &wrong) == -1 && errno == EINVAL, "CR0");
	wrong = sregs;
	wrong.efer |= 1 << 10;
	check(ioctl(vcpu, KVM_SET_SREGS, &wrong) == -1 && errno == EINVAL, "EFER");
	wrong = sregs;
	wrong.cs.l = 1;
	check(ioctl(vcpu, KVM_SET_SREGS, &wrong) == -1 && errno == EINVAL, "CS");
	wrong = sregs;
	wrong.cr4 |= 1ULL << 40;
	check(ioctl(vcpu, KVM_SET_SREGS, &wrong) == -1 && errno == EINVAL, "CR4");
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry[4];
	} msrs = { .head.nmsrs = 4 };
	msrs.entry[0].index = msrs.entry[2].index = msrs.entry[3].index = 0x174; /* SYSENTER_CS */
	msrs.entry[1].index = 0x4b564dff; /* none of KVM's */
	check(ioctl(vcpu, 0x4008ae89, &msrs) == 1, "KVM_SET_MSRS");
	/* A page in a slot that cannot be written leaves as MMIO. */
	check(mprotect(memory, 4096, PROT_READ) == 0, "mprotect");
	static const uint8_t store[] = { 0xa2, 0x10, 0x00, 0xf4 }; /* mov %al, 0x10; hlt */
	memcpy(memory + 0x1000, store, sizeof store);
	check(ioctl(vcpu, KVM_RUN, 0) == 0, "KVM_RUN");
	check(ioctl(-1, KVM_RUN, 0) == -1 && errno == EBADF, "a bad descriptor");
}

struct worker {
	pthread_t thread;
	int vm;
	long id;
	int rounds;
};

static void *work(void *argument)
{
	struct worker *worker = argument;
	struct kvm_run *run;
	int vcpu = make_vcpu(worker->vm, worker->id, &run);
	run_to_halt(vcpu, run);
	struct kvm_regs regs;
	for (int i = 0; i < worker->rounds; i++)
		check(ioctl(vcpu, KVM_GET_REGS, &regs) == 0, "KVM_GET_REGS");
	return NULL;
}

static void threads(int number, int rounds)
{
	uint8_t *memory;
	struct worker workers[16];
	int vm = make_vm(&memory);
	for (int i = 0; i < number; i++) {
		workers[i] = (struct worker){ .vm = vm, .id = i, .rounds = rounds };
		check(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
	}
	for (int i = 0; i < number; i++)
		pthread_join(workers[i].thread, NULL);
}

static void forking(void)
{
	uint8_t *memory;
	struct kvm_run *run;
	int vm = make_vm(&memory), vcpu;
	pid_t child = fork();
	if (child == 0) {
		/* A VM belongs to its creator: EIO. The child's own VM works. */
		check(ioctl(vm, KVM_CREATE_VCPU, 0) == -1 && errno == EIO, "the parent's VM");
		vm = make_vm(&memory);
		vcpu = make_vcpu(vm, 0, &run);
		run_to_halt(vcpu, run);
		exit(0);
	}
	int status;
	check(waitpid(child, &status, 0) == child && status == 0, "the child");
	vcpu = make_vcpu(vm, 5, &run);
	run_to_halt(vcpu, run);
}

/* A forked child that closes what it inherited, as one does before it executes another program. */
static void fork_close(void)
{
	uint8_t *memory;
	struct kvm_run *run;
	int vm = make_vm(&memory), vcpu = make_vcpu(vm, 0, &run);
	pid_t child = fork();
	if (child == 0) {
		close(vcpu);
		close(vm);
		_exit(0);
	}
	int status;
	check(waitpid(child, &status, 0) == child && status == 0, "the child");
	run_to_halt(vcpu, run);
}

/* Random bytes over the recorder's ring and the page that all recorded processes share, between ioctls. */
static void scribble(unsigned int seed, int rounds)
{
	uint8_t *memory, *places[2] = { NULL, NULL };
	size_t sizes[2] = { 0, 0 };
	int vm = make_vm(&memory);
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "r");
	check(maps != NULL, "/proc/self/maps");
	while (fgets(line, sizeof line, maps)) {
		unsigned long start, end;
		int which = strstr(line, "/ring.") ? 0 : strstr(line, "/control") ? 1 : -1;
		if (which < 0 || places[which] || sscanf(line, "%lx-%lx", &start, &end) != 2)
			continue;
		places[which] = (uint8_t *)start;
		sizes[which] = end - start;
	}
	fclose(maps);
	check(places[0] && places[1], "the recorder's memory");
	srandom(seed);
	for (int i = 0; i < rounds; i++) {
		int which = random() % 8 == 0, words = 1 + random() % 8;
		/* The heads of ring and control page, and the frames: all three are hit often. */
		size_t room = random() % 2 ? 256 : sizes[which] < 65536 ? sizes[which] : 65536;
		/* Not the sizes that the recorder itself goes by, nor the mark of who traces. */
		size_t least = which ? 256 : 64;
		for (int j = 0; j < words && room > least; j++) {
			uint64_t value = random() % 3 ? (uint64_t)random() << 32 | (uint64_t)random() : (uint64_t)random() % 9;
			*(uint64_t *)(places[which] + least + (size_t)random() % (room - least) / 8 * 8) = value;
		}
		ioctl(vm, KVM_CHECK_EXTENSION, (long)(random() % 100));
	}
}

struct cpuid {
	uint32_t nent, pad;
	uint32_t entries[128 * 10];
};

static int signal_kvm;
static volatile sig_atomic_t ticks;

static void tick(int number)
{
	(void)number;
	int saved = errno;
	/* Too few entries: E2BIG, at once. It must not disturb what it interrupted. */
	static struct cpuid one;
	one.nent = 1;
	ioctl(signal_kvm, KVM_GET_SUPPORTED_CPUID, &one);
	ticks++;
	errno = saved;
}

static void signals(void)
{
	struct sigaction action = { .sa_handler = tick };
	struct itimerval often = { { 0, 200 }, { 0, 200 } }, never = { { 0, 0 }, { 0, 0 } };
	signal_kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	struct cpuid cpuid;
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
	int rounds = 0;
	while (ticks < 200) {
		cpuid.nent = 128;
		check(ioctl(signal_kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) == 0 || errno == EINTR, "KVM_GET_SUPPORTED_CPUID");
		rounds++;
	}
	setitimer(ITIMER_REAL, &never, NULL);
	printf("%d %d\n", rounds, (int)ticks);
}

static void loop(void)
{
	uint8_t *memory;
	struct kvm_run *run;
	int vm = make_vm(&memory), vcpu = make_vcpu(vm, 0, &run);
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	printf("ready %d\n", getpid());
	fflush(stdout);
	for (;;) {
		struct timespec pause = { 0, 2000000 };
		check(ioctl(vcpu, KVM_SET_REGS, &regs) == 0, "KVM_SET_REGS");
		run_to_halt(vcpu, run);
		nanosleep(&pause, NULL);
	}
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static long bare(int fd, unsigned long request, void *argument)
{
	long result;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(SYS_ioctl), "D"((long)fd), "S"(request), "d"(argument)
			 : "rcx", "r11", "memory");
	return result;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return x < y ? -1 : x > y;
}

#define SAMPLES 41
#define ROUNDS 100

/* The medians of bare and recorded calls, sampled in turn. */
static void compare(const char *name, int fd, unsigned long request, void *argument)
{
	double plain[SAMPLES], recorded[SAMPLES];
	for (int i = 0; i < SAMPLES; i++) {
		double start = now();
		for (int j = 0; j < ROUNDS; j++)
			bare(fd, request, argument);
		plain[i] = (now() - start) / ROUNDS;
		start = now();
		for (int j = 0; j < ROUNDS; j++)
			ioctl(fd, request, argument);
		recorded[i] = (now() - start) / ROUNDS;
	}
	qsort(plain, SAMPLES, sizeof *plain, by_value);
	qsort(recorded, SAMPLES, sizeof *recorded, by_value);
	printf("%s %.0f %.0f\n", name, plain[SAMPLES / 2], recorded[SAMPLES / 2]);
}

static void bench(void)
{
	uint8_t *memory;
	struct kvm_run *run;
	static uint8_t room[4096];
	int vm = make_vm(&memory), vcpu = make_vcpu(vm, 0, &run);
	compare("KVM_CHECK_EXTENSION", vm, KVM_CHECK_EXTENSION, (void *)10);
	compare("KVM_GET_REGS", vcpu, KVM_GET_REGS, room);
	compare("KVM_SET_REGS", vcpu, KVM_SET_REGS, room);
	compare("KVM_GET_SREGS", vcpu, KVM_GET_SREGS, room);
	compare("KVM_GET_XSAVE", vcpu, 0x9000aea4, room);
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "basic";
	if (!strcmp(mode, "basic")) {
		basic();
	} else if (!strcmp(mode, "answers")) {
		answers();
	} else if (!strcmp(mode, "elsewhere")) {
		elsewhere();
	} else if (!strcmp(mode, "refusals")) {
		refusals();
	} else if (!strcmp(mode, "threads")) {
		threads(argc > 2 ? atoi(argv[2]) : 4, argc > 3 ? atoi(argv[3]) : 10);
	} else if (!strcmp(mode, "fork")) {
		forking();
	} else if (!strcmp(mode, "forkclose")) {
		fork_close();
	} else if (!strcmp(mode, "scribble")) {
		scribble((unsigned int)atoi(argv[2]), atoi(argv[3]));
	} else if (!strcmp(mode, "exec")) {
		char *const arguments[] = { argv[0], argv[2], NULL }, *const nothing[] = { NULL };
		execve(argc > 3 ? argv[3] : argv[0], arguments, nothing);
		return 3;
	} else if (!strcmp(mode, "rawexec")) {
		char *const arguments[] = { argv[0], argv[2], NULL }, *const nothing[] = { NULL };
		syscall(SYS_execve, argv[0], arguments, nothing);
		return 3;
	} else if (!strcmp(mode, "rawioctl")) {
		/* As a program does that issues system calls by itself. */
		int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
		check(bare(kvm, 0xae00, NULL) == 12, "KVM_GET_API_VERSION");
	} else if (!strcmp(mode, "rawvm")) {
		/* The C library's ioctl() once only; standard input says how long it lives. */
		char byte;
		int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
		int vm = (int)bare(kvm, KVM_CREATE_VM, NULL), vcpu = (int)bare(vm, KVM_CREATE_VCPU, NULL);
		check(vm >= 0 && vcpu >= 0, "KVM_CREATE_VCPU");
		check(ioctl(kvm, 0xae00, NULL) == 12, "KVM_GET_API_VERSION");
		check(read(0, &byte, 1) == 0, "standard input");
	} else if (!strcmp(mode, "closed")) {
		for (int fd = 0; fd < 256; fd++)
			close(fd);
		basic();
	} else if (!strcmp(mode, "signals")) {
		signals();
	} else if (!strcmp(mode, "loop")) {
		loop();
	} else if (!strcmp(mode, "bench")) {
		bench();
	} else if (!strcmp(mode, "crash")) {
		uint8_t *memory;
		make_vm(&memory);
		raise(SIGSEGV);
	} else if (!strcmp(mode, "nothing")) {
		return 7;
	} else {
		return 2;
	}
	return 0;
}
