# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of VMs and vCPUs."""

from __future__ import annotations

import errno
import os

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MP_STATE_INIT_RECEIVED,
    Agent,
    MakeVm,
    Vcpu,
    Vm,
    ioctls,
    kvm_debugregs,
)

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


INIT = 0x4500
CACHE_BITS = 3 << 29
PAT = 0x277


def after_init(make_vm: MakeVm) -> Vcpu:
    """Return a vCPU of which another one has made an INIT; its PAT was not the first one before."""
    vm = make_vm(AGENT, vcpus=2)
    agent, target = Agent(vm.vcpus[0]), vm.vcpus[1]
    agent.start()
    target.msrs.set(PAT, 0x0606_0606_0606_0606)
    assert agent.wrmsr(0x1B, 0xFEE00D00) is None
    assert agent.wrmsr(0x80F, 0x1FF) is None
    assert agent.wrmsr(0x830, 1 << 32 | INIT) is None
    # Asking for the state is when KVM takes the INIT.
    assert target.get_mp_state() == KVM_MP_STATE_INIT_RECEIVED
    return target


@pytest.mark.bug(134)
@pytest.mark.protections("none")
def test_cache_bits(make_vm: MakeVm) -> None:
    assert not after_init(make_vm).regs.get_sregs().cr0 & CACHE_BITS


@pytest.mark.bug(135)
@pytest.mark.protections("none")
def test_pat(make_vm: MakeVm) -> None:
    assert after_init(make_vm).msrs.get(PAT) == 0x0606_0606_0606_0606


@pytest.mark.bug(136)
def test_reserved(vm: Vm) -> None:
    registers = vm.create_vcpu().ioctl_raw
    arg = kvm_debugregs()
    assert registers(ioctls.KVM_GET_DEBUGREGS, arg) == (0, 0)
    assert not any(arg.reserved)
