# SPDX-License-Identifier: Apache-2.0
"""What was set on a file descriptor and KVM cannot be asked about: capabilities, routes, eventfds, ...

Each descriptor keeps the calls that its present state comes from; one that undoes another removes it.
"""

from __future__ import annotations

from typing import Any

from kvmpy.uapi import ioctls
from kvmpy.uapi.ioctls import Ioctl, Lasting
from kvmpy.uapi.structs import Struct

Argument = Struct | int | None
_Key = tuple[object, ...]


def _key(op: Ioctl, lasting: Lasting, arg: Any) -> _Key:
    values = {name: getattr(arg, name) for name in lasting.key}
    if "flags" in values:
        values["flags"] &= ~lasting.undo
    return op.nr, *values.values()


class Settings:
    """The calls that brought a descriptor into its present state, the oldest first."""

    def __init__(self) -> None:
        self._calls: dict[_Key, tuple[Ioctl, Argument]] = {}

    def remember(self, op: Ioctl, arg: Any) -> None:
        """Note a call of an ioctl whose effect lasts (:attr:`Ioctl.lasting`) that succeeded."""
        if isinstance(arg, Struct) != (op.arg != "none" and op.struct is not None):
            return  # an argument of another kind than KVM takes: nobody can say what it did
        lasting = op.lasting or Lasting()
        if lasting.removes:
            self._forget_zones(ioctls.IOCTLS[lasting.removes], arg)
            return
        key = _key(op, lasting, arg)
        self._calls.pop(key, None)
        if not (lasting.undo and arg.flags & lasting.undo):
            self._calls[key] = op, arg.copy() if isinstance(arg, Struct) else arg

    def _forget_zones(self, setter: Ioctl, gone: Any) -> None:
        """Every zone that contains the whole range goes (api.rst, section 4.116)."""
        zone: Any
        for key, (op, zone) in list(self._calls.items()):
            if op is setter:
                within = zone.addr <= gone.addr and gone.addr + gone.size <= zone.addr + zone.size
                if zone.pio == gone.pio and within:
                    del self._calls[key]

    def calls(self) -> list[tuple[Ioctl, Argument]]:
        """Return ``(ioctl, argument)`` of each, in the order in which they were made."""
        return list(self._calls.values())
