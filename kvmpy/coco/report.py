# SPDX-License-Identifier: Apache-2.0
"""SNP attestation reports: read, shown, and checked against certificates and expectations.

Layout: SEV Secure Nested Paging Firmware ABI, section 7.3 (ATTESTATION_REPORT), versions 2 to 5. Of a newer
version the fields of version 5 are read: so far, each version has filled what was reserved in the last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from cryptography.hazmat.primitives.asymmetric import ec

from kvmpy.coco.idblock import ECDSA_P384_SHA384, SIGNATURE_SIZE, verify_signature

REPORT_SIZE = 0x4A0
SIGNED_SIZE = 0x2A0
VERSIONS = range(2, 6)


class ReportError(ValueError):
    """A report that cannot be read, or that a check refuses; the message says which field."""


class SigningKey(IntEnum):
    """Which key has signed a report."""

    VCEK = 0
    VLEK = 1
    NONE = 7


class PlatformInfo(IntFlag):
    """What a report says of the platform (PLATFORM_INFO)."""

    SMT_EN = 1 << 0
    TSME_EN = 1 << 1
    ECC_EN = 1 << 2
    RAPL_DIS = 1 << 3
    CIPHERTEXT_HIDING_DRAM_EN = 1 << 4
    ALIAS_CHECK_COMPLETE = 1 << 5
    TIO_EN = 1 << 7


@dataclass(frozen=True)
class Tcb:
    """Security patch levels of the platform's firmware; *fmc* exists from family 1Ah (Turin) on."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    @classmethod
    def from_int(cls, value: int, *, has_fmc: bool = False) -> Tcb:
        """Read a TCB_VERSION of 64 bits."""
        part = value.to_bytes(8, "little")
        if has_fmc:
            return cls(part[1], part[2], part[3], part[7], part[0])
        return cls(part[0], part[1], part[6], part[7])

    def __str__(self) -> str:
        levels = f"bootloader {self.bootloader}, TEE {self.tee}, SNP {self.snp}, microcode {self.microcode}"
        return levels if self.fmc is None else f"FMC {self.fmc}, {levels}"


# name, offset, size: integers up to 8 bytes, else bytes.
_FIELDS: tuple[tuple[str, int, int], ...] = (
    ("version", 0x00, 4),
    ("guest_svn", 0x04, 4),
    ("policy", 0x08, 8),
    ("family_id", 0x10, 16),
    ("image_id", 0x20, 16),
    ("vmpl", 0x30, 4),
    ("signature_algorithm", 0x34, 4),
    ("current_tcb", 0x38, 8),
    ("platform_info", 0x40, 8),
    ("key_flags", 0x48, 4),
    ("report_data", 0x50, 64),
    ("measurement", 0x90, 48),
    ("host_data", 0xC0, 32),
    ("id_key_digest", 0xE0, 48),
    ("author_key_digest", 0x110, 48),
    ("report_id", 0x140, 32),
    ("report_id_ma", 0x160, 32),
    ("reported_tcb", 0x180, 8),
    ("cpuid_family", 0x188, 1),
    ("cpuid_model", 0x189, 1),
    ("cpuid_stepping", 0x18A, 1),
    ("chip_id", 0x1A0, 64),
    ("committed_tcb", 0x1E0, 8),
    ("current_build", 0x1E8, 1),
    ("current_minor", 0x1E9, 1),
    ("current_major", 0x1EA, 1),
    ("committed_build", 0x1EC, 1),
    ("committed_minor", 0x1ED, 1),
    ("committed_major", 0x1EE, 1),
    ("launch_tcb", 0x1F0, 8),
    ("launch_mit_vector", 0x1F8, 8),
    ("current_mit_vector", 0x200, 8),
)
_AT = {name: (offset, size) for name, offset, size in _FIELDS}
_SINCE = {
    "cpuid_family": 3,
    "cpuid_model": 3,
    "cpuid_stepping": 3,
    "launch_mit_vector": 5,
    "current_mit_vector": 5,
}
_TCBS = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")


@dataclass(frozen=True)
class Report:
    """One report of 1184 bytes, or more of a newer version; fields by the firmware's names, lower case."""

    data: bytes = field(repr=False)  # a failed assertion shows no chip's ID

    def __post_init__(self) -> None:
        # A newer one may have more behind it.
        size = len(self.data)
        if size < REPORT_SIZE or (size > REPORT_SIZE and not self.newer):
            raise ReportError(f"an attestation report has {REPORT_SIZE} bytes, not {size}")
        if self.version < VERSIONS.start:
            raise ReportError(
                f"report version {self.version} is unknown; known: {VERSIONS.start} to {VERSIONS.stop - 1}"
            )

    @property
    def newer(self) -> bool:
        """Whether the version is newer than those that are known here: there may be more to it."""
        return self.version >= VERSIONS.stop

    def unknown(self) -> Iterator[tuple[int, bytes]]:
        """Yield offset and content of what is not 0 before the signature and belongs to no known field."""
        end = 0
        for offset, size in (*sorted(_AT.values()), (SIGNED_SIZE, 0)):
            between = self.data[end:offset]
            if any(between):
                yield end, between
            end = offset + size

    def integer(self, name: str) -> int:
        """Return an integer field by its name, such as ``guest_svn`` or ``chip_id`` as a number."""
        offset, size = _AT[name]
        return int.from_bytes(self.data[offset : offset + size], "little")

    def field(self, name: str) -> bytes:
        """Return the bytes of a field."""
        offset, size = _AT[name]
        return self.data[offset : offset + size]

    @property
    def version(self) -> int:
        """The report's version."""
        return self.integer("version")

    @property
    def policy(self) -> int:
        """The guest policy, 64 bits."""
        return self.integer("policy")

    @property
    def vmpl(self) -> int:
        """The VMPL of the request."""
        return self.integer("vmpl")

    @property
    def measurement(self) -> bytes:
        """The launch digest, 48 bytes."""
        return self.field("measurement")

    @property
    def report_data(self) -> bytes:
        """The 64 bytes that the guest has put in."""
        return self.field("report_data")

    @property
    def host_data(self) -> bytes:
        """The 32 bytes that the host has given to LAUNCH_FINISH."""
        return self.field("host_data")

    @property
    def chip_id(self) -> bytes:
        """The chip's identity, 64 bytes; zeros when it is masked."""
        return self.field("chip_id")

    @property
    def platform_info(self) -> PlatformInfo:
        """What the firmware says of the platform."""
        return PlatformInfo(self.integer("platform_info"))

    @property
    def author_key_enabled(self) -> bool:
        """Whether the ID key was signed by an author key."""
        return bool(self.integer("key_flags") & 1)

    @property
    def chip_key_masked(self) -> bool:
        """Whether the report is not signed because MASK_CHIP_KEY is set."""
        return bool(self.integer("key_flags") & 2)

    @property
    def signing_key(self) -> SigningKey | int:
        """Which key has signed."""
        key = self.integer("key_flags") >> 2 & 7
        return SigningKey(key) if key in SigningKey._value2member_map_ else key

    @property
    def has_fmc(self) -> bool | None:
        """Whether TCB versions count an FMC, as from family 1Ah on; None where the report cannot tell.

        Reports name the family from version 3 on. Before, a chip ID of 8 bytes tells it, unless it is masked.
        """
        if self.version >= _SINCE["cpuid_family"]:
            return self.integer("cpuid_family") >= 0x1A
        return not any(self.chip_id[8:]) if any(self.chip_id) else None

    def tcb(self, name: str, *, has_fmc: bool = False) -> Tcb:
        """Return ``current_tcb``, ``reported_tcb``, ``committed_tcb`` or ``launch_tcb``.

        *has_fmc* is for the report that cannot tell whether there is one.
        """
        if name not in _TCBS:
            raise KeyError(name)
        own = self.has_fmc
        return Tcb.from_int(self.integer(name), has_fmc=has_fmc if own is None else own)

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers."""
        return self.data[:SIGNED_SIZE]

    @property
    def signature(self) -> bytes:
        """R and S in the firmware's format, 512 bytes."""
        return self.data[SIGNED_SIZE : SIGNED_SIZE + SIGNATURE_SIZE]

    def as_dict(self) -> dict[str, int | str]:
        """Return every field of this version: integers, and bytes as hex."""
        return {
            name: self.integer(name) if size <= 8 else self.field(name).hex()
            for name, _, size in _FIELDS
            if self.version >= _SINCE.get(name, 0)
        }

    def verify_signature(self, key: ec.EllipticCurvePublicKey) -> None:
        """Check the signature with the key of a VCEK or VLEK; raises ReportError."""
        if len(self.data) != REPORT_SIZE:
            raise ReportError(
                f"a report of version {self.version} with {len(self.data)} bytes: "
                "where its signature lies is not known"
            )
        if self.chip_key_masked and not any(self.signature):
            raise ReportError("the report is not signed: the platform masks its chip key (MASK_CHIP_KEY)")
        algorithm = self.integer("signature_algorithm")
        if algorithm != ECDSA_P384_SHA384:
            raise ReportError(f"signature algorithm {algorithm} is unknown; 1 is ECDSA P-384 with SHA-384")
        if not isinstance(key.curve, ec.SECP384R1):
            raise ReportError(f"the certificate's key is {key.curve.name}, reports are signed with P-384")
        if not verify_signature(key, self.signature, self.signed):
            raise ReportError("the signature is not that of this report by this key")

    def expect(self, expected: Mapping[str, int | bytes]) -> None:
        """Compare fields; raises ReportError that lists every one which differs.

        A field of bytes that is longer than what is expected must have zeros behind it, so that report data
        of 8 bytes can be compared as they were given.
        """
        wrong: list[str] = []
        for name, value in expected.items():
            if name not in _AT:
                raise KeyError(name)
            size = _AT[name][1]
            if isinstance(value, int):
                if self.integer(name) != value:
                    wrong.append(f"{name} is {self.integer(name):#x}, expected {value:#x}")
            elif len(value) > size:
                raise ReportError(f"{name} has {size} bytes, {len(value)} are expected")
            elif self.field(name) != value.ljust(size, b"\0"):
                wrong.append(
                    f"{name} is {self.field(name).hex()}, expected {value.ljust(size, bytes(1)).hex()}"
                )
        if wrong:
            raise ReportError("; ".join(wrong))


def build(fields: Mapping[str, int | bytes]) -> bytes:
    """Return the 1184 bytes of an unsigned report with these fields, zeros elsewhere."""
    data = bytearray(REPORT_SIZE)
    for name, value in fields.items():
        offset, size = _AT[name]
        part = value.to_bytes(size, "little") if isinstance(value, int) else value
        if len(part) > size:
            raise ReportError(f"{name} has {size} bytes, not {len(part)}")
        data[offset : offset + len(part)] = part
    return bytes(data)


def from_response(message: bytes) -> Report:
    """Return the report in a MSG_REPORT_RSP; raises ReportError with the firmware's status otherwise."""
    header = struct.Struct("<II24x")
    if len(message) < header.size:
        raise ReportError(f"a report response has at least {header.size} bytes, not {len(message)}")
    status, size = header.unpack_from(message)
    if status:
        meaning = {0x16: "invalid parameters", 0x27: "the key asked for is not there"}.get(status, "an error")
        raise ReportError(f"the firmware refuses a report with status {status:#x}: {meaning}")
    if size < REPORT_SIZE or len(message) < header.size + size:
        raise ReportError(f"the response says that its report has {size} bytes, and holds {len(message)}")
    return Report(message[header.size : header.size + size])
