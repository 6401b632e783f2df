# SPDX-License-Identifier: Apache-2.0
"""In-kernel devices, and the attributes of devices, VMs, vCPUs and /dev/kvm (api.rst 4.79 to 4.81)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvmpy.core.fd import KvmFd
from kvmpy.core.topic import Topic, topic
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.constants import KVM_CREATE_DEVICE_TEST
from kvmpy.uapi.structs import kvm_create_device, kvm_device_attr

if TYPE_CHECKING:
    from kvmpy.core.vm import Vm


class DeviceAttrs(Topic):
    """The attributes of a device, a VM, a vCPU or /dev/kvm."""

    _owner: KvmFd

    def has(self, group: int, attr: int, *, flags: int = 0) -> bool:
        """Tell whether attribute *attr* of *group* exists (KVM_HAS_DEVICE_ATTR).

        KvmError for other failures than ENXIO, such as ENOTTY where this kind of object has no attributes.
        """
        arg = kvm_device_attr(flags=flags, group=group, attr=attr)
        _, number = self._owner.ioctl_raw(ioctls.KVM_HAS_DEVICE_ATTR, arg)
        if number not in (0, errno.ENXIO):
            raise self._owner.error(ioctls.KVM_HAS_DEVICE_ATTR, number, arg)
        return number == 0

    def get(self, group: int, attr: int, size: int = 8, *, flags: int = 0) -> bytes:
        """Return the *size* bytes of an attribute.

        Its documentation says how many it has (KVM_GET_DEVICE_ATTR).
        """
        buffer = bytearray(size)
        # lifetime: `pointer` holds the buffer until the ioctl is done.
        pointer = ffi.from_buffer(buffer)
        arg = kvm_device_attr(
            flags=flags, group=group, attr=attr, addr=int(ffi.cast("uintptr_t", pointer)) if size else 0
        )
        self._owner.ioctl(ioctls.KVM_GET_DEVICE_ATTR, arg)
        del pointer
        return bytes(buffer)

    def get_int(self, group: int, attr: int, size: int = 8) -> int:
        """Return an attribute of *size* bytes as an unsigned number."""
        return int.from_bytes(self.get(group, attr, size), "little")

    def set(
        self, group: int, attr: int, data: bytes | int | None = None, *, size: int = 8, flags: int = 0
    ) -> None:
        """Set an attribute to *data*: bytes, or a number stored in *size* bytes (KVM_SET_DEVICE_ATTR).

        None passes no data at all.
        """
        raw = data.to_bytes(size, "little", signed=data < 0) if isinstance(data, int) else data
        # lifetime: `pointer` holds the bytes until the ioctl is done.
        pointer = ffi.from_buffer(raw) if raw else None
        arg = kvm_device_attr(
            flags=flags,
            group=group,
            attr=attr,
            addr=0 if pointer is None else int(ffi.cast("uintptr_t", pointer)),
        )
        self._owner.ioctl(ioctls.KVM_SET_DEVICE_ATTR, arg)
        del pointer


class Device(KvmFd):
    """A device made by :meth:`Devices.create`; ``.type`` is its KVM_DEV_TYPE_* number."""

    kind = "device"
    attrs = topic(DeviceAttrs)

    def __init__(self, fd: int, name: str, device_type: int) -> None:
        super().__init__(fd, name)
        self.type = device_type


class Devices(Topic):
    """The devices of a VM; those still open are closed with it."""

    _owner: Vm

    def __init__(self, owner: Vm) -> None:
        super().__init__(owner)
        self._devices: list[Device] = []

    def create(self, device_type: int, *, flags: int = 0) -> Device:
        """Create an in-kernel device such as KVM_DEV_TYPE_VFIO (KVM_CREATE_DEVICE).

        ENODEV for a type that KVM lacks.
        """
        arg = kvm_create_device(type=int(device_type), flags=flags)
        self._owner.ioctl(ioctls.KVM_CREATE_DEVICE, arg)
        device = Device(arg.fd, f"{self._owner.name}/device{arg.fd}", int(device_type))
        self._devices.append(device)
        return device

    def test(self, device_type: int) -> bool:
        """Tell whether KVM could create a device of this type, without doing so (KVM_CREATE_DEVICE_TEST)."""
        arg = kvm_create_device(type=int(device_type), flags=KVM_CREATE_DEVICE_TEST)
        _, number = self._owner.ioctl_raw(ioctls.KVM_CREATE_DEVICE, arg)
        if number not in (0, errno.ENODEV):
            raise self._owner.error(ioctls.KVM_CREATE_DEVICE, number, arg)
        return number == 0

    def close(self) -> None:
        """Close them."""
        for device in self._devices:
            device.close()
