/* SPDX-License-Identifier: Apache-2.0 */
/* Capabilities, devices, device attributes, binary statistics. */
struct kvm_enable_cap {
	uint32_t cap;
	uint32_t flags;
	uint64_t args[4];
	uint8_t pad[64];
};

struct kvm_create_device {
	uint32_t type;
	uint32_t fd;
	uint32_t flags;
};

struct kvm_device_attr {
	uint32_t flags;
	uint32_t group;
	uint64_t attr;
	uint64_t addr;
};

struct kvm_stats_header {
	uint32_t flags;
	uint32_t name_size;
	uint32_t num_desc;
	uint32_t id_offset;
	uint32_t desc_offset;
	uint32_t data_offset;
};

/* name: as long as name_size of the header says. */
struct kvm_stats_desc {
	uint32_t flags;
	int16_t exponent;
	uint16_t size;
	uint32_t offset;
	uint32_t bucket_size;
	uint8_t name[];
};
