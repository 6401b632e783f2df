# SPDX-License-Identifier: Apache-2.0
"""Page-fault error codes, bit by bit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.x86 import pferr
from kvmpy.x86.pferr import GUEST_VISIBLE, NESTED, SYNTHETIC, PfErr

# Bit numbers as the manuals and kvm_host.h give them.
BITS = {
    "P": 0,
    "W": 1,
    "U": 2,
    "RSVD": 3,
    "I": 4,
    "PK": 5,
    "SS": 6,
    "SGX": 15,
    "RMP": 31,
    "GUEST_FINAL": 32,
    "GUEST_PAGE": 33,
    "ENC": 34,
    "SIZEM": 35,
    "VMPL": 36,
    "IMPLICIT_ACCESS": 48,
    "PRIVATE_ACCESS": 49,
}


def test_every_bit_has_its_number() -> None:
    assert {name: int(bit) for name, bit in PfErr.__members__.items()} == {n: 1 << b for n, b in BITS.items()}


@pytest.mark.parametrize(("name", "bit"), BITS.items())
def test_words_of_one_bit(name: str, bit: int) -> None:
    assert pferr.decode(1 << bit).words == name
    assert pferr.encode(name) == 1 << bit


@given(st.integers(0, (1 << 64) - 1))
def test_words_say_everything(value: int) -> None:
    decoded = pferr.decode(value)
    assert pferr.encode(decoded.words) == value
    assert int(decoded.flags) | decoded.unknown == value
    assert int(decoded.flags) & decoded.unknown == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0x0, "supervisor read, page not present"),
        (0x3, "supervisor write, protection violation"),
        (0x6, "user write, page not present"),
        (0x15, "user fetch, protection violation"),
        (0x9, "supervisor read, protection violation; a reserved bit is set in a page-table entry"),
        (0x8000_0007, "user write, protection violation; RMP check failed"),
        (1 << 32 | 4, "user read, page not present; while translating the final guest-physical address"),
        (
            0x8_8000_0000,
            "supervisor read, page not present; RMP check failed; page sizes of RMP and access differ",
        ),
        (1 << 34, "supervisor read, page not present; the guest's effective C-bit is set"),
        (1 << 49 | 2, "supervisor write, page not present; access to private memory"),
        (1 << 20, "supervisor read, page not present; unknown bit 20"),
    ],
)
def test_sentences(value: int, text: str) -> None:
    assert str(pferr.decode(value)) == text


@pytest.mark.parametrize(
    ("value", "access", "user", "present"),
    [(0, "read", False, False), (7, "write", True, True), (0x11, "fetch", False, True)],
)
def test_properties(value: int, access: str, user: bool, present: bool) -> None:
    decoded = pferr.decode(value)
    assert (decoded.access, decoded.user, decoded.present) == (access, user, present)


def test_groups_of_bits() -> None:
    assert int(GUEST_VISIBLE) == 0x8000_807F
    assert int(NESTED) == 0x1F_0000_0000
    assert int(SYNTHETIC) == 0x3_0000_0000_0000
    assert int(GUEST_VISIBLE | NESTED | SYNTHETIC) == sum(1 << bit for bit in BITS.values())


def test_encode_takes_lists_and_any_case() -> None:
    assert pferr.encode(["p", "Enc", "bit7"]) == 1 | 1 << 34 | 1 << 7
    assert pferr.encode("") == 0


@pytest.mark.parametrize("word", ["X", "bit64", "bit-1", "P,W"])
def test_unknown_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="unknown page-fault bit"):
        pferr.encode(word)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_values_outside_64_bits_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="unsigned 64-bit"):
        pferr.decode(value)
