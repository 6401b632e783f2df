# SPDX-License-Identifier: Apache-2.0
"""Every intercept of an instruction, a register or an exception: taken where L1 sets it, else not there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from kvmpy import CR0, CR4, L2, Gva, SvmExit, Vector
from kvmpy.guest import layout
from kvmpy.x86.svm_exits import register_access
from selftests.nested.conftest import offered

pytestmark = [pytest.mark.protections("none"), pytest.mark.requires("cpuid:svm")]

ICEBP, IRETQ = b"\xf1", b"\x48\xcf"
UNMAPPED = 0x7FFF_0000_0000
# The selector of a data segment that is not present, behind those of the GDT.
ABSENT = 0x58


@dataclass
class Case:
    """An instruction: *code* whose last *length* bytes exit with *exit* where L1 intercepts it.

    *fault*: what it raises otherwise, None where it simply goes on; ``...`` where that cannot be tried.
    *feature*: without it in L1's CPUID the instruction is #UD.  *prepare* has fields of the VMCB to change
    (None: leave it), *info1* what EXITINFO1 must hold.
    """

    name: str
    code: bytes
    exit: int
    fault: object = None
    registers: dict[str, int] = field(default_factory=dict)
    length: int = 0
    feature: str = ""
    prepare: dict[str, int] = field(default_factory=dict)
    info1: int | None = None
    info2: int | None = None


E = SvmExit
GENERAL = [
    Case("CPUID", b"\x0f\xa2", E.CPUID),
    Case("RDTSC", b"\x0f\x31", E.RDTSC),
    Case("RDTSCP", b"\x0f\x01\xf9", E.RDTSCP, feature="rdtscp"),
    Case("RDPMC", b"\x0f\x33", E.RDPMC, fault=...),
    Case("PUSHF", b"\x9c", E.PUSHF, fault=...),
    Case("POPF", b"\x6a\x02\x9d", E.POPF, length=1, fault=...),
    Case(
        "IRET",
        # mov %ss, %eax; mov %rsp, %rdx; push %rax; push %rdx; pushf; mov %cs, %eax; push %rax;
        # lea 3(%rip), %rax; push %rax; iretq
        b"\x8c\xd0\x48\x89\xe2\x50\x52\x9c\x8c\xc8\x50\x48\x8d\x05\x03\x00\x00\x00\x50" + IRETQ,
        E.IRET, length=2,
    ),
    Case("INT n", b"\xcd\x03", E.SWINT, fault=Vector.BP),
    Case("INVD", b"\x0f\x08", E.INVD),
    Case("WBINVD", b"\x0f\x09", E.WBINVD),
    Case("PAUSE", b"\xf3\x90", E.PAUSE),
    Case("HLT", b"\xf4", E.HLT, fault=...),
    Case("INVLPG", b"\x0f\x01\x3f", E.INVLPG, registers={"rdi": 0x1000}),
    Case("INVLPGA", b"\x0f\x01\xdf", E.INVLPGA),
    Case("RSM", b"\x0f\xaa", E.RSM, fault=Vector.UD),
    Case("VMRUN", b"\x0f\x01\xd8", E.VMRUN, fault=...),
    Case("VMMCALL", b"\x0f\x01\xd9", E.VMMCALL, fault=...),
    Case("VMLOAD", b"\x0f\x01\xda", E.VMLOAD, fault=...),
    Case("VMSAVE", b"\x0f\x01\xdb", E.VMSAVE, fault=...),
    Case("STGI", b"\x0f\x01\xdc", E.STGI),
    Case("CLGI", b"\x0f\x01\xdd", E.CLGI, fault=...),
    Case("SKINIT", b"\x0f\x01\xde", E.SKINIT, fault=..., feature="skinit"),
    Case("ICEBP", ICEBP, E.ICEBP, fault=Vector.DB),
    Case("MONITOR", b"\x0f\x01\xc8", E.MONITOR, fault=..., feature="mwait"),
    Case("MWAIT", b"\x0f\x01\xc9", E.MWAIT, fault=..., feature="mwait"),
    Case(
        "XSETBV", b"\x0f\x01\xd1", E.XSETBV, feature="xsave", registers={"rax": 1},
        prepare={"cr4": int(CR4.OSXSAVE)},
    ),
    Case("SIDT", b"\x0f\x01\x4c\x24\xf0", E.IDTR_READ),
    Case("SGDT", b"\x0f\x01\x44\x24\xf0", E.GDTR_READ),
    Case("SLDT", b"\x0f\x00\xc0", E.LDTR_READ),
    Case("STR", b"\x0f\x00\xc8", E.TR_READ),
    Case("LIDT", b"\x0f\x01\x4c\x24\xf0\x0f\x01\x5c\x24\xf0", E.IDTR_WRITE, length=5),
    Case("LGDT", b"\x0f\x01\x44\x24\xf0\x0f\x01\x54\x24\xf0", E.GDTR_WRITE, length=5),
    Case("LLDT", b"\x31\xc0\x0f\x00\xd0", E.LDTR_WRITE, length=3),
    Case("LTR", b"\x31\xc0\x0f\x00\xd8", E.TR_WRITE, length=3, fault=...),
    Case(
        "INVPCID", b"\x66\x0f\x38\x82\x04\x24", E.INVPCID, feature="invpcid", fault=...,
        registers={"rax": 2},
    ),
]  # fmt: skip


def _moves() -> Iterable[Case]:
    """Moves to and from control and debug registers; what is written is what was read."""
    for number in (0, 2, 3, 4, 8):
        rex, low = (b"\x44", 0) if number == 8 else (b"", number)
        read = rex + bytes((0x0F, 0x20, 0xC0 | low << 3))
        write = rex + bytes((0x0F, 0x22, 0xC0 | low << 3))
        yield Case(f"MOV from CR{number}", read, E.READ_CR0 + number)
        yield Case(f"MOV to CR{number}", read + write, E.WRITE_CR0 + number, length=len(write))
    for number in range(8):
        read = bytes((0x0F, 0x21, 0xC0 | number << 3))
        write = bytes((0x0F, 0x23, 0xC0 | number << 3))
        yield Case(f"MOV from DR{number}", read, E.READ_DR0 + number)
        yield Case(f"MOV to DR{number}", read + write, E.WRITE_DR0 + number, length=3)
    yield Case("CLTS", b"\x0f\x06", E.WRITE_CR0)
    yield Case("LMSW", b"\x0f\x01\xe0\x0f\x01\xf0", E.WRITE_CR0, length=3)
    yield Case("SMSW", b"\x0f\x01\xe0", E.READ_CR0)


def _exceptions() -> Iterable[Case]:
    def case(vector: Vector, code: bytes, **more: object) -> Case:
        return Case(f"#{vector.name}", code, E.EXCP_BASE + vector, fault=vector, **more)  # type: ignore[arg-type]

    non_canonical = b"\x48\xb8" + (1 << 63).to_bytes(8, "little")  # mov $1 << 63, %rax
    yield case(Vector.DE, b"\x31\xd2\x31\xc9\xf7\xf1", length=2)
    yield case(Vector.BP, b"\xcc")
    yield case(Vector.UD, b"\x0f\x0b")
    yield case(Vector.NM, b"\xd9\xe8", prepare={"cr0": int(CR0.TS)})
    absent = {"gdtr.limit": ABSENT | 7}
    load = b"\xb8" + ABSENT.to_bytes(4, "little")  # mov $ABSENT, %eax
    yield case(Vector.SS, load + b"\x8e\xd0", length=2, prepare=absent, info1=ABSENT)
    yield case(Vector.NP, load + b"\x8e\xd8", length=2, prepare=absent, info1=ABSENT)
    yield case(Vector.GP, non_canonical + b"\x48\x8b\x00", length=3, info1=0)
    yield case(
        Vector.PF, b"\x48\xbf" + UNMAPPED.to_bytes(8, "little") + b"\x48\x89\x07", length=3,
        info1=2, info2=UNMAPPED,
    )  # fmt: skip


def prepare(l2: L2, case: Case) -> bytes:
    """Bring L2 before a case, without any intercept of it; return its code, with its registers loaded."""
    l2.reset()
    l2.vm.write(Gva(layout.GDT_GVA + ABSENT), (0x00CF_1300_0000_FFFF).to_bytes(8, "little"))
    for name, bits in case.prepare.items():
        l2.vmcb[name] |= bits
    moves = {"rax": b"\x48\xb8", "rdi": b"\x48\xbf"}
    preset = (moves[name] + value.to_bytes(8, "little") for name, value in case.registers.items())
    return b"".join(preset) + case.code


def check(l2: L2, case: Case) -> list[str]:
    """Run a case with and without its intercept; return what was not as it must be."""
    wrong = []
    code = prepare(l2, case)
    at = len(code) - (case.length or len(case.code))
    l2.intercept(case.exit)
    # What surrounds an attempt saves flags itself.
    exit_ = l2.run(code) if case.exit in (E.PUSHF, E.POPF) else l2.attempt(code)
    if (exit_.code, l2.offset) != (case.exit, at):
        raised = f", raised {l2.fault}" if exit_.code == E.VMMCALL and case.exit != E.VMMCALL else ""
        return [f"{case.name}: {exit_}{raised}, {l2.offset} bytes on, expected the exit at {at}"]
    if case.info1 is not None and exit_.info1 != case.info1:
        wrong.append(f"{case.name}: EXITINFO1 {exit_.info1:#x}, expected {case.info1:#x}")
    if case.info2 is not None and exit_.info2 != case.info2:
        wrong.append(f"{case.name}: EXITINFO2 {exit_.info2:#x}, expected {case.info2:#x}")
    behind = int(l2.code) + len(code)
    if offered(l2, "nrips") and case.exit < E.EXCP_BASE and l2.vmcb["next_rip"] != behind:
        wrong.append(f"{case.name}: next RIP {l2.vmcb['next_rip']:#x}, expected {behind:#x}")
    if case.fault is ...:
        return wrong
    code = prepare(l2, case)
    # What is like it stays intercepted: no neighbour is taken for it.
    if case.exit < E.EXCP_BASE:
        way = case.exit & 0x10
        l2.intercept(*(number for number in range(0x40) if number & 0x10 == way and number != case.exit))
    exit_ = l2.attempt(code)
    raised_vector = l2.fault.vector if l2.fault is not None else None
    if exit_.code != E.VMMCALL or raised_vector != case.fault:
        wrong.append(f"{case.name}, not intercepted: {exit_}, raised {l2.fault}")
    return wrong


@pytest.mark.parametrize("case", GENERAL, ids=lambda case: case.name.replace(" ", "-"))
def test_instruction(l2: L2, case: Case) -> None:
    """An intercepted instruction exits before it does anything; without the intercept it does its work.

    AMD APM volume 2, 15.9 Instruction Intercepts.
    """
    if case.feature and not offered(l2, case.feature):
        pytest.skip(f"L1's CPUID lacks {case.feature}")
    assert not check(l2, case)


def test_registers(l2: L2) -> None:
    """Reads and writes of each control and debug register exit by their own bit alone.

    AMD APM volume 2, 15.9 and table B-1.
    """
    wrong = [line for case in _moves() for line in check(l2, case)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", list(_exceptions()), ids=lambda case: case.name.strip("#"))
def test_exception(l2: L2, case: Case) -> None:
    """Exceptions exit by their vector's bit with error code and address, or else reach L2's own handler.

    AMD APM volume 2, 15.12 Exception Intercepts: RIP points at the instruction, at INT3, too.
    """
    assert not check(l2, case)


@pytest.mark.parametrize("bit", [CR0.TS, CR0.MP, CR0.WP, CR0.NE, CR0.AM], ids=lambda bit: bit.name)
def test_selective_write(l2: L2, bit: CR0) -> None:
    """The selective intercept of CR0 is for writes that change more than TS and MP.

    AMD APM volume 2, 15.9 (CR0_SEL_WRITE).
    """
    expected = E.VMMCALL if bit in (CR0.TS, CR0.MP) else E.CR0_SEL_WRITE
    l2.reset()
    before = l2.vmcb["cr0"]
    l2.intercept(E.CR0_SEL_WRITE)
    exit_ = l2.run(b"\x0f\x22\xc0", rax=before ^ bit)
    after = before ^ bit if expected == E.VMMCALL else before
    assert (exit_.code, l2.vmcb["cr0"]) == (expected, after), str(exit_)


def test_names(l2: L2) -> None:
    """What the registers' exits are called is what exits."""
    l2.reset()
    l2.intercept(E.WRITE_CR4)
    exit_ = l2.run(b"\x0f\x20\xe0\x0f\x22\xe0")
    assert (register_access(exit_.code), str(exit_)[:9]) == ("CR4 write", "CR4 write")
