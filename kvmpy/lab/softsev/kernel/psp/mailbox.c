// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the table of commands.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/kernel.h>
#include <linux/printk.h>
#include "psp.h"

struct command {
	u32 id;
	const char *name;
	u32 (*run)(void *buf);
};

#define COMMAND(name, function) { SEV_CMD_##name, #name, function }

static const struct command commands[] = {
	COMMAND(INIT, softsev_init),
	COMMAND(INIT_EX, softsev_init_ex),
	COMMAND(SHUTDOWN, softsev_shutdown),
	COMMAND(FACTORY_RESET, softsev_factory_reset),
	COMMAND(PLATFORM_STATUS, softsev_platform_status),
	COMMAND(PEK_GEN, softsev_pek_gen),
	COMMAND(PEK_CSR, softsev_pek_csr),
	COMMAND(PEK_CERT_IMPORT, softsev_pek_import),
	COMMAND(PDH_GEN, softsev_pdh_gen),
	COMMAND(PDH_CERT_EXPORT, softsev_pdh_export),
	COMMAND(DF_FLUSH, softsev_df_flush),
	COMMAND(GET_ID, softsev_get_id),

	COMMAND(DECOMMISSION, softsev_decommission),
	COMMAND(ACTIVATE, softsev_activate),
	COMMAND(DEACTIVATE, softsev_deactivate),
	COMMAND(GUEST_STATUS, softsev_guest_status),
	COMMAND(LAUNCH_START, softsev_launch_start),
	COMMAND(LAUNCH_UPDATE_DATA, softsev_launch_update_data),
	COMMAND(LAUNCH_UPDATE_VMSA, softsev_launch_update_vmsa),
	COMMAND(LAUNCH_MEASURE, softsev_launch_measure),
	COMMAND(LAUNCH_UPDATE_SECRET, softsev_launch_secret),
	COMMAND(LAUNCH_FINISH, softsev_launch_finish),
	COMMAND(ATTESTATION_REPORT, softsev_attestation_report),
	COMMAND(DBG_DECRYPT, softsev_dbg_decrypt),
	COMMAND(DBG_ENCRYPT, softsev_dbg_encrypt),

	COMMAND(SEND_START, softsev_send_start),
	COMMAND(SEND_UPDATE_DATA, softsev_send_update_data),
	COMMAND(SEND_UPDATE_VMSA, softsev_send_update_vmsa),
	COMMAND(SEND_FINISH, softsev_send_finish),
	COMMAND(SEND_CANCEL, softsev_send_cancel),
	COMMAND(RECEIVE_START, softsev_receive_start),
	COMMAND(RECEIVE_UPDATE_DATA, softsev_receive_update_data),
	COMMAND(RECEIVE_UPDATE_VMSA, softsev_receive_update_vmsa),
	COMMAND(RECEIVE_FINISH, softsev_receive_finish),

	COMMAND(SNP_INIT, softsev_snp_init),
	COMMAND(SNP_INIT_EX, softsev_snp_init_ex),
	COMMAND(SNP_SHUTDOWN_EX, softsev_snp_shutdown),
	COMMAND(SNP_PLATFORM_STATUS, softsev_snp_status),
	COMMAND(SNP_DF_FLUSH, softsev_snp_df_flush),
	COMMAND(SNP_CONFIG, softsev_snp_config),
	COMMAND(SNP_COMMIT, softsev_snp_commit),
	{ 0x0CD, "SNP_VLEK_LOAD", softsev_snp_vlek_load },
	{ 0x0CE, "SNP_FEATURE_INFO", softsev_snp_feature_info },
	COMMAND(SNP_GCTX_CREATE, softsev_snp_gctx_create),
	COMMAND(SNP_ACTIVATE, softsev_snp_activate),
	COMMAND(SNP_DECOMMISSION, softsev_snp_decommission),
	COMMAND(SNP_GUEST_STATUS, softsev_snp_guest_status),
	COMMAND(SNP_PAGE_RECLAIM, softsev_snp_page_reclaim),
	COMMAND(SNP_PAGE_UNSMASH, softsev_snp_page_unsmash),
	COMMAND(SNP_DBG_DECRYPT, softsev_snp_dbg_decrypt),
	COMMAND(SNP_DBG_ENCRYPT, softsev_snp_dbg_encrypt),
	COMMAND(SNP_LAUNCH_START, softsev_snp_launch_start),
	COMMAND(SNP_LAUNCH_UPDATE, softsev_snp_launch_update),
	COMMAND(SNP_LAUNCH_FINISH, softsev_snp_launch_finish),
	COMMAND(SNP_GUEST_REQUEST, softsev_snp_guest_request),
};

u32 softsev_command(u32 id, void *buf)
{
	u32 ret;
	int i;

	for (i = 0; i < ARRAY_SIZE(commands); i++) {
		if (commands[i].id != id)
			continue;
		ret = commands[i].run(buf);
		if (ret)
			pr_info("%s: error %#x\n", commands[i].name, ret);
		return ret;
	}
	pr_info("command %#x is not supported\n", id);
	return SEV_RET_INVALID_COMMAND;
}
