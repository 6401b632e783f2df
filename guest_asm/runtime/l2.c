// SPDX-License-Identifier: Apache-2.0
#include <kvmpy/layout.h>
#include <kvmpy/string.h>
#include <kvmpy/svm.h>

#include "runtime.h"

#define MSR_EFER	0xc0000080
#define MSR_PAT		0x277
#define EFER_SVME	BIT(12)

/* Bits 55:52 and 47:40 of the descriptors of the GDT. */
#define CODE_ATTRIB	0x29b
#define DATA_ATTRIB	0xc93

struct table_register {
	u16 limit;
	u64 base;
} __packed;

static void take_tables(struct vmcb *vmcb)
{
	struct table_register gdtr, idtr;

	asm volatile("sgdt %0" : "=m"(gdtr));
	asm volatile("sidt %0" : "=m"(idtr));
	vmcb->gdtr.base = gdtr.base;
	vmcb->gdtr.limit = gdtr.limit;
	vmcb->idtr.base = idtr.base;
	vmcb->idtr.limit = idtr.limit;
}

void l2_reset(struct guest_l2 *l2, void (*entry)(void))
{
	const struct vmcb_seg data = { KVMPY_KERNEL_DS, DATA_ATTRIB, 0xffffffff, 0 };
	struct vmcb *vmcb = l2->vmcb;
	u64 *stack = (u64 *)((uintptr_t)l2->stack_top & ~15ul) - 1;

	wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SVME);
	wrmsr(MSR_VM_HSAVE_PA, l2->hsave_pa);
	memset(vmcb, 0, sizeof(*vmcb));
	memset(&l2->regs, 0, sizeof(l2->regs));
	l2->context = (struct guest_l2_context) { .ucall_slot = guest_cpu()->ucall_slot };
	vmsave(l2->vmcb_pa);
	vmcb->cs = (struct vmcb_seg) { KVMPY_KERNEL_CS, CODE_ATTRIB, 0xffffffff, 0 };
	vmcb->ds = vmcb->es = vmcb->ss = data;
	take_tables(vmcb);
	vmcb->efer = rdmsr(MSR_EFER);
	vmcb->cr0 = read_cr0();
	vmcb->cr3 = read_cr3();
	vmcb->cr4 = read_cr4();
	vmcb->dr6 = 0xffff0ff0;
	vmcb->dr7 = 0x400;
	vmcb->rflags = 2;
	vmcb->g_pat = rdmsr(MSR_PAT);
	vmcb->rip = (uintptr_t)entry;
	vmcb->rsp = (uintptr_t)stack;
	*stack = (uintptr_t)guest_l2_end;

	vmcb->asid = 1;
	vmcb->msrpm_base_pa = l2->msrpm_pa;
	vmcb->iopm_base_pa = l2->iopm_pa;
	if (l2->nested_cr3) {
		vmcb->nested_cr3 = l2->nested_cr3;
		vmcb->misc_ctl = SVM_MISC_CTL_NP;
	}
	vmcb_intercept(vmcb, SVM_EXIT_VMRUN, true);
	vmcb_intercept(vmcb, SVM_EXIT_VMMCALL, true);
	vmcb_intercept(vmcb, SVM_EXIT_SHUTDOWN, true);
}

/* An exception of L2 must not go on where L1 waits for one, nor the other way round. */
static void change_guest(struct guest_l2 *l2)
{
	struct guest_l2_context other = l2->context;
	struct guest_cpu *cpu = guest_cpu();

	l2->context = (struct guest_l2_context) {
		.ucall_slot = cpu->ucall_slot,
		.fault = cpu->fault,
		.user_rsp = cpu->user_rsp,
		.user_exit = cpu->user_exit,
		.call_rsp = cpu->call_rsp,
		.call_exit = cpu->call_exit,
	};
	cpu->ucall_slot = other.ucall_slot;
	cpu->fault = other.fault;
	cpu->user_rsp = other.user_rsp;
	cpu->user_exit = other.user_exit;
	cpu->call_rsp = other.call_rsp;
	cpu->call_exit = other.call_exit;
}

/* L2's ucall, where L1 intercepts it: the slot is the vCPU's, whoever filled it. */
static bool is_ucall(const struct vmcb *vmcb)
{
	return vmcb->exit_code == SVM_EXIT_IOIO && vmcb->exit_info_1 >> 16 == KVMPY_UCALL_PORT &&
	       (vmcb->exit_info_1 & (SVM_IO_IN | SVM_IO_STR | SVM_IO_SZ32)) == SVM_IO_SZ32;
}

u64 l2_run(struct guest_l2 *l2)
{
	struct vmcb *vmcb = l2->vmcb;

	for (;;) {
		change_guest(l2);
		guest_l2_enter(l2);
		change_guest(l2);
		if (!is_ucall(vmcb))
			return vmcb->exit_code;
		asm volatile("outl %0, %1" : : "a"((u32)vmcb->rax), "N"(KVMPY_UCALL_PORT) : "memory");
		vmcb->rip = vmcb->exit_info_2;
	}
}

void l2_try(void)
{
	struct guest_l2 *l2 = guest_l2();

	for (;;) {
		l2->tried = guest_try_call(l2->function, l2->arg);
		vmmcall();
	}
}

void l2_intercept_msr(struct guest_l2 *l2, u32 msr, bool read, bool write)
{
	u32 range = msr >= 0xc0010000 ? 2 : msr >= 0xc0000000 ? 1 : 0;
	u32 bit = 2 * (range * 0x2000 + (msr & 0x1fff));
	u8 *byte = &l2->msrpm[bit / 8];

	*byte = (*byte & ~(3 << bit % 8)) | (read | write << 1) << bit % 8;
	vmcb_intercept(l2->vmcb, SVM_EXIT_MSR, true);
}

void l2_intercept_port(struct guest_l2 *l2, u16 port, bool on)
{
	u8 *byte = &l2->iopm[port / 8];

	*byte = (*byte & ~(1 << port % 8)) | on << port % 8;
	vmcb_intercept(l2->vmcb, SVM_EXIT_IOIO, true);
}
