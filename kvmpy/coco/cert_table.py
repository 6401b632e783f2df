# SPDX-License-Identifier: Apache-2.0
"""The table of certificates that an extended guest request gives an SNP guest beside its report.

GHCB specification, "SNP Extended Guest Request": entries of a GUID, an offset and a length, ended by an
entry of zeros; the certificates follow.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from uuid import UUID

# Bytes of a GUID are in the order in which it is written.
VCEK = UUID("63da758d-e664-4564-adc5-f4b93be8accd")
VLEK = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
ASK = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
ARK = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
CRL = UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")

_ENTRY = struct.Struct("<16sII")
_END = bytes(_ENTRY.size)


class CertTableError(ValueError):
    """A table that cannot be read: without an end, or with a certificate outside of it."""


def pack(certificates: Mapping[UUID, bytes]) -> bytes:
    """Return the table of *certificates* (DER each) in the order given; its size is no whole page."""
    offset = _ENTRY.size * (len(certificates) + 1)
    head = b""
    for guid, data in certificates.items():
        head += _ENTRY.pack(guid.bytes, offset, len(data))
        offset += len(data)
    return head + _END + b"".join(certificates.values())


def unpack(data: bytes) -> dict[UUID, bytes]:
    """Return the certificates of a table, which may be followed by anything; raises CertTableError."""
    results: dict[UUID, bytes] = {}
    for start in range(0, len(data) - _ENTRY.size + 1, _ENTRY.size):
        guid, offset, length = _ENTRY.unpack_from(data, start)
        if data[start : start + _ENTRY.size] == _END:
            return results
        if offset + length > len(data):
            raise CertTableError(
                f"certificate {UUID(bytes=guid)} is at {offset:#x} with {length} bytes, "
                f"the table has {len(data)}"
            )
        results[UUID(bytes=guid)] = data[offset : offset + length]
    raise CertTableError(f"no entry of zeros ends the table in its {len(data)} bytes")
