# SPDX-License-Identifier: Apache-2.0
"""Loads of segment registers and far transfers, with every kind of descriptor and each RPL."""

from __future__ import annotations

import pytest

from kvmpy import Gva
from kvmpy.guest import layout
from kvmpy.x86.operands import FIRST_FLAGS, RAX, RSP, WINDOW
from kvmpy.x86.pairs import ORDER, Question
from kvmpy.x86.segments import Descriptor
from selftests.emulator.conftest import ARENA, CODE, CODE_VIEW, PREFIX, SEGMENTS, MakePairs, Pairs, Way

pytestmark = [
    pytest.mark.protections("none"),
    pytest.mark.requires("param:kvm.force_emulation_prefix=1"),
]

FIRST = 0x58
READ, WRITE, EXECUTE_ONLY, READABLE, CONFORMING, LDT = 1, 3, 9, 0xB, 0xF, 2
TARGET = int(CODE) + 0x400


def describe(kind: int, dpl: int, *, s: int = 1, present: int = 1, long: int = 0, db: int = 1) -> int:
    """Return a flat descriptor."""
    return Descriptor(0, 0xFFFF_FFFF, kind, s, dpl, present, 0, long, db, 1).encode()


BOTH = "long-and-32-bit"
DATA = {
    "data-3": describe(WRITE, 3),
    "readonly-3": describe(READ, 3),
    "data-0": describe(WRITE, 0),
    "absent-data": describe(WRITE, 3, present=0),
    "execute-only": describe(EXECUTE_ONLY, 3),
    "code-3": describe(READABLE, 3),
    "code-0": describe(READABLE, 0),
    "conforming-0": describe(CONFORMING, 0),
    "long-code-3": describe(READABLE, 3, long=1, db=0),
    "long-code-0": describe(READABLE, 0, long=1, db=0),
    BOTH: describe(READABLE, 3, long=1, db=1),
    "absent-code": describe(READABLE, 3, long=1, db=0, present=0),
}
SYSTEM = {"ldt": describe(LDT, 3, s=0), "empty": 0}
TABLE = {**DATA, **SYSTEM}
SELECTORS = {name: FIRST + 8 * index for index, name in enumerate(TABLE)}
OTHERS = {"null": 0, "beyond-the-limit": 0xFFF8, "of-no-ldt": FIRST | 4}
# The emulator leaves gates and system segments to the CPU.
CODE_SELECTORS = {name: SELECTORS[name] for name in DATA if name != BOTH} | OTHERS

# What loads the selector in AX, or at RSP, and then stores it into RCX.
LOADS = {
    "mov-es": b"\x8e\xc0\x8c\xc1",
    "mov-ss": b"\x8e\xd0\x8c\xd1",
    "mov-ds": b"\x8e\xd8\x8c\xd9",
    "mov-fs": b"\x8e\xe0\x8c\xe1",
    "mov-gs": b"\x8e\xe8\x8c\xe9",
    "pop-fs": b"\x0f\xa1\x8c\xe1",
    "pop-gs": b"\x0f\xa9\x8c\xe9",
}
FAR_LOADS = {
    "lss": b"\x0f\xb2\x14\x24\x8c\xd1",
    "lfs": b"\x0f\xb4\x14\x24\x8c\xe1",
    "lgs": b"\x0f\xb5\x14\x24\x8c\xe9",
}
TRANSFERS = {
    "jmp-far": b"\xff\x2c\x24",
    "call-far": b"\xff\x1c\x24",
    "ret-far": b"\xcb",
    "ret-far-imm": b"\xca\x10\x00",
}


def extend_gdt(pairs: Pairs) -> None:
    """Add the descriptors to the GDT."""
    table = b"".join(value.to_bytes(8, "little") for value in TABLE.values())
    pairs.vm.write(Gva(layout.GDT_GVA + FIRST), table)
    sregs = pairs.vcpu.regs.get_sregs()
    sregs.gdt.limit = FIRST + len(table) - 1
    # There is no LDT, and TCG would look only at its limit.
    sregs.ldt.limit = 0
    pairs.vcpu.regs.set_sregs(sregs)


def question(code: bytes, selector: int, stack: bytes) -> Question:
    """Return the instruction with the selector in RAX and *stack* at RSP."""
    window = int(ARENA) + 0x400
    registers = {RAX: selector, RSP: window + WINDOW // 2}
    memory = bytes(WINDOW // 2) + stack.ljust(WINDOW // 2, b"\0")
    values = tuple(registers.get(number, 0) for number in ORDER)
    return Question(code, int(CODE) + 0x800, values, FIRST_FLAGS, 0, window, memory)


def compare(pairs: Pairs, named: dict[str, Question]) -> None:
    """Run them and tell what differs."""
    extend_gdt(pairs)
    if pairs.ring == 0:
        # INTO is another in 32-bit mode; UD2 is the same.
        pairs.vm.write(CODE_VIEW + (TARGET - int(CODE)), b"\x0f\x0b")
    reports = []
    for name, each in named.items():
        ends = pairs.ask(each, SEGMENTS)
        if ends is not None:
            reports.append(f"{name}: " + "; ".join(pairs.lines(each, *ends)))
    assert pairs.done >= len(named)
    assert not reports, "\n".join([f"of {len(named)} some differ (CPU | emulator):", *reports])


@pytest.mark.parametrize(
    ("instruction", "ring"),
    # GS of ring 0 is the runtime's own.
    [(name, ring) for name in (*LOADS, *FAR_LOADS) for ring in (3, 0) if ring == 3 or "gs" not in name],
)
def test_loads(make_pairs: MakePairs, instruction: str, ring: int) -> None:
    """A load of a segment register succeeds or faults, with the error code, as on the CPU.

    AMD APM volume 2, 4.8 and 8.2; volume 3, MOV, POP and LFS.
    """
    named = {}
    for name, selector in (SELECTORS | OTHERS).items():
        for rpl in range(4):
            chosen = selector | rpl
            if instruction in LOADS:
                named[f"{name} rpl {rpl}"] = question(
                    LOADS[instruction], chosen, chosen.to_bytes(8, "little")
                )
            else:
                pointer = b"\x44\x33\x22\x11" + chosen.to_bytes(2, "little")
                named[f"{name} rpl {rpl}"] = question(FAR_LOADS[instruction], 0, pointer)
    compare(make_pairs(Way.PREFIX, ring=ring), named)


def transfers(instruction: str, ring: int, selectors: dict[str, int]) -> dict[str, Question]:
    """Return the transfer to each of these with each RPL; the emulator has no returns to outer rings."""
    return {
        f"{name} rpl {rpl}": question(
            TRANSFERS[instruction], 0, TARGET.to_bytes(4, "little") + (selector | rpl).to_bytes(4, "little")
        )
        for name, selector in selectors.items()
        for rpl in range(4)
        if ring == 3 or not rpl or not instruction.startswith("ret")
    }


@pytest.mark.parametrize("ring", [3, 0])
@pytest.mark.parametrize("instruction", TRANSFERS)
def test_transfers(make_pairs: MakePairs, instruction: str, ring: int) -> None:
    """A far jump, call or return goes where it does on the CPU, or faults as there.

    AMD APM volume 2, 4.8 to 4.11; volume 3, CALL (Far), JMP (Far), RET (Far).
    """
    compare(make_pairs(Way.PREFIX, ring=ring), transfers(instruction, ring, CODE_SELECTORS))


@pytest.mark.parametrize("instruction", TRANSFERS)
def test_code_is_not_64_and_32_bit(make_pairs: MakePairs, instruction: str) -> None:
    """A transfer to a code segment with both L and D is #GP with its selector.

    AMD APM volume 2, 4.8.1.
    """
    compare(make_pairs(Way.PREFIX), transfers(instruction, 3, {BOTH: SELECTORS[BOTH]}))


TSS_AVAILABLE, TSS_BUSY = 9, 0xB
SYSTEM_FIRST = FIRST + 8 * len(TABLE)
GP, NP = 13, 11


def system(kind: int, *, base: int = 0x1000, present: int = 1) -> bytes:
    """Return a 16-byte descriptor of a TSS or an LDT."""
    low = Descriptor(base & 0xFFFF_FFFF, 0x67, kind, 0, 0, present, 0, 0, 0, 0).encode()
    return low.to_bytes(8, "little") + (base >> 32).to_bytes(8, "little")


# Code that loads AX into TR or LDTR, the descriptor, and the vector of its exception, 0 for none.
LTR, LLDT = b"\x0f\x00\xd8", b"\x0f\x00\xd0"
SYSTEM_LOADS = {
    "ltr-absent": (LTR, system(TSS_AVAILABLE, present=0), NP),
    "ltr-busy": (LTR, system(TSS_BUSY), GP),
    "ltr-ldt": (LTR, system(LDT), GP),
    "ltr-not-canonical": (LTR, system(TSS_AVAILABLE, base=1 << 62), GP),
    "lldt-absent": (LLDT, system(LDT, present=0), NP),
    "lldt-tss": (LLDT, system(TSS_AVAILABLE), GP),
    "lldt-not-canonical": (LLDT, system(LDT, base=1 << 62), GP),
    "lldt": (LLDT, system(LDT), 0),
}


@pytest.mark.parametrize("name", SYSTEM_LOADS)
def test_system_segments(make_pairs: MakePairs, name: str) -> None:
    """LTR and LLDT by the emulator fault with the selector as error code, and leave the descriptor alone.

    Only a load of TR without a fault marks its TSS as busy.  AMD APM volume 3, LTR and LLDT; commits
    ec6e4d863258 and 2626206963ac.
    """
    code, descriptor, vector = SYSTEM_LOADS[name]
    # Both runs are the emulator's: TCG loads TR with a base that is not canonical, and is lost.
    pairs = make_pairs(Way.MMIO, ring=0)
    where = Gva(layout.GDT_GVA + SYSTEM_FIRST)
    pairs.vm.write(where, descriptor)
    sregs = pairs.vcpu.regs.get_sregs()
    sregs.gdt.limit = SYSTEM_FIRST + 15
    pairs.vcpu.regs.set_sregs(sregs)
    end, _ = pairs.both(question(PREFIX + code, SYSTEM_FIRST, b""))
    start = int(CODE) + 0x800 + len(PREFIX)
    if vector:
        assert (end.vector, end.error_code, end.rip) == (vector, SYSTEM_FIRST, start)
    else:
        assert end.rip == start + len(code)
    assert pairs.vm.read(where, 16) == descriptor
