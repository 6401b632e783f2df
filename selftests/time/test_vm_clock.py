# SPDX-License-Identifier: Apache-2.0
"""KVM_GET_CLOCK and KVM_SET_CLOCK without a guest."""

from __future__ import annotations

import errno

import pytest

from kvmpy import KVM_CAP_ADJUST_CLOCK, Vm, kvm_clock_data, refused

pytestmark = pytest.mark.requires("KVM_CAP_ADJUST_CLOCK")

SECOND = 1_000_000_000


def test_starts_near_zero(vm: Vm) -> None:
    """A new VM's clock counts from about its creation, and goes forward.

    Documentation/virt/kvm/api.rst, 4.29 KVM_GET_CLOCK; arch/x86/kvm/x86.c, kvm_arch_init_vm().
    """
    first = vm.clock.get().clock
    second = vm.clock.get().clock
    assert 0 <= first <= second < 60 * SECOND


def test_flags_are_known(vm: Vm) -> None:
    """The flags of KVM_GET_CLOCK are among those that KVM_CAP_ADJUST_CLOCK names.

    Documentation/virt/kvm/api.rst, 4.29 KVM_GET_CLOCK.
    """
    vm.create_vcpu()
    assert vm.clock.get().flags & ~vm.check_extension(KVM_CAP_ADJUST_CLOCK) == 0


def test_set_and_get(vm: Vm) -> None:
    """KVM_GET_CLOCK goes on from what KVM_SET_CLOCK wrote, for vCPUs that come later too.

    Documentation/virt/kvm/api.rst, 4.30 KVM_SET_CLOCK.
    """
    vm.clock.set(kvm_clock_data(clock=1 << 45))
    vm.create_vcpu()
    assert 1 << 45 <= vm.clock.get().clock < (1 << 45) + 60 * SECOND


def test_result_can_be_set(vm: Vm) -> None:
    """What KVM_GET_CLOCK returned is accepted by KVM_SET_CLOCK as it is, all flags included.

    Documentation/virt/kvm/api.rst, 4.30 KVM_SET_CLOCK: other flags are accepted but ignored.
    """
    vm.create_vcpu()
    clock = vm.clock.get()
    vm.clock.set(clock)
    assert vm.clock.get().clock >= clock.clock


def test_unknown_flag(vm: Vm) -> None:
    """A flag that KVM_CAP_ADJUST_CLOCK does not name is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.30 KVM_SET_CLOCK.
    """
    with refused(errno.EINVAL):
        vm.clock.set(kvm_clock_data(clock=1, flags=1 << 31))
