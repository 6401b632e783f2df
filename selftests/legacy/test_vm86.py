# SPDX-License-Identifier: Apache-2.0
"""Virtual-8086 mode: what IOPL lets pass, the I/O permission map, and the way to ring 0 and back.

AMD APM volume 2, 8.10 and 12.2.4; volume 3 for each instruction.
"""

from __future__ import annotations

import struct

import pytest

from kvmpy import CR4, Fault, GuestProgram, IoExit, Legacy, LegacyMode, Vector
from kvmpy.guest import legacy as places
from kvmpy.x86 import segments
from selftests.legacy.conftest import ON_THE_CPU, LegacyMaker

pytestmark = [pytest.mark.protections("none"), ON_THE_CPU]

IF, VM, IOPL3, VIF, VIP = 0x200, 1 << 17, 0x3000, 1 << 19, 1 << 20
PORT = 0x5F

ASSEMBLY = """
	.section .low, "awx", @progbits
	.code16
store_segments:	movw %cs, %ax; movw %ds, %bx; movw %es, %cx; movw %ss, %dx
		ret
far:		movw $0x0f00, %ax; movw %ax, %ds; movw %ax, %es
		movw $0x1234, 0; movw %es:0, %bx
		ret
vector:		movw $0x77, %ax
		iretw
	.code32
/* Ring 0 enters with the frame of virtual-8086 mode on its stack. */
enter:		iretl
"""

SENSITIVE = {
    "cli": b"\xfa",
    "sti": b"\xfb",
    "pushf": b"\x9c",
    "popf": b"\x9d",
    "pushfd": b"\x66\x9c",
    "int": b"\xcd\x60",
    "iret": b"\xcf",
}
PRIVILEGED = {
    "hlt": b"\xf4",
    "mov cr0": b"\x0f\x20\xc0",
    "mov dr0": b"\x0f\x21\xc0",
    "lgdt": b"\x0f\x01\x16\x00\xf0",
    "lmsw": b"\x0f\x01\xf0",
    "clts": b"\x0f\x06",
    "invd": b"\x0f\x08",
    "wbinvd": b"\x0f\x09",
    "rdmsr": b"\x0f\x32",
    "wrmsr": b"\x0f\x30",
}
UNKNOWN = {
    "lldt": b"\x0f\x00\xd0",
    "ltr": b"\x0f\x00\xd8",
    "sldt": b"\x0f\x00\xc0",
    "str": b"\x0f\x00\xc8",
    "lar": b"\x0f\x02\xc0",
    "lsl": b"\x0f\x03\xc0",
    "verr": b"\x0f\x00\xe0",
    "arpl": b"\x63\xc0",
}


@pytest.fixture(params=[0, 2, 3], ids=["no-paging", "2-level", "pae"])
def cpu(legacy: LegacyMaker, request: pytest.FixtureRequest) -> Legacy:
    """A vCPU in virtual-8086 mode, under each kind of paging."""
    return legacy(LegacyMode.VM86, GuestProgram.from_asm(ASSEMBLY, name="vm86"), levels=request.param)


def test_segments_are_those_of_real_mode(cpu: Legacy) -> None:
    """Selectors are paragraphs, and any may be loaded."""
    ended = cpu.run("store_segments")
    assert ended.fault is None
    assert [ended[name] for name in ("ax", "bx", "cx", "dx")] == [0, 0, 0, 0]
    ended = cpu.run("far")
    assert (ended.fault, ended["bx"]) == (None, 0x1234)
    assert bytes(cpu.view(places.DATA, 2)) == b"\x34\x12"


def test_sensitive_instructions(cpu: Legacy) -> None:
    """CLI, STI, PUSHF, POPF, INT and IRET are #GP(0) below IOPL 3, at the instruction."""
    got = {name: cpu.run(code) for name, code in SENSITIVE.items()}
    assert {name: ended.fault for name, ended in got.items()} == dict.fromkeys(SENSITIVE, Fault(Vector.GP, 0))
    assert {ended["eip"] for ended in got.values()} == {places.CODE}
    assert all(ended.regs.rflags & VM for ended in got.values())


def test_sensitive_instructions_at_iopl_3(cpu: Legacy) -> None:
    """At IOPL 3 they run: PUSHF shows IOPL, STI sets IF, and POPF changes IF but not IOPL."""
    ended = cpu.run(b"\xfb\x9c\x58\xfa\x9c\x5b\x68\x02\x00\x9d\x9c\x59", flags=IOPL3)
    assert ended.fault is None
    assert [ended[name] for name in ("ax", "bx", "cx")] == [IOPL3 | IF | 2, IOPL3 | 2, IOPL3 | 2]


def test_privileged_instructions(cpu: Legacy) -> None:
    """Instructions of ring 0 are #GP(0) at any IOPL, those of protected mode #UD."""
    for flags in (0, IOPL3):
        got = {name: cpu.run(code, flags=flags).fault for name, code in (PRIVILEGED | UNKNOWN).items()}
        expected = dict.fromkeys(PRIVILEGED, Fault(Vector.GP, 0)) | dict.fromkeys(
            UNKNOWN, Fault(Vector.UD, 0)
        )
        assert got == expected


def test_interrupt_at_iopl_3(cpu: Legacy) -> None:
    """INT goes through the protected-mode IDT to ring 0, whose stack gets all segment registers."""
    for name, value in (("ds", 0x1111), ("es", 0x2222), ("fs", 0x3333), ("gs", 0x4444)):
        places.vm86_segment(getattr(cpu.sregs, name), value)
    cpu.set_gate(0x60, segments.gate32(places.STUBS + 0x60 * 4, segments.KERNEL_CS32, dpl=3))
    ended = cpu.run(b"\xcd\x60", flags=IOPL3 | 1)
    assert ended.fault == Fault(0x60, 0)
    assert (ended["eip"], ended.cs, ended.ss) == (places.CODE + 2, 0, 0)
    assert ended.segments == (0x2222, 0x1111, 0x3333, 0x4444)
    assert ended.regs.rflags & (VM | IOPL3 | 1) == VM | IOPL3 | 1
    assert [getattr(ended.sregs, name).selector for name in ("ds", "es", "fs", "gs")] == [0] * 4
    assert (ended.sregs.cs.selector, ended.sregs.ss.selector) == (segments.KERNEL_CS32, segments.KERNEL_DS)


def test_interrupt_to_ring_3_is_refused(cpu: Legacy) -> None:
    """A gate to a code segment that is not of ring 0 is #GP with its selector."""
    cpu.set_gate(0x60, segments.gate32(places.STUBS, segments.USER_CS32, dpl=3))
    assert cpu.run(b"\xcd\x60", flags=IOPL3).fault == Fault(Vector.GP, segments.USER_CS32 & ~3)


@pytest.mark.parametrize(("size", "code"), [(1, b"\xe6\x5f"), (2, b"\xe7\x5f"), (4, b"\x66\xe7\x5f")])
def test_ports(legacy: LegacyMaker, size: int, code: bytes) -> None:
    """The I/O permission map counts at any IOPL, one bit for each byte of the access."""
    cpu = legacy(LegacyMode.VM86)
    for flags in (0, IOPL3):
        cpu.reset()
        assert cpu.run(code, flags=flags).fault == Fault(Vector.GP, 0)
        cpu.allow_ports(PORT, size)
        cpu.begin(code, eax=0x12345678, flags=flags)
        got = cpu.vcpu.expect(IoExit)
        assert (got.port, got.size, got.value) == (PORT, size, 0x12345678 & (1 << 8 * size) - 1)
        cpu.vcpu.complete_io()
        for bit in range(size):
            cpu.reset()
            cpu.allow_ports(PORT, size)
            cpu.allow_ports(PORT + bit, on=False)
            assert cpu.run(code, flags=flags).fault == Fault(Vector.GP, 0)


def test_ports_without_a_map(legacy: LegacyMaker) -> None:
    """A map that begins behind the TSS's limit allows nothing."""
    cpu = legacy(LegacyMode.VM86)
    cpu.allow_ports(PORT)
    struct.pack_into("<H", cpu.tss, 102, len(cpu.tss))
    assert cpu.run(b"\xe6\x5f").fault == Fault(Vector.GP, 0)


def test_iret_from_ring_0(legacy: LegacyMaker) -> None:
    """IRET of ring 0 with VM in the flags on its stack enters virtual-8086 mode."""
    cpu = legacy(LegacyMode.PROTECTED32, GuestProgram.from_asm(ASSEMBLY, name="vm86"))
    frame = [
        places.CODE & 0xFF,
        places.CODE >> 4 & ~0xF,
        2 | VM | IOPL3,
        0x700,
        0x100,
        0x200,
        0x300,
        0x400,
        0x500,
    ]
    cpu.view(places.CODE, 2)[:] = b"\x0f\x0b"
    stack = places.DATA + 0x800
    cpu.view(stack, 36)[:] = struct.pack("<9I", *frame)
    ended = cpu.run("enter", esp=stack)
    assert ended.fault == Fault(Vector.UD, 0)
    assert ended.regs.rflags & VM
    assert (ended["eip"], ended.cs, ended["esp"], ended.ss) == (frame[0], frame[1], 0x700, 0x100)
    assert ended.segments == (0x200, 0x300, 0x400, 0x500)


@pytest.mark.requires("cpuid:vme")
def test_interrupt_redirection(legacy: LegacyMaker) -> None:
    """With CR4.VME a clear bit of the redirection map sends INT through the table of real mode at 0."""
    cpu = legacy(LegacyMode.VM86, GuestProgram.from_asm(ASSEMBLY, name="vm86"))
    cpu.sregs.cr4 |= int(CR4.VME)
    cpu.view(0x60 * 4, 4)[:] = struct.pack("<HH", int(cpu.vm.program.address_of("vector")), 0)
    redirected = cpu.run(b"\xcd\x60", flags=2)
    assert (redirected.fault, redirected["ax"]) == (None, 0x77)
    cpu.tss[places.IO_BITMAP - 32 + 0x60 // 8] = 1 << 0x60 % 8
    assert cpu.run(b"\xcd\x60", flags=2).fault == Fault(Vector.GP, 0)


@pytest.mark.requires("cpuid:vme")
def test_virtual_interrupt_flag(legacy: LegacyMaker) -> None:
    """With CR4.VME below IOPL 3, STI and CLI change VIF, which PUSHF shows as IF with IOPL 3; STI with VIP
    set is #GP.
    """
    cpu = legacy(LegacyMode.VM86)
    cpu.sregs.cr4 |= int(CR4.VME)
    ended = cpu.run(b"\xfb\x9c\x58\xfa\x9c\x5b", flags=2)
    assert ended.fault is None
    assert (ended["ax"], ended["bx"]) == (IOPL3 | IF | 2, IOPL3 | 2)
    assert cpu.run(b"\xfb", flags=VIP).fault == Fault(Vector.GP, 0)
    assert cpu.run(b"\xfb", flags=2).regs.rflags & (VIF | IF) == VIF
