# SPDX-License-Identifier: Apache-2.0
"""Writes across two pages of which the second cannot be written."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE
from kvmpy.x86.operands import FIRST_FLAGS, RAX, RSP, WINDOW
from kvmpy.x86.pairs import ORDER, Question
from selftests.emulator.conftest import ARENA, CODE, WAYS, MakePairs, Ways

pytestmark = pytest.mark.protections("none")

PAGE_FAULT = 14
# Each writes at RSP, PUSH below it.
CODES = {
    "mov": b"\x48\x89\x04\x24",
    "add": b"\x48\x01\x04\x24",
    "xchg": b"\x48\x87\x04\x24",
    "movbe": b"\x48\x0f\x38\xf1\x04\x24",
    "push": b"\x50",
    "movups": b"\x0f\x11\x04\x24",
    "lock-xadd": b"\xf0\x48\x0f\xc1\x04\x24",
}


@pytest.mark.parametrize("page", [2, 5], ids=["absent", "readonly"])
@pytest.mark.parametrize("instruction", CODES)
@pytest.mark.parametrize("ways", [each for each in WAYS if each.id in ("prefix", "ring0")])
def test_all_or_nothing(make_pairs: MakePairs, ways: Ways, instruction: str, page: int) -> None:
    """A write whose second page faults leaves the first as it was.

    AMD APM volume 2, 8.1.1: an instruction that faults changes nothing.
    """
    pairs = make_pairs(ways[0])
    window = int(ARENA) + page * PAGE_SIZE - WINDOW // 2
    where = window + WINDOW // 2 - 4
    registers = {RAX: (1 << 64) - 2, RSP: where + 8 if instruction == "push" else where}
    values = tuple(registers.get(number, 0) for number in ORDER)
    question = Question(
        CODES[instruction], int(CODE) + 0x800, values, FIRST_FLAGS, 0, window, bytes(range(WINDOW)),
        vectors=b"\xee" * 512,
    )  # fmt: skip
    plain, emulated = pairs.both(question, vectors=1 if instruction == "movups" else 0)
    assert (plain.vector, emulated.vector) == (PAGE_FAULT, PAGE_FAULT)
    assert plain.cr2 == emulated.cr2 == window + WINDOW // 2
    assert ("CPU", plain.memory) == ("CPU", question.memory)
    assert ("emulator", emulated.memory) == ("emulator", question.memory)
