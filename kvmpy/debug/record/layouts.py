# SPDX-License-Identifier: Apache-2.0
"""Structs that C and Python share, declared once as C has them: :mod:`kvmpy.gen` makes the headers."""

from __future__ import annotations

import re
import struct

LAYOUTS: dict[str, str] = {}
"""The members of each struct by its name without ``kvmpy_``."""

OFFSETS: dict[str, dict[str, int]] = {}
"""Where their members begin."""

PACKINGS: dict[str, struct.Struct] = {}

_CODES = {
    "uint8_t": "B", "uint16_t": "H", "uint32_t": "I", "uint64_t": "Q", "int32_t": "i", "int64_t": "q",
}  # fmt: skip
_MEMBER = re.compile(r"(?:_Alignas\((\d+)\) )?(?:_Atomic )?(\w+) (\w+)(?:\[(\d+)\])?;")


def layout(name: str, members: str) -> struct.Struct:
    """Declare ``struct kvmpy_NAME`` and return how Python packs it, little-endian.

    *members* are C declarations of fixed-width integers and arrays of bytes, each at a multiple of its size.
    """
    LAYOUTS[name] = members
    packing, OFFSETS[name] = "<", {}
    for align, kind, member, count in _MEMBER.findall(members):
        gap = -struct.calcsize(packing) % int(align or 1)
        packing += f"{gap}x" if gap else ""
        OFFSETS[name][member] = struct.calcsize(packing)
        packing += f"{count}s" if count else _CODES[kind]
    PACKINGS[name] = struct.Struct(packing)
    return PACKINGS[name]
