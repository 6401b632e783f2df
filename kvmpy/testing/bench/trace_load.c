/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a traced program pays: prints "pairs BARE RECORDED" (KVM_GET_XSAVE by itself and through the C library, in turn,
 * medians), "sustained EACH" (KVM_RUN, again and again) and "cpu ALL" (of this process), all in nanoseconds.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#define SAMPLES 41
#define ROUNDS 50

static double at(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static double now(void)
{
	return at(CLOCK_MONOTONIC);
}

static long bare(int fd, unsigned long request, void *argument)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(SYS_ioctl), "D"((long)fd), "S"(request), "d"(argument)
			 : "rcx", "r11", "memory");
	return result;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
	/* mov $0x41, %al; out %al, $0x10; jmp to the out */
	static const unsigned char code[] = { 0xb0, 0x41, 0xe6, 0x10, 0xeb, 0xfc };
	static struct kvm_xsave xsave;
	double plain[SAMPLES], recorded[SAMPLES];
	int kvm = open("/dev/kvm", O_RDWR), vm = ioctl(kvm, KVM_CREATE_VM, 0), count = argc > 1 ? atoi(argv[1]) : 1;
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	unsigned char *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	struct kvm_userspace_memory_region region = {
		.guest_phys_addr = 0x1000, .memory_size = 4096, .userspace_addr = (unsigned long)memory,
	};
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	struct kvm_sregs sregs;

	if (vcpu < 0 || run == MAP_FAILED || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) ||
	    ioctl(vcpu, KVM_GET_SREGS, &sregs))
		return 1;
	memcpy(memory, code, sizeof code);
	sregs.cs.base = sregs.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs))
		return 1;
	for (int i = 0; i < SAMPLES; i++) {
		double start = now();

		for (int j = 0; j < ROUNDS; j++)
			bare(vcpu, KVM_GET_XSAVE, &xsave);
		plain[i] = (now() - start) / ROUNDS;
		start = now();
		for (int j = 0; j < ROUNDS; j++)
			ioctl(vcpu, KVM_GET_XSAVE, &xsave);
		recorded[i] = (now() - start) / ROUNDS;
	}
	qsort(plain, SAMPLES, sizeof *plain, by_value);
	qsort(recorded, SAMPLES, sizeof *recorded, by_value);
	printf("pairs %.0f %.0f\n", plain[SAMPLES / 2], recorded[SAMPLES / 2]);
	double start = now();

	for (int i = 0; i < count; i++)
		if (ioctl(vcpu, KVM_RUN, 0))
			return 1;
	printf("sustained %.0f\n", count ? (now() - start) / count : 0);
	printf("cpu %.0f\n", at(CLOCK_PROCESS_CPUTIME_ID));
	return 0;
}
