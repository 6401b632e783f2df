/* SPDX-License-Identifier: Apache-2.0 */
/* The page that a vCPU shares with user space. */
struct kvm_sync_regs {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_vcpu_events events;
};

struct kvm_exit_snp_req_certs {
	uint64_t gpa;
	uint64_t npages;
	uint64_t ret;
};

struct kvm_run {
	uint8_t request_interrupt_window;
	uint8_t immediate_exit;
	uint8_t padding1[6];

	uint32_t exit_reason;
	uint8_t ready_for_interrupt_injection;
	uint8_t if_flag;
	uint16_t flags;

	uint64_t cr8;
	uint64_t apic_base;

	union {
		struct kvm_run__hw {
			uint64_t hardware_exit_reason;
		} hw;
		struct kvm_run__fail_entry {
			uint64_t hardware_entry_failure_reason;
			uint32_t cpu;
		} fail_entry;
		struct kvm_run__ex {
			uint32_t exception;
			uint32_t error_code;
		} ex;
		struct kvm_run__io {
			uint8_t direction;
			uint8_t size;
			uint16_t port;
			uint32_t count;
			uint64_t data_offset;
		} io;
		struct kvm_run__debug {
			struct kvm_debug_exit_arch arch;
		} debug;
		struct kvm_run__mmio {
			uint64_t phys_addr;
			uint8_t data[8];
			uint32_t len;
			uint8_t is_write;
		} mmio;
		struct kvm_run__iocsr_io {
			uint64_t phys_addr;
			uint8_t data[8];
			uint32_t len;
			uint8_t is_write;
		} iocsr_io;
		struct kvm_run__hypercall {
			uint64_t nr;
			uint64_t args[6];
			uint64_t ret;
			union {
				uint32_t longmode;
				uint64_t flags;
			};
		} hypercall;
		struct kvm_run__tpr_access {
			uint64_t rip;
			uint32_t is_write;
			uint32_t pad;
		} tpr_access;
		struct kvm_run__s390_sieic {
			uint8_t icptcode;
			uint16_t ipa;
			uint32_t ipb;
		} s390_sieic;
		uint64_t s390_reset_flags;
		struct kvm_run__s390_ucontrol {
			uint64_t trans_exc_code;
			uint32_t pgm_code;
		} s390_ucontrol;
		struct kvm_run__dcr {
			uint32_t dcrn;
			uint32_t data;
			uint8_t is_write;
		} dcr;
		struct kvm_run__internal {
			uint32_t suberror;
			uint32_t ndata;
			uint64_t data[16];
		} internal;
		struct kvm_run__emulation_failure {
			uint32_t suberror;
			uint32_t ndata;
			uint64_t flags;
			union {
				struct {
					uint8_t insn_size;
					uint8_t insn_bytes[15];
				};
			};
		} emulation_failure;
		struct kvm_run__osi {
			uint64_t gprs[32];
		} osi;
		struct kvm_run__papr_hcall {
			uint64_t nr;
			uint64_t ret;
			uint64_t args[9];
		} papr_hcall;
		struct kvm_run__s390_tsch {
			uint16_t subchannel_id;
			uint16_t subchannel_nr;
			uint32_t io_int_parm;
			uint32_t io_int_word;
			uint32_t ipb;
			uint8_t dequeued;
		} s390_tsch;
		struct kvm_run__epr {
			uint32_t epr;
		} epr;
		struct kvm_run__system_event {
			uint32_t type;
			uint32_t ndata;
			union {
				uint64_t flags;
				uint64_t data[16];
			};
		} system_event;
		struct kvm_run__s390_stsi {
			uint64_t addr;
			uint8_t ar;
			uint8_t reserved;
			uint8_t fc;
			uint8_t sel1;
			uint16_t sel2;
		} s390_stsi;
		struct kvm_run__eoi {
			uint8_t vector;
		} eoi;
		struct kvm_hyperv_exit hyperv;
		struct kvm_run__arm_nisv {
			uint64_t esr_iss;
			uint64_t fault_ipa;
		} arm_nisv;
		struct kvm_run__msr {
			uint8_t error;
			uint8_t pad[7];
			uint32_t reason;
			uint32_t index;
			uint64_t data;
		} msr;
		struct kvm_xen_exit xen;
		struct kvm_run__riscv_sbi {
			uint64_t extension_id;
			uint64_t function_id;
			uint64_t args[6];
			uint64_t ret[2];
		} riscv_sbi;
		struct kvm_run__riscv_csr {
			uint64_t csr_num;
			uint64_t new_value;
			uint64_t write_mask;
			uint64_t ret_value;
		} riscv_csr;
		struct kvm_run__notify {
			uint32_t flags;
		} notify;
		struct kvm_run__memory_fault {
			uint64_t flags;
			uint64_t gpa;
			uint64_t size;
		} memory_fault;
		struct kvm_run__tdx {
			uint64_t flags;
			uint64_t nr;
			union {
				struct kvm_run__tdx__unknown {
					uint64_t ret;
					uint64_t data[5];
				} unknown;
				struct kvm_run__tdx__get_quote {
					uint64_t ret;
					uint64_t gpa;
					uint64_t size;
				} get_quote;
				struct kvm_run__tdx__get_tdvmcall_info {
					uint64_t ret;
					uint64_t leaf;
					uint64_t r11;
					uint64_t r12;
					uint64_t r13;
					uint64_t r14;
				} get_tdvmcall_info;
				struct kvm_run__tdx__setup_event_notify {
					uint64_t ret;
					uint64_t vector;
				} setup_event_notify;
			};
		} tdx;
		struct kvm_run__arm_sea {
			uint64_t flags;
			uint64_t esr;
			uint64_t gva;
			uint64_t gpa;
		} arm_sea;
		struct kvm_exit_snp_req_certs snp_req_certs;
		uint8_t padding[256];
	};

	uint64_t kvm_valid_regs;
	uint64_t kvm_dirty_regs;
	union kvm_run__s {
		struct kvm_sync_regs regs;
		uint8_t padding[2048];
	} s;
};
