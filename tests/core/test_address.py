# SPDX-License-Identifier: Apache-2.0
"""Addresses keep their kind, and only the encryption bit converts between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.address import EncryptionBit, Gpa, Gva, RawGpa

KINDS = [Gva, Gpa, RawGpa]


@pytest.mark.parametrize("kind", KINDS)
def test_adding_a_number_keeps_the_kind(kind: type[Gva]) -> None:
    moved = kind(0x1000) + 0x234
    assert type(moved) is kind
    assert int(moved) == 0x1234
    assert type(0x10 + kind(0x20)) is kind
    assert type(kind(0x1000) - 0x10) is kind


def test_the_difference_of_two_addresses_is_a_number() -> None:
    difference = Gpa(0x3000) - Gpa(0x1000)
    assert type(difference) is int
    assert difference == 0x2000


def test_kinds_do_not_mix() -> None:
    with pytest.raises(TypeError, match="Gva"):
        Gva(1) - Gpa(1)
    with pytest.raises(TypeError, match="RawGpa"):
        Gpa(RawGpa(0x1000))
    with pytest.raises(TypeError, match="compare"):
        _ = Gva(1) == Gpa(1)
    with pytest.raises(TypeError, match="mix"):
        _ = Gva(1) < Gpa(2)
    with pytest.raises(TypeError, match="add two"):
        Gva(1) + Gva(1)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_an_address_has_64_bits(value: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        Gva(value)
    with pytest.raises(ValueError, match="64-bit"):
        Gva(0) + value


def test_subtracting_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        Gpa(0x1000) - 0x2000


def test_alignment() -> None:
    assert Gva(0x1234).align_down(0x1000) == Gva(0x1000)
    assert Gva(0x1234).align_up(0x1000) == Gva(0x2000)
    assert Gva(0x2000).align_up(0x1000) == Gva(0x2000)
    assert Gva(0x2000).is_aligned()
    assert not Gva(0x2001).is_aligned()


def test_text_shows_kind_and_hex() -> None:
    assert repr(Gpa(0x1000)) == "Gpa(0x1000)"
    assert f"{Gpa(0x1000)}" == "0x1000"
    assert f"{Gpa(0x1000):08x}" == "00001000"


@given(st.integers(0, (1 << 32) - 1), st.integers(32, 51), st.booleans(), st.booleans())
def test_raw_and_back(frame: int, bit: int, set_means_private: bool, private: bool) -> None:
    encryption = EncryptionBit(bit, set_means_private)
    gpa = Gpa(frame & ~(1 << bit))
    raw = encryption.to_raw(gpa, private)
    assert bool(int(raw) >> bit & 1) == (private == set_means_private)
    assert encryption.from_raw(raw) == (gpa, private)


def test_a_gpa_with_the_encryption_bit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="bit 47 set, which is the C-bit"):
        EncryptionBit(47).to_raw(Gpa(1 << 47 | 0x1000), True)
    with pytest.raises(ValueError, match="which is the S-bit"):
        EncryptionBit(47, set_means_private=False).check(Gpa(1 << 47))


@pytest.mark.parametrize("bit", [31, 52])
def test_the_bit_lies_in_the_address(bit: int) -> None:
    with pytest.raises(ValueError, match=r"32\.\.51"):
        EncryptionBit(bit)
