# SPDX-License-Identifier: Apache-2.0
"""The last ioctls of this process, for post-mortems; KVM_RUN is kept by each vCPU (``Vcpu.trail()``)."""

from __future__ import annotations

from collections import deque

from kvmpy.core.errors import errno_name
from kvmpy.uapi.ioctls import Ioctl
from kvmpy.uapi.structs import Struct

_MOST = 64
_LINE = 160

Call = tuple[str, Ioctl, Struct | int | None, int, int]

# (descriptor, ioctl, argument, result, errno). Structs are the callers' own, not copies: those would cost
# more than the rest.
calls: deque[Call] = deque(maxlen=_MOST)


def _shown(op: Ioctl, arg: Struct | int | None) -> str:
    if arg is None or (op.arg == "out" and not isinstance(arg, int)):
        return ""
    text = hex(arg) if isinstance(arg, int) else repr(arg)
    return " " + (text if len(text) <= _LINE else f"{text[:_LINE]}...")


def lines(vm: str, taken: list[Call], most: int = 12) -> list[str]:
    """Return what the last *most* calls of *taken* on the VM named *vm* and on its vCPUs were, oldest first.

    An argument is shown as it is now; what KVM only writes is left out.
    """
    own = [call for call in taken if call[0] == vm or call[0].startswith(f"{vm}/")]
    return [
        f"{name} {op.name}{_shown(op, arg)} = {result}{f' {errno_name(number)}' if number else ''}"
        for name, op, arg, result, number in own[-most:]
    ]
