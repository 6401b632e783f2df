# SPDX-License-Identifier: Apache-2.0
"""Registers as words: flags and control registers by the names of their bits, and whole register sets for a
post-mortem.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.x86.bits import (
    bit_words,
    cpu_mode,
    cr0_words,
    cr4_words,
    dr6_words,
    dr7_words,
    efer_words,
    paging_mode,
    rflags_words,
    xcr0_words,
)

if TYPE_CHECKING:
    from typing import Union

    from kvmpy.uapi.structs import kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2

    Sregs = Union[kvm_sregs, kvm_sregs2]

__all__ = [
    "GENERAL",
    "SEGMENTS",
    "bit_words",
    "cpu_mode",
    "cr0_words",
    "cr4_words",
    "dr6_words",
    "dr7_words",
    "efer_words",
    "format_debugregs",
    "format_regs",
    "format_sregs",
    "paging_mode",
    "rflags_words",
    "segment_words",
    "xcr0_words",
]

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")

_SYSTEM_TYPES = {1: "tss16", 2: "ldt", 3: "tss16 busy", 9: "tss", 11: "tss busy"}


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


def format_sregs(sregs: Sregs, rflags: int = 0) -> str:
    """Return control registers, segments and descriptor tables as lines of text."""
    mode = cpu_mode(sregs.cr0, sregs.efer, sregs.cs.l, sregs.cs.db, rflags)
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
