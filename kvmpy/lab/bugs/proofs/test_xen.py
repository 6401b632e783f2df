# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of Xen's interfaces."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    PAGE_SIZE,
    Agent,
    Vm,
    ioctls,
    kvm_msr_entry,
    kvm_msrs,
    kvm_xen_hvm_config,
    kvm_xen_vcpu_attr,
    refused,
)

INTERCEPT, MSR, EFER = 2, 0x4000_0000, 0xC000_0080
UPCALL, VECTOR, IRR = 8, 0x51, 0x200


@pytest.mark.protections("none")
@pytest.mark.bug(70)
def test_hypercall_page(agent: Agent) -> None:
    vm = agent.vm
    page = vm.alloc(PAGE_SIZE)
    agent.start()
    vm.ioctl(ioctls.KVM_XEN_HVM_CONFIG, kvm_xen_hvm_config(flags=INTERCEPT, msr=MSR))
    entry = kvm_msr_entry(index=MSR, data=int(vm.gva_to_gpa(page)))
    # Whether the value is taken is another matter.
    agent.vcpu.ioctl_raw(ioctls.KVM_SET_MSRS, kvm_msrs.of([entry]))
    assert vm.read(page, PAGE_SIZE) == bytes(PAGE_SIZE)


@pytest.mark.bug(71)
def test_real_msr(vm: Vm) -> None:
    with refused(errno.EINVAL):
        vm.ioctl(ioctls.KVM_XEN_HVM_CONFIG, kvm_xen_hvm_config(flags=INTERCEPT, msr=EFER))


@pytest.mark.protections("none")
@pytest.mark.bug(72)
def test_upcall(agent: Agent) -> None:
    vm, vcpu = agent.vm, agent.vcpu
    page = vm.alloc(PAGE_SIZE)
    vm.ioctl(ioctls.KVM_XEN_HVM_CONFIG, kvm_xen_hvm_config(flags=INTERCEPT, msr=MSR))
    agent.start()
    assert agent.wrmsr(0x1B, 0xFEE00D00) is None
    assert agent.wrmsr(0x80F, 0xFF) is None
    for kind, field, value in ((0, "gpa", int(vm.gva_to_gpa(page))), (UPCALL, "vector", VECTOR)):
        attribute = kvm_xen_vcpu_attr(type=kind)
        setattr(attribute.u, field, value)
        vcpu.ioctl(ioctls.KVM_XEN_VCPU_SET_ATTR, attribute)
    # evtchn_upcall_pending
    vm.write(page, b"\1")
    assert agent.wrmsr(0x80F, 0x1FF) is None
    assert vcpu.lapic.get_reg(IRR + 0x10 * (VECTOR >> 5)) & 1 << (VECTOR & 31)
