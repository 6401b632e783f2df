# SPDX-License-Identifier: Apache-2.0
"""The last ioctls of this process: kept by the funnel, decoded when a report asks for them."""

from __future__ import annotations

from collections import deque
from threading import get_ident
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from kvmpy.core.errors import errno_name
from kvmpy.core.observe import inspection
from kvmpy.uapi import ffi, lib
from kvmpy.uapi.error_hints import hint
from kvmpy.uapi.ioctls import KVM_RUN, Ioctl
from kvmpy.uapi.structs import Struct

if TYPE_CHECKING:
    from kvmpy.core.fd import KvmFd

_MOST = 64
# Bytes of kvm_run that hold the exit reason and what belongs to it.
_RUN_HEAD = lib.KVMPY_RUN_HEAD
_REASON = slice(8, 12)
_buffer = ffi.buffer


class Runs:
    """KVM_RUNs of one vCPU in a row that ended for one reason: the begin of its run area, and how many."""

    __slots__ = ("head", "times")

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.times = 1


# Structs as class and content: the callers' own live on.
Argument = tuple[type[Struct], bytes] | Runs | int | None
# (time, thread, descriptor, its kind, ioctl, argument, result, errno)
Call = tuple[int, int, str, str, Ioctl, Argument, int, int]

calls: deque[Call] = deque(maxlen=_MOST)
keeps_runs = False
"""Whether KVM_RUN is kept, too; it takes the loop out of C.  Without, each vCPU has its ``trail()``."""


def remember(fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno: int) -> None:
    """Keep an ioctl that returned, unless a tool's own look at a VM issued it."""
    # Every ioctl comes by here: no call that can be spared.
    if not inspection.depth:
        kept = (arg.__class__, _buffer(arg.cdata, arg.nbytes)[:]) if isinstance(arg, Struct) else arg
        calls.append((monotonic_ns(), get_ident(), fd.name, fd.kind, op, kept, result, errno))


def remember_run(fd: KvmFd, run: Any, result: int, errno: int) -> None:
    """Keep a KVM_RUN, with those before it where they are of the same vCPU and ended for the same reason."""
    if inspection.depth:
        return
    head: bytes = _buffer(run, _RUN_HEAD)[:]
    last = calls[-1] if calls else None
    if last is not None and (last[2], *last[6:]) == (fd.name, result, errno):
        runs = last[5]
        if isinstance(runs, Runs) and runs.head[_REASON] == head[_REASON]:
            runs.head = head
            runs.times += 1
            return
    calls.append((monotonic_ns(), get_ident(), fd.name, fd.kind, KVM_RUN, Runs(head), result, errno))


def of_vm(vm: str, taken: list[Call], most: int = 12) -> list[Call]:
    """Return the last *most* calls of *taken* on the VM named *vm* and on what belongs to it, but KVM_RUN."""
    own = [call for call in taken if call[4] is not KVM_RUN and f"{call[2]}/".startswith(f"{vm}/")]
    return own[-most:]


def entries(taken: list[Call]) -> list[dict[str, Any]]:
    """Return calls as JSON-ready values, the oldest first.

    ``ms`` counts from the first, ``thread`` numbers the threads from 0, ``fd`` and ``ioctl`` are names,
    ``arg`` is the decoded argument as it was when the ioctl returned (for KVM_RUN: the exit), ``result`` its
    result or errno by name, ``meaning`` what that errno means for this ioctl.
    """
    threads: dict[int, int] = {}
    return [
        {
            "ms": round((when - taken[0][0]) / 1e6, 3),
            "thread": threads.setdefault(thread, len(threads)),
            "fd": fd,
            "ioctl": op.name,
            "arg": _argument(op, kind, arg, result),
            "result": errno_name(errno) if result < 0 else str(result),
            "failed": result < 0,
            "meaning": hint(op.name, errno, arg[1] if isinstance(arg, tuple) else b"") if result < 0 else "",
            "count": arg.times if isinstance(arg, Runs) else 1,
        }
        for when, thread, fd, kind, op, arg, result, errno in taken
    ]


def line(entry: dict[str, Any]) -> str:
    """Return an entry as a line of text, with ``-1`` before an errno as in a trace."""
    argument = f" {entry['arg']}" if entry["arg"] else ""
    return f"{entry['fd']} {entry['ioctl']}{argument} = {'-1 ' if entry['failed'] else ''}{entry['result']}"


def _argument(op: Ioctl, kind: str, arg: Argument, result: int) -> str:
    # Here: what most programs never need would take time at every start.
    from kvmpy.uapi.argument_text import exit_words, run_of, struct_words
    from kvmpy.uapi.field_words import argument_words

    try:
        if isinstance(arg, Runs):
            return exit_words(run_of(arg.head)) if result >= 0 else ""
        if isinstance(arg, tuple):
            return struct_words(arg[0].from_bytes(arg[1]), kind)
        if op.arg == "int":
            return argument_words(op, arg or 0)
        return f"arg={arg:#x}" if arg else ""
    except Exception as error:  # noqa: BLE001 - evidence may not hide the failure it is about
        return f"not decoded: {type(error).__name__}: {error}"
