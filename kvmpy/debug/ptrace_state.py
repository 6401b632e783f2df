# SPDX-License-Identifier: Apache-2.0
"""What a tracer learns from outside a process: its memory, its file descriptors, where its run areas are."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field

from kvmpy.debug.record.format import ObjectKind

_MAPS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ *(.*)$", re.MULTILINE)
_NAMED = {"/dev/kvm": (ObjectKind.SYSTEM, "kvm"), "/dev/sev": (ObjectKind.SEV, "sev")}


@dataclass
class Known:
    """An object: its number in the record, what it is, and what is remembered of it."""

    ident: int
    kind: ObjectKind
    name: str
    vm: Known | None = None
    slots: dict[int, int] = field(default_factory=dict)
    """Bytes of memory by slot number."""
    xsave: int = 0
    run: int = 0
    run_length: int = 0
    shadow: bytes = b""
    answer: tuple[int, int] = (0, 0)
    """Address and size of the data that the guest reads from a port with its next run."""
    gmems: int = 0

    @property
    def owner(self) -> Known:
        """The VM, for what belongs to one."""
        return self.vm if self.vm is not None else self


class Process:
    """A traced process; threads share one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.objects: dict[int, Known] = {}
        self._memory = -1

    def peek(self, address: int, size: int) -> bytes:
        """Return what can be read of *size* bytes at *address*."""
        if self._memory < 0:
            with contextlib.suppress(OSError):
                self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        if self._memory < 0 or not 0 <= address < 1 << 63:
            return b""
        try:
            return os.pread(self._memory, size, address)
        except OSError:
            # All or nothing above: what lies before the first bad page is told.
            left = 4096 - address % 4096
            return self.peek(address, left) if left < size else b""

    def executed(self) -> None:
        """The process runs another program: its memory and most file descriptors are new."""
        self.close()
        self.objects = {}

    def close(self) -> None:
        """Let go of the process's memory."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def target(self, fd: int) -> str:
        """Return what /proc says of a file descriptor."""
        try:
            return os.readlink(f"/proc/{self.pid}/fd/{fd}")
        except OSError:
            return ""

    def open_files(self) -> list[int]:
        """Return the process's file descriptors."""
        try:
            return sorted(int(name) for name in os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return []

    def run_mappings(self, vcpu: str) -> list[tuple[int, int]]:
        """Return address and length of the mappings of vCPU files with this name, from their begin."""
        try:
            with open(f"/proc/{self.pid}/maps") as file:
                text = file.read()
        except OSError:
            return []
        found = []
        for start, end, offset, name in _MAPS.findall(text):
            if name.removesuffix(" (deleted)") == vcpu and int(offset, 16) == 0:
                found.append((int(start, 16), int(end, 16) - int(start, 16)))
        return found


def kind_of(target: str) -> tuple[ObjectKind, str] | None:
    """Return what a file descriptor is, and its name, by what /proc says; None for what is not KVM's."""
    if target in _NAMED:
        return _NAMED[target]
    name = target.removeprefix("anon_inode:")
    if name == target and "guest_memfd" not in target:
        return None
    if name == "kvm-vm":
        return ObjectKind.VM, "vm"
    if name.startswith(("kvm-vcpu-stats", "kvm-vm-stats")):
        return ObjectKind.STATS, name.removeprefix("kvm-")
    if name.startswith("kvm-vcpu"):
        return ObjectKind.VCPU, f"vcpu{name.partition(':')[2]}"
    if "guest_memfd" in name or "kvm-gmem" in name:
        return ObjectKind.GMEM, "gmem"
    if name.startswith("kvm-"):
        return ObjectKind.DEVICE, name.removeprefix("kvm-")
    return None
