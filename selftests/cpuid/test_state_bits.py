# SPDX-License-Identifier: Apache-2.0
"""CPUID bits that follow the vCPU's state instead of the table."""

from __future__ import annotations

import pytest

from kvmpy import (
    CR4,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_X86_DISABLE_EXITS_HLT,
    KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT,
    XCR0,
    Cpuid,
    GuestVm,
    Kvm,
    Missing,
    Msr,
    kvm_xcrs,
)
from selftests.cpuid.conftest import CpuidGuest, CpuidGuestMaker

APICBASE_ENABLE = 1 << 11
MISC_ENABLE_MWAIT = 1 << 18
PV_FEATURES = 0x4000_0001
PV_UNHALT = 1 << 7


def host_sees(guest: CpuidGuest, feature: str) -> bool:
    """Tell whether KVM_GET_CPUID2 shows the feature."""
    return Cpuid.from_struct(guest.vcpu.cpuid.get()).has(feature)


def avx_state(kvm: Kvm) -> Missing | None:
    """Ask whether XCR0 may have AVX."""
    if Cpuid.from_struct(kvm.supported_cpuid).register(0xD, 0, "eax") & XCR0.AVX:
        return None
    return Missing("AVX state in leaf 0xD of KVM_GET_SUPPORTED_CPUID", "a CPU with AVX", ("xcr0:avx",))


CR4_FEATURES = pytest.mark.parametrize(
    ("feature", "bit"),
    [
        pytest.param("osxsave", CR4.OSXSAVE, marks=pytest.mark.requires("cpu:xsave")),
        pytest.param("ospke", CR4.PKE, marks=pytest.mark.requires("cpuid:pku")),
    ],
)


@CR4_FEATURES
def test_cr4(cpuid_guest: CpuidGuestMaker, feature: str, bit: int) -> None:
    """OSXSAVE and OSPKE show in the guest exactly while it has the bit of CR4 set, and in KVM_GET_CPUID2 too.

    Intel SDM volume 2, CPUID, leaf 1 ECX bit 27 and leaf 7 ECX bit 4; volume 3, 2.5 Control Registers.
    """
    guest = cpuid_guest()
    assert (guest.has(feature), host_sees(guest, feature)) == (False, False)
    guest.change_cr4(put=bit)
    assert (guest.has(feature), host_sees(guest, feature)) == (True, True)
    guest.change_cr4(clear=bit)
    assert (guest.has(feature), host_sees(guest, feature)) == (False, False)


@CR4_FEATURES
@pytest.mark.usefixtures("open_registers")
def test_cr4_by_host(cpuid_guest: CpuidGuestMaker, feature: str, bit: int) -> None:
    """CR4 that KVM_SET_SREGS sets and clears shows and hides the feature as the guest's own MOV does.

    Each table that KVM_GET_CPUID2 returned before is still accepted: it is the same but for the state.  Intel
    SDM volume 2, CPUID, leaf 1 ECX bit 27 and leaf 7 ECX bit 4; arch/x86/kvm/cpuid.c, kvm_set_cpuid().
    """
    guest = cpuid_guest()
    tables = []
    for shown in (False, True, False):
        sregs = guest.vcpu.regs.get_sregs()
        sregs.cr4 = sregs.cr4 & ~int(bit) | (int(bit) if shown else 0)
        guest.vcpu.regs.set_sregs(sregs)
        assert host_sees(guest, feature) is shown
        assert guest.has(feature) is shown
        tables.append(guest.vcpu.cpuid.get())
        for table in tables:
            guest.vcpu.cpuid.set(table)
            assert host_sees(guest, feature) is shown
            assert guest.has(feature) is shown
    guest.change_cr4(put=bit)
    assert (guest.has(feature), host_sees(guest, feature)) == (True, True)


@pytest.mark.requires("cpu:xsave")
@pytest.mark.parametrize("changes", [("put",), ("put", "clear")])
def test_the_same_table_again(cpuid_guest: CpuidGuestMaker, changes: tuple[str, ...]) -> None:
    """KVM_SET_CPUID2 takes the table that a vCPU has run with, whatever bits follow its state meanwhile.

    Documentation/virt/kvm/api.rst, 4.20 KVM_SET_CPUID (not another table after KVM_RUN). Nobody looks at the
    table between the change and the call: KVM may bring it up to date only then.
    """
    guest = cpuid_guest()
    table = guest.vcpu.cpuid.get()
    for change in changes:
        guest.change_cr4(**{change: CR4.OSXSAVE})
        guest.vcpu.cpuid.set(table)


def test_table_cannot_set_osxsave(cpuid_guest: CpuidGuestMaker) -> None:
    """A table with OSXSAVE set does not show it to a guest whose CR4.OSXSAVE is clear.

    Intel SDM volume 2, CPUID, leaf 1 ECX bit 27.
    """
    guest = cpuid_guest(lambda cpuid: cpuid.set_feature("osxsave"))
    assert not guest.has("osxsave")


def test_apic(cpuid_guest: CpuidGuestMaker) -> None:
    """The APIC feature goes while the guest has its local APIC disabled, and comes back with it.

    Intel SDM volume 3, 11.4.3 Enabling or Disabling the Local APIC.
    """
    guest = cpuid_guest()
    base = guest.rdmsr(Msr.MSR_IA32_APICBASE)
    assert base is not None
    assert (base & APICBASE_ENABLE, guest.has("apic")) == (APICBASE_ENABLE, True)
    guest.wrmsr(Msr.MSR_IA32_APICBASE, base & ~APICBASE_ENABLE)
    assert (guest.has("apic"), host_sees(guest, "apic")) == (False, False)
    guest.wrmsr(Msr.MSR_IA32_APICBASE, base)
    assert (guest.has("apic"), host_sees(guest, "apic")) == (True, True)


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires("KVM_CAP_XCRS", avx_state)
def test_xsave_size(cpuid_guest: CpuidGuestMaker) -> None:
    """Leaf 0xD EBX is the size of the XSAVE area for the features that XCR0 enables now.

    Intel SDM volume 2, CPUID, leaf 0xD subleaf 0 EBX; volume 1, 13.4 for the sizes.
    """
    guest = cpuid_guest()
    sizes = {}
    for value in (XCR0.X87, XCR0.X87 | XCR0.SSE | XCR0.AVX):
        xcrs = kvm_xcrs(nr_xcrs=1)
        xcrs.xcrs[0].value = value
        guest.vcpu.fpu.set_xcrs(xcrs)
        sizes[int(value)] = guest.cpuid(0xD)[1]
    assert sizes == {1: 576, 7: 832}


@pytest.mark.requires(f"KVM_CAP_DISABLE_QUIRKS2&{int(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT):#x}", "cpuid:xmm3")
@pytest.mark.parametrize("disable", [False, True], ids=["quirk", "no-quirk"])
def test_mwait(cpuid_guest: CpuidGuestMaker, disable: bool) -> None:
    """With the quirk disabled MONITOR/MWAIT shows as MISC_ENABLE says; otherwise as the table does.

    Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT.
    """

    def before_vcpus(vm: GuestVm) -> None:
        if disable:
            vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)

    guest = cpuid_guest(lambda cpuid: cpuid.clear_feature("mwait"), before_vcpus=before_vcpus)
    value = guest.rdmsr(Msr.MSR_IA32_MISC_ENABLE)
    assert value is not None
    guest.wrmsr(Msr.MSR_IA32_MISC_ENABLE, value | MISC_ENABLE_MWAIT)
    assert guest.has("mwait") is disable
    guest.wrmsr(Msr.MSR_IA32_MISC_ENABLE, value & ~MISC_ENABLE_MWAIT)
    assert not guest.has("mwait")


@pytest.mark.requires(f"KVM_CAP_X86_DISABLE_EXITS&{int(KVM_X86_DISABLE_EXITS_HLT):#x}")
@pytest.mark.parametrize("disable", [False, True], ids=["hlt-exits", "no-hlt-exits"])
def test_pv_unhalt(cpuid_guest: CpuidGuestMaker, disable: bool) -> None:
    """KVM takes KVM_FEATURE_PV_UNHALT out of the guest's CPUID when HLT exits are disabled, and only then.

    Documentation/virt/kvm/api.rst, 7.13 KVM_CAP_X86_DISABLE_EXITS ("Do not enable KVM_FEATURE_PV_UNHALT").
    """

    def before_vcpus(vm: GuestVm) -> None:
        if disable:
            vm.enable_cap(KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT)

    def change(cpuid: Cpuid) -> None:
        cpuid.ensure(PV_FEATURES).eax |= PV_UNHALT

    guest = cpuid_guest(change, before_vcpus=before_vcpus)
    assert bool(guest.cpuid(PV_FEATURES)[0] & PV_UNHALT) is not disable
