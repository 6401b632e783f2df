/* SPDX-License-Identifier: Apache-2.0 */
/* Written by `python -m kvmpy.gen`: do not edit. From kvmpy.guest.layout. */
#ifndef KVMPY_LAYOUT_H
#define KVMPY_LAYOUT_H

/* Guest virtual addresses. */
#define KVMPY_IMAGE_BASE 0x400000
#define KVMPY_GDT_GVA 0x7ff0000
#define KVMPY_IDT_GVA 0x7ff1000
#define KVMPY_XAPIC_GVA 0x7ff2000
#define KVMPY_SNP_SECRETS_GVA 0x7ff3000
#define KVMPY_SNP_CPUID_GVA 0x7ff4000
#define KVMPY_PERCPU_BASE 0x8000000
#define KVMPY_UCALL_BASE 0xc000000
#define KVMPY_GHCB_BASE 0xe000000
#define KVMPY_STACK_BASE 0x10000000
#define KVMPY_HEAP_BASE 0x40000000

#define KVMPY_MAX_VCPUS 1024
#define KVMPY_PERCPU_SIZE 0x4000
#define KVMPY_UCALL_PAGE_SIZE 0x1000
#define KVMPY_STACK_SIZE 0x10000
#define KVMPY_STACK_GUARD 0x1000

/* Within a vCPU's four per-CPU pages; the IST stacks grow down from their tops. */
#define KVMPY_PERCPU_TSS 0x1000
#define KVMPY_PERCPU_IST1_TOP 0x3000
#define KVMPY_PERCPU_IST2_TOP 0x4000
#define KVMPY_TSS_RSP0 0x1004

/* Program header flags (within PF_MASKOS) that the linker script sets. */
#define KVMPY_PF_SHARED 0x100000
#define KVMPY_PF_USER 0x200000

/* Selectors of the GDT that the host writes. */
#define KVMPY_KERNEL_CS 0x8
#define KVMPY_KERNEL_DS 0x10
#define KVMPY_USER_DS 0x23
#define KVMPY_USER_CS 0x2b

/* Interrupt stubs: 256 of them under the symbol guest_vectors. */
#define KVMPY_VECTOR_STRIDE 16

/* struct guest_cpu: the GS base of every vCPU points to one. */
#define KVMPY_CPU_SELF 0
#define KVMPY_CPU_INDEX 8
#define KVMPY_CPU_APIC_ID 12
#define KVMPY_CPU_UCALL_SLOT 16
#define KVMPY_CPU_STACK_TOP 24
#define KVMPY_CPU_ENTRY 32
#define KVMPY_CPU_ARGS 40
#define KVMPY_CPU_FAULT 88
#define KVMPY_CPU_USER_RSP 120
#define KVMPY_CPU_USER_EXIT 128
#define KVMPY_CPU_X2APIC 136
#define KVMPY_CPU_GHCB 144
#define KVMPY_CPU_GHCB_GPA 152
#define KVMPY_CPU_SEV 160
#define KVMPY_CPU_GHCB_DEPTH 164
#define KVMPY_CPU_ENC_MASK 168
#define KVMPY_CPU_GHCB_MSR 176
#define KVMPY_CPU_CALL_RSP 192
#define KVMPY_CPU_SIZE 256
#define KVMPY_CPU_NR_ARGS 6

/* Bits of guest_cpu.sev, and the top-level page table entry that maps the tables themselves. */
#define KVMPY_SEV_ES 1
#define KVMPY_SEV_SNP 2
#define KVMPY_SELF_MAP_SLOT 510

/* struct guest_ucall_slot: eight to a page, the last one takes what overflows. */
#define KVMPY_UCALL_PORT 0xe6
#define KVMPY_UCALL_SLOT_SIZE 512
#define KVMPY_UCALL_SLOTS 8
#define KVMPY_UCALL_GPA 0
#define KVMPY_UCALL_ID 8
#define KVMPY_UCALL_CMD 12
#define KVMPY_UCALL_ARGS 16
#define KVMPY_UCALL_NEXT 80
#define KVMPY_UCALL_TEXT 96
#define KVMPY_UCALL_TEXT_SIZE 416
#define KVMPY_UCALL_NR_ARGS 8
#define KVMPY_UCALL_NO_SLOT 0xffffffff

/* cmd word: command in the low 16 bits, number of arguments, flags. */
#define KVMPY_UCALL_NARGS_SHIFT 16
#define KVMPY_UCALL_HAS_TEXT 0x1000000

/* What an ABORT compares: its fourth argument, the kind in the low 8 bits. */
#define KVMPY_ASSERT_KIND_MASK 0xff
#define KVMPY_ASSERT_GOT_SIGNED 0x100
#define KVMPY_ASSERT_EXPECTED_SIGNED 0x200

#define KVMPY_UCALL_CMD_NONE 0
#define KVMPY_UCALL_CMD_SYNC 1
#define KVMPY_UCALL_CMD_DONE 2
#define KVMPY_UCALL_CMD_ABORT 3
#define KVMPY_UCALL_CMD_PRINTF 4
#define KVMPY_UCALL_CMD_EXCEPTION 5
#define KVMPY_UCALL_CMD_USER 256

#define KVMPY_ASSERT_FAIL 0
#define KVMPY_ASSERT_TRUE 1
#define KVMPY_ASSERT_EQ 2
#define KVMPY_ASSERT_NE 3
#define KVMPY_ASSERT_LT 4
#define KVMPY_ASSERT_LE 5
#define KVMPY_ASSERT_GT 6
#define KVMPY_ASSERT_GE 7

#endif
