/* SPDX-License-Identifier: Apache-2.0 */
/* Arguments of KVM_MEMORY_ENCRYPT_OP for SEV, SEV-ES and SEV-SNP. */
struct kvm_sev_cmd {
	uint32_t id;
	uint32_t pad0;
	uint64_t data;
	uint32_t error;
	uint32_t sev_fd;
};

struct kvm_sev_init {
	uint64_t vmsa_features;
	uint32_t flags;
	uint16_t ghcb_version;
	uint16_t pad1;
	uint32_t pad2[8];
};

struct kvm_sev_launch_start {
	uint32_t handle;
	uint32_t policy;
	uint64_t dh_uaddr;
	uint32_t dh_len;
	uint32_t pad0;
	uint64_t session_uaddr;
	uint32_t session_len;
	uint32_t pad1;
};

struct kvm_sev_launch_update_data {
	uint64_t uaddr;
	uint32_t len;
	uint32_t pad0;
};

struct kvm_sev_launch_secret {
	uint64_t hdr_uaddr;
	uint32_t hdr_len;
	uint32_t pad0;
	uint64_t guest_uaddr;
	uint32_t guest_len;
	uint32_t pad1;
	uint64_t trans_uaddr;
	uint32_t trans_len;
	uint32_t pad2;
};

struct kvm_sev_launch_measure {
	uint64_t uaddr;
	uint32_t len;
	uint32_t pad0;
};

struct kvm_sev_guest_status {
	uint32_t handle;
	uint32_t policy;
	uint32_t state;
};

struct kvm_sev_dbg {
	uint64_t src_uaddr;
	uint64_t dst_uaddr;
	uint32_t len;
	uint32_t pad0;
};

struct kvm_sev_attestation_report {
	uint8_t mnonce[16];
	uint64_t uaddr;
	uint32_t len;
	uint32_t pad0;
};

struct kvm_sev_send_start {
	uint32_t policy;
	uint32_t pad0;
	uint64_t pdh_cert_uaddr;
	uint32_t pdh_cert_len;
	uint32_t pad1;
	uint64_t plat_certs_uaddr;
	uint32_t plat_certs_len;
	uint32_t pad2;
	uint64_t amd_certs_uaddr;
	uint32_t amd_certs_len;
	uint32_t pad3;
	uint64_t session_uaddr;
	uint32_t session_len;
	uint32_t pad4;
};

struct kvm_sev_send_update_data {
	uint64_t hdr_uaddr;
	uint32_t hdr_len;
	uint32_t pad0;
	uint64_t guest_uaddr;
	uint32_t guest_len;
	uint32_t pad1;
	uint64_t trans_uaddr;
	uint32_t trans_len;
	uint32_t pad2;
};

struct kvm_sev_receive_start {
	uint32_t handle;
	uint32_t policy;
	uint64_t pdh_uaddr;
	uint32_t pdh_len;
	uint32_t pad0;
	uint64_t session_uaddr;
	uint32_t session_len;
	uint32_t pad1;
};

struct kvm_sev_receive_update_data {
	uint64_t hdr_uaddr;
	uint32_t hdr_len;
	uint32_t pad0;
	uint64_t guest_uaddr;
	uint32_t guest_len;
	uint32_t pad1;
	uint64_t trans_uaddr;
	uint32_t trans_len;
	uint32_t pad2;
};

struct kvm_sev_snp_launch_start {
	uint64_t policy;
	uint8_t gosvw[16];
	uint16_t flags;
	uint8_t pad0[6];
	uint64_t pad1[4];
};

struct kvm_sev_snp_launch_update {
	uint64_t gfn_start;
	uint64_t uaddr;
	uint64_t len;
	uint8_t type;
	uint8_t pad0;
	uint16_t flags;
	uint32_t pad1;
	uint64_t pad2[4];
};

struct kvm_sev_snp_launch_finish {
	uint64_t id_block_uaddr;
	uint64_t id_auth_uaddr;
	uint8_t id_block_en;
	uint8_t auth_key_en;
	uint8_t vcek_disabled;
	uint8_t host_data[32];
	uint8_t pad0[3];
	uint16_t flags;
	uint64_t pad1[4];
};
