/* SPDX-License-Identifier: Apache-2.0 */
/* Events, interrupt injection, MP state, debugging, signal mask and TPR reports of a vCPU. */
struct kvm_vcpu_events {
	struct kvm_vcpu_events__exception {
		uint8_t injected;
		uint8_t nr;
		uint8_t has_error_code;
		uint8_t pending;
		uint32_t error_code;
	} exception;
	struct kvm_vcpu_events__interrupt {
		uint8_t injected;
		uint8_t nr;
		uint8_t soft;
		uint8_t shadow;
	} interrupt;
	struct kvm_vcpu_events__nmi {
		uint8_t injected;
		uint8_t pending;
		uint8_t masked;
		uint8_t pad;
	} nmi;
	uint32_t sipi_vector;
	uint32_t flags;
	struct kvm_vcpu_events__smi {
		uint8_t smm;
		uint8_t pending;
		uint8_t smm_inside_nmi;
		uint8_t latched_init;
	} smi;
	struct kvm_vcpu_events__triple_fault {
		uint8_t pending;
	} triple_fault;
	uint8_t reserved[26];
	uint8_t exception_has_payload;
	uint64_t exception_payload;
};

struct kvm_interrupt {
	uint32_t irq;
};

struct kvm_mp_state {
	uint32_t mp_state;
};

struct kvm_debug_exit_arch {
	uint32_t exception;
	uint32_t pad;
	uint64_t pc;
	uint64_t dr6;
	uint64_t dr7;
};

struct kvm_guest_debug_arch {
	uint64_t debugreg[8];
};

struct kvm_guest_debug {
	uint32_t control;
	uint32_t pad;
	struct kvm_guest_debug_arch arch;
};

struct kvm_signal_mask {
	uint32_t len;
	uint8_t sigset[];
};

struct kvm_tpr_access_ctl {
	uint32_t enabled;
	uint32_t flags;
	uint32_t reserved[8];
};

struct kvm_vapic_addr {
	uint64_t vapic_addr;
};
