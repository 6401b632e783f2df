# SPDX-License-Identifier: Apache-2.0
"""The exit codes of SVM, which are the numbers of its intercepts too.

AMD APM volume 2, appendix C (table C-1) for exit codes, appendix B (table B-1) for intercepts: a bit of the
vectors at 000h to 017h has the number of the exit that it causes.  Members carry Linux's names without
``SVM_EXIT_``.  What EXITINFO1 and EXITINFO2 hold: :func:`kvmpy.x86.vmcb.exit_words`.
"""

from __future__ import annotations

from enum import IntEnum


class SvmExit(IntEnum):
    """An exit code; below :data:`INTERCEPTS` also the number of the intercept bit."""

    READ_CR0 = 0x00
    READ_CR2 = 0x02
    READ_CR3 = 0x03
    READ_CR4 = 0x04
    READ_CR8 = 0x08
    WRITE_CR0 = 0x10
    WRITE_CR2 = 0x12
    WRITE_CR3 = 0x13
    WRITE_CR4 = 0x14
    WRITE_CR8 = 0x18
    READ_DR0 = 0x20
    READ_DR1 = 0x21
    READ_DR2 = 0x22
    READ_DR3 = 0x23
    READ_DR4 = 0x24
    READ_DR5 = 0x25
    READ_DR6 = 0x26
    READ_DR7 = 0x27
    WRITE_DR0 = 0x30
    WRITE_DR1 = 0x31
    WRITE_DR2 = 0x32
    WRITE_DR3 = 0x33
    WRITE_DR4 = 0x34
    WRITE_DR5 = 0x35
    WRITE_DR6 = 0x36
    WRITE_DR7 = 0x37
    EXCP_BASE = 0x40
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MWAIT_COND = 0x8C
    XSETBV = 0x8D
    RDPRU = 0x8E
    EFER_WRITE_TRAP = 0x8F
    CR0_WRITE_TRAP = 0x90
    CR3_WRITE_TRAP = 0x93
    CR4_WRITE_TRAP = 0x94
    CR8_WRITE_TRAP = 0x98
    INVLPGB = 0xA0
    INVLPGB_ILLEGAL = 0xA1
    INVPCID = 0xA2
    MCOMMIT = 0xA3
    TLBSYNC = 0xA4
    BUS_LOCK = 0xA5
    IDLE_HLT = 0xA6
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_UNACCELERATED_ACCESS = 0x402
    VMGEXIT = 0x403
    NOT_VALIDATED = 0x404
    INVALID = 0xFFFF_FFFF_FFFF_FFFF


INTERCEPTS = 0xC0
"""Exits below this number have an intercept bit of that number."""

WORDS: dict[int, str] = {
    SvmExit.CR0_SEL_WRITE: "CR0 selective write",
    SvmExit.IDTR_READ: "IDTR read",
    SvmExit.GDTR_READ: "GDTR read",
    SvmExit.LDTR_READ: "LDTR read",
    SvmExit.TR_READ: "TR read",
    SvmExit.IDTR_WRITE: "IDTR write",
    SvmExit.GDTR_WRITE: "GDTR write",
    SvmExit.LDTR_WRITE: "LDTR write",
    SvmExit.TR_WRITE: "TR write",
    SvmExit.SWINT: "INT n",
    SvmExit.TASK_SWITCH: "task switch",
    SvmExit.FERR_FREEZE: "FERR freeze",
    SvmExit.SHUTDOWN: "shutdown",
    SvmExit.MWAIT_COND: "MWAIT armed",
    SvmExit.EFER_WRITE_TRAP: "EFER write trap",
    SvmExit.INVLPGB_ILLEGAL: "INVLPGB with illegal operands",
    SvmExit.BUS_LOCK: "bus lock",
    SvmExit.IDLE_HLT: "idle HLT",
    SvmExit.AVIC_INCOMPLETE_IPI: "AVIC incomplete IPI",
    SvmExit.AVIC_UNACCELERATED_ACCESS: "AVIC unaccelerated access",
    SvmExit.NOT_VALIDATED: "page not validated",
    SvmExit.INVALID: "invalid state",
}
"""Exit codes in words, where these are not the member's name."""


def register_access(code: int) -> str | None:
    """Return ``CR3 write`` and so on for the exits of control and debug registers, None for others."""
    for base, label in (
        (0x00, "CR{} read"),
        (0x10, "CR{} write"),
        (0x20, "DR{} read"),
        (0x30, "DR{} write"),
        (0x90, "CR{} write trap"),
    ):
        if base <= code < base + 0x10:
            return label.format(code - base)
    return None


def event_words(code: int) -> str | None:
    """Return an exit code in words, None for an exception's and for one that is not known."""
    if (access := register_access(code)) is not None:
        return access
    if code in WORDS:
        return WORDS[code]
    return SvmExit(code).name if code in SvmExit._value2member_map_ and code != SvmExit.EXCP_BASE else None
