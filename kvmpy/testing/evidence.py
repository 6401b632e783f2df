# SPDX-License-Identifier: Apache-2.0
"""What a page about a test shows beside its verdict: the memory maps of its VMs and its last ioctls."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from kvmpy.core import observe
from kvmpy.core.errors import errno_name
from kvmpy.uapi import ffi
from kvmpy.uapi.error_hints import hint

if TYPE_CHECKING:
    from kvmpy.core.fd import KvmFd
    from kvmpy.debug.decode import Decoder
    from kvmpy.guest.vm import GuestVm
    from kvmpy.uapi.ioctls import Ioctl
    from kvmpy.uapi.structs import Struct

TAIL = 64
MAX_VMS = 8
# Bytes of kvm_run that hold the exit reason and what belongs to it.
RUN_HEAD = 32 + 256
_RUN = "KVM_RUN"


class _Entry:
    """One ioctl, or several KVM_RUN in a row that ended alike."""

    __slots__ = (
        "arg",
        "count",
        "errno",
        "exit_reason",
        "fd",
        "kind",
        "op",
        "result",
        "run",
        "thread",
        "vm_type",
        "when",
    )

    def __init__(self, when: int, fd: KvmFd, op: Ioctl) -> None:
        self.when = when
        self.thread = threading.get_ident()
        self.fd = fd.name
        self.kind = fd.kind
        self.vm_type = int(getattr(getattr(fd, "vm", fd), "vm_type", 0))
        self.op = op
        self.arg: tuple[type[Struct], bytes] | int | None = None
        self.result = self.errno = 0
        self.exit_reason = -1
        self.run = b""
        self.count = 1


class IoctlTail:
    """An observer that keeps the last ioctls of this process, cheaply: nothing is decoded until it is asked
    for.
    """

    def __init__(self, length: int = TAIL) -> None:
        self._entries: deque[_Entry] = deque(maxlen=length)

    def clear(self) -> None:
        """Forget what was seen: another test begins."""
        self._entries.clear()

    def fd_opened(self, fd: KvmFd) -> None:
        """Nothing is kept of this."""

    def fd_closed(self, fd: KvmFd) -> None:
        """Nothing is kept of this."""

    def ioctl_enter(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None) -> None:
        """Nothing is kept of this: the argument is looked at when the ioctl returns."""

    def ioctl_dropped(self, fd: KvmFd, op: Ioctl) -> None:
        """Nothing is kept of this."""

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno: int) -> None:
        """Keep the ioctl; KVM_RUNs of one vCPU that end alike are one entry with a count."""
        if observe.is_inspecting():
            return
        entries = self._entries
        reason = -1
        run = None
        if op.name == _RUN:
            run = getattr(fd, "_run", None)
            if run is not None:
                reason = int(run.exit_reason)
            last = entries[-1] if entries else None
            if (
                last is not None
                and last.op.name == _RUN
                and (last.fd, last.exit_reason, last.result, last.errno) == (fd.name, reason, result, errno)
            ):
                last.count += 1
                last.run = _head(run)
                return
        entry = _Entry(time.monotonic_ns(), fd, op)
        entry.run = _head(run)
        entry.result, entry.errno, entry.exit_reason = result, errno, reason
        entry.arg = arg if arg is None or isinstance(arg, int) else (type(arg), arg.to_bytes())
        entries.append(entry)

    def lines(self) -> list[dict[str, Any]]:
        """Return the entries as JSON-ready values, the oldest first.

        ``ms`` counts from the first, ``thread`` numbers the threads from 0, ``fd`` and ``ioctl`` are names,
        ``arg`` is the decoded argument as it was when the ioctl returned (for KVM_RUN: the exit), ``result``
        its result or errno by name, ``meaning`` what that errno means for this ioctl.
        """
        from kvmpy.debug.decode import Decoder

        entries = list(self._entries)
        decoder = Decoder()
        threads: dict[int, int] = {}
        return [
            {
                "ms": round((entry.when - entries[0].when) / 1e6, 3),
                "thread": threads.setdefault(entry.thread, len(threads)),
                "fd": entry.fd,
                "ioctl": entry.op.name,
                "arg": _argument(entry, decoder),
                "result": errno_name(entry.errno) if entry.result < 0 else str(entry.result),
                "failed": entry.result < 0,
                "meaning": hint(entry.op.name, entry.errno) if entry.result < 0 else "",
                "count": entry.count,
            }
            for entry in entries
        ]


def _head(run: Any) -> bytes:
    return b"" if run is None else bytes(ffi.buffer(run, RUN_HEAD))


def _argument(entry: _Entry, decoder: Decoder) -> str:
    from kvmpy.debug.decode import Place, run_of
    from kvmpy.debug.record import events

    try:
        if entry.op.name == _RUN:
            exited = entry.result >= 0 and entry.run
            return decoder.exit_text(run_of(entry.run)) if exited else ""
        place = Place(entry.kind, entry.vm_type)
        if isinstance(entry.arg, tuple):
            return decoder.struct_text(entry.arg[0].from_bytes(entry.arg[1]), place)
        told = events.Ioctl(0, -1, entry.op.nr, entry.arg or 0, entry.result, entry.errno)
        return decoder.ioctl(told, place).before
    except Exception as error:  # noqa: BLE001 - evidence may not hide the failure it is about
        return f"not decoded: {type(error).__name__}: {error}"


def maps_of(vms: list[GuestVm]) -> list[dict[str, Any]]:
    """Return the memory maps, with the VMs' names, of the VMs that are still there, at most eight."""
    from kvmpy.guest.memorymap import memory_map

    maps = []
    for vm in [vm for vm in vms if not vm.closed][:MAX_VMS]:
        try:
            maps.append({"vm": vm.name, **memory_map(vm)})
        except Exception as error:  # noqa: BLE001 - evidence may not hide the failure it is about
            maps.append({"vm": vm.name, "hidden": f"{type(error).__name__}: {error}"})
    return maps
