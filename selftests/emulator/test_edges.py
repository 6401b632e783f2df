# SPDX-License-Identifier: Apache-2.0
"""Every pair of edge values for each instruction that KVM lets its own CPU compute."""

from __future__ import annotations

import itertools

import pytest

from kvmpy.x86.instructions import Form, undefined_flags
from kvmpy.x86.operands import RAX, RCX, RDX, Instruction
from selftests.emulator.conftest import CASES, CODE, WAYS, MakePairs, Way, Ways, forms_of

pytestmark = pytest.mark.protections("none")

GROUPS = ("arithmetic", "shifts", "double-shifts", "products", "bits", "exchanges")
SIZES = {"b": 1, "w": 2, "d": 4, "q": 8}
PREFIXES = {1: b"", 2: b"\x66", 4: b"", 8: b"\x48"}


def values(size: int) -> list[int]:
    """Return the edges of a size."""
    top = 1 << 8 * size - 1
    return [0, 1, 2, 5, 31, top - 1, top, 2 * top - 2, 2 * top - 1]


def shape(form: Form) -> bool:
    """Whether all operands of a form are registers, and it has no immediate."""
    return len(form.code.split()) == 2 and "/" in form.code and form.only != "m"


def instructions(form: Form, size: int) -> list[Instruction]:
    """Return the instruction with each pair of values in RAX and the register that its second operand is."""
    opcode, modrm = form.code.split()
    code = bytearray(bytes.fromhex(opcode))
    code[-1] |= "b" in form.sizes and len(form.sizes) > 1 and size > 1
    by_divisor = form.group == "products" and modrm != "/r"
    code.append(0xC0 | (RDX if modrm == "/r" else int(modrm[1])) << 3 | (RCX if by_divisor else RAX))
    made = []
    for first, second in itertools.product(values(size), values(size)):
        if form.name in ("shld", "shrd") and second >= 8 * size:
            continue
        each = Instruction(form, 64, size, int(CODE) + 0x800, code=PREFIXES[size] + bytes(code))
        count = second if form.count == "cl" else 1
        each.exact = {RAX: first, RCX: second, RDX: first >> 1 if form.name in ("shld", "shrd") else second}
        if form.name in ("div", "idiv") and size > 1:
            each.exact[RDX] = first >> 8 * size - 1 if form.name == "idiv" else 0
        each.undefined = undefined_flags(form, size, count)
        made.append(each)
    return made


@pytest.mark.parametrize("ways", [each for each in WAYS if each.id in ("prefix", "ring0")])
def test_edges(make_pairs: MakePairs, ways: Ways) -> None:
    """Results, flags and #DE of every pair of edge values are the CPU's, in each size.

    arch/x86/kvm/emulate.c executes these instructions itself (EM_ASM_*); AMD APM volume 3.
    """
    way, _, _ = ways
    assert way is not Way.MMIO
    pairs, reports, total = make_pairs(way), [], 0
    chosen = [form for group in GROUPS for form in forms_of(group, ways) if shape(form)]
    made = [each for form in chosen for letter in form.sizes for each in instructions(form, SIZES[letter])]
    for start in range(0, len(made), CASES):
        part = made[start : start + CASES]
        reports += pairs.check(part, 1)
        total += len(part)
    print(f"{total:,} pairs of {len(chosen)} forms")
    names = {form.name for form in chosen}
    assert {"add", "sbb", "xadd", "neg", "rcl", "sar", "shld", "mul", "idiv", "btc"} <= names
    assert pairs.done >= total > 10_000
    assert not reports, "\n".join(reports)
