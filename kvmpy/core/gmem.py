# SPDX-License-Identifier: Apache-2.0
"""guest_memfd: guest memory as a file that belongs to one VM (KVM_CREATE_GUEST_MEMFD)."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from kvmpy.core import observe
from kvmpy.core.backing import Mapping
from kvmpy.core.fd import KvmFd
from kvmpy.uapi import ffi, lib

if TYPE_CHECKING:
    from kvmpy.core.slots import VmSlots

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2


class GuestMemfd(KvmFd):
    """A guest_memfd of *size* bytes; it outlives its VM's file descriptor but serves no other VM."""

    kind = "gmem"

    def __init__(self, vm: VmSlots, fd: int, size: int, flags: int) -> None:
        super().__init__(fd, f"{vm.name}/gmem{fd}")
        self.size = size
        self.flags = flags

    def map(self, size: int | None = None, offset: int = 0) -> Mapping:
        """Map it into this process; OSError (ENODEV) unless it was created with GUEST_MEMFD_FLAG_MMAP."""
        length = self.size - offset if size is None else size
        return Mapping(self.mmap(length, offset), length, offset=offset)

    def fallocate(self, mode: int, offset: int, size: int) -> None:
        """Call fallocate(2) with *mode* as it is; OSError with its errno.

        What a signal interrupts is done again.
        """
        number = ffi.errno if lib.kvmpy_fallocate(self.fd, mode, offset, size) else 0
        for observer in observe.host:
            observer.file_called(self, mode, offset, size, number)
        if number:
            raise OSError(
                number, f"fallocate({mode:#x}, {offset:#x}, {size:#x}) on {self.name}: {os.strerror(number)}"
            )

    def allocate(self, offset: int = 0, size: int | None = None) -> None:
        """Allocate the pages of a range in advance."""
        self.fallocate(FALLOC_FL_KEEP_SIZE, offset, self.size - offset if size is None else size)

    def punch_hole(self, offset: int = 0, size: int | None = None) -> None:
        """Give the pages of a range back; the guest finds zeroes there next time."""
        length = self.size - offset if size is None else size
        self.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def truncate(self, size: int) -> None:
        """Call ftruncate(2); guest_memfd answers with EINVAL, the size is fixed."""
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "?")
            raise OSError(error.errno, f"ftruncate({size:#x}) on {self.name}: {name}") from error
