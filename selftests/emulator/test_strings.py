# SPDX-License-Identifier: Apache-2.0
"""Repeated string instructions that meet a page that they may not use."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from kvmpy import PAGE_SIZE
from kvmpy.x86.bits import RFLAGS
from kvmpy.x86.operands import FIRST_FLAGS, RAX, RCX, RDI, RSI, WINDOW
from kvmpy.x86.pairs import ORDER, Question
from selftests.emulator.conftest import ARENA, CODE, USER_ERROR, WAYS, WRITE_ERROR, MakePairs, Way, Ways

pytestmark = pytest.mark.protections("none")

PAGE_FAULT = 14
HALF = WINDOW // 2
OPCODES = {"movs": 0xA4, "cmps": 0xA6, "stos": 0xAA, "lods": 0xAC, "scas": 0xAE}
PREFIXES = {1: b"", 2: b"\x66", 4: b"", 8: b"\x48"}
LEFT = 2
BYTE = 0x5A


@dataclass(frozen=True)
class Border:
    """Two pages of which a string runs into the second: its first page's number, and whether going down."""

    page: int
    down: bool
    write: bool


# Upwards from memory to nothing; downwards from memory that can be read to nothing, written to only read.
READ_UP, READ_DOWN = Border(2, False, False), Border(3, True, False)
WRITE_UP, WRITE_DOWN = Border(2, False, True), Border(4, True, True)
CASES = [
    *(("lods", RSI, border) for border in (READ_UP, READ_DOWN)),
    *(("scas", RDI, border) for border in (READ_UP, READ_DOWN)),
    *(("cmps", RSI, border) for border in (READ_UP, READ_DOWN)),
    *(("stos", RDI, border) for border in (WRITE_UP, WRITE_DOWN)),
    ("movs", RSI, READ_UP),
    ("movs", RDI, WRITE_UP),
    ("movs", RDI, WRITE_DOWN),
]


def label(case: object) -> str:
    """Return a short name of a case."""
    assert isinstance(case, tuple)
    name, pointer, border = case
    return f"{name}-{'source' if pointer == RSI else 'target'}-{'down' if border.down else 'up'}"


def ask(case: tuple[str, int, Border], size: int, done: int) -> tuple[Question, tuple[object, ...]]:
    """Return a string that ends behind *done* elements, and how: exception, registers, memory."""
    name, pointer, border = case
    window = int(ARENA) + border.page * PAGE_SIZE - HALF
    step = -size if border.down else size
    edge = window + HALF - (size if border.down else 0)
    # The other pointer has the same page, further from the border.
    start = edge - done * step
    other = start if name == "cmps" else start - 4 * step
    registers = {RAX: int.from_bytes(bytes([BYTE]) * 8, "little"), RCX: done + LEFT, RSI: other, RDI: other}
    registers[pointer] = start
    flags = FIRST_FLAGS | (int(RFLAGS.DF) if border.down else 0)
    code = b"\xf3" + PREFIXES[size] + bytes([OPCODES[name] | (size > 1)])
    memory = bytes([BYTE]) * WINDOW if name in ("cmps", "scas") else bytes(range(0x20, 0x20 + WINDOW))
    question = Question(
        code, int(CODE) + 0x800, tuple(registers.get(number, 0) for number in ORDER), flags,
        undefined=0x8D5 if name in ("cmps", "scas") else 0, window=window, memory=memory,
    )  # fmt: skip

    expected = bytearray(memory)
    for index in range(done):
        target = registers[RDI] + index * step - window
        if name == "movs":
            source = registers[RSI] + index * step - window
            expected[target : target + size] = expected[source : source + size]
        elif name == "stos":
            expected[target : target + size] = bytes([BYTE]) * size
    after = dict(registers)
    after[RCX] = LEFT
    if name in ("movs", "cmps", "lods"):
        after[RSI] += done * step
    if name in ("movs", "cmps", "stos", "scas"):
        after[RDI] += done * step
    if name == "lods" and done:
        last = registers[RSI] + (done - 1) * step - window
        loaded = int.from_bytes(memory[last : last + size], "little")
        after[RAX] = loaded if size >= 4 else after[RAX] & ~((1 << 8 * size) - 1) | loaded
    error = USER_ERROR | (WRITE_ERROR if border.write else 0) | (border.page == 4)
    values = tuple(after.get(number, 0) for number in ORDER)
    return question, (PAGE_FAULT, error, edge, question.rip, values, bytes(expected))


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("ways", [each for each in WAYS if each.id in ("prefix", "ring0")])
def test_a_string_ends_at_a_border(make_pairs: MakePairs, ways: Ways, case: tuple[str, int, Border]) -> None:
    """A fault leaves RCX, RSI and RDI as after the elements that are done, RIP at the instruction.

    What they stored stays.  AMD APM volume 3, 1.2.6; Intel SDM volume 2, REP.
    """
    pairs = make_pairs(ways[0])
    for size, done in itertools.product((1, 2, 4, 8), (0, 1, 3)):
        question, expected = ask(case, size, done)
        for who, end in zip(("CPU", "emulator"), pairs.both(question), strict=True):
            code = end.error_code | (USER_ERROR if ways[0] is Way.RING else 0)
            seen = (end.vector, code, end.cr2, end.rip, end.registers, end.memory)
            assert seen == expected, f"{who}, {size} bytes, {done} elements done"
