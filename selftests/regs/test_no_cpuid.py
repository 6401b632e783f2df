# SPDX-License-Identifier: Apache-2.0
"""A vCPU that was never given a CPUID table has none of the features that CPUID tells of."""

from __future__ import annotations

import errno

from kvmpy import CR4, KvmError, Vm
from selftests.regs.control import CR4_ALWAYS, CR4_FEATURES


def answer(vm: Vm, bit: CR4) -> int:
    """Return the errno with which a new vCPU refuses a bit of CR4, 0 if it takes it."""
    with vm.create_vcpu(int(bit).bit_length()) as vcpu:
        sregs = vcpu.regs.get_sregs()
        sregs.cr4 |= int(bit)
        try:
            vcpu.regs.set_sregs(sregs)
        except KvmError as error:
            return int(error.errno or 0)
        return 0


def test_cr4_features(vm: Vm) -> None:
    """Without KVM_SET_CPUID2, bits of CR4 that need a CPUID feature are refused with EINVAL.

    arch/x86/kvm/x86.c, kvm_arch_vcpu_create(): what an empty table means is in force from the start.
    """
    assert {bit.name: answer(vm, bit) for bit in CR4_FEATURES} == {
        bit.name: errno.EINVAL for bit in CR4_FEATURES
    }


def test_cr4_of_every_cpu(vm: Vm) -> None:
    """The bits of CR4 that KVM gives to every vCPU are taken without KVM_SET_CPUID2.

    arch/x86/kvm/regs.h, __cr4_reserved_bits().
    """
    vcpu = vm.create_vcpu()
    sregs = vcpu.regs.get_sregs()
    sregs.cr4 = int(CR4_ALWAYS)
    vcpu.regs.set_sregs(sregs)
    assert vcpu.regs.get_sregs().cr4 == CR4_ALWAYS
