# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of TSC and kvmclock."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    L1,
    L2,
    PAGE_SIZE,
    Agent,
    IoExit,
    MakeVm,
    Vm,
    ioctls,
    kvm_xen_hvm_config,
    kvm_xen_vcpu_attr,
)

SYSTEM_TIME_NEW = 0x4B56_4D01
VCPU_TIME_INFO, STOPPED = 1, 2
FLAGS = 29
TSC = 0x10


@pytest.mark.protections("none")
@pytest.mark.bug(61)
def test_two_clocks(agent: Agent) -> None:
    vm, vcpu = agent.vm, agent.vcpu
    kvmclock, xen = (vm.alloc(PAGE_SIZE) for _ in range(2))
    vm.ioctl(ioctls.KVM_XEN_HVM_CONFIG, kvm_xen_hvm_config(flags=2, msr=0x4000_0000))
    agent.start()
    attribute = kvm_xen_vcpu_attr(type=VCPU_TIME_INFO)
    attribute.u.gpa = int(vm.gva_to_gpa(xen))
    vcpu.ioctl(ioctls.KVM_XEN_VCPU_SET_ATTR, attribute)
    assert agent.wrmsr(SYSTEM_TIME_NEW, int(vm.gva_to_gpa(kvmclock)) | 1) is None
    assert agent.read(kvmclock, 4)
    vcpu.clock.kvmclock_ctrl()
    flags = [agent.read(page + FLAGS, 1) for page in (kvmclock, xen)]
    assert [isinstance(flag, int) and flag & STOPPED for flag in flags] == [STOPPED, 0]


@pytest.mark.bug(62)
def test_frequency(vm: Vm) -> None:
    vm.create_vcpu()
    assert vm.ioctl_raw(ioctls.KVM_SET_TSC_KHZ, 1_000_000)[1] == errno.EINVAL


@pytest.mark.bug(63)
@pytest.mark.protections("none")
def test_nested_counter(make_vm: MakeVm) -> None:
    vcpu = make_vm(L1).vcpus[0]
    l2 = L2(vcpu)
    l2.reset()
    before = vcpu.msrs.get(TSC)
    l2.vmcb["tsc_offset"] = 1 << 50
    # out %al, $0x42
    l2.load(b"\xe6\x42")
    l2.begin()
    vcpu.expect(IoExit)
    assert 0 < vcpu.msrs.get(TSC) - before < 1 << 49
