# SPDX-License-Identifier: Apache-2.0
"""Capabilities: what an object offers, and switching them on."""

from __future__ import annotations

from collections.abc import Iterable

from kvmpy.core.errors import MissingError
from kvmpy.core.fd import KvmFd
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import Cap
from kvmpy.uapi.structs import kvm_enable_cap


def enable_cap_arg(cap: int, args: Iterable[int], flags: int) -> kvm_enable_cap:
    """Return the argument of KVM_ENABLE_CAP; ValueError for more than four arguments."""
    values = [int(value) for value in args]
    if len(values) > 4:
        raise ValueError(f"KVM_ENABLE_CAP takes at most 4 arguments, {len(values)} were given")
    arg = kvm_enable_cap(cap=int(cap), flags=flags)
    for number, value in enumerate(values):
        arg.args[number] = value
    return arg


class CanEnable(KvmFd):
    """What VMs and vCPUs share: KVM_ENABLE_CAP."""

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """Enable capability *cap* with up to four 64-bit arguments (KVM_ENABLE_CAP, api.rst section 4.37)."""
        return self.ioctl(ioctls.KVM_ENABLE_CAP, enable_cap_arg(cap, args, flags))


class HasCaps(CanEnable):
    """What a VM offers and enables."""

    def check_extension(self, cap: int) -> int:
        """Return what this VM offers of capability *cap*, 0 for nothing (KVM_CHECK_EXTENSION on the VM)."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, int(cap))

    def need_cap(self, cap: int, why: str = "") -> int:
        """Return what this VM offers of capability *cap*; MissingError, which names it, for nothing."""
        value = self.check_extension(cap)
        if not value:
            name = Cap(cap).name if cap in Cap._value2member_map_ else f"capability {int(cap)}"
            raise MissingError(
                f"{name} is not offered by this KVM", why or "it takes another kernel or vendor module"
            )
        return value
