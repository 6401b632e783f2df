# SPDX-License-Identifier: Apache-2.0
"""ELF files that a guest cannot run are refused by name."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.address import Gva
from kvmpy.guest import GuestImageError, GuestProgram
from kvmpy.guest.symbols import FUNCTION, LineTable, SymbolTable, read_image

PT_LOAD, PT_INTERP = 1, 3
Load = tuple[int, int, int, int]  # type, address, memory size, flags
TEXT: Load = (PT_LOAD, 0x400000, 16, 5)

ELF32 = (
    b"\x7fELF\x01\x01\x01"
    + bytes(9)
    + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0, 52, 0, 0, 52, 32, 0, 40, 0, 0)
)


def _elf(
    *,
    loads: tuple[Load, ...] = ((PT_LOAD, 0x400000, 0x1000, 5),),
    kind: int = 2,
    machine: int = 62,
    entry: int = 0x400000,
) -> bytes:
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(loads), 64, 0, 0)
    table = b"".join(
        struct.pack("<IIQQQQQQ", type_, flags, 0x1000, gva, gva, min(memsize, 16), memsize, 0x1000)
        for type_, gva, memsize, flags in loads
    )
    return (ident + header + table).ljust(0x1000, b"\0") + b"\xf4" * 16


def test_a_plain_static_image() -> None:
    program = GuestProgram.from_elf(_elf())
    assert program.entry == Gva(0x400000)
    assert [(s.gva, bytes(s.data), s.memsize) for s in program.segments] == [
        (Gva(0x400000), b"\xf4" * 16, 0x1000)
    ]
    assert dict(program.symbols) == {}
    assert program.line(0x400000) is None


def test_a_path(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(_elf())
    assert GuestProgram.from_elf(path).name == "image"
    with pytest.raises(FileNotFoundError):
        GuestProgram.from_elf(tmp_path / "none")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an ELF file: it begins with nothing"),
        (b"#!/bin/sh\n", "not an ELF file: it begins with 23 21 2f 62"),
        (b"\x7fELF", "damaged"),
        (_elf()[:70], "damaged"),
        (_elf()[:0x1008], "is cut short"),
        (_elf(machine=183), "ELF for 64-bit AARCH64, guests need 64-bit X86_64"),
        (_elf(machine=243), "RISCV"),
        (ELF32, "nothing to load"),
        (ELF32[:18] + b"\x28" + ELF32[19:], "ELF for 32-bit ARM, guests need 64-bit X86_64 or 32-bit 386"),
        (_elf(kind=1), "an object file that was never linked"),
        (_elf(kind=3), "position independent or a shared library"),
        (_elf(loads=((PT_INTERP, 0, 1, 4), (PT_LOAD, 0x400000, 16, 5))), "dynamically linked"),
        (_elf(loads=()), "nothing to load"),
        (_elf(entry=0x500000), "entry 0x500000 lies in no executable segment"),
        (_elf(loads=((PT_LOAD, 0x400000, 16, 6),)), "lies in no executable segment"),
        (_elf(loads=(TEXT, (PT_LOAD, 0x7FF0000, 16, 6))), "overlaps the descriptor tables"),
        (_elf(loads=(TEXT, (PT_LOAD, 0x7FF0000, 0x10001, 6))), "descriptor tables"),
        (_elf(loads=(TEXT, (PT_LOAD, 0x8000000, 16, 6))), "overlaps the per-CPU areas"),
        (_elf(loads=(TEXT, (PT_LOAD, 0xFFFFFFFF81000000, 16, 6))), "lower half"),
        (_elf(loads=(TEXT, (PT_LOAD, 0x400800, 16, 6))), "share a page"),
    ],
)  # fmt: skip
def test_what_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(GuestImageError, match=message):
        GuestProgram.from_elf(data)


@given(st.binary(max_size=300), st.integers(0, 200))
def test_damage_is_always_a_clear_error(noise: bytes, at: int) -> None:
    data = bytearray(_elf())
    data[at : at + len(noise)] = noise
    with contextlib.suppress(GuestImageError):
        assert read_image(bytes(data), "noise").segments


def test_a_host_program_is_refused() -> None:
    with pytest.raises(GuestImageError, match=r"not a static executable|dynamically linked"):
        GuestProgram.from_elf("/proc/self/exe")


def test_functions_by_address() -> None:
    table = SymbolTable(
        "p", [("a", 0x10, 8, FUNCTION), ("b", 0x20, 0, FUNCTION), ("data", 0x18, 8, "object")]
    )
    assert table.function(0xF) is None
    assert table.function(0x17) == ("a", 7)
    assert table.function(0x18) is None
    assert table.function(0x20) == ("b", 0)
    assert table.function(0x21) is None


def test_lines_end_with_their_sequence() -> None:
    table = LineTable([(0x10, ("f", 1)), (0x14, ("f", 2)), (0x18, None), (0x20, ("g", 1)), (0x28, None)])
    assert [table.find(a) for a in (0xF, 0x10, 0x13, 0x17, 0x18, 0x20, 0x28)] == [
        None, ("f", 1), ("f", 1), ("f", 2), None, ("g", 1), None,
    ]  # fmt: skip


def test_a_sequence_that_begins_where_another_ends() -> None:
    table = LineTable([(0x20, ("g", 1)), (0x30, None), (0x10, ("f", 1)), (0x20, None)])
    assert table.find(0x20) == ("g", 1)


def test_damaged_debug_information_counts_as_none() -> None:
    assert LineTable.of(b"\x7fELF broken").find(0) is None
