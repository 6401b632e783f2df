# SPDX-License-Identifier: Apache-2.0
"""Messages between an SNP guest and the firmware: what a guest request carries, sealed with a VMPCK.

SEV Secure Nested Paging Firmware ABI, chapter 7 and section 8.26 (SNP_GUEST_REQUEST). A VMPCK stays in its
guest: a test guest seals what the host lays before it in the clear, and opens the answers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER_SIZE = 0x60
KEY_SIZE = 32
PAYLOAD_MAX = 4096 - HEADER_SIZE
_AES_256_GCM = 1
_HEADER_VERSION = 1
_TAG_SIZE = 16
_AUTHENTICATED = 0x30
_FIELDS = struct.Struct("<BBHBBHIB35x")


class MessageType(IntEnum):
    """Kinds of messages (table 99)."""

    CPUID_REQ = 1
    CPUID_RSP = 2
    KEY_REQ = 3
    KEY_RSP = 4
    REPORT_REQ = 5
    REPORT_RSP = 6
    EXPORT_REQ = 7
    EXPORT_RSP = 8
    IMPORT_REQ = 9
    IMPORT_RSP = 10
    ABSORB_REQ = 11
    ABSORB_RSP = 12
    VMRK_REQ = 13
    VMRK_RSP = 14
    TSC_INFO_REQ = 17
    TSC_INFO_RSP = 18


class MessageError(ValueError):
    """A message that cannot be read: cut short, of an unknown form, or not sealed with this key."""


@dataclass(frozen=True)
class Message:
    """One plaintext message; *vmpck* is the number of the key that seals it, 0 to 3."""

    type: int
    payload: bytes = field(repr=False)  # a report names its chip, a key is one
    sequence: int
    vmpck: int = 0
    version: int = 1

    def clear(self) -> bytes:
        """Return header and payload, at most 4096 bytes: what a guest has before it seals, tag 0."""
        if not 0 < len(self.payload) <= PAYLOAD_MAX:
            raise MessageError(f"a payload has 1 to {PAYLOAD_MAX} bytes, not {len(self.payload)}")
        fields = _FIELDS.pack(
            _AES_256_GCM,
            _HEADER_VERSION,
            HEADER_SIZE,
            self.type,
            self.version,
            len(self.payload),
            0,
            self.vmpck,
        )
        return bytes(32) + struct.pack("<QQ", self.sequence, 0) + fields + self.payload

    def seal(self, key: bytes) -> bytes:
        """Return header and encrypted payload, at most 4096 bytes, as a request page begins."""
        clear = self.clear()
        known = clear[_AUTHENTICATED:HEADER_SIZE]
        sealed = AESGCM(_checked(key)).encrypt(_iv(self.sequence), self.payload, known)
        tag, text = sealed[-_TAG_SIZE:], sealed[:-_TAG_SIZE]
        return tag + clear[_TAG_SIZE:HEADER_SIZE] + text

    @classmethod
    def read(cls, data: bytes) -> Message:
        """Read a message whose payload is in the clear, or sealed still; raises MessageError."""
        if len(data) < HEADER_SIZE:
            raise MessageError(f"a message has a header of {HEADER_SIZE} bytes, here are {len(data)}")
        (sequence,) = struct.unpack_from("<Q", data, 0x20)
        algorithm, header_version, header_size, kind, version, size, _, vmpck = _FIELDS.unpack_from(
            data, _AUTHENTICATED
        )
        if (algorithm, header_version, header_size) != (_AES_256_GCM, _HEADER_VERSION, HEADER_SIZE):
            raise MessageError(
                f"algorithm {algorithm}, header version {header_version} of {header_size:#x} bytes is unknown"
            )
        if len(data) < HEADER_SIZE + size:
            raise MessageError(f"the message has {size} bytes of payload, here are {len(data) - HEADER_SIZE}")
        return cls(kind, data[HEADER_SIZE : HEADER_SIZE + size], sequence, vmpck, version)

    @classmethod
    def open(cls, data: bytes, key: bytes) -> Message:
        """Read a sealed message; raises MessageError."""
        sealed = cls.read(data)
        try:
            payload = AESGCM(_checked(key)).decrypt(
                _iv(sealed.sequence), sealed.payload + data[:_TAG_SIZE], data[_AUTHENTICATED:HEADER_SIZE]
            )
        except InvalidTag:
            raise MessageError("the message is not sealed with this key, or was changed") from None
        return replace(sealed, payload=payload)


def report_request(report_data: bytes, vmpl: int = 0, key_select: int = 0) -> bytes:
    """Return the payload of a MSG_REPORT_REQ (96 bytes): up to 64 bytes of the caller's, VMPL, and which
    key signs.

    *key_select*: 0 is the VLEK if there is one and the VCEK otherwise, 1 the VCEK, 2 the VLEK.
    """
    if len(report_data) > 64:
        raise ValueError(f"report data have 64 bytes at most, not {len(report_data)}")
    return report_data.ljust(64, b"\0") + struct.pack("<II24x", vmpl, key_select)


def _iv(sequence: int) -> bytes:
    return struct.pack("<Q4x", sequence)


def _checked(key: bytes) -> bytes:
    if len(key) != KEY_SIZE:
        raise ValueError(f"a VMPCK has {KEY_SIZE} bytes, not {len(key)}")
    return key
