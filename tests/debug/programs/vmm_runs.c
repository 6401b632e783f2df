/* SPDX-License-Identifier: Apache-2.0 */
/* How VMMs run a vCPU: exits are completed with immediate_exit, timers interrupt, rings are drained. */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

/* 1: mov $0x200, %cx; loop .; inc %al; out %al, $0x10; jmp 1b */
static const unsigned char counting[] = { 0xb9, 0x00, 0x02, 0xe2, 0xfe, 0xfe, 0xc0, 0xe6, 0x10, 0xeb, 0xf5 };
/* mov $0x41, %al; 1: out %al, $0x10; jmp 1b */
static const unsigned char saying[] = { 0xb0, 0x41, 0xe6, 0x10, 0xeb, 0xfc };
/* mov $400, %cx; 1: out %al, $0x30; test $0x3f, %cl; jnz 2f; out %al, $0x31; 2: loop 1b; hlt */
static const unsigned char writing[] = {
	0xb9, 0x90, 0x01, 0xe6, 0x30, 0xf6, 0xc1, 0x3f, 0x75, 0x02, 0xe6, 0x31, 0xe2, 0xf5, 0xf4,
};

/* 1: mov 0x1800, %al; inc %al; mov %al, 0x1800; out %al, $0x10; jmp 1b */
static const unsigned char remembering[] = {
	0xa0, 0x00, 0x18, 0xfe, 0xc0, 0xa2, 0x00, 0x18, 0xe6, 0x10, 0xeb, 0xf4,
};

static int kvm, vm, cpu;
static char *memory;
static struct kvm_run *run;

static void check(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static void make(const unsigned char *code, size_t size)
{
	struct kvm_userspace_memory_region r = { .guest_phys_addr = 0x1000, .memory_size = 4096 };
	struct kvm_regs g = { .rip = 0x1000, .rflags = 2 };
	struct kvm_sregs s;
	char *m = mmap(memory, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	check(m != MAP_FAILED && cpu >= 0, "a vCPU");
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
	check(run != MAP_FAILED, "its run area");
	memory = memcpy(m, code, size);
	r.userspace_addr = (unsigned long)m;
	check(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r), "a slot");
	check(!ioctl(cpu, KVM_GET_SREGS, &s), "KVM_GET_SREGS");
	s.cs.base = s.cs.selector = 0;
	check(!ioctl(cpu, KVM_SET_SREGS, &s) && !ioctl(cpu, KVM_SET_REGS, &g), "registers");
}

static void run_to(unsigned int reason)
{
	check(!ioctl(cpu, KVM_RUN, 0) && run->exit_reason == reason, "KVM_RUN");
}

static void immediately(void)
{
	check(ioctl(cpu, KVM_RUN, 0) < 0 && errno == EINTR, "KVM_RUN with immediate_exit");
}

static void complete(void)
{
	for (int i = 0; i < 40; i++) {
		run_to(KVM_EXIT_IO);
		run->immediate_exit = 1;
		immediately();
		run->immediate_exit = 0;
	}
}

static void immediate(void)
{
	run->immediate_exit = 1;
	for (int i = 0; i < 3; i++)
		immediately();
	run->immediate_exit = 0;
	run_to(KVM_EXIT_IO);
}

static void nothing(int sig)
{
	(void)sig;
}

static void interrupted(void)
{
	struct itimerval t = { { 0, 3000 }, { 0, 3000 } };
	int exits = 0, interruptions = 0;

	sigaction(SIGALRM, &(struct sigaction){ .sa_handler = nothing }, NULL);
	setitimer(ITIMER_REAL, &t, NULL);
	while (exits < 40 || interruptions < 3) {
		if (ioctl(cpu, KVM_RUN, 0) < 0) {
			check(errno == EINTR, "KVM_RUN");
			interruptions++;
		} else {
			check(run->exit_reason == KVM_EXIT_IO, "its exit");
			exits++;
		}
	}
}

static void coalesced(void)
{
	struct kvm_coalesced_mmio_zone zone = { .addr = 0x30, .size = 1, .pio = 1 };
	struct kvm_coalesced_mmio_ring *ring = (void *)((char *)run + KVM_COALESCED_MMIO_PAGE_OFFSET * 4096);
	int exits = 0;

	check(!ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone), "KVM_REGISTER_COALESCED_MMIO");
	for (; !ioctl(cpu, KVM_RUN, 0) && run->exit_reason == KVM_EXIT_IO; exits++) {
		check(run->io.port == 0x31, "an exit that the ring had no room for");
		/* Emptied by one end, or begun anew at a place of the host's. */
		if (exits % 2)
			ring->first = ring->last;
		else
			ring->first = ring->last = 100;
	}
	check(run->exit_reason == KVM_EXIT_HLT && exits == 6, "the end");
}

/* Registers with KVM_RUN itself: refused, asked for, given, not asked for any more. */
static void synchronised(void)
{
	run->kvm_valid_regs = ~0ULL;
	check(ioctl(cpu, KVM_RUN, 0) < 0 && errno == EINVAL, "registers that do not exist");
	run->kvm_valid_regs = KVM_SYNC_X86_REGS;
	run_to(KVM_EXIT_IO);
	run->s.regs.regs.rax = 0x50;
	run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
	run_to(KVM_EXIT_IO);
	check(((unsigned char *)run)[run->io.data_offset] == 0x51, "the register that was given");
	run->kvm_valid_regs = 0;
	run->s.regs.regs.rax = 0;
	run_to(KVM_EXIT_IO);
	check(!run->s.regs.regs.rax, "registers that nobody asked for");
}

static void cpuid(void)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + 128 * sizeof(struct kvm_cpuid_entry2));

	c->nent = 128;
	check(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, c) && !ioctl(cpu, KVM_SET_CPUID2, c), "CPUID");
	free(c);
}

/* A VM whose memory lies where that of an earlier one lay, and holds nothing of it. */
static void again(void)
{
	char *first = memory;

	run_to(KVM_EXIT_IO);
	close(cpu);
	close(vm);
	munmap(run, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	close(kvm);
	munmap(memory, 4096);
	make(remembering, sizeof(remembering));
	run_to(KVM_EXIT_IO);
	check(memory == first && memory[0x800] == 1, "the memory of the second VM");
}

/* What KVM says to a process that did not make the VM. */
static void fork_shared(void)
{
	int status;
	pid_t child = fork();

	if (!child) {
		struct kvm_regs g;

		_exit(ioctl(cpu, KVM_GET_REGS, &g) < 0 && errno == EIO ? 0 : 1);
	}
	check(waitpid(child, &status, 0) == child && !status, "the child");
}

/* VMs of their own, in both processes at the same addresses. */
static void fork_own(void)
{
	int status;
	pid_t child = fork();

	make(child ? counting : writing, child ? sizeof(counting) : sizeof(writing));
	run_to(KVM_EXIT_IO);
	check(run->io.port == (child ? 0x10 : 0x30), "its port");
	if (!child)
		exit(0);
	check(waitpid(child, &status, 0) == child && !status, "the child");
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*function)(void);
		const unsigned char *code;
		size_t size;
	} modes[] = {
		{ "complete", complete, saying, sizeof(saying) },
		{ "immediate", immediate, counting, sizeof(counting) },
		{ "interrupted", interrupted, counting, sizeof(counting) },
		{ "coalesced", coalesced, writing, sizeof(writing) },
		{ "synchronised", synchronised, counting, sizeof(counting) },
		{ "cpuid", cpuid, counting, sizeof(counting) },
		{ "again", again, remembering, sizeof(remembering) },
		{ "fork-shared", fork_shared, counting, sizeof(counting) },
		{ "fork-own", fork_own, NULL, 0 },
	};

	for (size_t i = 0; argc > 1 && i < sizeof(modes) / sizeof(*modes); i++)
		if (!strcmp(argv[1], modes[i].name)) {
			if (modes[i].code)
				make(modes[i].code, modes[i].size);
			modes[i].function();
			return 0;
		}
	return 2;
}
