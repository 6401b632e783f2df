# SPDX-License-Identifier: Apache-2.0
"""Firmware images that tests make themselves: content, SEV metadata, and the table before the end."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from uuid import UUID

from kvmpy.coco import ovmf

SECTIONS = (
    (0x80_0000, 0x9000, 1),
    (0x80_A000, 0x3000, 1),
    (0x80_D000, 0x1000, 2),
    (0x80_E000, 0x1000, 3),
    (0x81_0000, 0x1000, 0x10),
    (0x81_1000, 0x1000, 4),
)
HASH_TABLE_GPA = 0x81_0C00
RESET_EIP = 0x0080_B004


def entry(guid: UUID, data: bytes) -> bytes:
    """Return one entry of the table."""
    return data + struct.pack("<H", len(data) + 18) + guid.bytes_le


def image(
    pages: int = 4,
    sections: Sequence[tuple[int, int, int]] | None = SECTIONS,
    *,
    hash_table: int | None = HASH_TABLE_GPA,
    reset_eip: int | None = RESET_EIP,
    seed: int = 1,
) -> bytes:
    """Return an image of so many *pages*; what is None is left out."""
    data = bytearray(random.Random(seed).randbytes(pages * 4096))
    table = entry(UUID(int=7), b"somebody else's")
    if sections is not None:
        metadata = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sections), 1, len(sections))
        metadata += b"".join(struct.pack("<III", *section) for section in sections)
        data[0x100 : 0x100 + len(metadata)] = metadata
        table += entry(ovmf.METADATA, struct.pack("<I", len(data) - 0x100))
    if hash_table is not None:
        table += entry(ovmf.HASH_TABLE, struct.pack("<II", hash_table, 0x400))
    if reset_eip is not None:
        table += entry(ovmf.RESET_BLOCK, struct.pack("<I", reset_eip))
    table += struct.pack("<H", len(table) + 18) + ovmf.FOOTER.bytes_le
    end = len(data) - 32
    data[end - len(table) : end] = table
    return bytes(data)
