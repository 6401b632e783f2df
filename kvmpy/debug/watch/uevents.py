# SPDX-License-Identifier: Apache-2.0
"""KVM's uevents: the kernel tells over netlink when a VM is created and when it is gone.

The kernel sends them since v4.13 (commit 286de8f6ac92, "KVM: trigger uevents when creating or destroying
a VM") to every network namespace that the initial user namespace owns; listening needs no privilege.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import re
import select
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

from pyroute2 import UeventSocket
from pyroute2.netlink.uevent import MONITOR_GROUP_KERNEL

DEVPATH = "/devices/virtual/misc/kvm"
# Kernel: UEVENT_BUFFER_SIZE is 2048, and the header line adds at most a path.
_DATAGRAM = 16384
_NS_GET_USERNS = 0xB701
# No number of the kernel's has more digits.
_NUMBER = re.compile(r"[0-9]{1,20}")
# Kernel: PROC_USER_INIT_INO, the same on every machine.
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD


class UeventKind(enum.Enum):
    """What happened to the VM."""

    CREATE = "create"
    DESTROY = "destroy"


_KINDS = {kind.value: kind for kind in UeventKind}


def _number(text: str) -> int | None:
    return int(text) if _NUMBER.fullmatch(text) else None


def variables(datagram: bytes) -> dict[str, str]:
    """Return a uevent's variables: ``KEY=VALUE``, a zero byte behind each (Linux: lib/kobject_uevent.c)."""
    parts = datagram.decode("utf-8", "replace").split("\0")
    return {key: value for key, mark, value in (part.partition("=") for part in parts) if mark}


@dataclass(frozen=True)
class KvmUevent:
    """One event: the VM's creator is process *pid* (in the initial PID namespace).

    *created* counts the VMs created since KVM was loaded, *count* those that exist now, after the event.
    *stats_path* is the VM's folder below debugfs (``/kvm/PID-FD``), None where KVM has no debugfs; *seqnum*
    numbers all uevents of the kernel.
    """

    kind: UeventKind
    pid: int
    created: int
    count: int
    stats_path: str | None
    seqnum: int

    @property
    def vm_fd(self) -> int | None:
        """The file descriptor that KVM_CREATE_VM returned to the creator, by *stats_path*."""
        name = (self.stats_path or "").rpartition("/")[2]
        return _number(name.rpartition("-")[2])

    @classmethod
    def parse(cls, fields: Mapping[str, str]) -> KvmUevent | None:
        """Return the event that a uevent's variables tell, or None when it is not one of KVM's VMs."""
        if fields.get("DEVPATH") != DEVPATH or fields.get("ACTION") != "change":
            return None
        kind = _KINDS.get(fields.get("EVENT", ""))
        pid, created, count, seqnum = (
            _number(fields.get(name, "")) for name in ("PID", "CREATED", "COUNT", "SEQNUM")
        )
        if kind is None or pid is None or created is None or count is None or seqnum is None:
            return None
        return cls(kind, pid, created, count, fields.get("STATS_PATH"), seqnum)


class UeventsLostError(OSError):
    """The kernel dropped uevents because the listener did not read them in time (ENOBUFS)."""


def _namespace_kinds() -> set[str] | None:
    """Return the kinds of namespaces that this kernel has, None where /proc does not tell."""
    try:
        return set(os.listdir("/proc/self/ns"))
    except OSError:
        return None


def why_unreachable() -> str | None:
    """Return why this process cannot get KVM's uevents, or None when it can."""
    kinds = _namespace_kinds()
    if kinds is not None and not {"net", "user"} <= kinds:
        # A kernel without one of the two: the initial one is all there is.
        return None
    try:
        fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return f"the owner of this network namespace is unknown: {error}"
    try:
        owner = fcntl.ioctl(fd, _NS_GET_USERNS)
    except OSError as error:
        return f"the owner of this network namespace is unknown (NS_GET_USERNS: {error.strerror})"
    finally:
        os.close(fd)
    try:
        if os.fstat(owner).st_ino != _INITIAL_USER_NAMESPACE:
            return (
                "this network namespace is not the initial user namespace's: the kernel sends no uevents here"
            )
    finally:
        os.close(owner)
    return None


class UeventListener:
    """Hears of every VM of this machine from the moment it is made; a context manager."""

    def __init__(self) -> None:
        self._socket = UeventSocket()
        try:
            # Without udev's group: it would repeat every event once udev is through with it.
            self._socket.bind(MONITOR_GROUP_KERNEL)
        except BaseException:
            self._socket.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket.fileno(), select.POLLIN)

    def _receive(self, timeout: float) -> Mapping[str, str] | None:
        if not self._poll.poll(max(0.0, timeout) * 1000):
            return None
        try:
            data = self._socket.recv(_DATAGRAM)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise UeventsLostError(
                    errno.ENOBUFS, "the kernel dropped uevents: read them faster"
                ) from error
            raise
        return variables(data)

    def next(self, timeout: float, *, pid: int | None = None) -> KvmUevent:
        """Return the next event, of creator *pid* only if given; TimeoutError after *timeout* seconds.

        Events of other processes that come by meanwhile are dropped.
        """
        deadline = time.monotonic() + timeout
        while True:
            fields = self._receive(deadline - time.monotonic())
            event = KvmUevent.parse(fields) if fields else None
            if event is not None and pid in (None, event.pid):
                return event
            if time.monotonic() >= deadline:
                whose = "" if pid is None else f" of process {pid}"
                raise TimeoutError(f"no KVM uevent{whose} within {timeout} s")

    def pending(self, *, pid: int | None = None) -> Iterator[KvmUevent]:
        """Yield the events that have arrived, without waiting for more."""
        while (fields := self._receive(0)) is not None:
            event = KvmUevent.parse(fields)
            if event is not None and pid in (None, event.pid):
                yield event

    def close(self) -> None:
        """Stop listening; twice is harmless."""
        self._socket.close()

    def __enter__(self) -> UeventListener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
