# SPDX-License-Identifier: Apache-2.0
"""Registers as words: flags and control registers by the names of their bits, and whole register sets for a
post-mortem.
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING

from kvmpy.x86.bits import CR0, CR4, DR6, EFER, RFLAGS, XCR0

if TYPE_CHECKING:
    from typing import Union

    from kvmpy.uapi.structs import kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2

    Sregs = Union[kvm_sregs, kvm_sregs2]

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")

_DR6_FIXED = 0xFFFF_07F0  # reads as one
_DR7_FIXED = 1 << 10
_DR7_ACCESS = ("execute", "write", "i/o", "read/write")
_DR7_LENGTH = (1, 2, 8, 4)
_SYSTEM_TYPES = {1: "tss16", 2: "ldt", 3: "tss16 busy", 9: "tss", 11: "tss busy"}


def bit_words(kind: type[IntFlag], value: int) -> list[str]:
    """Return the names of the bits of *value*, lowest first; a bit without a name is ``bitN``."""
    names = {int(member): name for name, member in kind.__members__.items()}
    return [names.get(1 << bit, f"bit{bit}") for bit in range(value.bit_length()) if value >> bit & 1]


def rflags_words(value: int) -> str:
    """Return RFLAGS as words, such as ``CF ZF IF IOPL3``; the bit that is always set is told only when it is
    not.
    """
    words = bit_words(RFLAGS, value & ~(int(RFLAGS.FIXED) | 3 << 12))
    if value >> 12 & 3:
        words.append(f"IOPL{value >> 12 & 3}")
    if not value & RFLAGS.FIXED:
        words.append("bit1-clear!")
    return " ".join(words)


def cr0_words(value: int) -> str:
    """Return CR0 as words."""
    return " ".join(bit_words(CR0, value))


def cr4_words(value: int) -> str:
    """Return CR4 as words."""
    return " ".join(bit_words(CR4, value))


def efer_words(value: int) -> str:
    """Return EFER as words."""
    return " ".join(bit_words(EFER, value))


def xcr0_words(value: int) -> str:
    """Return XCR0 (or XSTATE_BV) as words."""
    return " ".join(bit_words(XCR0, value))


def dr6_words(value: int) -> str:
    """Return DR6 as words; BLD and RTM, which events clear, are told when clear."""
    inverted = int(DR6.BLD | DR6.RTM)
    return " ".join(bit_words(DR6, ((value ^ inverted) & ~(_DR6_FIXED & ~inverted)) & 0xFFFF_FFFF))


def dr7_words(value: int) -> str:
    """Return DR7 as words: enabled breakpoints with scope, condition and length, then the general bits."""
    words = []
    for number in range(4):
        enabled = value >> 2 * number & 3
        if enabled:
            scope = {1: "L", 2: "G", 3: "LG"}[enabled]
            access, length = value >> 16 + 4 * number & 3, value >> 18 + 4 * number & 3
            words.append(f"{scope}{number}:{_DR7_ACCESS[access]}/{_DR7_LENGTH[length]}")
    words += [name for bit, name in ((8, "LE"), (9, "GE"), (11, "RTM"), (13, "GD")) if value >> bit & 1]
    if not value & _DR7_FIXED:
        words.append("bit10-clear!")
    return " ".join(words)


def cpu_mode(cr0: int, efer: int, cs_l: int, cs_db: int, rflags: int = 0) -> str:
    """Return ``64-bit``, ``compatibility 32-bit``, ``protected 16-bit``, ``virtual-8086`` or ``real``."""
    if not cr0 & CR0.PE:
        return "real"
    if efer & EFER.LMA:
        return "64-bit" if cs_l else f"compatibility {32 if cs_db else 16}-bit"
    if rflags & RFLAGS.VM:
        return "virtual-8086"
    return f"protected {32 if cs_db else 16}-bit"


def paging_mode(cr0: int, cr4: int, efer: int) -> str:
    """Return which page tables are in use: ``off``, ``32-bit``, ``PAE``, ``4-level`` or ``5-level``."""
    if not cr0 & CR0.PG:
        return "off"
    if not cr4 & CR4.PAE:
        return "32-bit"
    if not efer & EFER.LMA:
        return "PAE"
    return "5-level" if cr4 & CR4.LA57 else "4-level"


def segment_words(segment: kvm_segment) -> str:
    """Return the attributes of a segment register as words."""
    if segment.unusable:
        return "unusable"
    words = []
    if not segment.s:
        words.append(_SYSTEM_TYPES.get(segment.type, f"system type {segment.type}"))
    elif segment.type & 8:
        words.append(
            "code" + ("/read" if segment.type & 2 else "") + (" conforming" if segment.type & 4 else "")
        )
    else:
        words.append(
            "data" + ("/write" if segment.type & 2 else "") + (" expand-down" if segment.type & 4 else "")
        )
    words.append(f"dpl{segment.dpl}")
    if segment.s and segment.type & 8:
        words.append("64-bit" if segment.l else "32-bit" if segment.db else "16-bit")
    elif segment.s:
        words.append("32-bit" if segment.db else "16-bit")
    if not segment.present:
        words.append("not present")
    return " ".join(words)


def format_regs(regs: kvm_regs) -> str:
    """Return the general registers, RIP and RFLAGS as lines of text."""
    lines = [f"rip {regs.rip:016x}  rflags {regs.rflags:08x} [{rflags_words(regs.rflags)}]"]
    for start in range(0, len(GENERAL), 4):
        row = GENERAL[start : start + 4]
        lines.append("  ".join(f"{name:<3} {getattr(regs, name):016x}" for name in row))
    return "\n".join(lines)


def format_sregs(sregs: Sregs) -> str:
    """Return control registers, segments and descriptor tables as lines of text."""
    mode = cpu_mode(sregs.cr0, sregs.efer, sregs.cs.l, sregs.cs.db)
    lines = [
        f"mode {mode}, cpl {sregs.ss.dpl}, paging {paging_mode(sregs.cr0, sregs.cr4, sregs.efer)}",
        f"cr0 {sregs.cr0:016x} [{cr0_words(sregs.cr0)}]",
        f"cr2 {sregs.cr2:016x}  cr3 {sregs.cr3:016x}  cr8 {sregs.cr8:x}",
        f"cr4 {sregs.cr4:016x} [{cr4_words(sregs.cr4)}]",
        f"efer {sregs.efer:x} [{efer_words(sregs.efer)}]",
        f"apic base {sregs.apic_base:#x} [{_apic_base_words(sregs.apic_base)}]",
    ]
    for name in SEGMENTS:
        segment = getattr(sregs, name)
        place = f"base {segment.base:016x} limit {segment.limit:08x}"
        lines.append(f"{name:<3} {segment.selector:04x} {place} {segment_words(segment)}")
    lines += [_table("gdt", sregs.gdt), _table("idt", sregs.idt)]
    return "\n".join(lines)


def format_debugregs(debugregs: kvm_debugregs) -> str:
    """Return the debug registers as lines of text."""
    return "\n".join(
        (
            "  ".join(f"db{number} {debugregs.db[number]:016x}" for number in range(4)),
            f"dr6 {debugregs.dr6:08x} [{dr6_words(debugregs.dr6)}]",
            f"dr7 {debugregs.dr7:08x} [{dr7_words(debugregs.dr7)}]",
        )
    )


def _apic_base_words(value: int) -> str:
    words = ["bsp"] if value >> 8 & 1 else []
    words.append({0: "disabled", 1: "invalid", 2: "xapic", 3: "x2apic"}[value >> 10 & 3])
    return " ".join(words)


def _table(name: str, table: kvm_dtable) -> str:
    return f"{name:<3}      base {table.base:016x} limit {table.limit:08x}"
