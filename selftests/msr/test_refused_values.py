# SPDX-License-Identifier: Apache-2.0
"""MSRs as user space writes them: what is refused changes nothing, what is taken is there, and goes again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmpy import Kvm, MsrError, Vcpu, Vm, ioctls, kvm_msr_entry, kvm_msrs

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP", "param:kvm.ignore_msrs=N")

# Time goes on meanwhile; a write of it means something else than that it is kept.
CLOCKS = {0x10, 0x3B, 0x6E0, 0x4000_0020, 0x4000_0021}
# Writes that are commands, or go to memory: KVM's and Hyper-V's clock pages, the reset, hypercall pages.
COMMANDS = {
    0x11,
    0x12,
    0x4B56_4D00,
    0x4B56_4D01,
    0x4B56_4D06,
    0x4000_0001,
    0x4000_0003,
    0x4000_0105,
}
NOWHERE = 1 << 45


def write(vcpu: Vcpu, index: int, value: int) -> bool:
    """Tell whether KVM_SET_MSRS takes the value."""
    return vcpu.ioctl(ioctls.KVM_SET_MSRS, kvm_msrs.of([kvm_msr_entry(index=index, data=value)])) == 1


@pytest.fixture
def vcpu(kvm: Kvm, vm: Vm) -> Vcpu:
    """A vCPU with all that KVM supports."""
    vm.irq.create_split_chip()
    made = vm.create_vcpu()
    made.cpuid.set(kvm.supported_cpuid)
    return made


def values(before: int) -> Iterator[int]:
    """Yield values near the one that is there, and some that few MSRs take."""
    for bit in range(64):
        yield before ^ 1 << bit
    for enable in (1, 9, 0xB, 3):
        yield NOWHERE | enable
    yield from ((1 << 64) - 1, 0)


def test_a_refused_value_changes_nothing(kvm: Kvm, vcpu: Vcpu) -> None:
    """An MSR whose new value KVM_SET_MSRS refuses reads as before, whatever the value's bits.

    Documentation/virt/kvm/api.rst, 4.19 KVM_SET_MSRS (an invalid MSR or value ends it before that entry).
    """
    wrong = []
    for index in sorted(set(kvm.get_msr_index_list()) - CLOCKS - COMMANDS):
        try:
            before = vcpu.msrs.get(index)
        except MsrError:
            continue
        for value in values(before):
            if write(vcpu, index, value):
                write(vcpu, index, before)
                before = vcpu.msrs.get(index)
            elif (after := vcpu.msrs.get(index)) != before:
                wrong.append(f"MSR {index:#x}: {value:#x} was refused, and changed {before:#x} to {after:#x}")
                break
    assert wrong == []


@pytest.mark.parametrize("index", [0xC001_0015, 0x4B56_4D02, 0x4B56_4D03, 0x4B56_4D04, 0x1A0, 0x277])
def test_bits_that_were_set_can_be_cleared(vcpu: Vcpu, index: int) -> None:
    """A bit that KVM_SET_MSRS takes is there, and gone when the old value is written back.

    Documentation/virt/kvm/api.rst, 4.19 KVM_SET_MSRS.
    """
    before = vcpu.msrs.get(index)
    for bit in range(64):
        if write(vcpu, index, before ^ 1 << bit):
            assert write(vcpu, index, before)
            assert vcpu.msrs.get(index) == before, f"bit {bit} of MSR {index:#x}"
