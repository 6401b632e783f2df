# SPDX-License-Identifier: Apache-2.0
"""A guest owner's session, measurement and secrets, taken apart as a platform's firmware does."""

from __future__ import annotations

import hashlib
import hmac
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from kvmpy.coco.sev_session import GuestOwner, LaunchDigest, derive, dh_certificate, read_dh_certificate

PLATFORM = ec.generate_private_key(ec.SECP384R1())
PDH = dh_certificate(PLATFORM.public_key(), 1, 51)
FIRMWARE = (1, 51, 3)
POLICY = 0x5


def kdf(key: bytes, label: str, context: bytes, size: int) -> bytes:
    """Derive with the library's implementation of SP 800-108, told the firmware's little-endian counters."""
    fixed = label.encode() + b"\0" + context + struct.pack("<I", size * 8)
    output = b""
    for counter in range(1, (size + 31) // 32 + 1):
        output += hmac.digest(key, counter.to_bytes(4, "little") + fixed, hashlib.sha256)
    return output[:size]


def ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    return Cipher(AES(key), CTR(iv)).decryptor().update(data)


def test_the_derivation_is_sp_800_108_but_for_the_byte_order_of_its_numbers() -> None:
    key, label, context = b"k" * 16, "label", b"c" * 16
    fixed = label.encode() + b"\0" + context + struct.pack("<I", 128)
    library = KBKDFHMAC(
        SHA256(),
        Mode.CounterMode,
        16,
        rlen=4,
        llen=None,
        location=CounterLocation.BeforeFixed,
        label=None,
        context=None,
        fixed=fixed,
    ).derive(key)
    assert library == hmac.digest(key, b"\0\0\0\1" + fixed, "sha256")[:16]
    assert derive(key, label, context, 16) == hmac.digest(key, b"\1\0\0\0" + fixed, "sha256")[:16]


def test_the_firmware_unwraps_both_keys_from_a_session() -> None:
    owner = GuestOwner()
    session = owner.session(PDH, POLICY)
    assert len(session) == 128
    nonce, wrapped, iv, wrap_mac, policy_mac = struct.unpack("<16s32s16s32s32s", session)
    shared = PLATFORM.exchange(ec.ECDH(), read_dh_certificate(owner.certificate()))
    master = kdf(shared, "sev-master-secret", nonce, 16)
    kek, kik = kdf(master, "sev-kek", b"", 16), kdf(master, "sev-kik", b"", 16)
    assert wrap_mac == hmac.digest(kik, wrapped, hashlib.sha256)
    assert ctr(kek, iv, wrapped) == owner.tek + owner.tik
    assert policy_mac == hmac.digest(owner.tik, struct.pack("<I", POLICY), hashlib.sha256)


def test_sessions_differ_though_owner_and_platform_do_not() -> None:
    owner = GuestOwner()
    assert owner.session(PDH, POLICY) != owner.session(PDH, POLICY)
    fixed = {"nonce": bytes(16), "iv": bytes(16)}
    assert owner.session(PDH, POLICY, **fixed) == owner.session(PDH, POLICY, **fixed)


def answer(owner: GuestOwner, digest: bytes, firmware: tuple[int, int, int], policy: int) -> bytes:
    """Return what firmware answers to LAUNCH_MEASURE."""
    nonce = b"N" * 16
    text = bytes([4, *firmware]) + policy.to_bytes(4, "little") + digest + nonce
    return hmac.new(owner.tik, text, hashlib.sha256).digest() + nonce


def test_the_measurement_of_this_launch_is_accepted() -> None:
    owner, digest = GuestOwner(), LaunchDigest()
    digest.add(b"code" * 4)
    digest.add(memoryview(b"data" * 8))
    assert digest.value == hashlib.sha256(b"code" * 4 + b"data" * 8).digest()
    owner.check_measurement(answer(owner, digest.value, FIRMWARE, POLICY), digest.value, FIRMWARE, POLICY)


@pytest.mark.parametrize(
    ("firmware", "policy", "flip"),
    [
        ((1, 51, 4), POLICY, 0),
        ((1, 50, 3), POLICY, 0),
        ((0, 51, 3), POLICY, 0),
        (FIRMWARE, 1, 0),
        (FIRMWARE, POLICY, 1),
    ],
    ids=["build", "minor", "major", "policy", "digest"],
)
def test_another_measurement_is_refused(firmware: tuple[int, int, int], policy: int, flip: int) -> None:
    owner, digest = GuestOwner(), hashlib.sha256(b"x").digest()
    other = bytes([digest[0] ^ flip]) + digest[1:]
    with pytest.raises(ValueError, match="the launch measures"):
        owner.check_measurement(answer(owner, digest, FIRMWARE, POLICY), other, firmware, policy)


def test_a_measurement_cut_short_is_refused() -> None:
    with pytest.raises(ValueError, match="48 bytes, not 47"):
        GuestOwner().check_measurement(bytes(47), bytes(32), FIRMWARE, POLICY)


def test_the_firmware_opens_a_secret() -> None:
    owner = GuestOwner()
    measurement = answer(owner, bytes(32), FIRMWARE, POLICY)
    header, encrypted = owner.secret(b"sixteen bytes  !" * 2, measurement)
    flags, iv, mac = struct.unpack("<I16s32s", header)
    assert flags == 0
    text = b"\x01" + header[:20] + struct.pack("<II", 32, 32) + encrypted + measurement[:32]
    assert mac == hmac.new(owner.tik, text, hashlib.sha256).digest()
    assert ctr(owner.tek, iv, encrypted) == b"sixteen bytes  !" * 2


@pytest.mark.parametrize("size", [0, 15, 17])
def test_secrets_and_data_come_in_blocks_of_16(size: int) -> None:
    with pytest.raises(ValueError, match="16-byte blocks"):
        GuestOwner().secret(bytes(size), bytes(48))
    if size:
        with pytest.raises(ValueError, match="16-byte blocks"):
            LaunchDigest().add(bytes(size))


def test_only_a_pdh_on_the_owners_curve_makes_a_session() -> None:
    owner = GuestOwner()
    with pytest.raises(ValueError, match="2084 bytes, not 2083"):
        owner.session(PDH[:-1], POLICY)
    with pytest.raises(ValueError, match="no PDH"):
        owner.session(PDH[:8] + b"\x02" + PDH[9:], POLICY)
    with pytest.raises(ValueError, match="unknown curve"):
        owner.session(PDH[:0x10] + b"\x09" + PDH[0x11:], POLICY)
    with pytest.raises(ValueError, match="the platform's key is secp256r1, the owner's secp384r1"):
        owner.session(dh_certificate(ec.generate_private_key(ec.SECP256R1()).public_key()), POLICY)


def test_keys_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes each"):
        GuestOwner(tek=bytes(32))
    with pytest.raises(ValueError, match="16 bytes each"):
        GuestOwner().session(PDH, POLICY, nonce=bytes(15))
