/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bare side of every figure: what a C program without any harness does. Times are CLOCK_MONOTONIC nanoseconds;
 * a function that fails returns 0.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cdef/regs.h"
#include "cdef/cpuid_msr.h"
#include "cdef/events.h"
#include "cdef/memory.h"
#include "cdef/irq.h"
#include "cdef/xen.h"
#include "cdef/nested.h"
#include "cdef/device.h"
#include "cdef/run.h"
#include "cdef/sev.h"

#define PAGE 4096UL

struct bare_life {
	int kvm;
	int split_irqchip_cap;
	uint64_t memory;
	uint64_t run_size;
	uint32_t exit_reason;
	uint32_t npages;
	const uint64_t *gpas;
	const void *pages;
	const void *cpuid;
	const void *sregs;
	const void *regs;
	uint64_t req_create_vm, req_enable_cap, req_set_memory, req_create_vcpu;
	uint64_t req_set_cpuid, req_get_sregs, req_set_sregs, req_set_regs, req_run;
};

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ULL + (uint64_t)ts.tv_nsec;
}

uint64_t bare_run(int vcpu, uint64_t request, uint64_t count)
{
	uint64_t start = now();

	for (uint64_t i = 0; i < count; i++)
		if (ioctl(vcpu, request, 0))
			return 0;
	return now() - start;
}

/* A VM's life by ioctls alone: the pages, CPUID and registers that a harness worked out are given. */
uint64_t bare_life(const struct bare_life *l)
{
	struct kvm_enable_cap cap = { .cap = (uint32_t)l->split_irqchip_cap, .args = { 24 } };
	struct kvm_sregs sregs;
	uint64_t start = now(), taken = 0;
	struct kvm_run *run = MAP_FAILED;
	int vm = -1, vcpu = -1;
	char *memory;

	vm = ioctl(l->kvm, l->req_create_vm, 0);
	memory = mmap(NULL, l->memory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (vm < 0 || memory == MAP_FAILED)
		goto out;
	if (ioctl(vm, l->req_enable_cap, &cap))
		goto out;
	struct kvm_userspace_memory_region region = {
		.memory_size = l->memory,
		.userspace_addr = (uint64_t)memory,
	};
	if (ioctl(vm, l->req_set_memory, &region))
		goto out;
	for (uint32_t i = 0; i < l->npages; i++)
		memcpy(memory + l->gpas[i], (const char *)l->pages + i * PAGE, PAGE);
	vcpu = ioctl(vm, l->req_create_vcpu, 0);
	if (vcpu < 0)
		goto out;
	run = mmap(NULL, l->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED || ioctl(vcpu, l->req_set_cpuid, l->cpuid) || ioctl(vcpu, l->req_get_sregs, &sregs) ||
	    ioctl(vcpu, l->req_set_sregs, l->sregs) || ioctl(vcpu, l->req_set_regs, l->regs))
		goto out;
	if (ioctl(vcpu, l->req_run, 0) || run->exit_reason != l->exit_reason)
		goto out;
	taken = 1;
out:
	if (run != MAP_FAILED)
		munmap(run, l->run_size);
	if (vcpu >= 0)
		close(vcpu);
	if (vm >= 0)
		close(vm);
	if (memory != MAP_FAILED)
		munmap(memory, l->memory);
	return taken ? now() - start : 0;
}

/* Page-table entries for @count pages, into fresh memory: the least that any mapping has to write. */
uint64_t bare_fill(uint64_t count)
{
	uint64_t size = (count * 8 + PAGE - 1) & ~(PAGE - 1), start = now();
	uint64_t *table = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (table == MAP_FAILED)
		return 0;
	for (uint64_t i = 0; i < count; i++)
		((volatile uint64_t *)table)[i] = i << 12 | 3;
	start = now() - start;
	munmap(table, size);
	return start;
}

uint64_t bare_copy(void *to, const void *from, uint64_t size, uint64_t count)
{
	uint64_t start = now();

	for (uint64_t i = 0; i < count; i++) {
		memcpy(to, from, size);
		__asm__ volatile("" : : "r"(to) : "memory");
	}
	return now() - start;
}

/* Pages made private and shared in turn, @count conversions in all. */
uint64_t bare_convert(int vm, uint64_t request, uint64_t address, uint64_t size, uint64_t count)
{
	struct kvm_memory_attributes attributes = { .address = address, .size = size };
	uint64_t start = now();

	for (uint64_t i = 0; i < count; i++) {
		attributes.attributes = i & 1 ? 0 : 8; /* KVM_MEMORY_ATTRIBUTE_PRIVATE */
		if (ioctl(vm, request, &attributes))
			return 0;
	}
	return now() - start;
}

/* The rest of a range is asked for until there is none. */
uint64_t bare_pre_fault(int vcpu, uint64_t request, uint64_t gpa, uint64_t size)
{
	struct kvm_pre_fault_memory range = { .gpa = gpa, .size = size };
	uint64_t start = now();

	while (range.size)
		if (ioctl(vcpu, request, &range))
			return 0;
	return now() - start;
}

/* Pages copied into an SNP guest; KVM may do a part of a range, and names the rest. */
uint64_t bare_snp_update(int vm, uint64_t request, int sev_fd, uint64_t gfn, const void *source, uint64_t size)
{
	struct kvm_sev_snp_launch_update range = {
		.gfn_start = gfn,
		.uaddr = (uint64_t)source,
		.len = size,
		.type = 1, /* KVM_SEV_SNP_PAGE_TYPE_NORMAL */
	};
	struct kvm_sev_cmd cmd = { .id = 101, .data = (uint64_t)&range, .sev_fd = (uint32_t)sev_fd };
	uint64_t start = now();

	while (range.len)
		if (ioctl(vm, request, &cmd) || cmd.error)
			return 0;
	return now() - start;
}

/* Memory of an SEV guest encrypted in place. */
uint64_t bare_sev_update(int vm, uint64_t request, int sev_fd, void *memory, uint64_t size)
{
	struct kvm_sev_launch_update_data range = { .uaddr = (uint64_t)memory, .len = (uint32_t)size };
	struct kvm_sev_cmd cmd = { .id = 3, .data = (uint64_t)&range, .sev_fd = (uint32_t)sev_fd };
	uint64_t start = now();

	if (ioctl(vm, request, &cmd) || cmd.error)
		return 0;
	return now() - start;
}

/* SHA-384 of OpenSSL, found at run time: its headers need not be there. */
struct bare_sha384 {
	const void *md;
	void *(*new)(void);
	void (*free)(void *ctx);
	int (*init)(void *ctx, const void *md, void *engine);
	int (*update)(void *ctx, const void *data, size_t size);
	int (*final)(void *ctx, unsigned char *value, unsigned int *size);
};

/* Returns 0 where @libcrypto is no OpenSSL. */
int bare_sha384(struct bare_sha384 *s, const char *libcrypto)
{
	const void *(*fetch)(void *, const char *, const char *);
	void *library = dlopen(libcrypto, RTLD_NOW);

	if (!library)
		return 0;
	*(void **)&fetch = dlsym(library, "EVP_MD_fetch");
	*(void **)&s->new = dlsym(library, "EVP_MD_CTX_new");
	*(void **)&s->free = dlsym(library, "EVP_MD_CTX_free");
	*(void **)&s->init = dlsym(library, "EVP_DigestInit_ex");
	*(void **)&s->update = dlsym(library, "EVP_DigestUpdate");
	*(void **)&s->final = dlsym(library, "EVP_DigestFinal_ex");
	if (!fetch || !s->new || !s->free || !s->init || !s->update || !s->final)
		return 0;
	s->md = fetch(NULL, "SHA384", NULL);
	return s->md != NULL;
}

static int sha384(const struct bare_sha384 *s, void *ctx, const void *data, size_t size, unsigned char *value)
{
	return s->init(ctx, s->md, NULL) == 1 && s->update(ctx, data, size) == 1 && s->final(ctx, value, NULL) == 1;
}

/* The launch digest @value of 48 bytes, extended by the normal pages at @data from @gpa on. */
uint64_t bare_digest(const struct bare_sha384 *s, unsigned char *value, const unsigned char *data, uint64_t size,
		     uint64_t gpa)
{
	struct {
		unsigned char current[48], contents[48];
		uint16_t length;
		uint8_t type, imi, vmpl3, vmpl2, vmpl1, reserved;
		uint64_t gpa;
	} info = { .length = sizeof(info), .type = 1 };
	uint64_t start = now();
	void *ctx = s->new();
	int good = ctx != NULL;

	memcpy(info.current, value, sizeof(info.current));
	for (uint64_t at = 0; good && at < size; at += PAGE) {
		info.gpa = gpa + at;
		good = sha384(s, ctx, data + at, PAGE, info.contents) &&
		       sha384(s, ctx, &info, sizeof(info), info.current);
	}
	s->free(ctx);
	memcpy(value, info.current, sizeof(info.current));
	return good ? now() - start : 0;
}
