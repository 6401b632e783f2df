# SPDX-License-Identifier: Apache-2.0
"""Code bytes become instructions, also around an address in the middle."""

from __future__ import annotations

import pytest

from kvmpy.guest.disasm import around, disassemble

# push rbp; mov rbp,rsp; call 0x400020; ud2; pop rbp; ret
CODE = bytes.fromhex("55 4889e5 e817000000 0f0b 5d c3")
BASE = 0x400000


def test_instructions_with_their_addresses() -> None:
    assert disassemble(CODE, BASE) == [
        (BASE, "push rbp"),
        (BASE + 1, "mov rbp, rsp"),
        (BASE + 4, "call 0x400020"),
        (BASE + 9, "ud2"),
        (BASE + 11, "pop rbp"),
        (BASE + 12, "ret"),
    ]


def test_addresses_get_their_names() -> None:
    shown = dict(disassemble(CODE, BASE, name={0x400020: "helper"}.get))
    assert shown[BASE + 4] == "call 0x400020  <helper>"


def test_bytes_that_are_no_instruction_do_not_end_it() -> None:
    assert disassemble(b"\x06\x90", BASE) == [(BASE, ".byte 0x06"), (BASE + 1, "nop")]


def test_sixteen_bit_code() -> None:
    assert disassemble(b"\xb8\x34\x12\xf4", 0x7C00, bits=16) == [(0x7C00, "mov ax, 0x1234"), (0x7C03, "hlt")]
    with pytest.raises(ValueError, match="8-bit"):
        disassemble(b"\x90", 0, bits=8)


def test_around_an_address_without_a_known_start() -> None:
    shown = around(CODE, BASE, BASE + 9, before=1, after=1)
    assert [address for address, _ in shown] == [BASE + 4, BASE + 9, BASE + 11]


def test_around_an_address_inside_an_instruction_decodes_from_there() -> None:
    # From the function's head, no instruction begins at BASE + 2.
    assert around(CODE, BASE, BASE + 2, start=BASE)[0] == (BASE + 2, "mov ebp, esp")


def test_around_an_address_outside_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        around(CODE, BASE, BASE + 100)
