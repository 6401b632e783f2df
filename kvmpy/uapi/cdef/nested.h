/* SPDX-License-Identifier: Apache-2.0 */
/*
 * State of a nested hypervisor. What follows the header is a kvm_vmx_nested_state_data or a kvm_svm_nested_state_data;
 * cffi knows no union of nothing but open arrays, so it is bytes here.
 */
struct kvm_vmx_nested_state_data {
	uint8_t vmcs12[4096];
	uint8_t shadow_vmcs12[4096];
};

struct kvm_vmx_nested_state_hdr {
	uint64_t vmxon_pa;
	uint64_t vmcs12_pa;
	struct kvm_vmx_nested_state_hdr__smm {
		uint16_t flags;
	} smm;
	uint16_t pad;
	uint32_t flags;
	uint64_t preemption_timer_deadline;
};

struct kvm_svm_nested_state_data {
	uint8_t vmcb12[4096];
};

struct kvm_svm_nested_state_hdr {
	uint64_t vmcb_pa;
	uint64_t gpat;
};

struct kvm_nested_state {
	uint16_t flags;
	uint16_t format;
	uint32_t size;
	union kvm_nested_state__hdr {
		struct kvm_vmx_nested_state_hdr vmx;
		struct kvm_svm_nested_state_hdr svm;
		uint8_t pad[120];
	} hdr;
	uint8_t data[];
};
