# SPDX-License-Identifier: Apache-2.0
"""MSRs that take some values and refuse others, exist with a CPUID feature only, or belong to one vCPU."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    Agent,
    Cpuid,
    Kvm,
    MakeVm,
    Msr,
    Vcpu,
    Vector,
    Vm,
    kvm_cpuid2,
)
from selftests.msr.conftest import MsrGuest, MsrGuestMaker

pytestmark = pytest.mark.requires("param:kvm.ignore_msrs=N")

GP0 = (Vector.GP, 0)
PAT_AT_RESET = 0x0007_0406_0007_0406
LME, LMA = 1 << 8, 1 << 10


@pytest.fixture
def bare_vcpu(kvm: Kvm, vm: Vm) -> Vcpu:
    """A vCPU of a bare VM, with all the CPUID features that KVM supports."""
    vcpu = vm.create_vcpu()
    vcpu.cpuid.set(kvm.get_supported_cpuid())
    return vcpu


def test_pat(msr_guest: MsrGuestMaker) -> None:
    """The PAT has its architectural value at reset, and takes any of the six memory types in each entry.

    Intel SDM, volume 3, "IA32_PAT MSR" and "Programming the PAT".
    """
    guest = msr_guest()
    assert guest.read(Msr.MSR_IA32_CR_PAT).value() == PAT_AT_RESET
    guest.write(Msr.MSR_IA32_CR_PAT, 0x0001_0405_0607_0600).done()
    assert guest.read(Msr.MSR_IA32_CR_PAT).value() == 0x0001_0405_0607_0600


@pytest.mark.parametrize("user_cpuid", [False, True], ids=["no-cpuid-user-dis", "cpuid-user-dis"])
def test_hwcr(kvm: Kvm, vm: Vm, user_cpuid: bool) -> None:
    """HWCR keeps the bits that KVM emulates; three others may be written and read as 0; the rest is refused.

    Kept are McStatusWrEn (18), TscFreqSel (24), and CpuidUserDis (35) with its CPUID feature; FFDIS (6),
    IgnneEm (8) and CacheFlushDis (3) are ignored, as guests are known to set them.  AMD PPR, MSRC001_0015;
    arch/x86/kvm/x86.c, kvm_set_msr_common().
    """
    cpuid = Cpuid.from_struct(kvm.supported_cpuid)
    if user_cpuid and not cpuid.has("gp_on_user_cpuid"):
        pytest.skip("no gp_on_user_cpuid in KVM_GET_SUPPORTED_CPUID")
    if not user_cpuid:
        cpuid.clear_feature("gp_on_user_cpuid")
    vcpu = vm.create_vcpu()
    vcpu.cpuid.set(cpuid.to_struct())
    kept, ignored = {18, 24} | ({35} if user_cpuid else set()), {3, 6, 8}
    wrong = []
    for bit in range(64):
        before = vcpu.msrs.get(Msr.MSR_K7_HWCR)
        taken = vcpu.msrs.takes(Msr.MSR_K7_HWCR, 1 << bit)
        value = vcpu.msrs.get(Msr.MSR_K7_HWCR)
        expected = 1 << bit if bit in kept else 0 if bit in ignored else before
        if (taken, value) != (bit in kept | ignored, expected):
            wrong.append(f"bit {bit}: taken {taken}, reads {value:#x}")
    assert not wrong, "\n".join(wrong)


def test_misc_enable(msr_guest: MsrGuestMaker) -> None:
    """MISC_ENABLE tells a new guest that there is neither BTS nor PEBS, which a write may not change.

    Nor does it change the read-only bit 7.  Intel SDM volume 4, IA32_MISC_ENABLE; arch/x86/kvm/x86.c,
    kvm_set_msr_common().
    """
    guest = msr_guest()
    value = guest.read(Msr.MSR_IA32_MISC_ENABLE).value()
    assert value & (1 << 11 | 1 << 12) == 1 << 11 | 1 << 12
    for bit in (11, 12):
        assert guest.write(Msr.MSR_IA32_MISC_ENABLE, value ^ 1 << bit).fault() == GP0
        assert guest.read(Msr.MSR_IA32_MISC_ENABLE).value() == value
    guest.write(Msr.MSR_IA32_MISC_ENABLE, value ^ 1 << 7).done()
    assert guest.read(Msr.MSR_IA32_MISC_ENABLE).value() == value


def _without_tsc_aux(table: kvm_cpuid2) -> kvm_cpuid2:
    cpuid = Cpuid.from_struct(table)
    for feature in ("rdtscp", "rdpid"):
        cpuid.clear_feature(feature)
    return cpuid.to_struct()


@pytest.mark.requires("cpuid:rdtscp")
def test_tsc_aux(msr_guest: MsrGuestMaker) -> None:
    """TSC_AUX keeps 32 bits; what is above is #GP(0) on Intel CPUs and dropped on AMD's.

    Intel SDM, volume 4, IA32_TSC_AUX; AMD APM, volume 3, RDTSCP.
    """
    guest = msr_guest()
    guest.write(Msr.MSR_TSC_AUX, 0x8765_4321).done()
    assert guest.read(Msr.MSR_TSC_AUX).value() == 0x8765_4321
    write = guest.write(Msr.MSR_TSC_AUX, 0x1_0000_0002)
    if Cpuid.from_struct(guest.vcpu.cpuid.get()).vendor == "GenuineIntel":
        assert write.fault() == GP0
        assert guest.read(Msr.MSR_TSC_AUX).value() == 0x8765_4321
    else:
        write.done()
        assert guest.read(Msr.MSR_TSC_AUX).value() == 2


@pytest.mark.requires("cpuid:rdtscp")
def test_tsc_aux_without_cpuid(make_vm: MakeVm) -> None:
    """Where the vCPU's CPUID has neither RDTSCP nor RDPID, there is no TSC_AUX: #GP(0).

    Intel SDM, volume 4, IA32_TSC_AUX.
    """
    guest = MsrGuest(make_vm(AGENT, cpuid=_without_tsc_aux))
    assert guest.read(Msr.MSR_TSC_AUX).fault() == GP0
    assert guest.write(Msr.MSR_TSC_AUX, 1).fault() == GP0


def test_tsc_aux_is_listed_with_its_feature(kvm: Kvm) -> None:
    """KVM_GET_MSR_INDEX_LIST has TSC_AUX just where KVM_GET_SUPPORTED_CPUID has RDTSCP or RDPID.

    Documentation/virt/kvm/api.rst, 4.3 KVM_GET_MSR_INDEX_LIST ("the guest msrs that are supported").
    """
    supported = Cpuid.from_struct(kvm.get_supported_cpuid())
    offered = supported.has("rdtscp") or supported.has("rdpid")
    assert (Msr.MSR_TSC_AUX in kvm.get_msr_index_list()) == offered


@pytest.mark.requires("cpuid:xsaves")
def test_xss(kvm: Kvm, bare_vcpu: Vcpu) -> None:
    """XSS is 0 at first, and takes the components that CPUID leaf 0xd, subleaf 1 offers, no others.

    Intel SDM, volume 1, "Processor Tracking of XSAVE-Managed State"; kvm_set_msr_common().
    """
    cpuid = Cpuid.from_struct(kvm.get_supported_cpuid())
    offered = cpuid.register(0xD, 1, "ecx") | cpuid.register(0xD, 1, "edx") << 32
    assert bare_vcpu.msrs.get(Msr.MSR_IA32_XSS) == 0
    taken = sum(1 << bit for bit in range(64) if bare_vcpu.msrs.takes(Msr.MSR_IA32_XSS, 1 << bit))
    assert taken & ~offered == 0
    assert not taken or int(Msr.MSR_IA32_XSS) in kvm.get_msr_index_list()


def test_long_mode_stays_enabled(msr_guest: MsrGuestMaker) -> None:
    """While paging is on, EFER.LME cannot be changed: #GP(0); and writing EFER.LMA has no effect.

    Intel SDM, volume 3, "Initializing IA-32e Mode"; AMD APM, volume 2, "Enabling and Activating Long Mode".
    """
    guest = msr_guest()
    efer = guest.read(Msr.MSR_EFER).value()
    assert efer & (LME | LMA) == LME | LMA
    assert guest.write(Msr.MSR_EFER, efer & ~LME).fault() == GP0
    guest.write(Msr.MSR_EFER, efer & ~LMA).done()
    assert guest.read(Msr.MSR_EFER).value() == efer


def test_each_vcpu_has_its_own(make_vm: MakeVm) -> None:
    """vCPUs that take turns on one thread keep their own values of MSRs that the CPU itself holds.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS (a vCPU ioctl).
    """
    agents = [Agent(vcpu) for vcpu in make_vm(AGENT, vcpus=3).vcpus]
    msrs = [
        Msr.MSR_LSTAR,
        Msr.MSR_STAR,
        Msr.MSR_KERNEL_GS_BASE,
        Msr.MSR_SYSCALL_MASK,
        Msr.MSR_IA32_SYSENTER_EIP,
    ]
    values = [[0x10_0000 * index + number for number in range(len(msrs))] for index in (1, 2, 3)]
    for agent, own in zip(agents, values, strict=True):
        for msr, value in zip(msrs, own, strict=True):
            assert agent.wrmsr(msr, value) is None
    for _ in range(2):
        assert [[agent.rdmsr(msr) for msr in msrs] for agent in agents] == values
