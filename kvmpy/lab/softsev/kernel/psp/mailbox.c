// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the table of commands.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/irqflags.h>
#include <linux/kernel.h>
#include <linux/mutex.h>
#include <linux/printk.h>
#include "psp.h"

struct command {
	u32 id;
	const char *name;
	u32 (*run)(void *buf);
	bool answers;	/* into its own buffer, which must be the firmware's once SNP is initialised */
};

#define COMMAND(name, function) { SEV_CMD_##name, #name, function }
#define ANSWERING(name, function) { SEV_CMD_##name, #name, function, true }

static const struct command commands[] = {
	COMMAND(INIT, softsev_init),
	COMMAND(INIT_EX, softsev_init_ex),
	COMMAND(SHUTDOWN, softsev_shutdown),
	COMMAND(FACTORY_RESET, softsev_factory_reset),
	ANSWERING(PLATFORM_STATUS, softsev_platform_status),
	COMMAND(PEK_GEN, softsev_pek_gen),
	ANSWERING(PEK_CSR, softsev_pek_csr),
	COMMAND(PEK_CERT_IMPORT, softsev_pek_import),
	COMMAND(PDH_GEN, softsev_pdh_gen),
	ANSWERING(PDH_CERT_EXPORT, softsev_pdh_export),
	COMMAND(DF_FLUSH, softsev_df_flush),
	ANSWERING(GET_ID, softsev_get_id),

	COMMAND(DECOMMISSION, softsev_decommission),
	COMMAND(ACTIVATE, softsev_activate),
	COMMAND(DEACTIVATE, softsev_deactivate),
	ANSWERING(GUEST_STATUS, softsev_guest_status),
	ANSWERING(LAUNCH_START, softsev_launch_start),
	COMMAND(LAUNCH_UPDATE_DATA, softsev_launch_update_data),
	COMMAND(LAUNCH_UPDATE_VMSA, softsev_launch_update_vmsa),
	ANSWERING(LAUNCH_MEASURE, softsev_launch_measure),
	COMMAND(LAUNCH_UPDATE_SECRET, softsev_launch_secret),
	COMMAND(LAUNCH_FINISH, softsev_launch_finish),
	COMMAND(ATTESTATION_REPORT, softsev_attestation_report),
	COMMAND(DBG_DECRYPT, softsev_dbg_decrypt),
	COMMAND(DBG_ENCRYPT, softsev_dbg_encrypt),

	ANSWERING(SEND_START, softsev_send_start),
	ANSWERING(SEND_UPDATE_DATA, softsev_send_update_data),
	ANSWERING(SEND_UPDATE_VMSA, softsev_send_update_vmsa),
	COMMAND(SEND_FINISH, softsev_send_finish),
	COMMAND(SEND_CANCEL, softsev_send_cancel),
	ANSWERING(RECEIVE_START, softsev_receive_start),
	COMMAND(RECEIVE_UPDATE_DATA, softsev_receive_update_data),
	COMMAND(RECEIVE_UPDATE_VMSA, softsev_receive_update_vmsa),
	COMMAND(RECEIVE_FINISH, softsev_receive_finish),

	COMMAND(SNP_INIT, softsev_snp_init),
	COMMAND(SNP_INIT_EX, softsev_snp_init_ex),
	COMMAND(SNP_SHUTDOWN_EX, softsev_snp_shutdown),
	COMMAND(SNP_PLATFORM_STATUS, softsev_snp_status),
	COMMAND(SNP_DF_FLUSH, softsev_df_flush),
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

static const struct command *find(u32 id)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(commands); i++)
		if (commands[i].id == id)
			return &commands[i];
	pr_info("command %#x is not supported\n", id);
	return NULL;
}

/* The driver has a mutex of its own, the test bench has not. In a panic there is nobody else. */
static DEFINE_MUTEX(command_mutex);

static u32 run(const struct command *c, void *buf)
{
	unsigned int nth = softsev_own_memory_begin();
	bool alone = irqs_disabled();
	u32 ret;

	if (!alone)
		mutex_lock(&command_mutex);
	ret = c->run(buf);
	if (!alone)
		mutex_unlock(&command_mutex);
	softsev_own_memory_end(nth);
	if (ret)
		pr_info("%s: error %#x\n", c->name, ret);
	return ret;
}

/**
 * softsev_command() - run a command
 * @id: its number
 * @buf: its buffer, or NULL where it has none
 *
 * Return: the firmware's status.
 */
u32 softsev_command(u32 id, void *buf)
{
	const struct command *c = find(id);

	return c ? run(c, buf) : SEV_RET_INVALID_COMMAND;
}

/**
 * softsev_mailbox() - run a command that came through the registers
 * @id: its number
 * @pa: where its buffer is, or 0
 *
 * A buffer that is answered into must be a firmware page once SNP is initialised, and is the hypervisor's to reclaim
 * afterwards. Firmware: sev_dispatch_master(), which adds 64 to the error of the first.
 *
 * Return: the firmware's status.
 */
u32 softsev_mailbox(u32 id, u64 pa)
{
	const struct command *c = find(id);
	struct softsev_rmp e;
	u32 ret;

	if (!c)
		return SEV_RET_INVALID_COMMAND;
	if (c->answers && softsev_platform.snp && softsev_page_state(pa, &e) != PAGE_FIRMWARE)
		return RET_INVALID_PAGE_STATE + 64;
	ret = run(c, pa ? softsev_va(pa) : NULL);
	if (c->answers && softsev_page_state(pa, &e) == PAGE_FIRMWARE) {
		e.immutable = 0;
		softsev_rmp_write(PHYS_PFN(softsev_pa(pa)), &e);
	}
	return ret;
}
