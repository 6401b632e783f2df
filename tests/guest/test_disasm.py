# SPDX-License-Identifier: Apache-2.0
"""Code bytes become instructions."""

from __future__ import annotations

import pytest

from kvmpy.guest.disasm import disassemble

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
