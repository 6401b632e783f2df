# SPDX-License-Identifier: Apache-2.0
"""An image of OVMF, as far as a launch measures it: where it lies, what it wants, how its vCPUs start.

In front of the last 32 bytes lies a table that is read backwards: data, a length of two bytes, a GUID (OVMF:
ResetVectorVtf0.asm; its SEV sections: OvmfSevMetadata.asm). The table of hashes of what is booted directly is
that of QEMU (sev_add_kernel_loader_hashes()). No KVM is needed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from uuid import UUID

PAGE_SIZE = 4096
FLASH_END = 1 << 32
"""Where the image ends in the guest."""

FOOTER = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
RESET_BLOCK = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
METADATA = UUID("dc886566-984a-4798-a75e-5585a7bf67cc")
HASH_TABLE = UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")

HASHES = UUID("9438d606-4f22-4cc9-b479-a793d411fd21")
CMDLINE_HASH = UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
INITRD_HASH = UUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
KERNEL_HASH = UUID("4de79437-abd2-427f-b835-d5b172d2045b")

_BEHIND_TABLE = 32
_ENTRY = struct.Struct("<H16s")
_METADATA = struct.Struct("<4sIII")
_SECTION = struct.Struct("<III")
_HASH_ENTRY = struct.Struct("<16sH32s")
_ALIGN = 16


class OvmfError(ValueError):
    """An image that cannot be measured; the message says what it lacks."""


class SectionKind(IntEnum):
    """What a section of the SEV metadata is for."""

    SEC_MEM = 1
    SECRETS = 2
    CPUID = 3
    SVSM_CAA = 4
    KERNEL_HASHES = 0x10


@dataclass(frozen=True)
class Section:
    """Guest memory that the image wants prepared: *size* bytes from *gpa* on, whole pages."""

    gpa: int
    size: int
    kind: SectionKind


@dataclass(frozen=True)
class Ovmf:
    """An image: its bytes, and the entries of its table by GUID."""

    data: bytes
    table: Mapping[UUID, bytes]

    @classmethod
    def read(cls, path: Path) -> Ovmf:
        """Read an image file; OvmfError where it is none."""
        try:
            return cls.parse(path.read_bytes())
        except OvmfError as error:
            raise OvmfError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, data: bytes) -> Ovmf:
        """Find the table of an image; one without has no entries."""
        if not data or len(data) % PAGE_SIZE or len(data) >= FLASH_END:
            raise OvmfError(f"{len(data):#x} bytes are not a whole number of pages below 4 GiB")
        return cls(data, _table(data))

    @property
    def gpa(self) -> int:
        """Where the image begins in the guest."""
        return FLASH_END - len(self.data)

    @property
    def reset_eip(self) -> int | None:
        """Where vCPUs but the first start under SEV-ES and SNP; None where the image does not say."""
        return self._address(RESET_BLOCK)

    @property
    def hash_table_gpa(self) -> int | None:
        """Where the table of hashes lies; None where the image takes none."""
        return self._address(HASH_TABLE) or None

    def _address(self, guid: UUID) -> int | None:
        entry = self.table.get(guid)
        if entry is None:
            return None
        if len(entry) < 4:
            raise OvmfError(f"table entry {guid} has {len(entry)} bytes, an address has 4")
        return int.from_bytes(entry[:4], "little")

    def sections(self) -> list[Section]:
        """Return the sections of the SEV metadata, in their order; OvmfError where the image has none."""
        offset = self._address(METADATA)
        if offset is None:
            raise OvmfError("the image has no SEV metadata: it is not built for SNP")
        start = len(self.data) - offset
        if start < 0 or start + _METADATA.size > len(self.data):
            raise OvmfError(f"the SEV metadata, {offset:#x} bytes before the end, are not in the image")
        magic, size, version, count = _METADATA.unpack_from(self.data, start)
        if magic != b"ASEV" or version != 1:
            raise OvmfError(f"the SEV metadata are {magic!r} version {version}, not b'ASEV' version 1")
        end = start + min(size, len(self.data) - start)
        if start + _METADATA.size + count * _SECTION.size > end:
            raise OvmfError(f"{count} sections do not fit the SEV metadata's {size} bytes")
        position = start + _METADATA.size
        return [
            _section(*_SECTION.unpack_from(self.data, position + n * _SECTION.size)) for n in range(count)
        ]


def _table(data: bytes) -> dict[UUID, bytes]:
    end = len(data) - _BEHIND_TABLE
    results: dict[UUID, bytes] = {}
    size, guid = _ENTRY.unpack_from(data, end - _ENTRY.size)
    if guid != FOOTER.bytes_le:
        return results
    start = end - size
    if size < _ENTRY.size or start < 0:
        raise OvmfError(f"the table of {size} bytes does not fit the image")
    end -= _ENTRY.size
    while end - start >= _ENTRY.size:
        size, guid = _ENTRY.unpack_from(data, end - _ENTRY.size)
        if size < _ENTRY.size or end - size < start:
            raise OvmfError(f"table entry {UUID(bytes_le=guid)} of {size} bytes does not fit the table")
        results[UUID(bytes_le=guid)] = data[end - size : end - _ENTRY.size]
        end -= size
    return results


def _section(gpa: int, size: int, kind: int) -> Section:
    if kind not in SectionKind._value2member_map_:
        raise OvmfError(f"the SEV metadata have a section of unknown kind {kind:#x} at {gpa:#x}")
    if gpa % PAGE_SIZE or size % PAGE_SIZE or not size:
        raise OvmfError(f"section {SectionKind(kind).name}, {size:#x} bytes at {gpa:#x}, is not whole pages")
    return Section(gpa, size, SectionKind(kind))


@dataclass(frozen=True)
class KernelHashes:
    """SHA-256 of what is booted directly: kernel, initrd (nothing without one) and command line."""

    kernel: bytes
    initrd: bytes
    cmdline: bytes

    @classmethod
    def of(cls, kernel: Path, initrd: Path | None = None, append: str = "") -> KernelHashes:
        """Hash the files and the command line, which the firmware gets with a zero behind it."""
        return cls(
            _sha256(kernel),
            hashlib.sha256().digest() if initrd is None else _sha256(initrd),
            hashlib.sha256(append.encode() + b"\0").digest(),
        )

    def table(self) -> bytes:
        """Return the table that the firmware reads, padded to 16 bytes."""
        entries = b"".join(
            _HASH_ENTRY.pack(guid.bytes_le, _HASH_ENTRY.size, digest)
            for guid, digest in (
                (CMDLINE_HASH, self.cmdline),
                (INITRD_HASH, self.initrd),
                (KERNEL_HASH, self.kernel),
            )
        )
        size = 16 + 2 + len(entries)
        table = HASHES.bytes_le + size.to_bytes(2, "little") + entries
        return table.ljust(-(-size // _ALIGN) * _ALIGN, b"\0")

    def pages(self, section: Section, table_gpa: int | None) -> bytes:
        """Return the pages of *section* with the table at *table_gpa* in them; OvmfError where it is not."""
        table = self.table()
        if table_gpa is None:
            raise OvmfError("the image has no place for hashes of a kernel")
        offset = table_gpa - section.gpa
        if not 0 <= offset <= section.size - len(table):
            raise OvmfError(
                f"the table of hashes at {table_gpa:#x} is not in its section at {section.gpa:#x}"
            )
        return (bytes(offset) + table).ljust(section.size, b"\0")


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.digest()
