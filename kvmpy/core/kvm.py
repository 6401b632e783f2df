# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm: the system ioctls."""

from __future__ import annotations

import errno
import functools
import grp
import os
import stat
from collections.abc import Iterable
from typing import TypeVar

from kvmpy.core.device import DeviceAttrs
from kvmpy.core.errors import KvmError, MissingError
from kvmpy.core.fd import KvmFd
from kvmpy.core.topic import topic
from kvmpy.core.vm import Vm
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.constants import KVM_CAP_VM_TYPES, VmType
from kvmpy.uapi.structs import FlexStruct, kvm_cpuid2, kvm_msr_entry, kvm_msr_list, kvm_msrs

API_VERSION = 12

_S = TypeVar("_S", bound=FlexStruct)


def device_path() -> str:
    """Return the path of the KVM device: ``$KVMPY_DEV_KVM`` or /dev/kvm."""
    return os.environ.get("KVMPY_DEV_KVM") or "/dev/kvm"


def explain_open_failure(path: str, error: OSError) -> MissingError:
    """Return why *path* cannot be opened, and the command that helps."""
    if error.errno == errno.ENOENT:
        return MissingError(
            f"{path} does not exist",
            "load the vendor module (modprobe kvm_amd or kvm_intel); enable SVM or VT-x in the firmware, or "
            "nested virtualisation on the host of this machine",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        try:
            mode = os.stat(path)
            group = grp.getgrgid(mode.st_gid).gr_name
            writable = bool(mode.st_mode & stat.S_IWGRP)
        except (OSError, KeyError):
            group, writable = "kvm", True
        if group != "root" and writable:
            how = f"usermod -aG {group} $USER, then log in again"
        else:
            how = (
                'a udev rule gives it to the group kvm: echo \'KERNEL=="kvm", GROUP="kvm", MODE="0660"\' > '
                "/etc/udev/rules.d/65-kvm.rules && udevadm trigger, then usermod -aG kvm $USER"
            )
        return MissingError(f"no permission to open {path}", how)
    return MissingError(f"{path} cannot be opened: {error.strerror}", "see dmesg for why KVM refused")


class Kvm(KvmFd):
    """The KVM device; MissingError when it is absent or may not be opened."""

    kind = "system"
    attrs = topic(DeviceAttrs)

    def __init__(self, path: str | None = None) -> None:
        self.path = path or device_path()
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise explain_open_failure(self.path, error) from error
        super().__init__(fd, "kvm")
        try:
            version = self.get_api_version()
        except KvmError as error:
            self.close()
            raise MissingError(f"{self.path} is not a KVM device", "KVM_GET_API_VERSION failed") from error
        if version != API_VERSION:
            self.close()
            raise MissingError(f"KVM API version {version}, not {API_VERSION}", "this kernel is too old")

    def get_api_version(self) -> int:
        """Return the API version, 12 on every kernel since 2.6.22 (KVM_GET_API_VERSION)."""
        return self.ioctl(ioctls.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """Return what this KVM offers of capability *cap*, 0 for nothing (KVM_CHECK_EXTENSION)."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, int(cap))

    def get_vcpu_mmap_size(self) -> int:
        """Return the size of a vCPU's shared area in bytes (KVM_GET_VCPU_MMAP_SIZE)."""
        return self.ioctl(ioctls.KVM_GET_VCPU_MMAP_SIZE)

    @functools.cached_property
    def vcpu_mmap_size(self) -> int:
        """The size of a vCPU's shared area in bytes, asked once."""
        return self.get_vcpu_mmap_size()

    def vm_types(self) -> set[int]:
        """Return the VM types on offer (KVM_CAP_VM_TYPES); type 0 is always there."""
        mask = self.check_extension(KVM_CAP_VM_TYPES) | 1
        return {bit for bit in range(32) if mask >> bit & 1}

    def create_vm(self, vm_type: int = VmType.KVM_X86_DEFAULT_VM) -> Vm:
        """Create a bare VM of *vm_type*, with no memory and no vCPU (KVM_CREATE_VM)."""
        return Vm(self, self.create_vm_fd(vm_type), vm_type)

    def create_vm_fd(self, vm_type: int) -> int:
        """Create a VM and return its file descriptor alone."""
        return self.ioctl(ioctls.KVM_CREATE_VM, int(vm_type))

    def _grow(self, make: type[_S], op: ioctls.Ioctl, first: int = 128) -> _S:
        # KVM answers E2BIG when the list has no room for all entries.
        entries = first
        while True:
            arg = make.with_entries(entries)
            _, number = self.ioctl_raw(op, arg)
            if number == 0:
                return arg
            if number != errno.E2BIG or entries >= 1 << 16:
                raise self.error(op, number, arg)
            entries *= 2

    def get_supported_cpuid(self) -> kvm_cpuid2:
        """Return the CPUID leaves that KVM supports on this host (KVM_GET_SUPPORTED_CPUID)."""
        return self._grow(kvm_cpuid2, ioctls.KVM_GET_SUPPORTED_CPUID)

    def get_supported_hv_cpuid(self) -> kvm_cpuid2:
        """Return the Hyper-V leaves that KVM can offer to a guest (KVM_GET_SUPPORTED_HV_CPUID)."""
        return self._grow(kvm_cpuid2, ioctls.KVM_GET_SUPPORTED_HV_CPUID)

    def get_emulated_cpuid(self) -> kvm_cpuid2:
        """Return the CPUID features that KVM emulates (KVM_GET_EMULATED_CPUID)."""
        return self._grow(kvm_cpuid2, ioctls.KVM_GET_EMULATED_CPUID)

    @functools.cached_property
    def supported_cpuid(self) -> kvm_cpuid2:
        """The supported CPUID leaves, asked once; copy before changing it."""
        return self.get_supported_cpuid()

    def _index_list(self, op: ioctls.Ioctl) -> list[int]:
        index_list = kvm_msr_list.with_entries(0)
        _, number = self.ioctl_raw(op, index_list)
        if number not in (0, errno.E2BIG):
            raise self.error(op, number, index_list)
        index_list = kvm_msr_list.with_entries(index_list.nmsrs)
        self.ioctl(op, index_list)
        return [int(index) for index in index_list.entries_list()]

    def get_msr_index_list(self) -> list[int]:
        """Return the MSRs that can be saved and restored (KVM_GET_MSR_INDEX_LIST)."""
        return self._index_list(ioctls.KVM_GET_MSR_INDEX_LIST)

    def get_msr_feature_index_list(self) -> list[int]:
        """Return the MSRs that describe features of this host (KVM_GET_MSR_FEATURE_INDEX_LIST)."""
        return self._index_list(ioctls.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def x86_get_mce_cap_supported(self) -> int:
        """Return the machine-check features that guests may have (KVM_X86_GET_MCE_CAP_SUPPORTED)."""
        # lifetime: `place` lives until the ioctl is done.
        place = ffi.new("uint64_t *")
        self.ioctl(ioctls.KVM_X86_GET_MCE_CAP_SUPPORTED, int(ffi.cast("uintptr_t", place)))
        return int(place[0])

    def get_feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return the values of feature MSRs, by index (KVM_GET_MSRS on the system file descriptor).

        KVM stops at the first MSR that it refuses; those before it are returned.
        """
        arg = kvm_msrs.of([kvm_msr_entry(index=index) for index in indices])
        count = self.ioctl(ioctls.KVM_GET_MSRS, arg)
        return {entry.index: entry.data for entry in arg.entries_list()[:count]}
