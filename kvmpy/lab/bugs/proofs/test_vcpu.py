# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of VMs and vCPUs."""

from __future__ import annotations

import errno
import os

import pytest

from kvmpy import KVM_CAP_X86_DISABLE_EXITS, KVM_CAP_X86_USER_SPACE_MSR, Vm, ioctls

HLT = 2
UNKNOWN = 1 << 8


@pytest.mark.bug(130)
def test_vcpu_id(vm: Vm) -> None:
    fd, number = vm.ioctl_raw(ioctls.KVM_CREATE_VCPU, 1 << 32)
    if fd >= 0:
        os.close(fd)
    assert number == errno.EINVAL


@pytest.mark.bug(131)
def test_boot_cpu_id(vm: Vm) -> None:
    assert vm.ioctl_raw(ioctls.KVM_SET_BOOT_CPU_ID, 1 << 32)[1] == errno.EINVAL


@pytest.mark.bug(132)
def test_disable_exits(vm: Vm) -> None:
    vm.create_vcpu()
    with pytest.raises(OSError, match="EINVAL"):
        vm.enable_cap(KVM_CAP_X86_DISABLE_EXITS, HLT)


@pytest.mark.bug(133)
def test_exit_reasons(vm: Vm) -> None:
    with pytest.raises(OSError, match="EINVAL"):
        vm.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, UNKNOWN)
