# SPDX-License-Identifier: Apache-2.0
"""What is chosen for a whole VM before it has vCPUs: refused afterwards, and nothing changes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

import pytest

from kvmpy import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_MAX_VCPU_ID,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X86_APIC_BUS_CYCLES_NS,
    KVM_CAP_X86_DISABLE_EXITS,
    Kvm,
    KvmError,
    Vm,
    VmType,
    ioctls,
    kvm_sev_init,
)


class Choice(NamedTuple):
    """A choice, the errno after a vCPU was created, and what it needs."""

    make: Callable[[Vm], object]
    error: int
    needs: str


def _cap(cap: int, value: int) -> Callable[[Vm], object]:
    return lambda vm: vm.enable_cap(cap, value)


def _ioctl(request: ioctls.Ioctl, value: int = 0) -> Callable[[Vm], object]:
    return lambda vm: vm.ioctl(request, value)


CHOICES = {
    "irqchip": Choice(_ioctl(ioctls.KVM_CREATE_IRQCHIP), errno.EINVAL, "KVM_CAP_IRQCHIP"),
    "split irqchip": Choice(_cap(KVM_CAP_SPLIT_IRQCHIP, 24), errno.EEXIST, "KVM_CAP_SPLIT_IRQCHIP"),
    "boot vCPU": Choice(_ioctl(ioctls.KVM_SET_BOOT_CPU_ID, 1), errno.EBUSY, "KVM_CAP_SET_BOOT_CPU_ID"),
    "highest id": Choice(_cap(KVM_CAP_MAX_VCPU_ID, 8), errno.EINVAL, "KVM_CAP_MAX_VCPU_ID"),
    "exits": Choice(_cap(KVM_CAP_X86_DISABLE_EXITS, 2), errno.EINVAL, "KVM_CAP_X86_DISABLE_EXITS"),
    "dirty ring": Choice(_cap(KVM_CAP_DIRTY_LOG_RING, 4096), errno.EINVAL, "KVM_CAP_DIRTY_LOG_RING"),
    "bus clock": Choice(
        _cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10), errno.EINVAL, "KVM_CAP_X86_APIC_BUS_CYCLES_NS"
    ),
}


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(choice, id=name.replace(" ", "-"), marks=pytest.mark.requires(choice.needs))
        for name, choice in CHOICES.items()
    ],
)
def test_too_late(kvm: Kvm, choice: Choice) -> None:
    """What a VM takes while it has no vCPU it refuses once it has one.

    Documentation/virt/kvm/api.rst: KVM_CREATE_IRQCHIP, KVM_SET_BOOT_CPU_ID, and section 7 for the
    capabilities.
    """
    with kvm.create_vm() as early:
        if choice.needs == "KVM_CAP_X86_APIC_BUS_CYCLES_NS":
            early.irq.create_split_chip()
        choice.make(early)
    with kvm.create_vm() as late:
        if choice.needs == "KVM_CAP_X86_APIC_BUS_CYCLES_NS":
            late.irq.create_split_chip()
        late.create_vcpu()
        with pytest.raises(KvmError) as caught:
            choice.make(late)
        assert caught.value.errno == choice.error
        late.create_vcpu(1)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(VmType.KVM_X86_SEV_VM, id="sev", marks=pytest.mark.requires("protection:sev")),
        pytest.param(VmType.KVM_X86_SEV_ES_VM, id="sev-es", marks=pytest.mark.requires("protection:sev-es")),
        pytest.param(VmType.KVM_X86_SNP_VM, id="snp", marks=pytest.mark.requires("protection:snp")),
    ],
)
def test_encryption_too_late(kvm: Kvm, kind: VmType) -> None:
    """KVM_SEV_INIT2 of a VM with a vCPU: EINVAL; without one it is taken.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst, KVM_SEV_INIT2.
    """
    with kvm.create_vm(int(kind)) as late:
        late.irq.create_split_chip()
        # A vCPU with a state of its own is created before that state can be encrypted.
        late.create_vcpu()
        assert late.sev.command_raw("INIT2", kvm_sev_init()).errno == errno.EINVAL
    with kvm.create_vm(int(kind)) as early:
        assert early.sev.command_raw("INIT2", kvm_sev_init()).errno == 0
