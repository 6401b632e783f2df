# SPDX-License-Identifier: Apache-2.0
"""The launch digest of an SNP guest, computed as the firmware does.

The digest starts as 48 zero bytes; every page extends it by SHA-384 over a PAGE_INFO of 112 bytes (SEV Secure
Nested Paging Firmware ABI, section 8.17.2).  No KVM is needed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from mmap import ACCESS_READ, mmap
from pathlib import Path

PAGE_SIZE = 4096
DIGEST_SIZE = 48
VMSA_GPA = 0xFFFF_FFFF_F000
"""Where KVM's LAUNCH_FINISH says that every VMSA lies (Linux: snp_launch_update_vmsa)."""

GPA_LIMIT = 1 << 52
# PAGE_INFO: the digest so far, that of the contents, what its pages have in common, the address.
_PAGE_INFO = struct.Struct("<48s48sQQ")
_COMMON = struct.Struct("<HBBBBBB")
_ZERO_DIGEST = bytes(DIGEST_SIZE)
_CHUNK_PAGES = 4096
_PARALLEL_FROM = 16 * _CHUNK_PAGES
"""Pages (256 MiB) from which starting processes costs less than it saves."""


class PageType(IntEnum):
    """Page types of SNP_LAUNCH_UPDATE (Firmware ABI, table 67)."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


@dataclass(frozen=True)
class VmplPermissions:
    """What VMPL1 to VMPL3 may do with a page: bits read 1, write 2, user execute 4, supervisor execute 8."""

    vmpl1: int = 0
    vmpl2: int = 0
    vmpl3: int = 0


_NO_PERMISSIONS = VmplPermissions()


class SnpDigest:
    """A launch digest in the making; :attr:`value` is what it is after the pages so far."""

    def __init__(self, value: bytes = _ZERO_DIGEST) -> None:
        if len(value) != DIGEST_SIZE:
            raise ValueError(f"a launch digest has {DIGEST_SIZE} bytes, not {len(value)}")
        self._value = bytes(value)
        self.pages = 0

    @property
    def value(self) -> bytes:
        """The digest, 48 bytes."""
        return self._value

    def copy(self) -> SnpDigest:
        """Return an independent digest with the same pages."""
        other = SnpDigest(self._value)
        other.pages = self.pages
        return other

    def add(
        self,
        page_type: PageType,
        gpa: int,
        contents: bytes | bytearray | memoryview | None = None,
        *,
        pages: int | None = None,
        permissions: VmplPermissions = _NO_PERMISSIONS,
        imi: bool = False,
    ) -> None:
        """Add pages from *gpa* on: *contents* of whole pages for NORMAL and VMSA, else a number of *pages*.

        A VMSA does not move the address: KVM measures all of them at one GPA.
        """
        if page_type in (PageType.NORMAL, PageType.VMSA):
            if contents is None:
                raise ValueError(f"a page of type {page_type.name} is measured by its contents")
            view = memoryview(contents).cast("B")
            if not len(view) or len(view) % PAGE_SIZE:
                raise ValueError(f"{len(view):#x} bytes are not a whole number of pages")
            digests: Iterable[bytes] = page_digests(view)
            count = len(view) // PAGE_SIZE
        else:
            if contents is not None:
                raise ValueError(f"the contents of a page of type {page_type.name} are not measured")
            count = 1 if pages is None else pages
            if count < 1:
                raise ValueError(f"{count} pages cannot be added")
            digests = (_ZERO_DIGEST for _ in range(count))
        self.add_digests(page_type, gpa, digests, count=count, permissions=permissions, imi=imi)

    def add_vmsa(self, contents: bytes | bytearray | memoryview, gpa: int = VMSA_GPA) -> None:
        """Add one vCPU's save area of 4096 bytes, as SNP_LAUNCH_FINISH does for each vCPU in order."""
        if memoryview(contents).nbytes != PAGE_SIZE:
            raise ValueError(f"a VMSA has {PAGE_SIZE} bytes, not {memoryview(contents).nbytes}")
        self.add(PageType.VMSA, gpa, contents)

    def add_digests(
        self,
        page_type: PageType,
        gpa: int,
        digests: Iterable[bytes],
        *,
        count: int,
        permissions: VmplPermissions = _NO_PERMISSIONS,
        imi: bool = False,
    ) -> None:
        """Add *count* pages whose SHA-384 is known already."""
        if gpa % PAGE_SIZE or not 0 <= gpa <= GPA_LIMIT - count * PAGE_SIZE:
            raise ValueError(f"{gpa:#x} is not the address of {count} guest pages")
        for name in ("vmpl1", "vmpl2", "vmpl3"):
            if not 0 <= getattr(permissions, name) <= 0xFF:
                raise ValueError(f"{name} permissions {getattr(permissions, name):#x} do not fit a byte")
        vmpls = permissions.vmpl3, permissions.vmpl2, permissions.vmpl1
        common = _COMMON.pack(_PAGE_INFO.size, int(page_type), int(imi), *vmpls, 0)
        number = int.from_bytes(common, "little")
        value, sha384, pack = self._value, hashlib.sha384, _PAGE_INFO.pack
        for digest in digests:
            value = sha384(pack(value, digest, number, gpa)).digest()
            gpa += PAGE_SIZE
        self._value = value
        self.pages += count


def page_digests(view: memoryview) -> Iterator[bytes]:
    """Yield the SHA-384 of every page of *view*."""
    sha384 = hashlib.sha384
    for start in range(0, len(view), PAGE_SIZE):
        yield sha384(view[start : start + PAGE_SIZE]).digest()


def _file_part(path: str, start: int, pages: int) -> bytes:
    with Path(path).open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
        view = memoryview(mapped)
        part = view[start : start + pages * PAGE_SIZE]
        digests = b"".join(page_digests(part))
        part.release()
        view.release()
    return digests


def file_page_digests(path: Path, processes: int = 1) -> Iterator[bytes]:
    """Yield the SHA-384 of every page of a file, with more than one process when it is large.

    Raises OSError, and ValueError when the file is empty or no whole number of pages.
    """
    size = path.stat().st_size
    if not size or size % PAGE_SIZE:
        raise ValueError(f"{path}: {size:#x} bytes are not a whole number of pages of {PAGE_SIZE:#x}")
    total = size // PAGE_SIZE
    parts = [(start, min(_CHUNK_PAGES, total - start)) for start in range(0, total, _CHUNK_PAGES)]
    if processes < 2 or total < _PARALLEL_FROM:
        chunks: Iterable[bytes] = (_file_part(str(path), start * PAGE_SIZE, n) for start, n in parts)
        yield from _split(chunks)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from _split(
            pool.map(
                _file_part,
                [str(path)] * len(parts),
                [start * PAGE_SIZE for start, _ in parts],
                [n for _, n in parts],
            )
        )


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), DIGEST_SIZE):
            yield chunk[start : start + DIGEST_SIZE]
