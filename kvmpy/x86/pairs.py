# SPDX-License-Identifier: Apache-2.0
"""Pairs of runs of one instruction, by the CPU and by KVM's emulator: states, what differs, shrinking."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvmpy.x86 import exceptions
from kvmpy.x86.bits import RFLAGS, bit_words

ORDER = (15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 3, 2, 1, 0, 4)
"""Registers by their numbers in ModRM, in the order of a state."""
NAMES = {
    **dict(enumerate(("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"))),
    **{number: f"r{number}" for number in range(8, 16)},
}
WORDS = 16
VECTOR_WORDS = 64
GAVE_UP = 0xFF
"""The vector of a run that KVM ended with KVM_INTERNAL_ERROR_EMULATION."""
_STATE = struct.Struct(f"<23Q{8 * WORDS}s{8 * VECTOR_WORDS}s")
STATE_SIZE = _STATE.size
PAGE_FAULT = 14
_UINT64 = (1 << 64) - 1


@dataclass(frozen=True)
class State:
    """What a run began with or ended in: registers in the order of :data:`ORDER`, the exception that ended
    it, memory and vector registers.
    """

    registers: tuple[int, ...]
    vector: int
    error_code: int
    rip: int
    rflags: int
    cr2: int
    memory: bytes
    vectors: bytes
    cs: int = 0
    ss: int = 0

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> State:
        """Read a ``struct pair_state``."""
        *words, memory, vectors = _STATE.unpack(raw)
        low, (vector, error, rip, cs, rflags, rsp, ss, cr2) = words[:15], words[15:]
        return cls((*low, rsp), vector, error, rip, rflags, cr2, memory, vectors, cs, ss)

    def ending(self) -> str:
        """Name the exception."""
        if self.vector == GAVE_UP:
            return "KVM_INTERNAL_ERROR_EMULATION"
        address = f", CR2 {self.cr2:#x}" if self.vector == PAGE_FAULT else ""
        return f"{exceptions.describe(self.vector, self.error_code)} at {self.rip:#x}{address}"


@dataclass(frozen=True)
class Question:
    """One instruction with all that it begins with."""

    code: bytes
    rip: int
    registers: tuple[int, ...]
    rflags: int
    undefined: int
    window: int
    memory: bytes
    vectors: bytes = b""
    bits: int = 64
    kept_prefix: int = 0
    """A prefix without which it is another instruction."""

    def register(self, number: int) -> int:
        """Return a register by its number in ModRM."""
        return self.registers[ORDER.index(number)]


def differences(
    plain: State, emulated: State, undefined: int, ignored_error: int = 0, *, selectors: bool = True
) -> list[str]:
    """Return what differs between two runs, the CPU's first; *undefined* flags, the bits *ignored_error* of a
    page fault's error code, and CS and SS without *selectors* do not count.
    """
    if emulated.vector == GAVE_UP:
        return [f"ends: {plain.ending()} | {emulated.ending()}"]
    lines = []
    ignored = ignored_error if plain.vector == PAGE_FAULT else 0
    if (plain.vector, plain.rip, plain.cr2) != (emulated.vector, emulated.rip, emulated.cr2) or (
        plain.error_code ^ emulated.error_code
    ) & ~ignored:
        lines.append(f"ends: {plain.ending()} | {emulated.ending()}")
    if selectors and (plain.cs, plain.ss) != (emulated.cs, emulated.ss):
        lines.append(f"cs and ss: {plain.cs:#x} {plain.ss:#x} | {emulated.cs:#x} {emulated.ss:#x}")
    for place, number in enumerate(ORDER):
        if plain.registers[place] != emulated.registers[place]:
            lines.append(f"{NAMES[number]}: {plain.registers[place]:#x} | {emulated.registers[place]:#x}")
    if (flags := (plain.rflags ^ emulated.rflags) & ~undefined) != 0:
        words = " ".join(bit_words(RFLAGS, flags))
        lines.append(f"flags {words}: {plain.rflags & flags:#x} | {emulated.rflags & flags:#x}")
    for place in range(0, len(plain.memory), 8):
        a, b = plain.memory[place : place + 8], emulated.memory[place : place + 8]
        if a != b:
            lines.append(f"memory +{place:#x}: {a.hex()} | {b.hex()}")
    for number in range(len(plain.vectors) // 32):
        a, b = plain.vectors[32 * number : 32 * number + 32], emulated.vectors[32 * number : 32 * number + 32]
        if a != b:
            lines.append(f"ymm{number}: {a.hex()} | {b.hex()}")
    return lines


def describe(question: Question, text: str, lines: list[str]) -> str:
    """Return a report: the instruction (disassembled, *text*), what it began with, what differs."""
    names = " ".join(
        f"{NAMES[n]}={value:#x}" for n, value in zip(ORDER, question.registers, strict=True) if value
    )
    flags = " ".join(bit_words(RFLAGS, question.rflags))
    rows = [f"{question.code.hex(' ')}  {text}", f"  begins: {names} flags {flags}"]
    if question.window:
        rows.append(f"  memory at {question.window:#x}: {question.memory.hex()}")
    rows.append("  CPU | emulator")
    rows += [f"  {line}" for line in lines]
    return "\n".join(rows)


_LEGACY_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))


def _prefixes(code: bytes, bits: int) -> int:
    for place, byte in enumerate(code):
        if byte not in _LEGACY_PREFIXES and not (bits == 64 and byte >> 4 == 4):
            return place
    return len(code)


def _simpler(question: Question) -> Iterator[Question]:
    for place in range(_prefixes(question.code, question.bits)):
        if question.code[place] == question.kept_prefix:
            continue
        yield replace(question, code=question.code[:place] + question.code[place + 1 :])
    for place, value in enumerate(question.registers):
        for other in (0, 1, value & 0xFF, value & 0xFFFF, value & 0xFFFF_FFFF):
            if other < value:
                yield replace(
                    question, registers=(*question.registers[:place], other, *question.registers[place + 1 :])
                )
    if question.rflags & int(
        RFLAGS.CF | RFLAGS.PF | RFLAGS.AF | RFLAGS.ZF | RFLAGS.SF | RFLAGS.OF | RFLAGS.DF
    ):
        yield replace(question, rflags=int(RFLAGS.FIXED | RFLAGS.IF))
    if any(question.memory):
        yield replace(question, memory=bytes(len(question.memory)))
        for place in range(0, len(question.memory), 8):
            if any(question.memory[place : place + 8]):
                yield replace(
                    question, memory=question.memory[:place] + bytes(8) + question.memory[place + 8 :]
                )
    if any(question.vectors):
        yield replace(question, vectors=bytes(len(question.vectors)))


def shrink(question: Question, differs: Callable[[Question], bool], *, tries: int = 400) -> Question:
    """Return the simplest question that still *differs*, after at most as many *tries*."""
    again = True
    while again and tries > 0:
        again = False
        for candidate in _simpler(question):
            tries -= 1
            if differs(candidate):
                question, again = candidate, True
                break
            if tries <= 0:
                break
    return question


def pool(rng: random.Random, count: int) -> list[int]:
    """Return values for operands: edges of every size, alone and side by side, and random ones."""
    edges = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF]
    edges += [(1 << 63) - 1, 1 << 63, _UINT64, _UINT64 - 1, 0xFFFF_FFFF_8000_0000, 0x5555_5555_5555_5555]
    values = []
    for _ in range(count):
        kind = rng.randrange(4)
        if kind == 0:
            values.append(rng.choice(edges))
        elif kind == 1:
            values.append(rng.choice(edges) & 0xFFFF_FFFF | (rng.choice(edges) & 0xFFFF_FFFF) << 32)
        elif kind == 2:
            values.append(sum(rng.choice((0, 1, 0x7F, 0x80, 0xFF)) << 8 * byte for byte in range(8)))
        else:
            values.append(rng.getrandbits(64))
    return values
