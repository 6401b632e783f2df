# SPDX-License-Identifier: Apache-2.0
"""What a page about a test shows beside its verdict: the memory maps of its VMs and its last ioctls."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from kvmpy.core import observe
from kvmpy.core.errors import errno_name

if TYPE_CHECKING:
    from kvmpy.core.fd import KvmFd
    from kvmpy.guest.vm import GuestVm
    from kvmpy.uapi.ioctls import Ioctl
    from kvmpy.uapi.structs import Struct

TAIL = 64
MAX_VMS = 8
_RUN = "KVM_RUN"


class _Entry:
    """One ioctl, or several KVM_RUN in a row that ended alike."""

    __slots__ = ("arg", "count", "errno", "exit_reason", "fd", "op", "result", "thread", "when")

    def __init__(self, when: int, fd: str, op: Ioctl) -> None:
        self.when = when
        self.thread = threading.get_ident()
        self.fd = fd
        self.op = op
        self.arg: tuple[type[Struct], bytes] | int | None = None
        self.result = self.errno = 0
        self.exit_reason = -1
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

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno: int) -> None:
        """Keep the ioctl; KVM_RUNs of one vCPU that end alike are one entry with a count."""
        if observe.is_inspecting():
            return
        entries = self._entries
        reason = -1
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
                return
        entry = _Entry(time.monotonic_ns(), fd.name, op)
        entry.result, entry.errno, entry.exit_reason = result, errno, reason
        entry.arg = arg if arg is None or isinstance(arg, int) else (type(arg), arg.to_bytes())
        entries.append(entry)

    def lines(self) -> list[dict[str, Any]]:
        """Return the entries as JSON-ready values, the oldest first.

        ``ms`` counts from the first, ``thread`` numbers the threads from 0, ``fd`` and ``ioctl`` are names,
        ``arg`` is the decoded argument as it was when the ioctl returned, ``result`` its result or errno by
        name.
        """
        entries = list(self._entries)
        threads: dict[int, int] = {}
        return [
            {
                "ms": round((entry.when - entries[0].when) / 1e6, 3),
                "thread": threads.setdefault(entry.thread, len(threads)),
                "fd": entry.fd,
                "ioctl": entry.op.name,
                "arg": _argument(entry),
                "result": errno_name(entry.errno) if entry.result < 0 else str(entry.result),
                "failed": entry.result < 0,
                "count": entry.count,
            }
            for entry in entries
        ]


def _argument(entry: _Entry) -> str:
    if entry.op.name == _RUN:
        return _exit_name(entry.exit_reason)
    if entry.arg is None:
        return ""
    if isinstance(entry.arg, int):
        return f"{entry.arg:#x}"
    kind, data = entry.arg
    try:
        return str(kind.from_bytes(data))
    except Exception as error:  # noqa: BLE001 - evidence may not hide the failure it is about
        return f"{kind.__name__}, {len(data)} bytes ({error})"


def _exit_name(number: int) -> str:
    from kvmpy.uapi.constants import ExitReason

    try:
        return ExitReason(number).name
    except ValueError:
        return f"exit {number}" if number >= 0 else ""


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
