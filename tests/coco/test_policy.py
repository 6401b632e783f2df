# SPDX-License-Identifier: Apache-2.0
"""Policies by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.coco.policy import SevPolicy, SnpPolicy

SEV_BITS = [("no_debug", 0), ("no_key_sharing", 1), ("es", 2), ("no_send", 3), ("domain", 4), ("sev_only", 5)]
SNP_BITS = [
    ("smt", 16),
    ("migrate_ma", 18),
    ("debug", 19),
    ("single_socket", 20),
    ("cxl", 21),
    ("mem_aes_256_xts", 22),
    ("rapl_disabled", 23),
    ("ciphertext_hiding", 24),
    ("page_swap_disabled", 25),
]


@pytest.mark.parametrize(("name", "bit"), SEV_BITS)
def test_an_sev_policy_bit(name: str, bit: int) -> None:
    """SEV API, table 2: each name is one bit."""
    assert int(SevPolicy(**{name: True})) == 1 << bit
    assert getattr(SevPolicy.from_int(1 << bit), name) is True


@pytest.mark.parametrize(("name", "bit"), SNP_BITS)
def test_an_snp_policy_bit(name: str, bit: int) -> None:
    """Firmware ABI, table 9: each name is one bit, and bit 17 is always set."""
    values = {"smt": False, name: True}
    assert int(SnpPolicy(**values)) == 1 << bit | 1 << 17
    assert getattr(SnpPolicy.from_int(1 << bit | 1 << 17), name) is True


def test_api_versions() -> None:
    """The version takes the bytes that the specifications give it."""
    assert int(SevPolicy(api_major=1, api_minor=55)) == 0x37010000
    assert int(SnpPolicy(smt=False, abi_major=1, abi_minor=55)) == 0x20137


def test_a_version_that_does_not_fit() -> None:
    """Versions have eight bits."""
    with pytest.raises(ValueError, match=r"256\.0"):
        SevPolicy(api_major=256)
    with pytest.raises(ValueError, match=r"0\.-1"):
        SnpPolicy(abi_minor=-1)


@pytest.mark.parametrize("value", [1 << 6, 1 << 15, 1 << 32])
def test_reserved_bits_of_an_sev_policy(value: int) -> None:
    """Bits 6 to 15 are reserved, and there are 32."""
    with pytest.raises(ValueError, match="reserved bits"):
        SevPolicy.from_int(value)


@pytest.mark.parametrize("value", [1 << 17 | 1 << 26, 1 << 17 | 1 << 63])
def test_unknown_bits_of_an_snp_policy(value: int) -> None:
    """Bits from 26 up are unknown."""
    with pytest.raises(ValueError, match="unknown bits"):
        SnpPolicy.from_int(value)


def test_bit_17_must_be_one() -> None:
    """An SNP policy without bit 17 is none."""
    with pytest.raises(ValueError, match="bit 17"):
        SnpPolicy.from_int(1 << 16)


@given(st.integers(0, 63), st.integers(0, 255), st.integers(0, 255))
def test_sev_policies_go_both_ways(flags: int, major: int, minor: int) -> None:
    """Reading what was written gives the same number."""
    value = flags | major << 16 | minor << 24
    assert int(SevPolicy.from_int(value)) == value


@given(st.integers(0, 0xFFFF), st.integers(0, 0x3FF))
def test_snp_policies_go_both_ways(version: int, flags: int) -> None:
    """Reading what was written gives the same number."""
    value = version | flags << 16 | 1 << 17
    assert int(SnpPolicy.from_int(value)) == value


def test_words() -> None:
    """A policy names what is set."""
    assert str(SnpPolicy(debug=True)) == "0xb0000 (smt debug)"
    assert str(SevPolicy()) == "0x0 (nothing set)"
