# SPDX-License-Identifier: Apache-2.0
"""Flags and control registers, bits and words (Intel SDM volumes 1 and 3; AMD APM volume 2)."""

from __future__ import annotations

from enum import IntFlag


class RFLAGS(IntFlag):
    """RFLAGS; bit 1 is always set."""

    CF = 1 << 0
    FIXED = 1 << 1
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21


class CR0(IntFlag):
    """Control register 0."""

    PE = 1 << 0
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31


class CR4(IntFlag):
    """Control register 4."""

    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    VMXE = 1 << 13
    SMXE = 1 << 14
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22
    CET = 1 << 23
    PKS = 1 << 24
    UINTR = 1 << 25
    LASS = 1 << 27
    LAM_SUP = 1 << 28
    FRED = 1 << 32


class EFER(IntFlag):
    """MSR_EFER."""

    SCE = 1 << 0
    LME = 1 << 8
    LMA = 1 << 10
    NXE = 1 << 11
    SVME = 1 << 12
    LMSLE = 1 << 13
    FFXSR = 1 << 14
    TCE = 1 << 15
    AUTOIBRS = 1 << 21


class DR6(IntFlag):
    """Debug status; BLD and RTM are clear when their event happened."""

    B0 = 1 << 0
    B1 = 1 << 1
    B2 = 1 << 2
    B3 = 1 << 3
    BLD = 1 << 11
    BD = 1 << 13
    BS = 1 << 14
    BT = 1 << 15
    RTM = 1 << 16


class XCR0(IntFlag):
    """Extended control register 0: the state components that XSAVE manages."""

    X87 = 1 << 0
    SSE = 1 << 1
    AVX = 1 << 2
    BNDREGS = 1 << 3
    BNDCSR = 1 << 4
    OPMASK = 1 << 5
    ZMM_HI256 = 1 << 6
    HI16_ZMM = 1 << 7
    PT = 1 << 8
    PKRU = 1 << 9
    PASID = 1 << 10
    CET_U = 1 << 11
    CET_S = 1 << 12
    HDC = 1 << 13
    UINTR = 1 << 14
    LBR = 1 << 15
    HWP = 1 << 16
    TILECFG = 1 << 17
    TILEDATA = 1 << 18
    APX = 1 << 19


_DR6_FIXED = 0xFFFF_07F0  # reads as one
_DR7_FIXED = 1 << 10
_DR7_ACCESS = ("execute", "write", "i/o", "read/write")
_DR7_LENGTH = (1, 2, 8, 4)


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
