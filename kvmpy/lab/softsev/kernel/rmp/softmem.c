// SPDX-License-Identifier: GPL-2.0-only
/*
 * Software AMD-SP: what the RMP means for the host's own accesses. It may read every page, but write to its own alone.
 *
 * An assigned page is read-only in the direct map, so that a write faults as it does on hardware. The firmware and the
 * processor, which are software here, write through a second mapping of all memory.
 */
#define pr_fmt(fmt) "softsev: " fmt

#include <linux/export.h>
#include <linux/init.h>
#include <linux/io.h>
#include <linux/memblock.h>
#include <linux/mm.h>
#include <linux/panic.h>
#include <linux/printk.h>
#include <linux/ratelimit.h>
#include <linux/vmalloc.h>
#include <asm/asm.h>
#include <asm/pgtable.h>
#include <asm/set_memory.h>
#include <asm/softsev.h>
#include <asm/trap_pf.h>

static void *second_mapping __ro_after_init;

static int __init softsev_mem_init(void)
{
	unsigned long size = PFN_PHYS(max_pfn), start;
	struct vm_struct *area;
	int ret = -ENOMEM;

	if (!softsev_enabled())
		return 0;
	area = get_vm_area(size, VM_IOREMAP);
	if (area) {
		start = (unsigned long)area->addr;
		ret = ioremap_page_range(start, start + size, 0, PAGE_KERNEL);
	}
	if (ret)
		pr_err("no second mapping of memory (%d): writes of the host are not checked\n", ret);
	else
		second_mapping = area->addr;
	return 0;
}
core_initcall(softsev_mem_init);

/**
 * softsev_mem() - memory as the firmware and the processor write to it, whoever owns it
 * @pa: a physical address
 *
 * Return: where it is mapped.
 */
void *softsev_mem(u64 pa)
{
	return second_mapping ? second_mapping + pa : __va(pa);
}
EXPORT_SYMBOL_GPL(softsev_mem);

/**
 * softsev_host_may_write() - what RMPUPDATE does to the host's access
 * @pfn: the page
 * @large: it is the first one of 2M
 * @may: whether the host may write to it from now on
 *
 * A dying kernel, which gives back all pages with interrupts off, keeps its mappings.
 *
 * Context: may sleep.
 * Return: 0, or an error.
 */
int softsev_host_may_write(u64 pfn, bool large, bool may)
{
	unsigned long address = (unsigned long)pfn_to_kaddr(pfn);
	int pages = large ? PTRS_PER_PMD : 1;
	unsigned int level;

	if (!second_mapping || !pfn_valid(pfn) || atomic_read(&panic_cpu) != PANIC_CPU_INVALID)
		return 0;
	WARN_RATELIMIT(!large && !may && lookup_address(address, &level) && level > PG_LEVEL_4K,
		       "PFN %#llx is assigned while the direct map has it in a large page: hardware would refuse writes to its neighbours\n",
		       pfn);
	return may ? set_memory_rw(address, pages) : set_memory_ro(address, pages);
}

/**
 * softsev_rmp_describe() - one line of the log about a page's entry
 * @pfn: the page
 */
void softsev_rmp_describe(u64 pfn)
{
	struct softsev_rmp e;

	softsev_rmp_read(pfn, &e);
	pr_err("RMP entry of PFN %#llx: %s, GPA %#llx, ASID %u, %s%s%s%s\n", pfn,
	       e.assigned ? "assigned" : "hypervisor's", e.gpa, e.asid, e.large ? "2M" : "4K",
	       e.immutable ? ", immutable" : "", e.vmsa ? ", VMSA or context" : "", e.validated ? ", validated" : "");
}

/**
 * softsev_host_fault() - what a page fault of the kernel is
 * @error: its error code
 * @address: where
 *
 * Return: the error code, with the RMP bit where the RMP is the reason.
 */
unsigned long softsev_host_fault(unsigned long error, unsigned long address)
{
	const unsigned long write = X86_PF_WRITE | X86_PF_PROT;
	struct softsev_rmp e;
	u64 pfn;

	if ((error & (write | X86_PF_USER)) != write || address < PAGE_OFFSET || address >= (unsigned long)high_memory)
		return error;
	pfn = PHYS_PFN(__pa(address));
	softsev_rmp_read(pfn, &e);
	if (!e.assigned)
		return error;
	pr_err("RMP violation: the host writes to %#lx, a page that is not its own\n", address);
	softsev_rmp_describe(pfn);
	return error | X86_PF_RMP;
}

/**
 * softsev_host_write() - try a write that changes nothing
 * @pfn: the page
 *
 * Return: 0, or -EFAULT where the host may not write to it.
 */
int softsev_host_write(u64 pfn)
{
	int err = 0;

	if (!pfn_valid(pfn))
		return -EINVAL;
	asm volatile("1:\tlock; orb $0, (%1)\n2:\n"
		     _ASM_EXTABLE_TYPE_REG(1b, 2b, EX_TYPE_EFAULT_REG, %0)
		     : "+r" (err) : "r" (pfn_to_kaddr(pfn)) : "memory", "cc");
	return err;
}
