# SPDX-License-Identifier: Apache-2.0
"""Which CPUID feature opens which bit of a control register."""

from __future__ import annotations

from kvmpy import CR4, EFER, XCR0, Cpuid

CR4_FEATURES = {
    CR4.UMIP: "umip",
    CR4.LA57: "la57",
    CR4.VMXE: "vmx",
    CR4.SMXE: "smx",
    CR4.FSGSBASE: "fsgsbase",
    CR4.PCIDE: "pcid",
    CR4.OSXSAVE: "xsave",
    CR4.SMEP: "smep",
    CR4.SMAP: "smap",
    CR4.PKE: "pku",
}
EFER_FEATURES = {EFER.NXE: "nx", EFER.SVME: "svm", EFER.FFXSR: "fxsr_opt", EFER.AUTOIBRS: "autoibrs"}
# Bits that KVM gives to every vCPU: arch/x86/kvm/regs.h, __cr4_reserved_bits().
CR4_ALWAYS = (
    CR4.VME | CR4.PVI | CR4.TSD | CR4.DE | CR4.PSE | CR4.PAE | CR4.MCE | CR4.PGE | CR4.PCE
    | CR4.OSFXSR | CR4.OSXMMEXCPT
)  # fmt: skip
_AVX512 = int(XCR0.OPMASK | XCR0.ZMM_HI256 | XCR0.HI16_ZMM)
_MPX = int(XCR0.BNDREGS | XCR0.BNDCSR)
_TILES = 3 << 17


def xcr0_of(cpuid: Cpuid) -> int:
    """Return the bits of XCR0 that leaf 0xD offers."""
    return cpuid.register(0xD, 0, "eax") | cpuid.register(0xD, 0, "edx") << 32


def xcr0_holds_together(value: int) -> bool:
    """Tell whether the features in a value of XCR0 have what they need (Intel SDM volume 1, 13.3)."""
    return (
        value & XCR0.X87 != 0
        and (value & XCR0.AVX == 0 or value & XCR0.SSE != 0)
        and value & _MPX in (0, _MPX)
        and (value & _AVX512 == 0 or (value & _AVX512 == _AVX512 and value & XCR0.AVX != 0))
        and value & _TILES in (0, _TILES)
    )
