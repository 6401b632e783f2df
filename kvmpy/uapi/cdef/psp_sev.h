/* SPDX-License-Identifier: Apache-2.0 */
/* Commands of /dev/sev whose layout has no holes. */
struct sev_user_data_get_id {
	uint8_t socket1[64];
	uint8_t socket2[64];
};

struct sev_user_data_snp_status {
	uint8_t api_major;
	uint8_t api_minor;
	uint8_t state;
	uint8_t is_rmp_initialized:1;
	uint8_t rsvd:7;
	uint32_t build_id;
	uint32_t mask_chip_id:1;
	uint32_t mask_chip_key:1;
	uint32_t vlek_en:1;
	uint32_t feature_info:1;
	uint32_t rapl_dis:1;
	uint32_t ciphertext_hiding_cap:1;
	uint32_t ciphertext_hiding_en:1;
	uint32_t rsvd1:25;
	uint32_t guest_count;
	uint64_t current_tcb_version;
	uint64_t reported_tcb_version;
};

struct sev_user_data_snp_config {
	uint64_t reported_tcb;
	uint32_t mask_chip_id:1;
	uint32_t mask_chip_key:1;
	uint32_t rsvd:30;
	uint8_t rsvd1[52];
};

struct sev_user_data_snp_vlek_load {
	uint32_t len;
	uint8_t vlek_wrapped_version;
	uint8_t rsvd[3];
	uint64_t vlek_wrapped_address;
};

struct sev_user_data_snp_wrapped_vlek_hashstick {
	uint8_t data[432];
};
