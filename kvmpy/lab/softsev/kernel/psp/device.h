/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Software AMD-SP: for the ccp driver, which reads and writes registers and asks for an interrupt here.
 */
#ifndef __SOFTSEV_DEVICE_H
#define __SOFTSEV_DEVICE_H

#include <linux/interrupt.h>
#include <linux/io.h>
#include <asm/softsev.h>

struct sp_device;

void softsev_device_create(void);
u32 softsev_ioread32(const void __iomem *addr);
void softsev_iowrite32(u32 value, void __iomem *addr);
int softsev_request_irq(struct sp_device *sp, irq_handler_t handler, const char *name, void *data);
void softsev_free_irq(struct sp_device *sp, void *data);

#ifndef SOFTSEV_DEVICE
#undef ioread32
#undef iowrite32
#define ioread32 softsev_ioread32
#define iowrite32 softsev_iowrite32
#define sp_request_psp_irq softsev_request_irq
#define sp_free_psp_irq softsev_free_irq
/* The software is not updated by a file. */
#define firmware_request_nowarn(fw, name, dev) \
	(softsev_enabled() ? -ENOENT : firmware_request_nowarn(fw, name, dev))
#endif

#endif
