# SPDX-License-Identifier: Apache-2.0
"""MSR names, numbers and bits."""

from __future__ import annotations

import pytest

from kvmpy.x86 import msrs
from kvmpy.x86.msrs import Msr


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0x10, "MSR_IA32_TSC"),
        (0x1B, "MSR_IA32_APICBASE"),
        (0xC3, "MSR_ARCH_PERFMON_PERFCTR2"),
        (0x188, "MSR_ARCH_PERFMON_EVENTSEL2"),
        (0x200, "MSR_MTRRphysBase0"),
        (0x20F, "MSR_MTRRphysMask7"),
        (0x277, "MSR_IA32_CR_PAT"),
        (0x400, "MSR_IA32_MC0_CTL"),
        (0x40D, "MSR_IA32_MC3_STATUS"),
        (0x6E0, "MSR_IA32_TSC_DEADLINE"),
        (0x802, "X2APIC_ID"),
        (0x830, "X2APIC_ICR"),
        (0x83F, "X2APIC_SELF_IPI"),
        (0x4000_009F, "HV_X64_MSR_SINT15"),
        (0x4B56_4D01, "MSR_KVM_SYSTEM_TIME_NEW"),
        (0x4B56_4D08, "MSR_KVM_MIGRATION_CONTROL"),
        (0xC000_0080, "MSR_EFER"),
        (0xC000_0102, "MSR_KERNEL_GS_BASE"),
        (0xC001_0130, "MSR_AMD64_SEV_ES_GHCB"),
        (0xC001_0131, "MSR_AMD64_SEV"),
        (0xC001_0205, "MSR_F15H_PERF_CTR2"),
    ],
)
def test_names_and_numbers(number: int, name: str) -> None:
    assert msrs.name(number) == name
    assert msrs.number(name) == number


def test_every_member_has_its_own_number() -> None:
    numbers = [int(member) for member in Msr.__members__.values()]
    assert len(set(numbers)) == len(Msr.__members__)
    for name, member in Msr.__members__.items():
        assert msrs.name(member) == name


def test_names_without_prefix() -> None:
    assert msrs.number("EFER") == 0xC000_0080
    assert msrs.number("TSC") == 0x10


def test_unknown_names_and_numbers() -> None:
    assert msrs.name(0xDEAD_BEEF) == "0xdeadbeef"
    with pytest.raises(KeyError, match="MSR_KVM_STEAL_TIME"):
        msrs.number("MSR_KVM_STEAL_TIM")


@pytest.mark.parametrize(
    ("msr", "value", "text"),
    [
        (Msr.MSR_EFER, 0x1D01, "SCE LME LMA NXE SVME"),
        (Msr.MSR_EFER, 1 << 40, "bit40"),
        (Msr.MSR_IA32_APICBASE, 0xFEE0_0D00, "address 0xfee00000 x2apic bsp"),
        (Msr.MSR_IA32_APICBASE, 0xFEE0_0800, "address 0xfee00000 xapic"),
        (
            Msr.MSR_IA32_CR_PAT,
            0x0007_0406_0007_0406,
            "PAT0=WB PAT1=WT PAT2=UC- PAT3=UC PAT4=WB PAT5=WT PAT6=UC- PAT7=UC",
        ),
        (Msr.MSR_STAR, 0x001B_0008_0000_0000, "SYSCALL cs 0x8 ss 0x10, SYSRET cs 0x2b (32-bit 0x1b) ss 0x23"),
        (Msr.MSR_SYSCALL_MASK, 0x4_7700, "TF IF DF bit12 bit13 NT AC"),
        (Msr.MSR_AMD64_SEV, 0x807, "SEV SEV_ES SEV_SNP SECURE_TSC"),
        (Msr.MSR_AMD64_SEV_ES_GHCB, 0x1234_5000, "GHCB at gpa 0x12345000"),
        (Msr.MSR_AMD64_SEV_ES_GHCB, 0x1234_5014, "page state change request, data 0x12345"),
        (Msr.MSR_AMD64_SEV_ES_GHCB, 0xFFF, "code 0xfff, data 0x0"),
        (Msr.MSR_KVM_SYSTEM_TIME_NEW, 0x9005, "address 0x9004 ENABLED"),
        (Msr.MSR_KVM_STEAL_TIME, 0x90C1, "address 0x90c0 ENABLED"),
        (Msr.MSR_KVM_ASYNC_PF_EN, 0x9049, "address 0x9040 ENABLED DELIVERY_AS_INT"),
        (Msr.MSR_KVM_ASYNC_PF_INT, 0xEC, "vector 236"),
        (Msr.HV_X64_MSR_HYPERCALL, 0x5003, "address 0x5000 ENABLED LOCKED"),
        (Msr.MSR_IA32_FEAT_CTL, 0x5, "LOCKED VMX_OUTSIDE_SMX"),
        (Msr.MSR_IA32_TSC, 0x1234, ""),
        (0xDEAD, 1, ""),
    ],
)
def test_meaning_of_values(msr: int, value: int, text: str) -> None:
    assert msrs.decode(msr, value) == text


def test_bit_names() -> None:
    assert msrs.bit_names(Msr.MSR_IA32_SPEC_CTRL) == {
        0: "IBRS",
        1: "STIBP",
        2: "SSBD",
        6: "RRSBA_DIS_S",
        10: "BHI_DIS_S",
    }
    assert msrs.bit_names(Msr.MSR_IA32_TSC) == {}
