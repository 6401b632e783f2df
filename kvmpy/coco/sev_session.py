# SPDX-License-Identifier: Apache-2.0
"""A guest owner's side of an SEV or SEV-ES launch: session, measurement, and secrets.

Secure Encrypted Virtualization API, chapter 2 (keys and their derivation), 6.2 (LAUNCH_START), 6.5
(LAUNCH_MEASURE), 6.6 (LAUNCH_SECRET) and appendix C (certificates). No KVM is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

CERTIFICATE_SIZE = 0x824
SESSION_SIZE = 128
SECRET_HEADER_SIZE = 52
MEASUREMENT_SIZE = 48

_PDH_USAGE, _NO_USAGE = 0x1003, 0x1000
_ECDH_SHA256 = 3
_CURVES: dict[int, type[ec.EllipticCurve]] = {1: ec.SECP256R1, 2: ec.SECP384R1}
_KEY_AT, _NUMBER = 0x10, 72
_FIRST_SIGNATURE, _SECOND_SIGNATURE = 0x414, 0x61C
_MEASURE_CONTEXT, _SECRET_CONTEXT = b"\x04", b"\x01"


def derive(key: bytes, label: str, context: bytes, size: int) -> bytes:
    """Derive *size* bytes: NIST SP 800-108 in counter mode over HMAC-SHA256, as the firmware does (chapter
    2).
    """
    output = b""
    for counter in range(1, -(-size // 32) + 1):
        output += hmac.digest(
            key,
            struct.pack("<I", counter) + label.encode() + b"\0" + context + struct.pack("<I", size * 8),
            "sha256",
        )
    return output[:size]


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    encryptor = Cipher(AES(key), CTR(iv)).encryptor()
    return encryptor.update(data) + encryptor.finalize()


def read_dh_certificate(certificate: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key of a platform Diffie-Hellman certificate (PDH, 2084 bytes); raises ValueError."""
    if len(certificate) != CERTIFICATE_SIZE:
        raise ValueError(f"a certificate has {CERTIFICATE_SIZE} bytes, not {len(certificate)}")
    version, _, _, usage, _ = struct.unpack_from("<IBBxxII", certificate)
    if version != 1 or usage != _PDH_USAGE:
        raise ValueError(f"certificate version {version} with key usage {usage:#x}: no PDH ({_PDH_USAGE:#x})")
    curve = _CURVES.get(struct.unpack_from("<I", certificate, _KEY_AT)[0])
    if curve is None:
        raise ValueError("the certificate's key is on an unknown curve")
    x, y = (
        int.from_bytes(certificate[start : start + _NUMBER], "little")
        for start in (_KEY_AT + 4, _KEY_AT + 4 + _NUMBER)
    )
    return ec.EllipticCurvePublicNumbers(x, y, curve()).public_key()


def dh_certificate(key: ec.EllipticCurvePublicKey, api_major: int = 0, api_minor: int = 0) -> bytes:
    """Return the unsigned certificate of a guest owner's Diffie-Hellman key, as LAUNCH_START takes it."""
    numbers = key.public_numbers()
    identifier = next(number for number, curve in _CURVES.items() if isinstance(numbers.curve, curve))
    data = bytearray(CERTIFICATE_SIZE)
    struct.pack_into("<IBBxxII", data, 0, 1, api_major, api_minor, _PDH_USAGE, _ECDH_SHA256)
    struct.pack_into("<I", data, _KEY_AT, identifier)
    data[_KEY_AT + 4 : _KEY_AT + 4 + _NUMBER] = numbers.x.to_bytes(_NUMBER, "little")
    data[_KEY_AT + 4 + _NUMBER : _KEY_AT + 4 + 2 * _NUMBER] = numbers.y.to_bytes(_NUMBER, "little")
    for start in (_FIRST_SIGNATURE, _SECOND_SIGNATURE):
        struct.pack_into("<II", data, start, _NO_USAGE, 0)
    return bytes(data)


@dataclass(frozen=True)
class GuestOwner:
    """The keys of one launch: TEK (encryption) and TIK (integrity), 16 bytes each, and a Diffie-Hellman
    key.
    """

    tek: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    tik: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    dh_key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP384R1())
    )

    def __post_init__(self) -> None:
        if len(self.tek) != 16 or len(self.tik) != 16:
            raise ValueError("TEK and TIK have 16 bytes each")

    def certificate(self) -> bytes:
        """Return the Diffie-Hellman certificate that LAUNCH_START takes (dh_uaddr)."""
        return dh_certificate(self.dh_key.public_key())

    def session(
        self, pdh: bytes, policy: int, *, nonce: bytes | None = None, iv: bytes | None = None
    ) -> bytes:
        """Return the session that LAUNCH_START takes (session_uaddr), 128 bytes, for the platform with this
        PDH.

        *nonce* and *iv* (16 bytes each) are random unless given. Raises ValueError when *pdh* is no
        certificate or on another curve.
        """
        nonce = secrets.token_bytes(16) if nonce is None else nonce
        iv = secrets.token_bytes(16) if iv is None else iv
        if len(nonce) != 16 or len(iv) != 16:
            raise ValueError("nonce and iv have 16 bytes each")
        peer = read_dh_certificate(pdh)
        if peer.curve.name != self.dh_key.curve.name:
            raise ValueError(f"the platform's key is {peer.curve.name}, the owner's {self.dh_key.curve.name}")
        kek, kik = transport_keys(self.dh_key, peer, nonce)
        wrapped = _ctr(kek, iv, self.tek + self.tik)
        return b"".join(
            (
                nonce,
                wrapped,
                iv,
                hmac.digest(kik, wrapped, "sha256"),
                hmac.digest(self.tik, struct.pack("<I", policy), "sha256"),
            )
        )

    def measurement(
        self, launch_digest: bytes, nonce: bytes, firmware: tuple[int, int, int], policy: int
    ) -> bytes:
        """Return what LAUNCH_MEASURE must answer, 48 bytes: the HMAC, then the firmware's *nonce*.

        *launch_digest* is the SHA-256 of all that was launched (:class:`LaunchDigest`); *firmware* is the
        API's major and minor version and the build, as PLATFORM_STATUS has them.
        """
        major, minor, build = firmware
        text = _MEASURE_CONTEXT + struct.pack("<BBBI", major, minor, build, policy) + launch_digest + nonce
        return hmac.digest(self.tik, text, "sha256") + nonce

    def check_measurement(
        self, answer: bytes, launch_digest: bytes, firmware: tuple[int, int, int], policy: int
    ) -> None:
        """Compare the answer of LAUNCH_MEASURE; raises ValueError when it is not that of this launch."""
        if len(answer) != MEASUREMENT_SIZE:
            raise ValueError(f"a measurement has {MEASUREMENT_SIZE} bytes, not {len(answer)}")
        expected = self.measurement(launch_digest, answer[32:], firmware, policy)
        if not hmac.compare_digest(answer, expected):
            raise ValueError(
                f"the launch measures {answer[:32].hex()}, expected {expected[:32].hex()} "
                f"for digest {launch_digest.hex()}, firmware {firmware}, policy {policy:#x}"
            )

    def secret(
        self, data: bytes, measurement: bytes, *, iv: bytes | None = None, flags: int = 0
    ) -> tuple[bytes, bytes]:
        """Return header (52 bytes) and encrypted data that LAUNCH_SECRET takes.

        *measurement* is the answer of LAUNCH_MEASURE: the secret can be unpacked in that launch alone.
        """
        if not data or len(data) % 16:
            raise ValueError(f"a secret is a number of 16-byte blocks, not {len(data)} bytes")
        iv = secrets.token_bytes(16) if iv is None else iv
        encrypted = _ctr(self.tek, iv, data)
        lengths = struct.pack("<II", len(data), len(encrypted))
        text = _SECRET_CONTEXT + struct.pack("<I", flags) + iv + lengths + encrypted + measurement[:32]
        return struct.pack("<I", flags) + iv + hmac.digest(self.tik, text, "sha256"), encrypted


def transport_keys(
    own: ec.EllipticCurvePrivateKey, peer: ec.EllipticCurvePublicKey, nonce: bytes
) -> tuple[bytes, bytes]:
    """Return the key encryption key and the key integrity key of two Diffie-Hellman keys and a nonce."""
    master = derive(own.exchange(ec.ECDH(), peer), "sev-master-secret", nonce, 16)
    return derive(master, "sev-kek", b"", 16), derive(master, "sev-kik", b"", 16)


class LaunchDigest:
    """SHA-256 of what LAUNCH_UPDATE_DATA and LAUNCH_UPDATE_VMSA are given, in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """Add plaintext of 16-byte blocks, before it is encrypted in place."""
        if memoryview(data).nbytes % 16:
            raise ValueError(f"{memoryview(data).nbytes} bytes are not a whole number of 16-byte blocks")
        self._hash.update(data)

    @property
    def value(self) -> bytes:
        """The digest so far, 32 bytes."""
        return self._hash.digest()
