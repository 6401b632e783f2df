# SPDX-License-Identifier: Apache-2.0
"""Numbers that are wider than what KVM keeps of them: refused, never cut off."""

from __future__ import annotations

import errno
import os

import pytest

from kvmpy import (
    KVM_CAP_MAX_VCPU_ID,
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_CAP_X86_USER_SPACE_MSR,
    KvmError,
    Vm,
    ioctls,
)

WIDE = (1 << 32, 1 << 32 | 1, 1 << 63)


@pytest.mark.parametrize("value", WIDE)
def test_vcpu_ids(vm: Vm, value: int) -> None:
    """KVM_CREATE_VCPU takes no id above KVM_CAP_MAX_VCPU_ID, also one of more than 32 bits.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU.
    """
    assert vm.check_extension(KVM_CAP_MAX_VCPU_ID) < value
    fd, number = vm.ioctl_raw(ioctls.KVM_CREATE_VCPU, value)
    if fd >= 0:
        os.close(fd)
    assert number == errno.EINVAL, f"KVM_CREATE_VCPU of {value:#x}: errno {number}, expected EINVAL"


@pytest.mark.parametrize("value", WIDE)
def test_boot_processor(vm: Vm, value: int) -> None:
    """KVM_SET_BOOT_CPU_ID takes none either.

    Documentation/virt/kvm/api.rst, 4.41 KVM_SET_BOOT_CPU_ID.
    """
    number = vm.ioctl_raw(ioctls.KVM_SET_BOOT_CPU_ID, value)[1]
    assert number == errno.EINVAL, f"KVM_SET_BOOT_CPU_ID of {value:#x}: errno {number}, expected EINVAL"


@pytest.mark.parametrize("cap", [KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_X86_DISABLE_EXITS], ids=["msr", "exits"])
def test_flags_of_capabilities(vm: Vm, cap: int) -> None:
    """A capability that takes flags takes those alone that KVM_CHECK_EXTENSION shows, each and all of them.

    Documentation/virt/kvm/api.rst, 7.23 KVM_CAP_X86_USER_SPACE_MSR and 7.13 KVM_CAP_X86_DISABLE_EXITS.
    """
    known = vm.check_extension(cap) if cap == KVM_CAP_X86_DISABLE_EXITS else 0b111
    for bit in range(64):
        if not known >> bit & 1:
            number = 0
            try:
                vm.enable_cap(cap, 1 << bit)
            except KvmError as error:
                number = error.errno or 0
            assert number == errno.EINVAL, f"bit {bit}: errno {number}, expected EINVAL"


@pytest.mark.requires("KVM_CAP_X86_DISABLE_EXITS")
def test_exits_are_chosen_before_vcpus(vm: Vm) -> None:
    """KVM_CAP_X86_DISABLE_EXITS is refused with EINVAL when there is a vCPU.

    Documentation/virt/kvm/api.rst, 7.13 KVM_CAP_X86_DISABLE_EXITS.
    """
    known = vm.check_extension(KVM_CAP_X86_DISABLE_EXITS)
    vm.create_vcpu()
    with pytest.raises(KvmError) as caught:
        vm.enable_cap(KVM_CAP_X86_DISABLE_EXITS, known)
    assert caught.value.errno == errno.EINVAL
