# SPDX-License-Identifier: Apache-2.0
"""An application processor on its whole way: INIT, SIPI, real mode, protected mode, 64-bit mode, C.

Not under an encryption bit: it does not fit the CR3 of 32-bit mode.
"""

from __future__ import annotations

import struct

import pytest

from kvmpy import KVM_MP_STATE_UNINITIALIZED, Gpa, Gva, MakeVm
from kvmpy.guest import layout

pytestmark = pytest.mark.requires("KVM_CAP_MP_STATE", "KVM_CAP_SPLIT_IRQCHIP")

PAGE = 0x8000

GUEST = """
#include <kvmpy/guest.h>

/* Copied to 0x8000 by the host, which fills in what is behind it. */
asm(".pushsection .rodata\\n"
    ".globl trampoline, trampoline_end\\n"
    ".set here, 0x8000\\n"
    "trampoline:\\n"
    ".code16\\n"
    "	cli\\n"
    "	xorw	%ax, %ax\\n"
    "	movw	%ax, %ds\\n"
    "	lgdtl	here + gdt_pointer - trampoline\\n"
    "	movl	%cr0, %eax\\n"
    "	orl	$1, %eax\\n"
    "	movl	%eax, %cr0\\n"
    "	ljmpl	$0x08, $(here + protected - trampoline)\\n"
    ".code32\\n"
    "protected:\\n"
    "	movw	$0x10, %ax\\n"
    "	movw	%ax, %ds\\n"
    "	movw	%ax, %es\\n"
    "	movw	%ax, %ss\\n"
    "	movl	$0x6a0, %eax\\n"
    "	movl	%eax, %cr4\\n"
    "	movl	here + trampoline_end - trampoline, %eax\\n"
    "	movl	%eax, %cr3\\n"
    "	movl	$0xc0000080, %ecx\\n"
    "	rdmsr\\n"
    "	orl	$0x901, %eax\\n"
    "	wrmsr\\n"
    "	movl	%cr0, %eax\\n"
    "	orl	$0x80010000, %eax\\n"
    "	movl	%eax, %cr0\\n"
    "	ljmpl	$0x18, $(here + long_mode - trampoline)\\n"
    ".code64\\n"
    "long_mode:\\n"
    "	movl	$(here + trampoline_end - trampoline), %ebx\\n"
    "	movq	8(%rbx), %rdi\\n"
    "	movq	16(%rbx), %rsp\\n"
    "	lgdt	32(%rbx)\\n"
    "	lidt	48(%rbx)\\n"
    "	movl	$0xc0000101, %ecx\\n"
    "	movl	%edi, %eax\\n"
    "	movq	%rdi, %rdx\\n"
    "	shrq	$32, %rdx\\n"
    "	wrmsr\\n"
    "	pushq	$8\\n"
    "	pushq	24(%rbx)\\n"
    "	lretq\\n"
    "	.balign	8\\n"
    "gdt:	.quad	0, 0x00cf9a000000ffff, 0x00cf92000000ffff, 0x00af9a000000ffff\\n"
    "gdt_pointer:\\n"
    "	.word	31\\n"
    "	.long	here + gdt - trampoline\\n"
    "	.balign	8\\n"
    "trampoline_end:\\n"
    ".popsection\\n");

static u64 started;

void guest_main(void)
{
	apic_enable();
	GUEST_SYNC('b');
	apic_send(1, APIC_DM_INIT | APIC_INT_ASSERT);
	apic_send(1, APIC_DM_STARTUP | APIC_INT_ASSERT | 0x08);
	while (!atomic_read(&started))
		cpu_relax();
	GUEST_ASSERT_EQ(atomic_read(&started), 0x1234ull);
}

void second(u64 value)
{
	GUEST_ASSERT_EQ(guest_cpu_index(), 1u);
	GUEST_ASSERT_EQ(xapic_read(APIC_ID) >> 24, 1u);
	GUEST_ASSERT_EQ(rdmsr(MSR_IA32_APICBASE) & APICBASE_BSP, 0ull);
	/* Exceptions work: the descriptor tables are those of all. */
	GUEST_ASSERT_EQ(GUEST_TRY("ud2").vector, UD_VECTOR);
	atomic_set(&started, value);
}
"""


@pytest.mark.protections("none")
def test_ap_start(make_vm: MakeVm) -> None:
    """After INIT and SIPI a vCPU brings itself from real mode to 64-bit mode, and runs beside the first.

    Intel SDM 3A, 10.4.4 (MP initialization example) and 11.8.5 (initializing IA-32e mode).
    """
    vm = make_vm(GUEST, vcpus=2)
    target = vm.vcpus[1]
    target.set_entry("second", 0x1234)
    start, end = vm.symbol("trampoline").gva, vm.symbol("trampoline_end").gva
    descriptor = "<HQ6x"
    code = vm.read(start, end - start) + b"".join(
        (
            struct.pack(
                "<QQQQ", int(vm.pages.cr3), int(target.percpu), int(target.stack_top), int(vm.program.entry)
            ),
            struct.pack(descriptor, 0xFFF, layout.GDT_GVA),
            struct.pack(descriptor, 0xFFF, layout.IDT_GVA),
        )
    )
    vm.memory.write(Gpa(PAGE), code)
    vm.map(Gva(PAGE), Gpa(PAGE), 0x1000, nx=False)
    vm.launch()
    target.set_mp_state(KVM_MP_STATE_UNINITIALIZED)
    vm.run_all()
