# SPDX-License-Identifier: Apache-2.0
"""ID blocks: layout, signatures, and what the firmware would refuse."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from kvmpy.coco import idblock
from kvmpy.coco.idblock import IdAuth, IdBlock

BLOCK = IdBlock(bytes(range(48)), 0x30000, b"F" * 16, b"I" * 16, 1, 7)
ID_KEY, AUTHOR_KEY = idblock.generate_key(), idblock.generate_key()


def test_the_block_has_its_96_bytes_in_order() -> None:
    data = BLOCK.to_bytes()
    assert data == bytes(range(48)) + b"F" * 16 + b"I" * 16 + struct.pack("<IIQ", 1, 7, 0x30000)
    assert IdBlock.from_bytes(data) == BLOCK


def test_signature_and_key_verify_with_nothing_but_their_numbers() -> None:
    """Read as the firmware does: little-endian numbers of 72 bytes at the offsets of ID_AUTH_INFO."""
    page = BLOCK.sign(ID_KEY, AUTHOR_KEY).to_bytes()
    assert len(page) == 4096
    assert struct.unpack_from("<II", page) == (1, 1)

    def number(offset: int) -> int:
        return int.from_bytes(page[offset : offset + 72], "little")

    for signature_at, key_at, message in (
        (0x40, 0x240, BLOCK.to_bytes()),
        (0x680, 0x880, page[0x240 : 0x240 + 1028]),
    ):
        assert struct.unpack_from("<I", page, key_at) == (2,)
        key = ec.EllipticCurvePublicNumbers(
            number(key_at + 4), number(key_at + 76), ec.SECP384R1()
        ).public_key()
        der = encode_dss_signature(number(signature_at), number(signature_at + 72))
        key.verify(der, message, ec.ECDSA(SHA384()))
    for start, end in ((8, 0x40), (0xD0, 0x240), (0x2D4, 0x680), (0x710, 0x880), (0x914, 0x1000)):
        assert not any(page[start:end]), f"reserved bytes from {start:#x} on"


@pytest.mark.parametrize("author", [None, AUTHOR_KEY], ids=["id-key", "author-key"])
def test_an_authentication_survives_its_bytes(author: ec.EllipticCurvePrivateKey | None) -> None:
    auth = BLOCK.sign(ID_KEY, author)
    again = IdAuth.from_bytes(auth.to_bytes())
    assert again == auth
    again.verify(BLOCK)
    assert again.author_key_enabled == (author is not None)


def test_digests_of_keys_are_those_of_their_1028_bytes() -> None:
    auth = BLOCK.sign(ID_KEY, AUTHOR_KEY)
    page = auth.to_bytes()
    assert auth.id_key_digest == hashlib.sha384(page[0x240 : 0x240 + 1028]).digest()
    assert auth.author_key_digest == hashlib.sha384(page[0x880 : 0x880 + 1028]).digest()
    assert BLOCK.sign(ID_KEY).author_key_digest == bytes(48)


@pytest.mark.parametrize(
    "changes",
    [
        {"launch_digest": bytes(48)},
        {"policy": 0xB0000},
        {"family_id": bytes(16)},
        {"image_id": bytes(16)},
        {"version": 2},
        {"guest_svn": 8},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_is_signed(changes: dict[str, bytes | int]) -> None:
    with pytest.raises(ValueError, match="the ID block is not signed by the ID key"):
        BLOCK.sign(ID_KEY).verify(replace(BLOCK, **changes))  # type: ignore[arg-type]


def test_another_author_is_noticed() -> None:
    auth = replace(BLOCK.sign(ID_KEY, AUTHOR_KEY), author_key=BLOCK.sign(AUTHOR_KEY).to_bytes()[0x240:0x644])
    auth.verify(BLOCK)
    other = idblock.encode_public_key(idblock.generate_key().public_key())
    with pytest.raises(ValueError, match="not signed by the author key"):
        replace(auth, author_key=other).verify(BLOCK)


def test_a_key_of_another_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="are P-384, not secp256r1"):
        BLOCK.sign(ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize("field", ["launch_digest", "family_id", "image_id"])
def test_fields_of_the_wrong_length_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(BLOCK, **{field: b"short"})  # type: ignore[arg-type]


def test_cut_short_is_refused() -> None:
    with pytest.raises(ValueError, match="96 bytes, not 95"):
        IdBlock.from_bytes(BLOCK.to_bytes()[:-1])
    with pytest.raises(ValueError, match="4096 bytes, not 4095"):
        IdAuth.from_bytes(BLOCK.sign(ID_KEY).to_bytes()[:-1])
    with pytest.raises(ValueError, match="512 bytes, not 511"):
        idblock.decode_signature(bytes(511))


def test_a_point_off_the_curve_is_no_key() -> None:
    key = bytearray(idblock.encode_public_key(ID_KEY.public_key()))
    key[4] ^= 1
    with pytest.raises(ValueError, match=r"(?i)point|curve|key"):
        idblock.decode_public_key(bytes(key))


def test_unknown_algorithms_are_named() -> None:
    page = bytearray(BLOCK.sign(ID_KEY).to_bytes())
    page[0] = 9
    with pytest.raises(ValueError, match="unknown key algorithms 9, 0"):
        IdAuth.from_bytes(bytes(page))
