/* SPDX-License-Identifier: Apache-2.0 */
/* Memory slots, guest_memfd, attributes, dirty tracking, coalesced MMIO. Addresses of user memory are numbers. */
struct kvm_userspace_memory_region {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
};

struct kvm_userspace_memory_region2 {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
	uint64_t guest_memfd_offset;
	uint32_t guest_memfd;
	uint32_t pad1;
	uint64_t pad2[14];
};

struct kvm_memory_attributes {
	uint64_t address;
	uint64_t size;
	uint64_t attributes;
	uint64_t flags;
};

struct kvm_create_guest_memfd {
	uint64_t size;
	uint64_t flags;
	uint64_t reserved[6];
};

struct kvm_pre_fault_memory {
	uint64_t gpa;
	uint64_t size;
	uint64_t flags;
	uint64_t padding[5];
};

struct kvm_enc_region {
	uint64_t addr;
	uint64_t size;
};

struct kvm_dirty_log {
	uint32_t slot;
	uint32_t padding1;
	union {
		uint64_t dirty_bitmap;
		uint64_t padding2;
	};
};

struct kvm_clear_dirty_log {
	uint32_t slot;
	uint32_t num_pages;
	uint64_t first_page;
	union {
		uint64_t dirty_bitmap;
		uint64_t padding2;
	};
};

struct kvm_dirty_gfn {
	uint32_t flags;
	uint32_t slot;
	uint64_t offset;
};

struct kvm_coalesced_mmio_zone {
	uint64_t addr;
	uint32_t size;
	union {
		uint32_t pad;
		uint32_t pio;
	};
};

struct kvm_coalesced_mmio {
	uint64_t phys_addr;
	uint32_t len;
	union {
		uint32_t pad;
		uint32_t pio;
	};
	uint8_t data[8];
};

struct kvm_coalesced_mmio_ring {
	uint32_t first;
	uint32_t last;
	struct kvm_coalesced_mmio coalesced_mmio[];
};
