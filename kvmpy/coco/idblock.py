# SPDX-License-Identifier: Apache-2.0
"""The ID block and its authentication: what makes the firmware itself compare a launch digest.

Layouts: SEV Secure Nested Paging Firmware ABI, section 8.19 (ID_BLOCK, ID_AUTH_INFO) and its appendix on
ECDSA P-384. The numbers of keys and signatures are little-endian and have 72 bytes each.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_pem_private_key

ID_BLOCK_SIZE = 96
ID_AUTH_SIZE = 4096
KEY_SIZE = 1028
SIGNATURE_SIZE = 512
ECDSA_P384_SHA384 = 1
CURVE_P384 = 2

_ID_BLOCK = struct.Struct("<48s16s16sIIQ")
_NUMBER = 72
_SIGNATURE, _KEY, _KEY_SIGNATURE, _AUTHOR_KEY = 0x40, 0x240, 0x680, 0x880


@dataclass(frozen=True)
class IdBlock:
    """What a guest owner signs: the digest a launch must have, its policy, and the identity it gets."""

    launch_digest: bytes
    policy: int
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    version: int = 1
    guest_svn: int = 0

    def __post_init__(self) -> None:
        for name, size in (("launch_digest", 48), ("family_id", 16), ("image_id", 16)):
            if len(getattr(self, name)) != size:
                raise ValueError(f"{name} has {size} bytes, not {len(getattr(self, name))}")
        for name, bits in (("policy", 64), ("version", 32), ("guest_svn", 32)):
            if not 0 <= getattr(self, name) < 1 << bits:
                raise ValueError(f"{name} {getattr(self, name):#x} does not fit {bits} bits")

    def to_bytes(self) -> bytes:
        """Return the 96 bytes of the ID_BLOCK."""
        return _ID_BLOCK.pack(
            self.launch_digest, self.family_id, self.image_id, self.version, self.guest_svn, self.policy
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> IdBlock:
        """Read 96 bytes; raises ValueError for another length."""
        if len(data) != ID_BLOCK_SIZE:
            raise ValueError(f"an ID block has {ID_BLOCK_SIZE} bytes, not {len(data)}")
        digest, family, image, version, svn, policy = _ID_BLOCK.unpack(data)
        return cls(digest, policy, family, image, version, svn)

    def sign(
        self,
        id_key: ec.EllipticCurvePrivateKey,
        author_key: ec.EllipticCurvePrivateKey | None = None,
    ) -> IdAuth:
        """Sign the block with the ID key, and the ID key with an author key if there is one."""
        key = encode_public_key(id_key.public_key())
        return IdAuth(
            signature=encode_signature(id_key.sign(self.to_bytes(), ec.ECDSA(SHA384()))),
            id_key=key,
            key_signature=encode_signature(author_key.sign(key, ec.ECDSA(SHA384()))) if author_key else None,
            author_key=encode_public_key(author_key.public_key()) if author_key else None,
        )


@dataclass(frozen=True)
class IdAuth:
    """The signatures over an ID block: 512 bytes each, keys of 1028 bytes, in the firmware's formats."""

    signature: bytes
    id_key: bytes
    key_signature: bytes | None = None
    author_key: bytes | None = None

    @property
    def author_key_enabled(self) -> bool:
        """Whether LAUNCH_FINISH is told of an author key (auth_key_en)."""
        return self.author_key is not None

    @property
    def id_key_digest(self) -> bytes:
        """SHA-384 of the ID key, as an attestation report shows it."""
        return key_digest(self.id_key)

    @property
    def author_key_digest(self) -> bytes:
        """SHA-384 of the author key, 48 zero bytes without one."""
        return key_digest(self.author_key) if self.author_key else bytes(48)

    def to_bytes(self) -> bytes:
        """Return the 4096 bytes of the ID_AUTH_INFO."""
        page = bytearray(ID_AUTH_SIZE)
        struct.pack_into("<II", page, 0, ECDSA_P384_SHA384, ECDSA_P384_SHA384 if self.author_key else 0)
        for offset, part in (
            (_SIGNATURE, self.signature),
            (_KEY, self.id_key),
            (_KEY_SIGNATURE, self.key_signature),
            (_AUTHOR_KEY, self.author_key),
        ):
            if part is not None:
                page[offset : offset + len(part)] = part
        return bytes(page)

    @classmethod
    def from_bytes(cls, data: bytes) -> IdAuth:
        """Read 4096 bytes; raises ValueError for another length or an unknown algorithm."""
        if len(data) != ID_AUTH_SIZE:
            raise ValueError(f"an ID authentication page has {ID_AUTH_SIZE} bytes, not {len(data)}")
        id_algorithm, author_algorithm = struct.unpack_from("<II", data)
        if id_algorithm != ECDSA_P384_SHA384 or author_algorithm not in (0, ECDSA_P384_SHA384):
            raise ValueError(
                f"unknown key algorithms {id_algorithm}, {author_algorithm}: 1 is ECDSA P-384 with SHA-384"
            )
        author = author_algorithm == ECDSA_P384_SHA384
        return cls(
            data[_SIGNATURE : _SIGNATURE + SIGNATURE_SIZE],
            data[_KEY : _KEY + KEY_SIZE],
            data[_KEY_SIGNATURE : _KEY_SIGNATURE + SIGNATURE_SIZE] if author else None,
            data[_AUTHOR_KEY : _AUTHOR_KEY + KEY_SIZE] if author else None,
        )

    def verify(self, block: IdBlock) -> None:
        """Check what the firmware checks; raises ValueError that names the signature which is wrong."""
        if not verify_signature(decode_public_key(self.id_key), self.signature, block.to_bytes()):
            raise ValueError("the ID block is not signed by the ID key")
        if self.author_key is not None and not verify_signature(
            decode_public_key(self.author_key), self.key_signature or bytes(SIGNATURE_SIZE), self.id_key
        ):
            raise ValueError("the ID key is not signed by the author key")


def generate_key() -> ec.EllipticCurvePrivateKey:
    """Return a new P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Read an unencrypted P-384 key in PEM; raises ValueError for anything else."""
    try:
        key = load_pem_private_key(pem, None)
    except Exception as error:  # noqa: BLE001 - the library has many errors of its own, of no common class
        raise ValueError(f"no unencrypted PEM key: {str(error) or type(error).__name__}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic curve key; make one with: openssl ecparam -name secp384r1 -genkey")
    return key


def encode_public_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a P-384 public key in the firmware's 1028 bytes: curve, then X and Y."""
    if not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(f"keys of ID blocks are P-384, not {key.curve.name}")
    numbers = key.public_numbers()
    point = numbers.x.to_bytes(_NUMBER, "little") + numbers.y.to_bytes(_NUMBER, "little")
    return (struct.pack("<I", CURVE_P384) + point).ljust(KEY_SIZE, b"\0")


def decode_public_key(data: bytes) -> ec.EllipticCurvePublicKey:
    """Read a key of 1028 bytes; raises ValueError when it is no point of P-384."""
    if len(data) != KEY_SIZE or struct.unpack_from("<I", data)[0] != CURVE_P384:
        raise ValueError(f"not a P-384 key of {KEY_SIZE} bytes")
    x = int.from_bytes(data[4 : 4 + _NUMBER], "little")
    y = int.from_bytes(data[4 + _NUMBER : 4 + 2 * _NUMBER], "little")
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()


def key_digest(key: bytes) -> bytes:
    """Return the SHA-384 that stands for a key in attestation reports; *key* is in the firmware's format."""
    return hashlib.sha384(key).digest()


def encode_signature(der: bytes) -> bytes:
    """Turn a DER signature into the firmware's 512 bytes: R and S."""
    r, s = decode_dss_signature(der)
    return (r.to_bytes(_NUMBER, "little") + s.to_bytes(_NUMBER, "little")).ljust(SIGNATURE_SIZE, b"\0")


def decode_signature(data: bytes) -> bytes:
    """Turn the firmware's signature into DER."""
    if len(data) != SIGNATURE_SIZE:
        raise ValueError(f"a signature has {SIGNATURE_SIZE} bytes, not {len(data)}")
    r = int.from_bytes(data[:_NUMBER], "little")
    s = int.from_bytes(data[_NUMBER : 2 * _NUMBER], "little")
    return encode_dss_signature(r, s)


def verify_signature(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    """Tell whether *signature*, in the firmware's format, is that of *message* by *key* with SHA-384."""
    try:
        key.verify(decode_signature(signature), message, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True
