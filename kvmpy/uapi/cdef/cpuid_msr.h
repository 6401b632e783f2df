/* SPDX-License-Identifier: Apache-2.0 */
/* CPUID tables, MSRs and their filters, performance events. */
struct kvm_cpuid_entry {
	uint32_t function;
	uint32_t eax;
	uint32_t ebx;
	uint32_t ecx;
	uint32_t edx;
	uint32_t padding;
};

struct kvm_cpuid {
	uint32_t nent;
	uint32_t padding;
	struct kvm_cpuid_entry entries[];
};

struct kvm_cpuid_entry2 {
	uint32_t function;
	uint32_t index;
	uint32_t flags;
	uint32_t eax;
	uint32_t ebx;
	uint32_t ecx;
	uint32_t edx;
	uint32_t padding[3];
};

struct kvm_cpuid2 {
	uint32_t nent;
	uint32_t padding;
	struct kvm_cpuid_entry2 entries[];
};

struct kvm_msr_entry {
	uint32_t index;
	uint32_t reserved;
	uint64_t data;
};

struct kvm_msrs {
	uint32_t nmsrs;
	uint32_t pad;
	struct kvm_msr_entry entries[];
};

struct kvm_msr_list {
	uint32_t nmsrs;
	uint32_t indices[];
};

/* bitmap: address of one bit for each MSR. */
struct kvm_msr_filter_range {
	uint32_t flags;
	uint32_t nmsrs;
	uint32_t base;
	uint64_t bitmap;
};

struct kvm_msr_filter {
	uint32_t flags;
	struct kvm_msr_filter_range ranges[16];
};

struct kvm_pmu_event_filter {
	uint32_t action;
	uint32_t nevents;
	uint32_t fixed_counter_bitmap;
	uint32_t flags;
	uint32_t pad[4];
	uint64_t events[];
};

struct kvm_x86_mce {
	uint64_t status;
	uint64_t addr;
	uint64_t misc;
	uint64_t mcg_status;
	uint8_t bank;
	uint8_t pad1[7];
	uint64_t pad2[3];
};
