# SPDX-License-Identifier: Apache-2.0
"""Where everything lives in the guest's address space, and the formats shared with the guest.

``guest_asm/include/kvmpy/layout.h``, written by :mod:`kvmpy.gen`, says it to the guest, with each name
prefixed by ``KVMPY_``.
Addresses are guest-virtual; sizes and offsets are bytes.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Guest virtual addresses.
IMAGE_BASE = 0x0040_0000
GDT_GVA = 0x07FF_0000
IDT_GVA = 0x07FF_1000
XAPIC_GVA = 0x07FF_2000
SNP_SECRETS_GVA = 0x07FF_3000
SNP_CPUID_GVA = 0x07FF_4000
PERCPU_BASE = 0x0800_0000
UCALL_BASE = 0x0C00_0000
GHCB_BASE = 0x0E00_0000
STACK_BASE = 0x1000_0000
HEAP_BASE = 0x4000_0000

MAX_VCPUS = 1024
PERCPU_SIZE = 0x4000
UCALL_PAGE_SIZE = 0x1000
STACK_SIZE = 0x1_0000
STACK_GUARD = 0x1000

# Within a vCPU's four per-CPU pages; the IST stacks grow down from their tops.
PERCPU_TSS = 0x1000
PERCPU_IST1_TOP = 0x3000
PERCPU_IST2_TOP = 0x4000
TSS_RSP0 = 0x1004

# Program header flags (within PF_MASKOS) that the linker script sets.
PF_SHARED = 0x0010_0000
PF_USER = 0x0020_0000
PF_LOW = 0x0040_0000

# Selectors of the GDT that the host writes.
KERNEL_CS = 0x08
KERNEL_DS = 0x10
KERNEL_CS32 = 0x40
USER_DS = 0x23
USER_CS = 0x2B

# Interrupt stubs: 256 of them under the symbol guest_vectors.
VECTOR_STRIDE = 16
VECTORS_SYMBOL = "guest_vectors"

# struct guest_cpu: the GS base of every vCPU points to one.
CPU_SELF = 0
CPU_INDEX = 8
CPU_APIC_ID = 12
CPU_UCALL_SLOT = 16
CPU_STACK_TOP = 24
CPU_ENTRY = 32
CPU_ARGS = 40
CPU_FAULT = 88
CPU_USER_RSP = 120
CPU_USER_EXIT = 128
CPU_X2APIC = 136
CPU_GHCB = 144
CPU_GHCB_GPA = 152
CPU_SEV = 160
CPU_GHCB_DEPTH = 164
CPU_ENC_MASK = 168
CPU_GHCB_MSR = 176
CPU_CALL_RSP = 192
CPU_L2 = 208
CPU_SIZE = 256
CPU_NR_ARGS = 6

# Bits of guest_cpu.sev, and the top-level page table entry that maps the tables themselves.
SEV_ES = 1
SEV_SNP = 2
SELF_MAP_SLOT = 510

# struct guest_ucall_slot: eight to a page, the last one takes what overflows.
UCALL_PORT = 0xE6
UCALL_SLOT_SIZE = 512
UCALL_SLOTS = 8
UCALL_GPA = 0
UCALL_ID = 8
UCALL_CMD = 12
UCALL_ARGS = 16
UCALL_NEXT = 80
UCALL_TEXT = 96
UCALL_TEXT_SIZE = 416
UCALL_NR_ARGS = 8
UCALL_NO_SLOT = 0xFFFF_FFFF

# cmd word: command in the low 16 bits, number of arguments, flags.
UCALL_NARGS_SHIFT = 16
UCALL_HAS_TEXT = 0x0100_0000

# What an ABORT compares: its fourth argument, the kind in the low 8 bits.
ASSERT_KIND_MASK = 0xFF
ASSERT_GOT_SIGNED = 0x100
ASSERT_EXPECTED_SIGNED = 0x200

_CPU = struct.Struct("<QIIQQQ6Q")
_CPU_SEV = struct.Struct("<QQIIQ")
_CPU_L2_WORD = struct.Struct("<Q")
_SLOT_HEAD = struct.Struct("<QI")
_SLOT_NEXT = struct.Struct("<Q")


class UcallCmd(enum.IntEnum):
    """What a ucall asks of the host; a test's own commands are ``USER`` and above."""

    NONE = 0
    SYNC = 1
    DONE = 2
    ABORT = 3
    PRINTF = 4
    EXCEPTION = 5
    USER = 0x100


class AssertKind(enum.IntEnum):
    """What an assertion compared: the low 8 bits of the fourth argument of an ABORT."""

    FAIL = 0
    TRUE = 1
    EQ = 2
    NE = 3
    LT = 4
    LE = 5
    GT = 6
    GE = 7


def pack_guest_cpu(
    *,
    index: int,
    apic_id: int,
    percpu: int,
    ucall_slot: int,
    stack_top: int,
    entry: int,
    args: Sequence[int] = (),
    ghcb: int = 0,
    ghcb_gpa: int = 0,
    sev: int = 0,
    encryption_mask: int = 0,
    l2: int = 0,
) -> bytes:
    """Return the initial ``struct guest_cpu`` of vCPU *index*; addresses are GVAs, *args* at most six.

    With a GHCB: its GVA and GPA, and ``SEV_*`` bits.  *l2* is where a ``struct guest_l2`` lies.
    """
    if len(args) > CPU_NR_ARGS:
        raise ValueError(f"a vCPU takes at most {CPU_NR_ARGS} arguments, not {len(args)}")
    values = [int(a) & 0xFFFF_FFFF_FFFF_FFFF for a in args] + [0] * (CPU_NR_ARGS - len(args))
    page = bytearray(CPU_SIZE)
    _CPU.pack_into(page, 0, percpu, index, apic_id, ucall_slot, stack_top, entry, *values)
    _CPU_SEV.pack_into(page, CPU_GHCB, ghcb, ghcb_gpa, sev, 0, encryption_mask)
    _CPU_L2_WORD.pack_into(page, CPU_L2, l2)
    return bytes(page)


def self_map_entry(cr3: int) -> bytes:
    """Return the top-level entry that maps the tables themselves: writable, not executable."""
    return (cr3 & ~0xFFF | 0x63 | 1 << 63).to_bytes(8, "little")


def ucall_id(index: int, slot: int = 0) -> int:
    """Return the value that the guest writes to the port for slot *slot* of vCPU *index*.

    The last slot of a page takes the calls for which no slot is left; its id is ``UCALL_NO_SLOT``.
    """
    return UCALL_NO_SLOT if slot == UCALL_SLOTS - 1 else index * UCALL_SLOTS + slot


def fill_ucall_page(page: bytearray | memoryview, index: int, gpa: int, gva: int) -> None:
    """Chain the ucall slots of vCPU *index* in the zeroed *page*, which the guest has at *gpa* and *gva*.

    The last slot is its own successor, so that the guest needs no check for the end of the chain.
    """
    for slot in range(UCALL_SLOTS):
        offset = slot * UCALL_SLOT_SIZE
        following = min(slot + 1, UCALL_SLOTS - 1) * UCALL_SLOT_SIZE
        _SLOT_HEAD.pack_into(page, offset + UCALL_GPA, int(gpa) + offset, ucall_id(index, slot))
        _SLOT_NEXT.pack_into(page, offset + UCALL_NEXT, int(gva) + following)
