/* SPDX-License-Identifier: Apache-2.0 */
/* Written by `python -m kvmpy.gen`: do not edit. From kvmpy/uapi/ioctls.py and links.py. */
#ifndef KVMPY_TABLES_H
#define KVMPY_TABLES_H

#include <stdbool.h>
#include <stdint.h>

#define KVM_GET_API_VERSION 0xae00U
#define KVM_CREATE_VM 0xae01U
#define KVM_CHECK_EXTENSION 0xae03U
#define KVM_GET_VCPU_MMAP_SIZE 0xae04U
#define KVM_GET_MSR_INDEX_LIST 0xc004ae02U
#define KVM_GET_SUPPORTED_CPUID 0xc008ae05U
#define KVM_GET_EMULATED_CPUID 0xc008ae09U
#define KVM_GET_MSR_FEATURE_INDEX_LIST 0xc004ae0aU
#define KVM_X86_GET_MCE_CAP_SUPPORTED 0x8008ae9dU
#define KVM_CREATE_VCPU 0xae41U
#define KVM_GET_DIRTY_LOG 0x4010ae42U
#define KVM_SET_NR_MMU_PAGES 0xae44U
#define KVM_GET_NR_MMU_PAGES 0xae45U
#define KVM_SET_USER_MEMORY_REGION 0x4020ae46U
#define KVM_SET_TSS_ADDR 0xae47U
#define KVM_SET_IDENTITY_MAP_ADDR 0x4008ae48U
#define KVM_SET_USER_MEMORY_REGION2 0x40a0ae49U
#define KVM_CREATE_IRQCHIP 0xae60U
#define KVM_IRQ_LINE 0x4008ae61U
#define KVM_GET_IRQCHIP 0xc208ae62U
#define KVM_SET_IRQCHIP 0x8208ae63U
#define KVM_CREATE_PIT 0xae64U
#define KVM_GET_PIT 0xc048ae65U
#define KVM_SET_PIT 0x8048ae66U
#define KVM_IRQ_LINE_STATUS 0xc008ae67U
#define KVM_REGISTER_COALESCED_MMIO 0x4010ae67U
#define KVM_UNREGISTER_COALESCED_MMIO 0x4010ae68U
#define KVM_SET_GSI_ROUTING 0x4008ae6aU
#define KVM_REINJECT_CONTROL 0xae71U
#define KVM_IRQFD 0x4020ae76U
#define KVM_CREATE_PIT2 0x4040ae77U
#define KVM_SET_BOOT_CPU_ID 0xae78U
#define KVM_IOEVENTFD 0x4040ae79U
#define KVM_XEN_HVM_CONFIG 0x4038ae7aU
#define KVM_SET_CLOCK 0x4030ae7bU
#define KVM_GET_CLOCK 0x8030ae7cU
#define KVM_GET_PIT2 0x8070ae9fU
#define KVM_SET_PIT2 0x4070aea0U
#define KVM_SIGNAL_MSI 0x4020aea5U
#define KVM_SET_PMU_EVENT_FILTER 0x4020aeb2U
#define KVM_MEMORY_ENCRYPT_OP 0xc008aebaU
#define KVM_MEMORY_ENCRYPT_REG_REGION 0x8010aebbU
#define KVM_MEMORY_ENCRYPT_UNREG_REGION 0x8010aebcU
#define KVM_HYPERV_EVENTFD 0x4018aebdU
#define KVM_CLEAR_DIRTY_LOG 0xc018aec0U
#define KVM_X86_SET_MSR_FILTER 0x4188aec6U
#define KVM_RESET_DIRTY_RINGS 0xaec7U
#define KVM_XEN_HVM_GET_ATTR 0xc048aec8U
#define KVM_XEN_HVM_SET_ATTR 0x4048aec9U
#define KVM_GET_STATS_FD 0xaeceU
#define KVM_XEN_HVM_EVTCHN_SEND 0x400caed0U
#define KVM_SET_MEMORY_ATTRIBUTES 0x4020aed2U
#define KVM_CREATE_GUEST_MEMFD 0xc040aed4U
#define KVM_CREATE_DEVICE 0xc00caee0U
#define KVM_SET_DEVICE_ATTR 0x4018aee1U
#define KVM_GET_DEVICE_ATTR 0x4018aee2U
#define KVM_HAS_DEVICE_ATTR 0x4018aee3U
#define KVM_RUN 0xae80U
#define KVM_GET_REGS 0x8090ae81U
#define KVM_SET_REGS 0x4090ae82U
#define KVM_GET_SREGS 0x8138ae83U
#define KVM_SET_SREGS 0x4138ae84U
#define KVM_TRANSLATE 0xc018ae85U
#define KVM_INTERRUPT 0x4004ae86U
#define KVM_GET_MSRS 0xc008ae88U
#define KVM_SET_MSRS 0x4008ae89U
#define KVM_SET_CPUID 0x4008ae8aU
#define KVM_SET_SIGNAL_MASK 0x4004ae8bU
#define KVM_GET_FPU 0x81a0ae8cU
#define KVM_SET_FPU 0x41a0ae8dU
#define KVM_GET_LAPIC 0x8400ae8eU
#define KVM_SET_LAPIC 0x4400ae8fU
#define KVM_SET_CPUID2 0x4008ae90U
#define KVM_GET_CPUID2 0xc008ae91U
#define KVM_TPR_ACCESS_REPORTING 0xc028ae92U
#define KVM_SET_VAPIC_ADDR 0x4008ae93U
#define KVM_GET_MP_STATE 0x8004ae98U
#define KVM_SET_MP_STATE 0x4004ae99U
#define KVM_NMI 0xae9aU
#define KVM_SET_GUEST_DEBUG 0x4048ae9bU
#define KVM_X86_SETUP_MCE 0x4008ae9cU
#define KVM_X86_SET_MCE 0x4040ae9eU
#define KVM_GET_VCPU_EVENTS 0x8040ae9fU
#define KVM_SET_VCPU_EVENTS 0x4040aea0U
#define KVM_GET_DEBUGREGS 0x8080aea1U
#define KVM_SET_DEBUGREGS 0x4080aea2U
#define KVM_SET_TSC_KHZ 0xaea2U
#define KVM_GET_TSC_KHZ 0xaea3U
#define KVM_ENABLE_CAP 0x4068aea3U
#define KVM_GET_XSAVE 0x9000aea4U
#define KVM_SET_XSAVE 0x5000aea5U
#define KVM_GET_XCRS 0x8188aea6U
#define KVM_SET_XCRS 0x4188aea7U
#define KVM_GET_ONE_REG 0x4010aeabU
#define KVM_SET_ONE_REG 0x4010aeacU
#define KVM_KVMCLOCK_CTRL 0xaeadU
#define KVM_GET_REG_LIST 0xc008aeb0U
#define KVM_SMI 0xaeb7U
#define KVM_GET_NESTED_STATE 0xc080aebeU
#define KVM_SET_NESTED_STATE 0x4080aebfU
#define KVM_GET_SUPPORTED_HV_CPUID 0xc008aec1U
#define KVM_XEN_VCPU_GET_ATTR 0xc048aecaU
#define KVM_XEN_VCPU_SET_ATTR 0x4048aecbU
#define KVM_GET_SREGS2 0x8140aeccU
#define KVM_SET_SREGS2 0x4140aecdU
#define KVM_GET_XSAVE2 0x9000aecfU
#define KVM_PRE_FAULT_MEMORY 0xc040aed5U
#define KVM_CAP_XSAVE2 208U
#define KVM_CREATE_DEVICE_TEST 1U
#define KVM_EXIT_IO 2U
#define KVM_X86_TDX_VM 5U
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
