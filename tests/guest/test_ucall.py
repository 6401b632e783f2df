# SPDX-License-Identifier: Apache-2.0
"""Ucalls are read out of their slots as the guest wrote them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.guest import layout, ucall
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.symbols import Image

U64 = st.integers(0, (1 << 64) - 1)


def _page(slot: int, cmd: int, args: tuple[int, ...] = (), text: bytes = b"", flags: int = 0) -> bytearray:
    page = bytearray(0x1000)
    offset = slot * 512
    struct.pack_into("<I", page, offset + 12, cmd | len(args) << 16 | flags)
    struct.pack_into(f"<{len(args)}Q", page, offset + 16, *args)
    page[offset + 96 : offset + 96 + len(text)] = text
    return page


def _program() -> GuestProgram:
    image = Image(0x400000, ((0x400000, 0, 0, 0x1000, 5),), (("guest_main", 0x400010, 0x40, "function"),))
    return GuestProgram("test", b"", image)


@given(slot=st.integers(0, 7), cmd=st.integers(0, 0xFFFF), args=st.lists(U64, max_size=8))
def test_command_and_arguments_come_back(slot: int, cmd: int, args: list[int]) -> None:
    call = ucall.read(memoryview(_page(slot, cmd, tuple(args))), slot, 9)
    assert (call.cmd, call.args, call.slot, call.vcpu, call.text) == (cmd, tuple(args), slot, 9, "")


def test_a_guest_that_claims_too_many_arguments_gets_eight() -> None:
    page = _page(0, 1, (1, 2, 3, 4, 5, 6, 7, 8))
    struct.pack_into("<I", page, 12, 1 | 200 << 16)
    assert ucall.read(page, 0, 0).args == (1, 2, 3, 4, 5, 6, 7, 8)


def test_a_call_stays_what_it_was_when_its_slot_is_used_again() -> None:
    page = _page(1, ucall.SYNC, (5,))
    call = ucall.read(page, 1, 0)
    page[512:1024] = bytes(512)
    assert call.args == (5,)


def test_text_ends_at_its_nul_and_need_not_have_one() -> None:
    printed = ucall.read(_page(0, ucall.PRINTF, (), b"hi \xc3\xa9\0rest", layout.UCALL_HAS_TEXT), 0, 0)
    assert printed.text == "hi é"
    full = ucall.read(_page(0, ucall.PRINTF, (), b"x" * 416, layout.UCALL_HAS_TEXT), 0, 0)
    assert full.text == "x" * 416
    assert ucall.read(_page(0, ucall.SYNC, (), b"stale\0"), 0, 0).text == ""


def test_a_reply_lands_in_the_first_argument() -> None:
    page = _page(2, ucall.USER, (1, 2))
    ucall.read(memoryview(page), 2, 0).reply(-1)
    assert struct.unpack_from("<2Q", page, 2 * 512 + 16) == (0xFFFFFFFFFFFFFFFF, 2)
    with pytest.raises(ValueError, match="did not come from a guest"):
        ucall.Ucall(ucall.SYNC).reply(1)


def test_names() -> None:
    assert [ucall.command_name(c) for c in (1, 3, 0x100, 0x103, 0x42)] == [
        "SYNC",
        "ABORT",
        "USER",
        "USER+3",
        "ucall 0x42",
    ]
    assert repr(ucall.Ucall(ucall.SYNC, (1, 255), vcpu=2)) == "<SYNC(0x1, 0xff) of vcpu2>"


def _abort(kind: int, got: int, expected: int) -> str:
    args = (got & (1 << 64) - 1, expected & (1 << 64) - 1, 12, kind, 0x400021)
    page = _page(0, ucall.ABORT, args, b"x == y\0/t/test_a.py\0", layout.UCALL_HAS_TEXT)
    return ucall.assertion_text(ucall.read(page, 0, 3), _program())


def test_an_assertion_shows_both_values_and_where() -> None:
    assert _abort(layout.AssertKind.EQ, 255, 3) == (
        "guest assertion failed: x == y\n"
        "       got 255 (0xff)\n"
        "  expected 3 (0x3)\n"
        "  at /t/test_a.py:12: vcpu3 in guest_main+0x10"
    )


def test_signed_values_are_shown_signed() -> None:
    text = _abort(layout.AssertKind.GE | layout.ASSERT_GOT_SIGNED, -3, -1)
    assert "got -3 (0xfffffffffffffffd)" in text
    assert "expected >= 18446744073709551615 (0xffffffffffffffff)" in text


def test_a_condition_has_no_values() -> None:
    assert _abort(layout.AssertKind.TRUE, 0, 1).splitlines() == [
        "guest assertion failed: x == y",
        "  at /t/test_a.py:12: vcpu3 in guest_main+0x10",
    ]
    assert _abort(layout.AssertKind.FAIL, 0, 0).startswith("guest failed: x == y\n")


def test_an_exception_says_which_and_where() -> None:
    args = (14, 2, 0x400014, 0x1000FFF0, 0xDEAD000, 0x10046, 0, 0)
    call = ucall.read(_page(0, ucall.EXCEPTION, args), 0, 1)
    text = ucall.exception_text(call, _program())
    assert text.startswith("unexpected #PF page fault (0x2: ")
    assert " on vcpu1, address 0xdead000\n" in text
    assert "in guest_main+0x4" in text
    assert call.rip == 0x400014
