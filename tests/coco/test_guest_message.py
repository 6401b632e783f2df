# SPDX-License-Identifier: Apache-2.0
"""Messages of guest requests: layout, sealing, and what must not be accepted."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.coco.guest_message import (
    HEADER_SIZE,
    PAYLOAD_MAX,
    Message,
    MessageError,
    MessageType,
    report_request,
)

KEY = bytes(range(32))


def test_the_header_has_its_fields_in_place() -> None:
    data = Message(MessageType.REPORT_REQ, b"payload!", sequence=0x1122, vmpck=2).seal(KEY)
    assert len(data) == HEADER_SIZE + 8
    assert struct.unpack_from("<QQ", data, 0x20) == (0x1122, 0)
    assert struct.unpack_from("<BBHBBHIB", data, 0x30) == (1, 1, 0x60, 5, 1, 8, 0, 2)
    assert not any(data[0x10:0x20] + data[0x3D:0x60])
    iv = (0x1122).to_bytes(12, "little")
    assert AESGCM(KEY).decrypt(iv, data[0x60:] + data[:16], data[0x30:0x60]) == b"payload!"


@given(
    st.sampled_from(MessageType),
    st.binary(min_size=1, max_size=PAYLOAD_MAX),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 3),
)
def test_a_message_survives_sealing(kind: MessageType, payload: bytes, sequence: int, vmpck: int) -> None:
    message = Message(kind, payload, sequence, vmpck)
    assert Message.open(message.seal(KEY).ljust(4096, b"\0"), KEY) == message


@given(st.integers(0, (HEADER_SIZE + 40) * 8 - 1))
def test_a_flipped_bit_is_noticed_wherever_it_counts(bit: int) -> None:
    sealed = Message(MessageType.REPORT_REQ, bytes(40), 7).seal(KEY)
    flipped = bytearray(sealed)
    flipped[bit // 8] ^= 1 << bit % 8
    if 0x10 <= bit // 8 < 0x20 or 0x28 <= bit // 8 < 0x30:
        assert Message.open(bytes(flipped), KEY).payload == bytes(
            40
        )  # outside of tag, IV and authenticated bytes
        return
    with pytest.raises(MessageError):
        Message.open(bytes(flipped), KEY)


def test_a_guest_seals_what_is_laid_before_it_in_the_clear() -> None:
    """In the clear only tag and payload differ from what is sealed, and it reads as itself."""
    message = Message(MessageType.REPORT_REQ, b"payload!", 7, vmpck=3)
    clear, sealed = message.clear(), message.seal(KEY)
    assert clear[:32] == bytes(32)
    assert clear[16:HEADER_SIZE] == sealed[16:HEADER_SIZE]
    assert clear[HEADER_SIZE:] == b"payload!"
    assert Message.read(clear.ljust(4096, b"\0")) == message


def test_another_key_does_not_open() -> None:
    with pytest.raises(MessageError, match="not sealed with this key"):
        Message.open(Message(5, b"x", 1).seal(KEY), bytes(32))


@pytest.mark.parametrize(("size", "text"), [(0, "header of 96 bytes, here are 0"), (100, "here are 4")])
def test_cut_short_is_refused(size: int, text: str) -> None:
    with pytest.raises(MessageError, match=text):
        Message.open(Message(5, bytes(40), 1).seal(KEY)[:size], KEY)


@pytest.mark.parametrize("size", [0, PAYLOAD_MAX + 1])
def test_payloads_fit_a_page(size: int) -> None:
    with pytest.raises(MessageError, match="1 to 4000 bytes"):
        Message(5, bytes(size), 1).seal(KEY)


def test_keys_have_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 16"):
        Message(5, b"x", 1).seal(bytes(16))


def test_a_report_request_has_96_bytes() -> None:
    payload = report_request(b"nonce", vmpl=1, key_select=2)
    assert payload == b"nonce".ljust(64, b"\0") + struct.pack("<II", 1, 2) + bytes(24)
    with pytest.raises(ValueError, match="64 bytes at most, not 65"):
        report_request(bytes(65))
