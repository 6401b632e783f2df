# SPDX-License-Identifier: Apache-2.0
"""Binary statistics of a VM or a vCPU, read through a file descriptor of their own (KVM_GET_STATS_FD)."""

from __future__ import annotations

import os

from kvmpy.core.fd import KvmFd
from kvmpy.core.topic import Topic
from kvmpy.uapi import ioctls
from kvmpy.uapi.stats import (
    Bucket,
    StatDescriptor,
    Stats,
    StatsFile,
    StatsHeader,
    StatValue,
    parse_descriptors,
    parse_values,
)

__all__ = [
    "BinaryStats",
    "Bucket",
    "StatDescriptor",
    "StatValue",
    "Stats",
    "StatsFd",
    "StatsHeader",
    "parse_descriptors",
    "parse_values",
]


class StatsFd(KvmFd):
    """The statistics file of a VM or vCPU; it stays readable after that was closed.

    ``id`` is the kernel's name of the object, such as ``kvm-1234/vcpu-0``.
    """

    kind = "stats"

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, name)
        try:
            self._file = StatsFile.parse(self._read)
        except ValueError:
            self.close()
            raise
        self.header = self._file.header
        self.id = self._file.id
        self.descriptors = list(self._file.descriptors)

    def _read(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0:
            part = os.pread(self.fd, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def read(self) -> Stats:
        """Return all statistics by name, read in one go."""
        return self._file.values(self._read)


class BinaryStats(Topic):
    """The statistics of a VM or vCPU, in a file of their own (KVM_CAP_BINARY_STATS_FD)."""

    _owner: KvmFd

    def get_fd(self) -> StatsFd:
        """Open the statistics file; the caller closes it (KVM_GET_STATS_FD)."""
        return StatsFd(self._owner.ioctl(ioctls.KVM_GET_STATS_FD), f"{self._owner.name}/stats")

    def get(self) -> Stats:
        """Return the statistics by name, once; keep a :meth:`get_fd` open to read them often."""
        with self.get_fd() as stats:
            return stats.read()
