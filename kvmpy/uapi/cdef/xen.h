/* SPDX-License-Identifier: Apache-2.0 */
/* Xen and Hyper-V emulation. */
struct kvm_hyperv_exit {
	uint32_t type;
	uint32_t pad1;
	union kvm_hyperv_exit__u {
		struct kvm_hyperv_exit__u__synic {
			uint32_t msr;
			uint32_t pad2;
			uint64_t control;
			uint64_t evt_page;
			uint64_t msg_page;
		} synic;
		struct kvm_hyperv_exit__u__hcall {
			uint64_t input;
			uint64_t result;
			uint64_t params[2];
		} hcall;
		struct kvm_hyperv_exit__u__syndbg {
			uint32_t msr;
			uint32_t pad2;
			uint64_t control;
			uint64_t status;
			uint64_t send_page;
			uint64_t recv_page;
			uint64_t pending_page;
		} syndbg;
	} u;
};

struct kvm_hyperv_eventfd {
	uint32_t conn_id;
	int32_t fd;
	uint32_t flags;
	uint32_t padding[3];
};

struct kvm_xen_exit {
	uint32_t type;
	union kvm_xen_exit__u {
		struct kvm_xen_exit__u__hcall {
			uint32_t longmode;
			uint32_t cpl;
			uint64_t input;
			uint64_t result;
			uint64_t params[6];
		} hcall;
	} u;
};

struct kvm_xen_hvm_config {
	uint32_t flags;
	uint32_t msr;
	uint64_t blob_addr_32;
	uint64_t blob_addr_64;
	uint8_t blob_size_32;
	uint8_t blob_size_64;
	uint8_t pad2[30];
};

struct kvm_xen_hvm_attr {
	uint16_t type;
	uint16_t pad[3];
	union kvm_xen_hvm_attr__u {
		uint8_t long_mode;
		uint8_t vector;
		uint8_t runstate_update_flag;
		union kvm_xen_hvm_attr__u__shared_info {
			uint64_t gfn;
			uint64_t hva;
		} shared_info;
		struct kvm_xen_hvm_attr__u__evtchn {
			uint32_t send_port;
			uint32_t type;
			uint32_t flags;
			union kvm_xen_hvm_attr__u__evtchn__deliver {
				struct kvm_xen_hvm_attr__u__evtchn__deliver__port {
					uint32_t port;
					uint32_t vcpu;
					uint32_t priority;
				} port;
				struct kvm_xen_hvm_attr__u__evtchn__deliver__eventfd {
					uint32_t port;
					int32_t fd;
				} eventfd;
				uint32_t padding[4];
			} deliver;
		} evtchn;
		uint32_t xen_version;
		uint64_t pad[8];
	} u;
};

struct kvm_xen_vcpu_attr {
	uint16_t type;
	uint16_t pad[3];
	union kvm_xen_vcpu_attr__u {
		uint64_t gpa;
		uint64_t hva;
		uint64_t pad[8];
		struct kvm_xen_vcpu_attr__u__runstate {
			uint64_t state;
			uint64_t state_entry_time;
			uint64_t time_running;
			uint64_t time_runnable;
			uint64_t time_blocked;
			uint64_t time_offline;
		} runstate;
		uint32_t vcpu_id;
		struct kvm_xen_vcpu_attr__u__timer {
			uint32_t port;
			uint32_t priority;
			uint64_t expires_ns;
		} timer;
		uint8_t vector;
	} u;
};
