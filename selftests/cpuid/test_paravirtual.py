# SPDX-License-Identifier: Apache-2.0
"""KVM's own CPUID leaves."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from kvmpy import (
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_X86_DISABLE_EXITS_HLT,
    Cpuid,
    GuestVm,
    Kvm,
    Msr,
)
from kvmpy.uapi.constants import Hypercall, ParaFeature
from selftests.cpuid.conftest import CpuidGuestMaker

SIGNATURE, FEATURES = 0x4000_0000, 0x4000_0001
CLOCKSOURCE2 = 1 << ParaFeature.KVM_FEATURE_CLOCKSOURCE2
MSRS = {
    ParaFeature.KVM_FEATURE_CLOCKSOURCE: (Msr.MSR_KVM_WALL_CLOCK, Msr.MSR_KVM_SYSTEM_TIME),
    ParaFeature.KVM_FEATURE_CLOCKSOURCE2: (Msr.MSR_KVM_WALL_CLOCK_NEW, Msr.MSR_KVM_SYSTEM_TIME_NEW),
    ParaFeature.KVM_FEATURE_ASYNC_PF: (Msr.MSR_KVM_ASYNC_PF_EN,),
    ParaFeature.KVM_FEATURE_STEAL_TIME: (Msr.MSR_KVM_STEAL_TIME,),
    ParaFeature.KVM_FEATURE_PV_EOI: (Msr.MSR_KVM_PV_EOI_EN,),
    ParaFeature.KVM_FEATURE_POLL_CONTROL: (Msr.MSR_KVM_POLL_CONTROL,),
    ParaFeature.KVM_FEATURE_ASYNC_PF_INT: (Msr.MSR_KVM_ASYNC_PF_INT, Msr.MSR_KVM_ASYNC_PF_ACK),
}
HYPERCALLS = {
    Hypercall.KVM_HC_KICK_CPU: ParaFeature.KVM_FEATURE_PV_UNHALT,
    Hypercall.KVM_HC_SEND_IPI: ParaFeature.KVM_FEATURE_PV_SEND_IPI,
    Hypercall.KVM_HC_SCHED_YIELD: ParaFeature.KVM_FEATURE_PV_SCHED_YIELD,
}


def test_signature(cpuid_guest: CpuidGuestMaker) -> None:
    """With the supported CPUID the guest finds "KVMKVMKVM" at 0x40000000, with the highest leaf in EAX.

    Documentation/virt/kvm/x86/cpuid.rst, KVM_CPUID_SIGNATURE.
    """
    guest = cpuid_guest()
    eax, ebx, ecx, edx = guest.cpuid(SIGNATURE)
    assert b"".join(register.to_bytes(4, "little") for register in (ebx, ecx, edx)) == b"KVMKVMKVM\0\0\0"
    assert FEATURES <= eax <= 0x4000_00FF


def test_features(cpuid_guest: CpuidGuestMaker, kvm: Kvm) -> None:
    """The guest finds KVM's features at 0x40000001, among them kvmclock, and the hypervisor bit in leaf 1.

    Documentation/virt/kvm/x86/cpuid.rst, KVM_CPUID_FEATURES; kvmclock is what KVM always has.
    """
    guest = cpuid_guest()
    supported = Cpuid.from_struct(kvm.supported_cpuid).register(FEATURES, 0, "eax")
    assert supported & CLOCKSOURCE2
    assert guest.cpuid(FEATURES)[0] == supported
    assert guest.has("hypervisor")


@pytest.mark.usefixtures("open_registers")
def test_hidden(cpuid_guest: CpuidGuestMaker) -> None:
    """A guest whose table lacks KVM's leaves finds no signature, and may use KVM's MSRs all the same.

    Documentation/virt/kvm/x86/cpuid.rst ("userspace can mask-out"); api.rst, 6.80 ("Otherwise, a guest
    may use").
    """

    def change(cpuid: Cpuid) -> None:
        cpuid.remove(SIGNATURE)
        cpuid.remove(FEATURES)

    guest = cpuid_guest(change)
    _, ebx, ecx, edx = guest.cpuid(SIGNATURE)
    text = b"".join(register.to_bytes(4, "little") for register in (ebx, ecx, edx))
    assert text.rstrip(b"\0") != b"KVMKVMKVM"
    assert guest.rdmsr(Msr.MSR_KVM_SYSTEM_TIME_NEW) == 0


def offering(features: int) -> Callable[[Cpuid], None]:
    """Return what makes a table offer *features* of KVM's and no others."""

    def change(cpuid: Cpuid) -> None:
        cpuid.ensure(FEATURES).eax = features

    return change


@pytest.mark.requires("KVM_CAP_ENFORCE_PV_FEATURE_CPUID", "param:kvm.ignore_msrs=N")
@pytest.mark.parametrize("feature", MSRS)
def test_enforced(cpuid_guest: CpuidGuestMaker, kvm: Kvm, feature: ParaFeature) -> None:
    """With KVM_CAP_ENFORCE_PV_FEATURE_CPUID the MSRs of a feature work exactly when its CPUID bit is set.

    So it is with all other bits set and with none, for the first vCPU and not for the second, and only until
    the capability is taken back.  Documentation/virt/kvm/api.rst, 6.80 KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
    Documentation/virt/kvm/x86/msr.rst (the CPUID bit of each MSR).
    """
    supported = Cpuid.from_struct(kvm.supported_cpuid).register(FEATURES, 0, "eax")
    bit = 1 << feature
    if not supported & bit:
        pytest.skip(f"{feature.name} is not in KVM_GET_SUPPORTED_CPUID")
    for features in (supported & ~bit, 0, bit, supported):
        guest = cpuid_guest(offering(features), vcpus=2)
        guest.vcpu.enable_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
        there = features & bit != 0
        for index in MSRS[feature]:
            first, second = guest.agents
            value = first.rdmsr(index)
            assert isinstance(value, int) is there, (hex(features), hex(index), value)
            assert (first.wrmsr(index, 0) is None) is there, (hex(features), hex(index))
            assert isinstance(second.rdmsr(index), int)
        guest.vcpu.enable_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0)
        for index in MSRS[feature]:
            assert isinstance(guest.agents[0].rdmsr(index), int)


@pytest.mark.deadline(2)
@pytest.mark.requires("KVM_CAP_ENFORCE_PV_FEATURE_CPUID")
def test_hypercalls(cpuid_guest: CpuidGuestMaker, kvm: Kvm) -> None:
    """A hypercall whose feature the enforced CPUID lacks returns -KVM_ENOSYS; otherwise it does its work.

    Documentation/virt/kvm/x86/hypercalls.rst; Documentation/virt/kvm/api.rst, 6.80.
    """
    supported = Cpuid.from_struct(kvm.supported_cpuid).register(FEATURES, 0, "eax")
    for call, feature in HYPERCALLS.items():
        for features in (supported & ~(1 << feature), 1 << feature):
            guest = cpuid_guest(offering(features))
            guest.vcpu.enable_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
            # No vCPU has this APIC id, and an empty set gets no IPI.
            answer = guest.agents[0].hypercall(call, 0, 0x77)
            assert answer == (0 if features >> feature & 1 else -1000), (call.name, hex(features))
            guest.vcpu.enable_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0)
            assert guest.agents[0].hypercall(call, 0, 0x77) == 0, (call.name, hex(features))


@pytest.mark.requires(f"KVM_CAP_X86_DISABLE_EXITS&{int(KVM_X86_DISABLE_EXITS_HLT):#x}")
@pytest.mark.parametrize("signature", [b"KVMKVMKVM\0\0\0", b"BogusBogus\0\0"])
def test_features_stand_behind_the_signature(cpuid_guest: CpuidGuestMaker, signature: bytes) -> None:
    """KVM knows its leaf by the signature: elsewhere it leaves PV_UNHALT alone though HLT exits are off.

    Documentation/virt/kvm/x86/cpuid.rst, KVM_CPUID_SIGNATURE; arch/x86/kvm/cpuid.c,
    kvm_apply_cpuid_pv_features_quirk().
    """

    def change(cpuid: Cpuid) -> None:
        leaf = cpuid.ensure(SIGNATURE)
        leaf.ebx, leaf.ecx, leaf.edx = struct.unpack("<3I", signature)
        cpuid.ensure(FEATURES).eax |= 1 << ParaFeature.KVM_FEATURE_PV_UNHALT

    def before_vcpus(vm: GuestVm) -> None:
        vm.enable_cap(KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT)

    guest = cpuid_guest(change, before_vcpus=before_vcpus)
    bogus = not signature.startswith(b"KVM")
    assert guest.cpuid(FEATURES)[0] >> ParaFeature.KVM_FEATURE_PV_UNHALT & 1 == bogus
