/* SPDX-License-Identifier: Apache-2.0 */
/* Commands of /dev/sev that are packed: fields follow one another without alignment. */
struct sev_issue_cmd {
	uint32_t cmd;
	uint64_t data;
	uint32_t error;
};

struct sev_user_data_status {
	uint8_t api_major;
	uint8_t api_minor;
	uint8_t state;
	uint32_t flags;
	uint8_t build;
	uint32_t guest_count;
};

struct sev_user_data_pek_csr {
	uint64_t address;
	uint32_t length;
};

struct sev_user_data_pek_cert_import {
	uint64_t pek_cert_address;
	uint32_t pek_cert_len;
	uint64_t oca_cert_address;
	uint32_t oca_cert_len;
};

struct sev_user_data_pdh_cert_export {
	uint64_t pdh_cert_address;
	uint32_t pdh_cert_len;
	uint64_t cert_chain_address;
	uint32_t cert_chain_len;
};

struct sev_user_data_get_id2 {
	uint64_t address;
	uint32_t length;
};
