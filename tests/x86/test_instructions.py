# SPDX-License-Identifier: Apache-2.0
"""The table of instructions and their encoder, against an independent disassembler."""

from __future__ import annotations

import random
from typing import Any

import capstone
import pytest
from capstone import x86

from kvmpy.x86.bits import RFLAGS
from kvmpy.x86.instructions import ALL, Form, groups, table, undefined_flags
from kvmpy.x86.operands import WINDOW, Encoder, Instruction, Site, choose

CF, AF, OF = int(RFLAGS.CF), int(RFLAGS.AF), int(RFLAGS.OF)
HOLE = 0x6000_2800
SITE = Site(
    rip=0x5FF0_0800, window=0x6000_0400, fs_base=0x1230, unmapped=(HOLE,), targets=(0x5FF0_0100, 0x5FF0_1F00)
)
# What the disassembler calls otherwise.
OTHER = {
    "cbw": {"cbw", "cwde", "cdqe"}, "cwd": {"cwd", "cdq", "cqo"}, "sal": {"shl", "sal"}, "xlat": {"xlatb"},
    "loopz": {"loope"}, "loopnz": {"loopne"}, "jcxz": {"jcxz", "jecxz", "jrcxz"}, "xchg": {"xchg", "nop"},
    "prefetch": {"prefetchw", "prefetcht0", "prefetch", "prefetchnta"}, "mov-cr": {"mov"}, "mov-dr": {"mov"},
    "mov": {"mov", "movabs"}, "pusha": {"pushal", "pushaw", "pusha"}, "popa": {"popal", "popaw", "popa"},
    "pushf": {"pushf", "pushfd", "pushfq"}, "popf": {"popf", "popfd", "popfq"},
    "ins": {"insb"}, "outs": {"outsb"}, "das": {"das"}, "ret": {"ret"},
}  # fmt: skip
CONDITIONS = {"nb": "ae", "z": "e", "nz": "ne", "nbe": "a", "nl": "ge", "nle": "g"}
PREFIXES = bytes((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
STRINGS = ("movs", "cmps", "stos", "lods", "scas")


def is_known(form: Form, made: Instruction) -> bool:
    """Whether the disassembler knows it: MOVSXD without REX.W it does not."""
    return form.name != "movsxd" or made.size == 8


def decode(made: Instruction) -> Any:
    """Return the one instruction that the bytes are, without LOCK, which not every one may have."""
    decoder = capstone.Cs(
        capstone.CS_ARCH_X86, capstone.CS_MODE_64 if made.bits == 64 else capstone.CS_MODE_32
    )
    decoder.detail = True
    prefixes = len(made.code) - len(made.code.lstrip(PREFIXES))
    code = made.code[:prefixes].replace(b"\xf0", b"") + made.code[prefixes:]
    (found,) = decoder.disasm(code, made.rip + len(made.code) - len(code))
    assert found.size == len(code)
    return found


def names_of(form: Form) -> set[str]:
    """Return what the disassembler may call it."""
    if form.name in STRINGS:
        return {form.name + letter for letter in "bwdq"}
    for start in ("cmov", "set", "j"):
        rest = form.name[len(start) :]
        if form.name.startswith(start) and rest in CONDITIONS:
            return {start + CONDITIONS[rest]}
    return OTHER.get(form.name, {form.name})


def address_of(made: Instruction, found: Any) -> int | None:
    """Return the linear address of the explicit memory operand, from the registers that it needs."""
    number = {x86.X86_REG_FS: SITE.fs_base}
    names = ("a", "c", "d", "b", "sp", "bp", "si", "di")
    base, mask = made.registers()
    for operand in found.operands:
        if operand.type != x86.X86_OP_MEM:
            continue
        address: int = operand.mem.disp
        for register, scale in ((operand.mem.base, 1), (operand.mem.index, operand.mem.scale)):
            if not register:
                continue
            name = found.reg_name(register)
            if name in ("rip", "eip"):
                address += found.address + found.size
                continue
            if name in ("riz", "eiz"):
                continue
            index = (
                int(name[1:].rstrip("d")) if name[1].isdigit() else names.index(name[1:].removesuffix("x"))
            )
            wide = 0xFFFF_FFFF if name[0] == "e" or name.endswith("d") else (1 << 64) - 1
            assert not mask[index] & wide, f"{name} of an address is random"
            address += (base[index] & wide) * scale
        address &= (1 << 8 * found.addr_size) - 1
        return int(address) + number.get(operand.mem.segment, 0)
    return None


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("group", groups())
def test_the_bytes_are_the_instruction(group: str, bits: int) -> None:
    """Each form is encoded as what it is called, whatever prefixes and operands it has."""
    encoder = Encoder(random.Random(7), bits=bits)
    for form in table():
        if form.group == group and bits in form.modes:
            for _ in range(24):
                made = encoder.encode(form, SITE)
                if not is_known(form, made):
                    continue
                found = decode(made)
                words = found.mnemonic.split()
                assert words[-1] in names_of(form), f"{made.code.hex(' ')} is {found.mnemonic} {found.op_str}"


@pytest.mark.parametrize("bits", [64, 32])
def test_memory_operands_are_in_the_window(bits: int) -> None:
    """Every addressing form comes out where it was meant: in the window, or where nothing is."""
    encoder = Encoder(random.Random(8), bits=bits)
    seen: set[tuple[bool, bool, int]] = set()
    for form in table():
        if (
            bits not in form.modes
            or not form.access
            or form.kind == "string"
            or form.name in ("ins", "outs", "xlat")
        ):
            continue
        for _ in range(24):
            made = encoder.encode(form, SITE)
            if not is_known(form, made):
                continue
            found = decode(made)
            address = address_of(made, found)
            if address is not None and "/" in form.code:
                offset = address - SITE.window
                assert 0 <= offset < WINDOW or address == HOLE, (
                    f"{found.mnemonic} {found.op_str}: {address:#x}"
                )
                memory = next(each.mem for each in found.operands if each.type == x86.X86_OP_MEM)
                seen.add((memory.base != 0, memory.index != 0, found.addr_size))
    sizes = (8, 4) if bits == 64 else (4,)
    assert seen >= {
        (base, index, size) for base in (True, False) for index in (True, False) for size in sizes
    }


def test_no_form_of_another_mode() -> None:
    """A form that a mode does not have is refused."""
    decimal = next(form for form in table() if form.name == "aam")
    with pytest.raises(ValueError, match="aam d4 ib has no 64-bit encoding"):
        Encoder(random.Random(1)).encode(decimal, SITE)


@pytest.mark.parametrize(
    ("name", "size", "count", "expected"),
    [
        ("shl", 4, 0, 0),
        ("shl", 4, 32, 0),
        ("shl", 8, 32, AF | OF),
        ("shl", 4, 1, AF),
        ("shr", 1, 8, AF | OF | CF),
        ("sar", 1, 9, AF | OF),
        ("rol", 4, 1, 0),
        ("rcr", 2, 5, OF),
        ("shld", 4, 3, AF | OF),
    ],
)
def test_flags_of_shifts(name: str, size: int, count: int, expected: int) -> None:
    """A shift by 0 changes no flag, by 1 leaves AF open (rotates: nothing), by more OF, by the size CF."""
    form = next(form for form in table() if form.name == name and form.count)
    assert undefined_flags(form, size, count) == expected


def test_only_flags_are_undefined() -> None:
    """No form excuses anything but the six status flags."""
    assert all(not form.undefined & ~ALL for form in table())


def test_borders_without_operands_across() -> None:
    """Where no operand may lie across the border, none does."""
    site = Site(rip=SITE.rip, window=SITE.window, border=True, across=False, targets=SITE.targets)
    encoder = Encoder(random.Random(9), edge=0)
    middle = site.window + WINDOW // 2
    for form in table():
        if form.group not in ("arithmetic", "exchanges", "moves") or not form.access or 64 not in form.modes:
            continue
        for _ in range(24):
            made = encoder.encode(form, site)
            address = address_of(made, decode(made)) if "/" in form.code and is_known(form, made) else None
            if address is not None:
                width = 8 if form.kind == "compare8" else made.size
                assert address + width <= middle or address >= middle, made.code.hex(" ")


def test_all_forms_come_as_often() -> None:
    """Choosing takes each form as often as the others."""
    forms = table()[:7]
    chosen = choose(random.Random(3), forms, 70)
    assert {chosen.count(form) for form in forms} == {10}


def test_strings_stay_in_the_window() -> None:
    """However often a string instruction repeats, all that it reaches is in the window."""
    encoder, inside = Encoder(random.Random(11)), 0
    for form in table():
        if form.kind != "string":
            continue
        for border in (False, True):
            site = Site(rip=SITE.rip, window=SITE.window, border=border, across=border)
            for _ in range(300):
                made = encoder.encode(form, site)
                base, _ = made.registers()
                count = base[1] & 0xFFFF_FFFF if {0xF2, 0xF3} & set(made.code[:4]) else 1
                last = (count - 1) * made.size * (-1 if made.flags & int(RFLAGS.DF) else 1) if count else 0
                for pointer in (base[6], base[7]):
                    first = (pointer & 0xFFFF_FFFF) - site.window
                    assert min(first, first + last) >= 0, made.code.hex(" ")
                    assert max(first, first + last) + made.size <= WINDOW, made.code.hex(" ")
                    inside += 1
    assert inside > 1000
