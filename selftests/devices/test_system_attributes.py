# SPDX-License-Identifier: Apache-2.0
"""Attributes of /dev/kvm itself and of vCPUs (api.rst 4.80 KVM_GET_DEVICE_ATTR, 4.81 KVM_HAS_DEVICE_ATTR)."""

from __future__ import annotations

import errno

import pytest

from kvmpy import Kvm, SystemAttr, SystemGroup, VcpuGroup, VcpuTscAttr, Vm, ioctls, kvm_device_attr, refused

SYSTEM = pytest.mark.requires("KVM_CAP_SYS_ATTRIBUTES")
VCPU = pytest.mark.requires("KVM_CAP_VCPU_ATTRIBUTES")


@SYSTEM
def test_guest_xsave_components(kvm: Kvm) -> None:
    """KVM_X86_XCOMP_GUEST_SUPP names the XSAVE components of guests, among them all of the supported CPUID.

    arch/x86/kvm/x86.c, __kvm_x86_dev_get_attr(): it reports what KVM supports in XCR0, with the components
    that a VMM needs a permission for, which CPUID leaf 0xD leaves out.
    """
    offered = kvm.attrs.get_int(SystemGroup.KVM_X86_GRP_SYSTEM, SystemAttr.KVM_X86_XCOMP_GUEST_SUPP)
    leaf = [e for e in kvm.get_supported_cpuid().entries_list() if e.function == 0xD and e.index == 0]
    in_cpuid = leaf[0].eax | leaf[0].edx << 32 if leaf else 0
    assert in_cpuid & ~offered == 0
    assert offered & 1


@SYSTEM
@pytest.mark.parametrize(("group", "attr"), [(0, 99), (99, 0)], ids=["attribute", "group"])
def test_unknown_system_attributes(kvm: Kvm, group: int, attr: int) -> None:
    """An attribute that /dev/kvm lacks fails with ENXIO, to be read as well as to be tested for.

    api.rst 4.80 and 4.81.
    """
    assert not kvm.attrs.has(group, attr)
    with refused(errno.ENXIO):
        kvm.attrs.get(group, attr)


@SYSTEM
def test_system_attributes_cannot_be_set(kvm: Kvm) -> None:
    """/dev/kvm does not take KVM_SET_DEVICE_ATTR at all.

    api.rst 4.80 KVM_SET_DEVICE_ATTR: no set for the system device; EINVAL is /dev/kvm's answer to ioctls that
    it lacks.
    """
    with refused(errno.EINVAL):
        kvm.attrs.set(SystemGroup.KVM_X86_GRP_SYSTEM, SystemAttr.KVM_X86_XCOMP_GUEST_SUPP, 1)


@SYSTEM
def test_a_system_attribute_to_nowhere(kvm: Kvm) -> None:
    """Reading an attribute to an address that cannot be written fails with EFAULT.

    api.rst 4.80 KVM_GET_DEVICE_ATTR: addr is the address of the data.
    """
    arg = kvm_device_attr(addr=8)
    with refused(errno.EFAULT):
        kvm.ioctl(ioctls.KVM_GET_DEVICE_ATTR, arg)


@VCPU
def test_vcpus_have_a_tsc_offset(vm: Vm) -> None:
    """A vCPU has the attribute KVM_VCPU_TSC_OFFSET, and no unknown ones.

    Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_CTRL.
    """
    vcpu = vm.create_vcpu()
    assert vcpu.attrs.has(VcpuGroup.KVM_VCPU_TSC_CTRL, VcpuTscAttr.KVM_VCPU_TSC_OFFSET)
    assert not vcpu.attrs.has(VcpuGroup.KVM_VCPU_TSC_CTRL, 99)
    assert not vcpu.attrs.has(99, VcpuTscAttr.KVM_VCPU_TSC_OFFSET)


@VCPU
@pytest.mark.parametrize("op", ["get", "set"])
def test_unknown_vcpu_attributes(vm: Vm, op: str) -> None:
    """An attribute that vCPUs lack fails with ENXIO, to be read as well as to be set.

    api.rst 4.80.
    """
    vcpu = vm.create_vcpu()
    access = vcpu.attrs.get if op == "get" else vcpu.attrs.set
    with refused(errno.ENXIO):
        access(VcpuGroup.KVM_VCPU_TSC_CTRL, 99)


@VCPU
@pytest.mark.parametrize("op", [ioctls.KVM_GET_DEVICE_ATTR, ioctls.KVM_SET_DEVICE_ATTR], ids=["get", "set"])
def test_a_tsc_offset_to_and_from_nowhere(vm: Vm, op: ioctls.Ioctl) -> None:
    """An address that cannot be accessed fails with EFAULT.

    Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET.
    """
    vcpu = vm.create_vcpu()
    with refused(errno.EFAULT):
        vcpu.ioctl(op, kvm_device_attr(group=VcpuGroup.KVM_VCPU_TSC_CTRL, addr=8))
