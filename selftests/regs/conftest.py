# SPDX-License-Identifier: Apache-2.0
"""What the tests of registers share: a vCPU in 64-bit mode without a guest program."""

from __future__ import annotations

import pytest

from kvmpy import KVM_CAP_SPLIT_IRQCHIP, Vcpu, Vm, segments


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    """The vCPU of a bare VM with local APICs, in 64-bit mode, with the CPUID that KVM supports."""
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    new_vcpu = vm.create_vcpu()
    new_vcpu.cpuid.set(vm.kvm.supported_cpuid)
    sregs = new_vcpu.regs.get_sregs()
    segments.long_mode_sregs(sregs, cr3=0x1000, gdt=0x2000, idt=0x3000, tss=0x4000)
    new_vcpu.regs.set_sregs(sregs)
    return new_vcpu
