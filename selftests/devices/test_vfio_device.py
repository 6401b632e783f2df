# SPDX-License-Identifier: Apache-2.0
"""In-kernel devices: making one, and the attributes of the VFIO device, which every x86 KVM may have."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from kvmpy import (
    Device,
    DeviceType,
    EventFd,
    Kvm,
    Missing,
    VfioAttr,
    VfioGroup,
    Vm,
    ioctls,
    kvm_create_device,
    kvm_device_attr,
    refused,
)


def vfio_device(kvm: Kvm) -> Missing | None:
    """Tell whether KVM makes VFIO devices."""
    with kvm.create_vm() as vm:
        if vm.devices.test(DeviceType.KVM_DEV_TYPE_VFIO):
            return None
    return Missing("KVM_DEV_TYPE_VFIO", "a kernel with CONFIG_KVM_VFIO=y", ("KVM_DEV_TYPE_VFIO",))


pytestmark = pytest.mark.requires("KVM_CAP_DEVICE_CTRL")
WITH_VFIO = pytest.mark.requires.with_args(vfio_device)


@pytest.fixture
def device(vm: Vm) -> Device:
    """The VFIO device of a bare VM."""
    return vm.devices.create(DeviceType.KVM_DEV_TYPE_VFIO)


@pytest.mark.parametrize(
    "kind", [DeviceType.KVM_DEV_TYPE_ARM_VGIC_V2, 0xFFFF], ids=["of another CPU", "unknown"]
)
def test_types_that_this_kvm_lacks(vm: Vm, kind: int) -> None:
    """A device type that KVM does not support fails with ENODEV, to be made as well as to be tested for.

    api.rst 4.79 KVM_CREATE_DEVICE.
    """
    with refused(errno.ENODEV):
        vm.devices.create(kind)
    assert not vm.devices.test(kind)


@WITH_VFIO
def test_a_test_makes_nothing(vm: Vm) -> None:
    """KVM_CREATE_DEVICE_TEST makes no device and no file descriptor.

    api.rst 4.79 KVM_CREATE_DEVICE.
    """
    before = os.listdir("/proc/self/fd")
    arg = kvm_create_device(type=DeviceType.KVM_DEV_TYPE_VFIO, fd=12345, flags=1)
    vm.ioctl(ioctls.KVM_CREATE_DEVICE, arg)
    assert arg.fd == 12345
    assert len(os.listdir("/proc/self/fd")) == len(before)
    vm.devices.create(DeviceType.KVM_DEV_TYPE_VFIO)


@WITH_VFIO
def test_only_one_vfio_device(vm: Vm, device: Device) -> None:
    """A VM has at most one VFIO device: the second one fails with EBUSY.

    virt/kvm/vfio.c, kvm_vfio_create().
    """
    with refused(errno.EBUSY):
        vm.devices.create(DeviceType.KVM_DEV_TYPE_VFIO)
    assert vm.devices.test(DeviceType.KVM_DEV_TYPE_VFIO)


@WITH_VFIO
def test_a_closed_device_makes_room(vm: Vm, device: Device) -> None:
    """Closing the VFIO device destroys it, so that another can be made.

    virt/kvm/vfio.c, kvm_vfio_release().
    """
    device.close()
    assert vm.devices.create(DeviceType.KVM_DEV_TYPE_VFIO).fd >= 0


@WITH_VFIO
def test_attributes_of_the_vfio_device(device: Device) -> None:
    """The VFIO device has the attributes to add and remove files, and no others.

    Documentation/virt/kvm/devices/vfio.rst; api.rst 4.81 KVM_HAS_DEVICE_ATTR.
    """
    group = VfioGroup.KVM_DEV_VFIO_FILE
    assert device.attrs.has(group, VfioAttr.KVM_DEV_VFIO_FILE_ADD)
    assert device.attrs.has(group, VfioAttr.KVM_DEV_VFIO_FILE_DEL)
    assert not device.attrs.has(group, 99)
    assert not device.attrs.has(99, VfioAttr.KVM_DEV_VFIO_FILE_ADD)


@WITH_VFIO
@pytest.mark.parametrize(("group", "attr"), [(1, 99), (99, 1)], ids=["attribute", "group"])
def test_unknown_attributes_cannot_be_set(device: Device, group: int, attr: int) -> None:
    """Setting an attribute that the device lacks fails with ENXIO.

    api.rst 4.80 KVM_SET_DEVICE_ATTR.
    """
    with refused(errno.ENXIO):
        device.attrs.set(group, attr, 0, size=4)


@WITH_VFIO
def test_a_file_that_is_not_open(device: Device) -> None:
    """Adding a file descriptor that is not open fails with EBADF.

    Documentation/virt/kvm/devices/vfio.rst; virt/kvm/vfio.c, kvm_vfio_file_add().
    """
    with refused(errno.EBADF):
        device.attrs.set(VfioGroup.KVM_DEV_VFIO_FILE, VfioAttr.KVM_DEV_VFIO_FILE_ADD, struct.pack("<i", -1))


@WITH_VFIO
def test_a_file_that_is_not_vfio(device: Device) -> None:
    """Adding a file that does not belong to VFIO fails with EINVAL.

    Documentation/virt/kvm/devices/vfio.rst; virt/kvm/vfio.c, kvm_vfio_file_add().
    """
    with EventFd() as other, refused(errno.EINVAL):
        device.attrs.set(VfioGroup.KVM_DEV_VFIO_FILE, VfioAttr.KVM_DEV_VFIO_FILE_ADD, other.fd, size=4)


@WITH_VFIO
def test_data_that_cannot_be_read(device: Device) -> None:
    """Setting an attribute from an address that cannot be read fails with EFAULT.

    api.rst 4.80 KVM_SET_DEVICE_ATTR: addr is the address of the data.
    """
    arg = kvm_device_attr(group=VfioGroup.KVM_DEV_VFIO_FILE, attr=VfioAttr.KVM_DEV_VFIO_FILE_ADD, addr=8)
    with refused(errno.EFAULT):
        device.ioctl(ioctls.KVM_SET_DEVICE_ATTR, arg)


@WITH_VFIO
def test_there_is_nothing_to_get(device: Device) -> None:
    """The VFIO device has no attribute that can be read, which KVM_GET_DEVICE_ATTR says with EPERM.

    virt/kvm/kvm_main.c, kvm_device_ioctl_attr(): the device does not implement reading.
    """
    with refused(errno.EPERM):
        device.attrs.get(VfioGroup.KVM_DEV_VFIO_FILE, VfioAttr.KVM_DEV_VFIO_FILE_ADD, 4)


@WITH_VFIO
def test_the_device_outlives_the_vm_descriptor(vm: Vm, device: Device) -> None:
    """A device keeps its VM alive: it answers after the VM's own file descriptor is closed.

    virt/kvm/kvm_main.c, kvm_ioctl_create_device() takes a reference to the VM.
    """
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, vm.fd, inheritable=False)
    os.close(null)
    assert device.attrs.has(VfioGroup.KVM_DEV_VFIO_FILE, VfioAttr.KVM_DEV_VFIO_FILE_ADD)
