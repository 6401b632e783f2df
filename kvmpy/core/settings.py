# SPDX-License-Identifier: Apache-2.0
"""What was set on a file descriptor and KVM cannot be asked about: capabilities, routes, eventfds, ...

Each descriptor keeps the calls that its present state comes from; one that undoes another removes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_IOEVENTFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_DEASSIGN
from kvmpy.uapi.ioctls import Ioctl
from kvmpy.uapi.structs import Struct

Argument = Struct | int | None
_Key = tuple[object, ...]


def _alone(_arg: Any) -> _Key:
    return ()


def _cap(arg: Any) -> _Key:
    return (arg.cap,)


def _irqfd(arg: Any) -> _Key:
    return arg.fd, arg.gsi


def _ioeventfd(arg: Any) -> _Key:
    flags = arg.flags & ~KVM_IOEVENTFD_FLAG_DEASSIGN
    return arg.addr, arg.len, arg.fd, flags, arg.datamatch


def _zone(arg: Any) -> tuple[int, int, int]:
    return arg.addr, arg.size, arg.pio


# What tells two calls of one ioctl apart: those with the same key replace each other.
_KEYS: dict[int, Callable[[Any], _Key]] = {
    ioctls.KVM_ENABLE_CAP.nr: _cap,
    ioctls.KVM_CREATE_IRQCHIP.nr: _alone,
    ioctls.KVM_CREATE_PIT2.nr: _alone,
    ioctls.KVM_IRQFD.nr: _irqfd,
    ioctls.KVM_IOEVENTFD.nr: _ioeventfd,
    ioctls.KVM_REGISTER_COALESCED_MMIO.nr: _zone,
    ioctls.KVM_UNREGISTER_COALESCED_MMIO.nr: _alone,
    ioctls.KVM_SET_BOOT_CPU_ID.nr: _alone,
    ioctls.KVM_SET_GSI_ROUTING.nr: _alone,
    ioctls.KVM_SET_GUEST_DEBUG.nr: _alone,
    ioctls.KVM_SET_IDENTITY_MAP_ADDR.nr: _alone,
    ioctls.KVM_SET_PMU_EVENT_FILTER.nr: _alone,
    ioctls.KVM_SET_TSS_ADDR.nr: _alone,
    ioctls.KVM_SET_VAPIC_ADDR.nr: _alone,
    ioctls.KVM_TPR_ACCESS_REPORTING.nr: _alone,
    ioctls.KVM_XEN_HVM_CONFIG.nr: _alone,
}
LASTING = frozenset(_KEYS)


def _deassigns(op: Ioctl, arg: Any) -> bool:
    if op is ioctls.KVM_IRQFD:
        return bool(arg.flags & KVM_IRQFD_FLAG_DEASSIGN)
    return op is ioctls.KVM_IOEVENTFD and bool(arg.flags & KVM_IOEVENTFD_FLAG_DEASSIGN)


class Settings:
    """The calls that brought a descriptor into its present state, the oldest first."""

    def __init__(self) -> None:
        self._calls: dict[_Key, tuple[Ioctl, Argument]] = {}

    def remember(self, op: Ioctl, arg: Argument) -> None:
        """Note a call of an ioctl in :data:`LASTING` that succeeded."""
        if isinstance(arg, Struct) != (op.arg != "none" and op.struct is not None):
            return  # an argument of another kind than KVM takes: nobody can say what it did
        if op is ioctls.KVM_UNREGISTER_COALESCED_MMIO:
            self._forget_zones(arg)
            return
        key = (op.nr, *_KEYS[op.nr](arg))
        self._calls.pop(key, None)
        if not _deassigns(op, arg):
            self._calls[key] = op, arg.copy() if isinstance(arg, Struct) else arg

    def _forget_zones(self, gone: Any) -> None:
        """Every zone that contains the whole range goes (api.rst, section 4.116)."""
        for key, (op, zone) in list(self._calls.items()):
            if op is ioctls.KVM_REGISTER_COALESCED_MMIO:
                addr, size, pio = _zone(zone)
                if pio == gone.pio and addr <= gone.addr and gone.addr + gone.size <= addr + size:
                    del self._calls[key]

    def calls(self) -> list[tuple[Ioctl, Argument]]:
        """Return ``(ioctl, argument)`` of each, in the order in which they were made."""
        return list(self._calls.values())
