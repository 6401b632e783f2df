# SPDX-License-Identifier: Apache-2.0
"""Comparing and shrinking pairs of runs."""

from __future__ import annotations

import random
from dataclasses import replace

from kvmpy.x86.bits import RFLAGS
from kvmpy.x86.pairs import GAVE_UP, ORDER, STATE_SIZE, Question, State, describe, differences, pool, shrink

STATE = State(tuple(range(100, 116)), 13, 0, 0x5000, 0x246, 0, bytes(128), bytes(512))
QUESTION = Question(
    code=b"\x66\x2e\x48\x01\xc8", rip=0x1000, registers=tuple(range(1, 17)), rflags=0x247, undefined=0,
    window=0x2000, memory=bytes(range(128)),
)  # fmt: skip


def test_states_are_read_as_the_guest_writes_them() -> None:
    """Words in the order of the frame, RSP behind RFLAGS."""
    words = [*range(15), 14, 6, 0x5FF0, 0x2B, 0x202, 0x6000, 0x23, 0xCAFE]
    raw = b"".join(word.to_bytes(8, "little") for word in words) + bytes([1]) * 128 + bytes([2]) * 512
    assert len(raw) == STATE_SIZE
    state = State.unpack(raw)
    assert state.registers == (*range(15), 0x6000)
    assert (state.vector, state.error_code, state.rip, state.rflags, state.cr2) == (
        14,
        6,
        0x5FF0,
        0x202,
        0xCAFE,
    )
    assert (state.cs, state.ss) == (0x2B, 0x23)
    assert (state.memory, state.vectors) == (bytes([1]) * 128, bytes([2]) * 512)


def test_equal_ends_do_not_differ() -> None:
    """Nothing is told of two equal ends."""
    assert differences(STATE, replace(STATE), 0) == []


def test_each_kind_of_difference_is_told() -> None:
    """A register, a flag, memory, a vector register, the exception: each by its name, the CPU first."""
    registers = (*STATE.registers[:-2], 7, STATE.registers[-1])
    assert differences(STATE, replace(STATE, registers=registers), 0) == ["rax: 0x72 | 0x7"]
    assert differences(STATE, replace(STATE, rflags=0x202), 0) == ["flags PF ZF: 0x44 | 0x0"]
    memory = bytes(8) + b"\1" + bytes(119)
    assert differences(STATE, replace(STATE, memory=memory), 0)[0].startswith("memory +0x8: 00")
    vectors = bytes(32) + b"\1" + bytes(479)
    assert differences(STATE, replace(STATE, vectors=vectors), 0)[0].startswith("ymm1: 00")
    assert differences(STATE, replace(STATE, cs=8), 0) == ["cs and ss: 0x0 0x0 | 0x8 0x0"]
    assert differences(STATE, replace(STATE, cs=8), 0, selectors=False) == []
    (line,) = differences(STATE, replace(STATE, rip=0x5001), 0)
    assert line.startswith("ends: #GP")
    assert line.endswith("at 0x5001")
    (line,) = differences(STATE, replace(STATE, vector=GAVE_UP, rflags=0), 0)
    assert line.endswith("KVM_INTERNAL_ERROR_EMULATION")


def test_undefined_flags_and_ignored_error_bits_do_not_count() -> None:
    """Only what the instruction leaves open is excused."""
    other = replace(STATE, rflags=STATE.rflags ^ int(RFLAGS.AF | RFLAGS.OF))
    assert differences(STATE, other, int(RFLAGS.AF)) == ["flags OF: 0x0 | 0x800"]
    fault, by_kernel = replace(STATE, vector=14, error_code=7), replace(STATE, vector=14, error_code=3)
    assert differences(fault, by_kernel, 0, 4) == []
    assert differences(fault, by_kernel, 0) != []
    assert differences(replace(STATE, error_code=4), STATE, 0, 4) != []


def test_shrinking_keeps_what_matters() -> None:
    """All that the difference does not need goes: prefixes, registers, flags, memory."""
    rcx = ORDER.index(1)

    def differs(question: Question) -> bool:
        return bool(question.registers[rcx] and question.memory[9]) and question.code.endswith(
            b"\x48\x01\xc8"
        )

    found = shrink(QUESTION, differs)
    assert found.code == b"\x48\x01\xc8"
    assert found.registers == tuple(1 if place == rcx else 0 for place in range(16))
    assert found.rflags == 0x202
    assert found.memory == bytes(8) + QUESTION.memory[8:16] + bytes(112)
    assert differs(found)


def test_shrinking_keeps_a_prefix_of_the_opcode() -> None:
    """What would be another instruction is not tried."""
    tried: list[bytes] = []

    def differs(question: Question) -> bool:
        tried.append(question.code)
        return False

    shrink(replace(QUESTION, code=b"\x2e\xf3\x0f\xbc\xc1", kept_prefix=0xF3), differs)
    assert b"\xf3\x0f\xbc\xc1" in tried
    assert b"\x2e\x0f\xbc\xc1" not in tried


def test_shrinking_ends() -> None:
    """A difference that never goes away costs no more than the tries."""
    count = 0

    def differs(question: Question) -> bool:
        nonlocal count
        count += 1
        return True

    shrink(QUESTION, differs, tries=50)
    assert count <= 51


def test_a_report_has_all_that_repeats_it() -> None:
    """Bytes, disassembly, registers, flags, memory, and what differs."""
    text = describe(QUESTION, "add rax, rcx", ["rax: 0x1 | 0x2"])
    assert text.startswith("66 2e 48 01 c8  add rax, rcx\n")
    for part in ("rcx=0xe", "flags CF FIXED PF", bytes(range(128)).hex()):
        assert part in text
    assert text.endswith("  CPU | emulator\n  rax: 0x1 | 0x2")


def test_the_pool_has_edges_and_follows_its_seed() -> None:
    """Edge values are there, and the same seed gives the same pool."""
    values = pool(random.Random(5), 1000)
    assert {0, (1 << 64) - 1, 1 << 63, 0x8000_0000} <= set(values)
    assert values == pool(random.Random(5), 1000)
    assert all(0 <= value < 1 << 64 for value in values)
