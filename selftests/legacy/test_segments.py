# SPDX-License-Identifier: Apache-2.0
"""Segments, gates and IRET in protected mode of 16 and 32 bits (AMD APM volume 2, 4.7 to 4.12 and 8.7)."""

from __future__ import annotations

import struct

import pytest

from kvmpy import Fault, GuestProgram, Legacy, LegacyMode, Vector
from kvmpy.guest import legacy as places
from kvmpy.x86 import segments
from kvmpy.x86.segments import Descriptor
from selftests.legacy.conftest import ON_THE_CPU, LegacyMaker

pytestmark = pytest.mark.protections("none")

SELECTOR = places.FREE_SELECTOR
GATE = SELECTOR + 8
TARGET = SELECTOR + 16
BASE, SIZE = 0x1_0000, 0x2000
MODES = pytest.mark.parametrize(
    "mode", [LegacyMode.PROTECTED16, LegacyMode.PROTECTED32], ids=["16-bit", "32-bit"]
)

ASSEMBLY = """
	.section .low, "awx", @progbits
	.code32
/* A call gate's target: what it was given, and where it came from. */
called:		movl 8(%esp), %eax
		movl 4(%esp), %ecx
		movl %esp, %ebx
		lretl $4
called_from_3:	movl 8(%esp), %eax
		movw %cs, %dx
		lretl $4
call_gate:	pushl %eax
		lcall $0x70, $0x99999999
		ret
iret:		iretl
"""
# The first opcode byte, ModRM of [ebx] in 32-bit and [bx] in 16-bit code; CF of 16 bits gets a prefix.
READ = {1: b"\x8a", 2: b"\x8b", 4: b"\x8b"}
WRITE = {1: b"\x88", 2: b"\x89", 4: b"\x89"}


def access(cpu: Legacy, size: int, *, write: bool = False, stack: bool = False) -> bytes:
    """Return an access of *size* bytes at DS:(E)BX or SS:(E)BP."""
    wide = cpu.mode is LegacyMode.PROTECTED32
    prefix = b"\x66" if (size == 2 and wide) or (size == 4 and not wide) else b""
    modrm = (b"\x45\x00" if wide else b"\x46\x00") if stack else (b"\x03" if wide else b"\x07")
    return prefix + (WRITE if write else READ)[size] + modrm


def segment_of(cpu: Legacy, name: str, kind: int, limit: int, *, big: int = 1) -> None:
    """Let a segment register begin with a segment of *limit* at BASE."""
    cpu.describe(SELECTOR, Descriptor(BASE, limit, kind, 1, 0, 1, 0, 0, big, 0))
    cpu.load(getattr(cpu.sregs, name), SELECTOR)


@MODES
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_limit(legacy: LegacyMaker, mode: LegacyMode, size: int, write: bool) -> None:
    """The last byte of an access may be the limit's, and not the byte behind it: #GP(0)."""
    cpu = legacy(mode)
    segment_of(cpu, "ds", segments.DATA, SIZE - 1)
    code = access(cpu, size, write=write)
    assert cpu.run(code, ebx=SIZE - size).fault is None
    for offset in range(SIZE - size + 1, SIZE + 2):
        ended = cpu.run(code, ebx=offset)
        assert (ended.fault, ended["eip"]) == (Fault(Vector.GP, 0), places.CODE), hex(offset)


@MODES
@pytest.mark.parametrize("size", [1, 2, 4])
def test_expand_down(legacy: LegacyMaker, mode: LegacyMode, size: int) -> None:
    """An expand-down segment begins behind its limit, and ends at 64 KiB or 4 GiB by its B bit."""
    cpu = legacy(mode)
    for big in (0, 1):
        segment_of(cpu, "ds", segments.DATA | 4, SIZE - 1, big=big)
        code = access(cpu, size)
        assert cpu.run(code, ebx=SIZE).fault is None
        for offset in range(SIZE - size, SIZE):
            assert cpu.run(code, ebx=offset).fault == Fault(Vector.GP, 0), hex(offset)
        end = cpu.run(access(cpu, 4), ebx=0xFFFE).fault
        assert end == (None if big else Fault(Vector.GP, 0))


@MODES
def test_stack_limit(legacy: LegacyMaker, mode: LegacyMode) -> None:
    """What lies outside the stack segment is #SS(0), by address and by PUSH."""
    cpu = legacy(mode)
    # The exception needs a stack itself: the segment ends above its frame.
    segment_of(cpu, "ss", segments.DATA, SIZE - 1, big=int(mode is LegacyMode.PROTECTED32))
    code = access(cpu, 4, stack=True)
    assert cpu.run(code, ebp=SIZE - 4, esp=0x1000).fault is None
    assert cpu.run(code, ebp=SIZE - 3, esp=0x1000).fault == Fault(Vector.SS, 0)


@MODES
def test_what_may_not_be_done(legacy: LegacyMaker, mode: LegacyMode) -> None:
    """Writes to read-only data and code, reads of execute-only code and by a null selector are #GP(0)."""
    cpu = legacy(mode)
    read, write = access(cpu, 2), access(cpu, 2, write=True)
    # Read-only data, execute/read, execute-only.
    for kind, codes in ((0x1, (write,)), (segments.CODE, (write,)), (0x9, (read, write))):
        segment_of(cpu, "ds", kind, SIZE - 1)
        for code in codes:
            assert cpu.run(code).fault == Fault(Vector.GP, 0), hex(kind)
    cpu.reset()
    null = b"\x31\xc0\x8e\xd8"  # xor %eax, %eax; mov %eax, %ds
    assert cpu.run(null).fault is None
    assert cpu.run(null + read).fault == Fault(Vector.GP, 0)


LOADS = {
    "beyond the GDT": (0xFFF8, None, Vector.GP),
    "not present": (SELECTOR, Descriptor(0, 0xFFFF, segments.DATA, 1, 0, 0, 0, 0, 1, 0), Vector.NP),
    "a system segment": (SELECTOR, places.system(0, 0xFFFF, 0x2), Vector.GP),
    "execute-only": (SELECTOR, Descriptor(0, 0xFFFF, 0x9, 1, 0, 1, 0, 0, 1, 0), Vector.GP),
    "LDT": (SELECTOR | 4, None, Vector.GP),
}


@MODES
@pytest.mark.parametrize("what", LOADS)
def test_load_of_a_data_segment(legacy: LegacyMaker, mode: LegacyMode, what: str) -> None:
    """MOV to ES of what is no readable, present segment faults with the selector, and ES stays."""
    cpu = legacy(mode)
    selector, descriptor, vector = LOADS[what]
    if descriptor is not None:
        cpu.describe(SELECTOR, descriptor)
    before = cpu.sregs.es.selector
    ended = cpu.run(b"\x8e\xc0", eax=selector)
    assert ended.fault == Fault(vector, selector)
    assert ended.sregs.es.selector == before


def test_load_sets_the_accessed_bit(legacy: LegacyMaker) -> None:
    """A load marks the descriptor in memory as accessed."""
    cpu = legacy(LegacyMode.PROTECTED32)
    cpu.describe(SELECTOR, Descriptor(0, 0xFFFF, 0x2, 1, 0, 1, 0, 0, 1, 0))
    assert cpu.run(b"\x8e\xc0", eax=SELECTOR).fault is None
    assert cpu.described(SELECTOR).type == 0x3


STACKS = {
    "null": (0, None, Vector.GP),
    "ring 3": (segments.USER_DS, None, Vector.GP),
    "read-only": (SELECTOR, Descriptor(0, 0xFFFF, 0x1, 1, 0, 1, 0, 0, 1, 0), Vector.GP),
    "not present": (SELECTOR, Descriptor(0, 0xFFFF, segments.DATA, 1, 0, 0, 0, 0, 1, 0), Vector.SS),
}


@MODES
@pytest.mark.parametrize("what", STACKS)
def test_load_of_a_stack_segment(legacy: LegacyMaker, mode: LegacyMode, what: str) -> None:
    """SS takes a writable segment of the current ring only; one that is not present is #SS."""
    cpu = legacy(mode)
    selector, descriptor, vector = STACKS[what]
    if descriptor is not None:
        cpu.describe(SELECTOR, descriptor)
    ended = cpu.run(b"\x8e\xd0", eax=selector)
    assert ended.fault == Fault(vector, selector & ~3)


@pytest.fixture
def gates(legacy: LegacyMaker) -> Legacy:
    """A vCPU of ring 0 with a call gate to ``called`` that takes one parameter."""
    cpu = legacy(LegacyMode.PROTECTED32, GuestProgram.from_asm(ASSEMBLY, name="gates"))
    cpu.describe(
        GATE,
        segments.gate32(
            int(cpu.vm.program.address_of("called")), segments.KERNEL_CS32, segments.CALL_GATE32, count=1
        ),
    )
    return cpu


@ON_THE_CPU
def test_call_gate(gates: Legacy) -> None:
    """A call through a gate goes to the gate's offset; in the same ring it copies no parameters."""
    ended = gates.run("call_gate", eax=0x5555)
    assert ended.fault is None
    assert (ended["eax"], ended["ecx"], ended["esp"]) == (0x5555, segments.KERNEL_CS32, places.STACK_TOP)


@ON_THE_CPU
def test_call_gate_to_ring_0(legacy: LegacyMaker) -> None:
    """From ring 3 a gate of DPL 3 switches to the stack of the TSS and copies parameters; RET goes back."""
    cpu = legacy(LegacyMode.PROTECTED32, GuestProgram.from_asm(ASSEMBLY, name="gates"), ring=3)
    target = int(cpu.vm.program.address_of("called_from_3"))
    for dpl in (0, 3):
        cpu.describe(
            GATE, segments.gate32(target, segments.KERNEL_CS32, segments.CALL_GATE32, dpl=dpl, count=1)
        )
        ended = cpu.run("call_gate", eax=0x1234)
        if dpl == 0:
            assert ended.fault == Fault(Vector.GP, GATE)
            continue
        assert ended.fault is None
        assert (ended["eax"], ended["edx"] & 3, ended.cs, ended["esp"]) == (
            0x1234,
            0,
            0x1B,
            places.USER_STACK_TOP,
        )


GATES = {
    "not present": (segments.gate32(0, 0x40, segments.CALL_GATE32) & ~(1 << 47), Vector.NP, GATE),
    "null target": (segments.gate32(0, 0, segments.CALL_GATE32), Vector.GP, 0),
    "target is data": (segments.gate32(0, 0x10, segments.CALL_GATE32), Vector.GP, 0x10),
    "target of ring 3": (segments.gate32(0, 0x1B, segments.CALL_GATE32), Vector.GP, 0x18),
    "an interrupt gate": (segments.gate32(0, 0x40), Vector.GP, GATE),
}


@ON_THE_CPU
@pytest.mark.parametrize("what", GATES)
def test_bad_call_gate(gates: Legacy, what: str) -> None:
    """A gate that is not to be used faults with its selector or its target's."""
    gate, vector, error = GATES[what]
    gates.describe(GATE, gate)
    assert gates.run("call_gate").fault == Fault(vector, error)


def frame(*words: int) -> bytes:
    """Return a frame for a 32-bit IRET."""
    return struct.pack(f"<{len(words)}I", *words)


@ON_THE_CPU
def test_iret_to_ring_3(gates: Legacy) -> None:
    """IRET to ring 3 loads SS:ESP, and empties data segments that ring 3 may not have."""
    gates.view(places.CODE, 2)[:] = b"\x0f\x0b"
    stack = places.DATA
    gates.view(stack, 20)[:] = frame(places.CODE, segments.USER_CS32, 0x3003, 0x7800, segments.USER_DS)
    gates.load(gates.sregs.es, segments.USER_DS)
    ended = gates.run("iret", esp=stack)
    assert ended.fault == Fault(Vector.UD, 0)
    assert (ended.cs, ended.ss, ended["esp"]) == (segments.USER_CS32, segments.USER_DS, 0x7800)
    assert ended.regs.rflags & 0x3001 == 0x3001
    assert (ended.sregs.ds.selector, ended.sregs.es.selector) == (0, segments.USER_DS)


IRETS = {
    "null CS": (0, segments.USER_DS, Vector.GP, 0),
    "CS is data": (segments.KERNEL_DS, segments.KERNEL_DS, Vector.GP, segments.KERNEL_DS),
    "CS beyond the GDT": (0xFFF8, segments.KERNEL_DS, Vector.GP, 0xFFF8),
    "CS.RPL is not its DPL": (segments.KERNEL_CS32 | 3, segments.USER_DS, Vector.GP, segments.KERNEL_CS32),
    "SS of ring 0": (segments.USER_CS32, segments.KERNEL_DS, Vector.GP, segments.KERNEL_DS),
    "null SS": (segments.USER_CS32, 0, Vector.GP, 0),
    "SS is code": (segments.USER_CS32, segments.USER_CS32, Vector.GP, segments.USER_CS32 & ~3),
}


@ON_THE_CPU
@pytest.mark.parametrize("what", IRETS)
def test_bad_iret(gates: Legacy, what: str) -> None:
    """A frame whose selectors do not fit each other faults at IRET."""
    cs, ss, vector, error = IRETS[what]
    gates.view(places.DATA, 20)[:] = frame(places.CODE, cs, 2, 0x7800, ss)
    ended = gates.run("iret", esp=places.DATA)
    assert ended.fault == Fault(vector, error)
    assert ended.cs == segments.KERNEL_CS32
