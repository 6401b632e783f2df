# SPDX-License-Identifier: Apache-2.0
"""MSRs: names, numbers, and what the bits of those that KVM emulates mean."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

from kvmpy.x86 import apic
from kvmpy.x86.bits import EFER, RFLAGS, XCR0, bit_words
from kvmpy.x86.msr_numbers import Msr

__all__ = ["BITS", "Msr", "bit_names", "decode", "name", "number"]

X2APIC_BASE = 0x800
X2APIC_END = 0x900


class _Series(NamedTuple):
    """MSRs in a row, *step* apart: *length* of them from *first*; *pattern* takes the place in the row."""

    first: int
    step: int
    length: int
    pattern: str


_SERIES = (
    _Series(0x8C, 1, 4, "MSR_IA32_SGXLEPUBKEYHASH{}"),
    _Series(0xC1, 1, 8, "MSR_ARCH_PERFMON_PERFCTR{}"),
    _Series(0x186, 1, 8, "MSR_ARCH_PERFMON_EVENTSEL{}"),
    _Series(0x200, 2, 16, "MSR_MTRRphysBase{}"),
    _Series(0x201, 2, 16, "MSR_MTRRphysMask{}"),
    _Series(0x280, 1, 32, "MSR_IA32_MC{}_CTL2"),
    _Series(0x309, 1, 4, "MSR_ARCH_PERFMON_FIXED_CTR{}"),
    _Series(0x400, 4, 32, "MSR_IA32_MC{}_CTL"),
    _Series(0x401, 4, 32, "MSR_IA32_MC{}_STATUS"),
    _Series(0x402, 4, 32, "MSR_IA32_MC{}_ADDR"),
    _Series(0x403, 4, 32, "MSR_IA32_MC{}_MISC"),
    _Series(0x4C1, 1, 8, "MSR_IA32_PMC{}"),
    _Series(0x580, 2, 4, "MSR_IA32_RTIT_ADDR{}_A"),
    _Series(0x581, 2, 4, "MSR_IA32_RTIT_ADDR{}_B"),
    _Series(0x4000_0090, 1, 16, "HV_X64_MSR_SINT{}"),
    _Series(0x4000_00B0, 2, 4, "HV_X64_MSR_STIMER{}_CONFIG"),
    _Series(0x4000_00B1, 2, 4, "HV_X64_MSR_STIMER{}_COUNT"),
    _Series(0x4000_0100, 1, 5, "HV_X64_MSR_CRASH_P{}"),
    _Series(0xC001_0000, 1, 4, "MSR_K7_EVNTSEL{}"),
    _Series(0xC001_0004, 1, 4, "MSR_K7_PERFCTR{}"),
    _Series(0xC001_0200, 2, 16, "MSR_F15H_PERF_CTL{}"),
    _Series(0xC001_0201, 2, 16, "MSR_F15H_PERF_CTR{}"),
)


def _names() -> dict[int, str]:
    names = {int(member): key for key, member in Msr.__members__.items()}
    for series in _SERIES:
        for row in range(series.length):
            names.setdefault(series.first + row * series.step, series.pattern.format(row))
    for msr in range(X2APIC_BASE, X2APIC_END):
        register = apic.REGISTERS.get((msr - X2APIC_BASE) << 4)
        if register is not None:
            names.setdefault(msr, f"X2APIC_{register}")
    names.setdefault(apic.x2apic_msr(apic.SELF_IPI), "X2APIC_SELF_IPI")
    return names


_BY_NUMBER = _names()
_BY_NAME = {text: msr for msr, text in _BY_NUMBER.items()}


def name(msr: int) -> str:
    """Return the kernel's name of an MSR, or its number in hexadecimal where it has none."""
    return _BY_NUMBER.get(msr, f"{msr:#x}")


def number(text: str) -> int:
    """Return the number of an MSR by its name (``MSR_`` may be left out); KeyError with the closest names."""
    for candidate in (text, f"MSR_{text}", f"MSR_IA32_{text}"):
        if candidate in _BY_NAME:
            return _BY_NAME[candidate]
    close = difflib.get_close_matches(text, _BY_NAME, 3, 0.5)
    raise KeyError(f"no MSR is called {text!r}" + (f": did you mean {', '.join(close)}?" if close else ""))


BITS: dict[int, dict[int, str]] = {
    Msr.MSR_EFER: {int(bit).bit_length() - 1: key for key, bit in EFER.__members__.items()},
    Msr.MSR_IA32_XSS: {int(bit).bit_length() - 1: key for key, bit in XCR0.__members__.items()},
    Msr.MSR_IA32_XFD: {int(bit).bit_length() - 1: key for key, bit in XCR0.__members__.items()},
    Msr.MSR_IA32_FEAT_CTL: {
        0: "LOCKED",
        1: "VMX_INSIDE_SMX",
        2: "VMX_OUTSIDE_SMX",
        17: "SGX_LC",
        18: "SGX",
        20: "LMCE",
    },
    Msr.MSR_IA32_SPEC_CTRL: {0: "IBRS", 1: "STIBP", 2: "SSBD", 6: "RRSBA_DIS_S", 10: "BHI_DIS_S"},
    Msr.MSR_AMD64_VIRT_SPEC_CTRL: {2: "SSBD"},
    Msr.MSR_IA32_PRED_CMD: {0: "IBPB", 7: "SBPB"},
    Msr.MSR_IA32_FLUSH_CMD: {0: "L1D"},
    Msr.MSR_IA32_TSX_CTRL: {0: "RTM_DISABLE", 1: "CPUID_CLEAR"},
    Msr.MSR_IA32_DEBUGCTLMSR: {
        0: "LBR",
        1: "BTF",
        2: "BUS_LOCK_DETECT",
        6: "TR",
        7: "BTS",
        8: "BTINT",
        9: "BTS_OFF_OS",
        10: "BTS_OFF_USR",
        11: "FREEZE_LBRS_ON_PMI",
        12: "FREEZE_PERFMON_ON_PMI",
        14: "FREEZE_IN_SMM",
        15: "RTM_DEBUG",
    },
    Msr.MSR_IA32_MISC_ENABLE: {
        0: "FAST_STRING",
        3: "TM1",
        7: "EMON",
        11: "BTS_UNAVAIL",
        12: "PEBS_UNAVAIL",
        16: "ENHANCED_SPEEDSTEP",
        18: "MWAIT",
        22: "LIMIT_CPUID",
        23: "XTPR_DISABLE",
        34: "XD_DISABLE",
        38: "TURBO_DISABLE",
    },
    Msr.MSR_IA32_MCG_STATUS: {0: "RIPV", 1: "EIPV", 2: "MCIP", 3: "LMCE_S"},
    Msr.MSR_IA32_ARCH_CAPABILITIES: {
        0: "RDCL_NO",
        1: "IBRS_ALL",
        2: "RSBA",
        3: "SKIP_VMENTRY_L1DFLUSH",
        4: "SSB_NO",
        5: "MDS_NO",
        6: "PSCHANGE_MC_NO",
        7: "TSX_CTRL",
        8: "TAA_NO",
        13: "SBDR_SSDP_NO",
        14: "FBSDP_NO",
        15: "PSDP_NO",
        16: "MCU_ENUM",
        17: "FB_CLEAR",
        18: "FB_CLEAR_CTRL",
        19: "RRSBA",
        20: "BHI_NO",
        21: "XAPIC_DISABLE",
        24: "PBRSB_NO",
        25: "GDS_CTRL",
        26: "GDS_NO",
        27: "RFDS_NO",
        28: "RFDS_CLEAR",
        62: "ITS_NO",
    },
    Msr.MSR_K7_HWCR: {
        0: "SMMLOCK",
        3: "TLBCACHEDIS",
        6: "FFDIS",
        8: "IGNNEEM",
        18: "MCSTATUSWREN",
        24: "TSCFREQSEL",
        25: "CPB_DIS",
        30: "IRPERF_EN",
        35: "CPUID_USER_DIS",
    },
    Msr.MSR_AMD64_SYSCFG: {19: "MFDM", 23: "MEM_ENCRYPT", 24: "SNP_EN", 25: "SNP_VMPL_EN"},
    Msr.MSR_AMD64_DE_CFG: {1: "LFENCE_SERIALIZE"},
    Msr.MSR_VM_CR: {0: "DPD", 1: "R_INIT", 2: "DIS_A20M", 3: "SVM_LOCK", 4: "SVM_DIS"},
    Msr.MSR_AMD64_SEV: {
        0: "SEV",
        1: "SEV_ES",
        2: "SEV_SNP",
        3: "VTOM",
        4: "REFLECT_VC",
        5: "RESTRICTED_INJ",
        6: "ALT_INJ",
        7: "DEBUG_SWAP",
        8: "PREVENT_HOST_IBS",
        9: "BTB_ISOLATION",
        10: "VMPL_SSS",
        11: "SECURE_TSC",
        12: "VMGEXIT_PARAM",
        14: "IBS_VIRT",
        16: "VMSA_REG_PROT",
        17: "SMT_PROT",
        18: "SECURE_AVIC",
        23: "IBPB_ON_ENTRY",
    },
    Msr.MSR_KVM_ASYNC_PF_EN: {
        0: "ENABLED",
        1: "SEND_ALWAYS",
        2: "DELIVERY_AS_PF_VMEXIT",
        3: "DELIVERY_AS_INT",
    },
    Msr.MSR_KVM_ASYNC_PF_ACK: {0: "ACK"},
    Msr.MSR_KVM_STEAL_TIME: {0: "ENABLED"},
    Msr.MSR_KVM_PV_EOI_EN: {0: "ENABLED"},
    Msr.MSR_KVM_POLL_CONTROL: {0: "HOST_POLL"},
    Msr.MSR_KVM_MIGRATION_CONTROL: {0: "READY"},
    Msr.MSR_KVM_SYSTEM_TIME: {0: "ENABLED"},
    Msr.MSR_KVM_SYSTEM_TIME_NEW: {0: "ENABLED"},
    Msr.HV_X64_MSR_HYPERCALL: {0: "ENABLED", 1: "LOCKED"},
    Msr.HV_X64_MSR_REFERENCE_TSC: {0: "ENABLED"},
    Msr.HV_X64_MSR_VP_ASSIST_PAGE: {0: "ENABLED"},
}
"""Names of the bits of those MSRs that are made of flags, by MSR and bit."""

# Flags below an address of this alignment.
_ADDRESS_ALIGNMENT = {
    Msr.MSR_KVM_SYSTEM_TIME: 4,
    Msr.MSR_KVM_SYSTEM_TIME_NEW: 4,
    Msr.MSR_KVM_PV_EOI_EN: 4,
    Msr.MSR_KVM_ASYNC_PF_EN: 64,
    Msr.MSR_KVM_STEAL_TIME: 64,
    Msr.HV_X64_MSR_HYPERCALL: 4096,
    Msr.HV_X64_MSR_REFERENCE_TSC: 4096,
    Msr.HV_X64_MSR_VP_ASSIST_PAGE: 4096,
}

_MEMORY_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB", 7: "UC-"}
_GHCB_CODES = {
    0x001: "SEV information response",
    0x002: "SEV information request",
    0x004: "CPUID request",
    0x005: "CPUID response",
    0x006: "AP reset hold request",
    0x007: "AP reset hold response",
    0x010: "preferred GPA request",
    0x011: "preferred GPA response",
    0x012: "register GPA request",
    0x013: "register GPA response",
    0x014: "page state change request",
    0x015: "page state change response",
    0x016: "VMPL request",
    0x017: "VMPL response",
    0x080: "hypervisor features request",
    0x081: "hypervisor features response",
    0x100: "termination request",
}


def bit_names(msr: int) -> dict[int, str]:
    """Return the names of an MSR's flags by bit, empty where it is not made of flags."""
    return dict(BITS.get(msr, {}))


def _flags(msr: int, value: int) -> str:
    names = BITS[msr]
    words = []
    alignment = _ADDRESS_ALIGNMENT.get(Msr(msr))
    if alignment is not None:
        words.append(f"address {value & -alignment:#x}")
        value &= alignment - 1
    words += [names.get(bit, f"bit{bit}") for bit in range(value.bit_length()) if value >> bit & 1]
    return " ".join(words)


def _pat(value: int) -> str:
    return " ".join(
        f"PAT{n}={_MEMORY_TYPES.get(value >> 8 * n & 0xFF, f'reserved({value >> 8 * n & 0xFF:#x})')}"
        for n in range(8)
    )


def _apic_base(value: int) -> str:
    mode = {0: "disabled", 1: "invalid mode", 2: "xapic", 3: "x2apic"}[value >> 10 & 3]
    return f"address {value & 0x000F_FFFF_FFFF_F000:#x} {mode}" + (" bsp" if value >> 8 & 1 else "")


def _star(value: int) -> str:
    kernel, user = value >> 32 & 0xFFFF, value >> 48 & 0xFFFF
    sysret = f"cs {user + 16:#x} (32-bit {user:#x}) ss {user + 8:#x}"
    return f"SYSCALL cs {kernel:#x} ss {kernel + 8:#x}, SYSRET {sysret}"


def _ghcb(value: int) -> str:
    code = value & 0xFFF
    if code == 0:
        return f"GHCB at gpa {value:#x}"
    return f"{_GHCB_CODES.get(code, f'code {code:#x}')}, data {value >> 12:#x}"


def _syscall_mask(value: int) -> str:
    return " ".join(bit_words(RFLAGS, value))


_DECODERS: dict[int, Callable[[int], str]] = {
    Msr.MSR_IA32_CR_PAT: _pat,
    Msr.MSR_IA32_APICBASE: _apic_base,
    Msr.MSR_STAR: _star,
    Msr.MSR_AMD64_SEV_ES_GHCB: _ghcb,
    Msr.MSR_SYSCALL_MASK: _syscall_mask,
    Msr.MSR_KVM_ASYNC_PF_INT: lambda value: f"vector {value & 0xFF}",
}


def decode(msr: int, value: int) -> str:
    """Return what *value* means in *msr*, empty where kvmpy knows no meaning of its bits."""
    if msr in _DECODERS:
        return _DECODERS[msr](value)
    return _flags(msr, value) if msr in BITS else ""
