# SPDX-License-Identifier: Apache-2.0
"""Host mappings that back guest memory: anonymous, transparent or explicit huge pages, memfd, mmapped
guest_memfd.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from array import array
from dataclasses import dataclass

from kvmpy.core import observe
from kvmpy.core.address import PAGE_SIZE, SIZE_1G, SIZE_2M
from kvmpy.core.closing import Closing
from kvmpy.core.errors import MissingError
from kvmpy.uapi import ffi

_MAP_NORESERVE = 0x4000  # not in the mmap module before Python 3.13
_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26
_MFD_HUGETLB = 0x4
_PAGEMAP_SWAPPED_BIT = 62  # bit 63: present (Documentation/admin-guide/mm/pagemap.rst)
_HUGE_KIB = {SIZE_2M: 2048, SIZE_1G: 1048576}


class Mapping(Closing):
    """A mapping of host memory that this object owns: ``.hva``, ``.size``, and ``.fd`` (or -1) with
    ``.offset``.

    Views made by :meth:`view` keep the mapping alive after :meth:`close`: it goes with the last of them.
    """

    def __init__(
        self, area: mmap.mmap, size: int, *, align: int = PAGE_SIZE, fd: int = -1, offset: int = 0
    ) -> None:
        base = int(ffi.cast("uintptr_t", ffi.from_buffer(area)))
        skip = -base % align
        self.hva = base + skip
        self.size = size
        self.fd = fd
        self.offset = offset
        self._area: mmap.mmap | None = area
        self._view: memoryview | None = memoryview(area)[skip : skip + size]

    def view(self, offset: int, size: int) -> memoryview:
        """Return *size* bytes from *offset* as a writable view of the memory itself, not a copy."""
        window = self.look(offset, size)
        for observer in observe.host:
            observer.memory_shown(window, False)
        return window

    def look(self, offset: int, size: int) -> memoryview:
        """Return the same for a caller who tells observers itself what it writes."""
        if self._view is None:
            raise ValueError("the mapping is closed")
        return self._view[offset : offset + size]

    def madvise(self, advice: int, offset: int = 0, size: int | None = None) -> None:
        """Call madvise(2) on a part of the mapping (bytes, page aligned)."""
        if self._area is None:
            raise ValueError("the mapping is closed")
        skip = self.hva - int(ffi.cast("uintptr_t", ffi.from_buffer(self._area)))
        self._area.madvise(advice, skip + offset, self.size - offset if size is None else size)

    def touched(self, offset: int, size: int) -> list[tuple[int, int]]:
        """Return the parts ``(offset, bytes)`` of a range, in whole pages, that anybody ever wrote or read;
        the rest of anonymous memory is zero.

        From /proc/self/pagemap; the whole range where that cannot be read.
        """
        first, last = offset // PAGE_SIZE, -(-(offset + size) // PAGE_SIZE)
        base = self.hva // PAGE_SIZE
        entries = array("Q")
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as table:
                entries.frombytes(os.pread(table.fileno(), 8 * (last - first), 8 * (base + first)))
        except OSError:
            return [(offset, size)]
        parts: list[tuple[int, int]] = []
        for page, entry in enumerate(entries, first):
            if not entry >> _PAGEMAP_SWAPPED_BIT:
                continue
            if parts and sum(parts[-1]) == page * PAGE_SIZE:
                parts[-1] = (parts[-1][0], parts[-1][1] + PAGE_SIZE)
            else:
                parts.append((page * PAGE_SIZE, PAGE_SIZE))
        return parts

    @property
    def closed(self) -> bool:
        """Whether the mapping was given back."""
        return self._area is None

    def close(self) -> None:
        """Unmap, at once or, where views are still held, with the last of them."""
        area, self._area, view, self._view = self._area, None, self._view, None
        if view is not None:
            view.release()
        if area is not None:
            # Where somebody holds a view, the mmap object goes with it.
            with contextlib.suppress(BufferError):
                area.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        """Close a memfd that was left open; memory alone goes with its last view in any case."""
        if getattr(self, "fd", -1) >= 0:
            super().__del__()


@dataclass(frozen=True)
class Anonymous:
    """Private anonymous memory; *huge* asks for transparent huge pages (``"thp"``) or forbids them
    (``"never"``).
    """

    huge: str | None = None

    def map(self, size: int) -> Mapping:
        """Map *size* bytes."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        align = SIZE_2M if self.huge == "thp" else PAGE_SIZE
        area = mmap.mmap(-1, size + align - PAGE_SIZE, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        mapping = Mapping(area, size, align=align)
        if self.huge is not None:
            if self.huge not in ("thp", "never"):
                mapping.close()
                raise ValueError(f"huge={self.huge!r}: expected 'thp' or 'never'")
            mapping.madvise(mmap.MADV_HUGEPAGE if self.huge == "thp" else mmap.MADV_NOHUGEPAGE)
        return mapping


@dataclass(frozen=True)
class Inaccessible:
    """Addresses with nothing behind them (PROT_NONE): whoever reads or writes there faults, KVM too."""

    def map(self, size: int) -> Mapping:
        """Reserve *size* bytes of addresses."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        return Mapping(mmap.mmap(-1, size, flags, prot=0), size)


@dataclass(frozen=True)
class HugeTlb:
    """Explicit huge pages of *page_size* (2 MiB or 1 GiB) from the host's hugetlb pool; MissingError when
    it is empty.
    """

    page_size: int = SIZE_2M

    def map(self, size: int) -> Mapping:
        """Map *size* bytes, a multiple of the page size."""
        if self.page_size not in _HUGE_KIB or size % self.page_size:
            raise ValueError(
                f"size {size:#x} is not a multiple of a 2 MiB or 1 GiB huge page ({self.page_size:#x})"
            )
        shift = self.page_size.bit_length() - 1
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | shift << _MAP_HUGE_SHIFT
        try:
            area = mmap.mmap(-1, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise _no_huge_pages(self.page_size, size, error) from error
        return Mapping(area, size)


def _no_huge_pages(page_size: int, size: int, error: OSError) -> Exception:
    if error.errno not in (errno.ENOMEM, errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP):
        return error
    kib = _HUGE_KIB[page_size]
    return MissingError(
        f"{size // page_size} free hugetlb pages of {kib} KiB",
        f"echo {size // page_size} > /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages (as root)",
    )


@dataclass(frozen=True)
class MemFd:
    """Shared memory behind a memfd, that other processes and mappings can see; *huge_page_size* puts it on
    hugetlb.
    """

    huge_page_size: int | None = None

    def map(self, size: int) -> Mapping:
        """Create the memfd and map *size* bytes of it."""
        flags = os.MFD_CLOEXEC
        if self.huge_page_size is not None:
            if self.huge_page_size not in _HUGE_KIB or size % self.huge_page_size:
                raise ValueError(f"size {size:#x} is not a multiple of the huge page size")
            flags |= _MFD_HUGETLB | (self.huge_page_size.bit_length() - 1) << _MAP_HUGE_SHIFT
        fd = os.memfd_create("kvmpy", flags)
        try:
            os.ftruncate(fd, size)
            area = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.close(fd)
            if self.huge_page_size is not None:
                raise _no_huge_pages(self.huge_page_size, size, error) from error
            raise
        return Mapping(area, size, fd=fd)


@dataclass(frozen=True)
class MappedGuestMemfd:
    """A guest_memfd of the VM itself, mapped into the host: both ends of the slot are the same pages.

    *flags* are those of KVM_CREATE_GUEST_MEMFD; by default GUEST_MEMFD_FLAG_MMAP and
    GUEST_MEMFD_FLAG_INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS says which a VM type offers).
    """

    flags: int = 3


Backing = Anonymous | HugeTlb | MemFd | MappedGuestMemfd
