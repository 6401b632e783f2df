// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: the device. A register file, whose command register runs a command, and an interrupt line.
 */
#define pr_fmt(fmt) "softsev: " fmt
#define SOFTSEV_DEVICE

#include <linux/bitfield.h>
#include <linux/kernel.h>
#include <linux/platform_device.h>
#include <linux/psp.h>
#include "../sp-dev.h"
#include "../psp-dev.h"
#include "../sev-dev.h"
#include "device.h"
#include "psp.h"

enum {
	REG_FEATURES	= 0x10,
	REG_INT_ENABLE	= 0x14,
	REG_INT_STATUS	= 0x18,
	REG_COMMAND	= 0x20,
	REG_BUFFER_LOW	= 0x24,
	REG_BUFFER_HIGH	= 0x28,
	REG_END		= 0x40,
};

#define FEATURE_SEV	BIT(0)

static u32 registers[REG_END / 4];
static irq_handler_t irq_handler;
static void *irq_data;
static struct sp_device *soft_sp;

static bool is_register(const void __iomem *addr)
{
	return (uintptr_t)addr >= (uintptr_t)registers && (uintptr_t)addr < (uintptr_t)registers + REG_END;
}

static u32 *reg(unsigned int offset)
{
	return &registers[offset / 4];
}

u32 softsev_ioread32(const void __iomem *addr)
{
	if (!is_register(addr))
		return ioread32(addr);
	return READ_ONCE(*(const u32 __force *)addr);
}

static void run_command(u32 value)
{
	u64 buffer = (u64)*reg(REG_BUFFER_HIGH) << 32 | *reg(REG_BUFFER_LOW);
	u32 status = softsev_mailbox(FIELD_GET(SEV_CMDRESP_CMD, value), buffer);

	*reg(REG_COMMAND) = PSP_CMDRESP_RESP | FIELD_PREP(PSP_CMDRESP_STS, status);
	*reg(REG_INT_STATUS) |= SEV_CMD_COMPLETE;
	if ((value & SEV_CMDRESP_IOC) && (*reg(REG_INT_ENABLE) & SEV_CMD_COMPLETE) && irq_handler)
		irq_handler(0, irq_data);
}

void softsev_iowrite32(u32 value, void __iomem *addr)
{
	if (!is_register(addr)) {
		iowrite32(value, addr);
		return;
	}
	switch ((uintptr_t)addr - (uintptr_t)registers) {
	case REG_COMMAND:
		run_command(value);
		break;
	case REG_INT_STATUS:
		*reg(REG_INT_STATUS) &= ~value;
		break;
	case REG_FEATURES:
		break;
	default:
		WRITE_ONCE(*(u32 __force *)addr, value);
	}
}

int softsev_request_irq(struct sp_device *sp, irq_handler_t handler, const char *name, void *data)
{
	if (sp != soft_sp)
		return sp_request_psp_irq(sp, handler, name, data);
	irq_handler = handler;
	irq_data = data;
	return 0;
}

void softsev_free_irq(struct sp_device *sp, void *data)
{
	if (sp != soft_sp)
		sp_free_psp_irq(sp, data);
	else
		irq_handler = NULL;
}

static struct sp_device *get_master(void)
{
	return soft_sp;
}

static void set_master(struct sp_device *sp)
{
}

static const struct sev_vdata sev_registers = {
	.cmdresp_reg		= REG_COMMAND,
	.cmdbuff_addr_lo_reg	= REG_BUFFER_LOW,
	.cmdbuff_addr_hi_reg	= REG_BUFFER_HIGH,
};

static const struct psp_vdata psp_registers = {
	.sev		= &sev_registers,
	.feature_reg	= REG_FEATURES,
	.inten_reg	= REG_INT_ENABLE,
	.intsts_reg	= REG_INT_STATUS,
};

static const struct sp_dev_vdata device_data = { .psp_vdata = &psp_registers };

/**
 * softsev_device_create() - make the device, before the ccp driver looks for its master device
 */
void softsev_device_create(void)
{
	struct platform_device *pdev;

	if (!softsev_enabled() || soft_sp || sp_get_psp_master_device())
		return;
	pdev = platform_device_register_simple("softsev", PLATFORM_DEVID_NONE, NULL, 0);
	if (IS_ERR(pdev))
		return;
	soft_sp = sp_alloc_struct(&pdev->dev);
	if (!soft_sp)
		return;
	*reg(REG_FEATURES) = FEATURE_SEV;
	soft_sp->io_map = (void __iomem __force *)registers;
	soft_sp->dev_vdata = &device_data;
	soft_sp->get_psp_master_device = get_master;
	soft_sp->set_psp_master_device = set_master;
	soft_sp->clear_psp_master_device = set_master;
	dev_set_drvdata(&pdev->dev, soft_sp);
	sp_init(soft_sp);
	softsev_debugfs_init();
	pr_notice("software AMD-SP, API %d.%d build %d: nothing is encrypted\n", SOFTSEV_API_MAJOR,
		  SOFTSEV_API_MINOR, SOFTSEV_BUILD);
}
