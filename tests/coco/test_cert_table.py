# SPDX-License-Identifier: Apache-2.0
"""The table of certificates of extended guest requests."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.coco import cert_table
from kvmpy.coco.cert_table import CertTableError

NIL = "00000000-0000-0000-0000-000000000000"


def test_the_bytes_of_a_table() -> None:
    table = cert_table.pack({cert_table.VCEK: b"leaf", cert_table.ARK: b"root!"})

    assert table[:24] == bytes.fromhex("63da758de6644564adc5f4b93be8accd") + struct.pack("<II", 72, 4)
    assert table[24:48] == bytes.fromhex("c0b406a4a803495297433fb6014cd0ae") + struct.pack("<II", 76, 5)
    assert table[48:72] == bytes(24)
    assert table[72:] == b"leafroot!"


def test_an_empty_table_is_its_end() -> None:
    assert cert_table.pack({}) == bytes(24)
    assert cert_table.unpack(bytes(4096)) == {}


@given(
    st.dictionaries(st.uuids().filter(lambda guid: str(guid) != NIL), st.binary(max_size=200), max_size=8),
    st.binary(max_size=100),
)
def test_there_and_back(certificates: dict[object, bytes], rest: bytes) -> None:
    assert cert_table.unpack(cert_table.pack(certificates) + rest) == certificates  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 23, 24, 48])
def test_a_table_without_an_end(size: int) -> None:
    entries = (cert_table.VCEK.bytes + bytes(8)) * 2

    with pytest.raises(CertTableError, match="no entry of zeros ends the table"):
        cert_table.unpack(entries[:size])


def test_a_certificate_outside_of_the_table() -> None:
    table = cert_table.pack({cert_table.VLEK: b"leaf"})

    with pytest.raises(CertTableError, match=r"a8074bc2-.* is at 0x30 with 4 bytes, the table has 51"):
        cert_table.unpack(table[:-1])
