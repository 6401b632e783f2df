/* SPDX-License-Identifier: Apache-2.0 */
/* Written by `python -m kvmpy.gen`: do not edit. From kvmpy/uapi/ioctls.py and links.py. */
#ifndef KVMPY_TABLES_H
#define KVMPY_TABLES_H

#include <stdbool.h>
#include <stdint.h>

#define KVM_CREATE_VM 0xae01U
#define KVM_CHECK_EXTENSION 0xae03U
#define KVM_CREATE_VCPU 0xae41U
#define KVM_SET_USER_MEMORY_REGION 0x4020ae46U
#define KVM_SET_USER_MEMORY_REGION2 0x40a0ae49U
#define KVM_IRQFD 0x4020ae76U
#define KVM_IOEVENTFD 0x4040ae79U
#define KVM_MEMORY_ENCRYPT_OP 0xc008aebaU
#define KVM_HYPERV_EVENTFD 0x4018aebdU
#define KVM_GET_STATS_FD 0xaeceU
#define KVM_CREATE_GUEST_MEMFD 0xc040aed4U
#define KVM_CREATE_DEVICE 0xc00caee0U
#define KVM_RUN 0xae80U
#define KVM_ENABLE_CAP 0x4068aea3U
#define USERFAULTFD_IOC_NEW 0xaa00U
#define KVM_CAP_XSAVE2 208U
#define KVM_X86_TDX_VM 5U
#define KVM_CREATE_DEVICE_TEST 1U
#define KVM_EXIT_IO 2U
#define AT_kvm_run_exit_reason 8U
#define AT_kvm_run_io_direction 32U
#define AT_kvm_run_io_size 33U
#define AT_kvm_run_io_count 36U
#define AT_kvm_run_io_data_offset 40U
#define AT_kvm_run_kvm_valid_regs 288U
#define AT_kvm_run_kvm_dirty_regs 296U
#define AT_kvm_userspace_memory_region_slot 0U
#define AT_kvm_userspace_memory_region_memory_size 16U
#define AT_kvm_userspace_memory_region_userspace_addr 24U
#define AT_kvm_create_device_type 0U
#define AT_kvm_create_device_flags 8U
#define SIZE_kvm_run 2352U

/* A link in /proc/PID/fd: the text, with is_open its begin; the kind of the object. */
static const struct kvmpy_link {
	const char *text;
	uint32_t length;
	bool is_open, kvm, of_vm;
	uint32_t kind;
	const char *name;
} kvmpy_link_table[] = {
	{ "/dev/kvm", 8, false, true, false, 1, "kvm" },
	{ "/dev/sev", 8, false, true, false, 7, "sev" },
	{ "/dev/userfaultfd", 16, false, false, false, 11, "/dev/userfaultfd" },
	{ "anon_inode:kvm-vm", 17, false, true, false, 2, "vm" },
	{ "anon_inode:kvm-vcpu:", 20, true, true, true, 3, "vcpu" },
	{ "anon_inode:kvm-vm-stats", 23, false, true, true, 6, "vm-stats" },
	{ "anon_inode:kvm-vcpu-stats:", 26, true, true, true, 6, "vcpu-stats:" },
	{ "anon_inode:kvm-", 15, true, true, true, 4, "" },
	{ "anon_inode:[kvm-gmem]", 21, false, true, true, 5, "gmem" },
	{ "/[kvm-gmem]", 11, false, true, true, 5, "gmem" },
	{ "anon_inode:[eventfd]", 20, false, false, false, 9, "eventfd" },
	{ "anon_inode:[userfaultfd]", 24, false, false, false, 8, "uffd" },
	{ "/memfd:", 7, true, false, false, 10, "memfd:" },
	{ "/anon_hugepage", 14, false, false, false, 11, "/anon_hugepage" },
	{ "/dev/hugepages", 14, true, false, false, 11, "/dev/hugepages" },
};

/* Where an argument of size bytes holds a descriptor, if the u32 at where, masked, is value. */
static const struct kvmpy_fd_field {
	uint32_t request;
	uint32_t size;
	uint32_t offset;
	uint32_t where;
	uint32_t mask;
	uint32_t value;
} kvmpy_fd_field_table[] = {
	{ KVM_SET_USER_MEMORY_REGION2, 160, 40, 4, 4, 4 },
	{ KVM_IRQFD, 32, 0, 0, 0, 0 },
	{ KVM_IRQFD, 32, 12, 8, 2, 2 },
	{ KVM_IOEVENTFD, 64, 20, 0, 0, 0 },
	{ KVM_HYPERV_EVENTFD, 24, 4, 0, 0, 0 },
};

/* The kind of object that an ioctl makes, and where its descriptor is: -1 is the result. */
static const struct kvmpy_maker {
	uint32_t request;
	uint32_t kind;
	int32_t offset;
} kvmpy_maker_table[] = {
	{ KVM_CREATE_VM, 2, -1 },
	{ KVM_CREATE_VCPU, 3, -1 },
	{ KVM_GET_STATS_FD, 6, -1 },
	{ KVM_CREATE_GUEST_MEMFD, 5, -1 },
	{ KVM_CREATE_DEVICE, 4, 4 },
};

#endif
