# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's CPUID leaves: what KVM can offer, to a VM and to a vCPU, and what a guest sees of it."""

from __future__ import annotations

import errno

import pytest

from kvmpy import AGENT, KVM_CAP_MAX_VCPUS, Agent, Cpuid, Kvm, MakeVm, Vm, ioctls, kvm_cpuid2, refused
from kvmpy.core.fd import KvmFd
from kvmpy.x86.hyperv import SIGNATURE, HvLeaf

from .conftest import leaves

pytestmark = pytest.mark.requires("KVM_CAP_HYPERV_CPUID", "KVM_CAP_SYS_HYPERV_CPUID")

OF_THE_APIC = {"HV_STIMER_DIRECT_MODE_AVAILABLE", "HV_X64_CLUSTER_IPI_RECOMMENDED"}


def asked(kvm: Kvm, vm: Vm) -> dict[str, KvmFd]:
    """Return both kinds of file descriptor that can be asked."""
    return {"system": kvm, "vcpu": vm.create_vcpu()}


def test_leaves(kvm: Kvm, vm: Vm) -> None:
    """KVM offers ten leaves, without an index, and names the interface and the last leaf in them.

    Documentation/virt/kvm/api.rst, 4.118 KVM_GET_SUPPORTED_HV_CPUID.
    """
    for kind, target in asked(kvm, vm).items():
        table = kvm_cpuid2.with_entries(64)
        target.ioctl(ioctls.KVM_GET_SUPPORTED_HV_CPUID, table)
        entries = table.entries_list()
        assert sorted(entry.function for entry in entries) == sorted(HvLeaf), kind
        assert {(entry.index, entry.flags, *entry.padding) for entry in entries} == {(0, 0, 0, 0, 0)}, kind
        cpuid = Cpuid.from_struct(table)
        assert cpuid.register(HvLeaf.HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS, 0, "eax") == max(HvLeaf)
        assert cpuid.hypervisor == "Linux KVM Hv"
        assert cpuid.register(HvLeaf.HYPERV_CPUID_INTERFACE, 0, "eax") == SIGNATURE
        assert cpuid.register(HvLeaf.HYPERV_CPUID_SYNDBG_INTERFACE, 0, "eax") == int.from_bytes(
            b"VS#1", "little"
        )
        # Zero would be "no limit known"; the guest may not be told of fewer vCPUs than it can have.
        assert cpuid.register(HvLeaf.HYPERV_CPUID_IMPLEMENT_LIMITS, 0, "eax") >= kvm.check_extension(
            KVM_CAP_MAX_VCPUS
        )
        assert cpuid.register(HvLeaf.HYPERV_CPUID_ENLIGHTMENT_INFO, 0, "ebx") == 0xFFF


def test_too_small(kvm: Kvm, vm: Vm) -> None:
    """With room for fewer than ten leaves the answer is E2BIG and nothing is written; with more, nent is ten.

    api.rst, 4.118.
    """
    for target in asked(kvm, vm).values():
        for room in range(10):
            table = kvm_cpuid2.with_entries(room)
            with refused(errno.E2BIG, about=f"room for {room}"):
                target.ioctl(ioctls.KVM_GET_SUPPORTED_HV_CPUID, table)
            assert table.nent == room
            assert table.to_bytes()[8:] == bytes(room * 40)
        for room in (10, 11, 200):
            table = kvm_cpuid2.with_entries(room)
            target.ioctl(ioctls.KVM_GET_SUPPORTED_HV_CPUID, table)
            assert table.nent == 10


def test_without_apic(kvm: Kvm, vm: Vm) -> None:
    """A vCPU without an APIC in the kernel lacks what needs one, and nothing else.

    api.rst, 4.118: the vCPU's ioctl tells some features only where other things are enabled.
    """
    system = Cpuid.from_struct(kvm.get_supported_hv_cpuid())
    bare = Cpuid.from_struct(vm.create_vcpu().cpuid.get_supported_hv())
    assert system.features - bare.features == OF_THE_APIC
    assert bare.features <= system.features
    with kvm.create_vm() as other:
        other.irq.create_split_chip()
        with_apic = Cpuid.from_struct(other.create_vcpu().cpuid.get_supported_hv())
    assert with_apic.features == system.features


@pytest.mark.protections("none", "cbit")
def test_guest_sees_them(make_vm: MakeVm, kvm: Kvm) -> None:
    """Given to a vCPU, the leaves are what its CPUID returns.

    api.rst, 4.118: user space passes what it wants of them to KVM_SET_CPUID2.
    """
    offered = leaves(kvm)

    def hyperv(table: kvm_cpuid2) -> kvm_cpuid2:
        cpuid = Cpuid.from_struct(table)
        cpuid.set_hypervisor(offered)
        return cpuid.to_struct()

    agent = Agent(make_vm(AGENT, cpuid=hyperv).vcpus[0])
    assert {e.function: agent.cpuid(e.function) for e in offered} == {
        e.function: e.registers for e in offered
    }
