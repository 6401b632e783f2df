# SPDX-License-Identifier: Apache-2.0
"""Errors of the core: what was asked, what came back, and what to do about it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmpy.uapi.error_hints import errno_name, hint

if TYPE_CHECKING:
    from kvmpy.uapi.ioctls import Ioctl
    from kvmpy.uapi.structs import Struct

__all__ = [
    "ClosedError",
    "DeadProcessorError",
    "KvmError",
    "MissingError",
    "PrivateMemoryError",
    "VcpuBusyError",
    "errno_name",
]


class KvmError(OSError):
    """An ioctl that failed: ``.op``, ``.errno``, ``.arg`` (the decoded argument as text) and a hint.

    ``.target`` names the file descriptor, such as ``vm0/vcpu1``.
    """

    def __init__(self, op: Ioctl, number: int, target: str, arg: Struct | int | None = None) -> None:
        self.op = op
        self.target = target
        self.arg = "" if arg is None else (hex(arg) if isinstance(arg, int) else repr(arg))
        self.hint = hint(op.name, number, b"" if arg is None or isinstance(arg, int) else arg.to_bytes())
        text = f"{op.name} on {target} failed: {errno_name(number)} ({os.strerror(number)})"
        if self.arg:
            text += f"\n  argument: {self.arg}"
        if self.hint:
            text += f"\n  hint: {self.hint}"
        super().__init__(number, text)

    def __reduce__(self) -> tuple[object, ...]:
        return (OSError, (self.errno, self.strerror))

    def __str__(self) -> str:
        return str(self.strerror)


class MissingError(RuntimeError):
    """This host lacks something: ``.missing`` names it exactly, ``.how`` says how to get it."""

    def __init__(self, missing: str, how: str) -> None:
        self.missing = missing
        self.how = how
        super().__init__(f"{missing}: {how}" if how else missing)


class DeadProcessorError(RuntimeError):
    """The AMD secure processor answers no command until the next boot; *because* says what showed it."""

    def __init__(self, because: str) -> None:
        super().__init__(
            f"the secure processor does not answer; reboot\n  {because}; see dmesg | grep -i ccp"
        )


class ClosedError(RuntimeError):
    """A KVM object was used after it was closed."""


class VcpuBusyError(RuntimeError):
    """A vCPU is running in another thread."""


class PrivateMemoryError(RuntimeError):
    """The host asked for guest memory that a protection keeps from it."""
