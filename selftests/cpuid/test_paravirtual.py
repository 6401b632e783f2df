# SPDX-License-Identifier: Apache-2.0
"""KVM's own CPUID leaves."""

from __future__ import annotations

import pytest

from kvmpy import KVM_CAP_ENFORCE_PV_FEATURE_CPUID, Cpuid, Kvm
from selftests.cpuid.conftest import CpuidGuestMaker

SIGNATURE, FEATURES = 0x4000_0000, 0x4000_0001
CLOCKSOURCE2 = 1 << 3
STEAL_TIME = 1 << 5
MSR_KVM_SYSTEM_TIME_NEW = 0x4B56_4D01
MSR_KVM_STEAL_TIME = 0x4B56_4D03


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
    assert guest.rdmsr(MSR_KVM_SYSTEM_TIME_NEW) == 0


@pytest.mark.requires("KVM_CAP_ENFORCE_PV_FEATURE_CPUID")
@pytest.mark.parametrize(
    "offered",
    [
        pytest.param(False, id="hidden", marks=pytest.mark.requires("param:kvm.ignore_msrs=N")),
        pytest.param(True, id="offered"),
    ],
)
def test_enforced(cpuid_guest: CpuidGuestMaker, offered: bool) -> None:
    """With KVM_CAP_ENFORCE_PV_FEATURE_CPUID the MSR of a feature works exactly when the CPUID leaf offers it.

    Documentation/virt/kvm/api.rst, 6.80 KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
    """

    def change(cpuid: Cpuid) -> None:
        leaf = cpuid.ensure(FEATURES)
        leaf.eax = leaf.eax & ~CLOCKSOURCE2 | (CLOCKSOURCE2 if offered else 0)

    guest = cpuid_guest(change)
    guest.vcpu.enable_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
    assert guest.rdmsr(MSR_KVM_SYSTEM_TIME_NEW) == (0 if offered else None)
    guest.vcpu.enable_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0)
    assert guest.rdmsr(MSR_KVM_SYSTEM_TIME_NEW) == 0
