# SPDX-License-Identifier: Apache-2.0
"""Exits in the middle of an instruction in each legacy mode: state read, written, and moved to a new VM."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, Gpa, Gva, IoExit, Legacy, LegacyMode, MakeVm, MmioExit
from kvmpy.testing import host
from selftests.legacy.conftest import ON_THE_CPU, LegacyMaker

pytestmark = pytest.mark.protections("none")

PORT = 0x5F
# No memory is there; code of 16 bits reaches it with a segment of 4 GiB, where its mode has some.
NOWHERE = Gpa(0xD000_0000)
MODES = [
    pytest.param((LegacyMode.REAL, 0, 0), id="real"),
    pytest.param((LegacyMode.PROTECTED16, 0, 0), id="16-bit"),
    pytest.param((LegacyMode.PROTECTED32, 0, 0), id="32-bit"),
    pytest.param((LegacyMode.PROTECTED32, 2, 0), id="2-level", marks=ON_THE_CPU),
    pytest.param((LegacyMode.PROTECTED32, 3, 0), id="pae", marks=ON_THE_CPU),
    pytest.param((LegacyMode.PROTECTED32, 3, 3), id="pae-ring3", marks=ON_THE_CPU),
    pytest.param((LegacyMode.VM86, 2, 3), id="vm86", marks=ON_THE_CPU),
]
IN = b"\xe5\x5f\x43"  # in $0x5f, %eax (%ax); inc %ebx (%bx)
INS = b"\xf3\x6c\x43"  # rep insb; inc
LOAD = {16: b"\x67\x8b\x01\x43", 32: b"\x8b\x01\x43"}  # mov (%ecx), %eax; inc
PUSH = {16: b"\x67\xff\x31\x43", 32: b"\xff\x31\x43"}  # push (%ecx); inc


@pytest.fixture(params=MODES)
def cpu(legacy: LegacyMaker, request: pytest.FixtureRequest) -> Legacy:
    """A vCPU in each mode, with a hole in its memory at ``NOWHERE`` and one port open."""
    mode, levels, ring = request.param
    cpu = legacy(mode, levels=levels, ring=ring)
    prepare(cpu)
    return cpu


def prepare(cpu: Legacy) -> None:
    """Open the port, and the way to the hole."""
    if cpu.ring:
        cpu.allow_ports(PORT, 4)
    if cpu.tables is not None:
        cpu.tables.map(Gva(hole(cpu)), NOWHERE, PAGE_SIZE, user=True, overwrite=True)
    elif cpu.mode in (LegacyMode.REAL, LegacyMode.PROTECTED16):
        cpu.sregs.ds.limit, cpu.sregs.ds.g = 0xFFFF_FFFF, 1


def hole(cpu: Legacy) -> int:
    """Return the address at which the code finds no memory."""
    # Virtual-8086 mode ends its addresses at 64 KiB of a segment.
    return 0xC000 if cpu.mode is LegacyMode.VM86 else int(NOWHERE)


def bits(cpu: Legacy) -> int:
    """Return the size of the mode's operands."""
    return 32 if cpu.mode is LegacyMode.PROTECTED32 else 16


def test_port(cpu: Legacy) -> None:
    """An IN exits with RIP at itself or its registers as before; what user space answers is in (E)AX."""
    size = bits(cpu) // 8
    cpu.begin(IN, eax=0xAABBCCDD, ebx=1)
    got = cpu.vcpu.expect(IoExit)
    assert (got.port, got.size) == (PORT, size)
    regs = cpu.vcpu.regs.get()
    assert (regs.rax, regs.rbx) == (0xAABBCCDD, 1)
    got.respond(b"\x11\x22\x33\x44"[:size])
    ended = cpu.end()
    assert (ended.fault, ended["ebx"]) == (None, 2)
    assert ended["eax"] == (0x44332211 if size == 4 else 0xAABB2211)


def test_string_port(cpu: Legacy) -> None:
    """A REP INS writes through ES, and counts (E)DI and (E)CX."""
    cpu.begin(INS, edx=PORT, edi=0xF000, ecx=3, ebx=1)
    data = b"abc"
    while data:
        got = cpu.vcpu.expect(IoExit)
        count = got.count
        got.respond(data[:count])
        data = data[count:]
    ended = cpu.end()
    assert (ended.fault, ended["edi"], ended["ecx"], ended["ebx"]) == (None, 0xF003, 0, 2)
    assert bytes(cpu.view(0xF000, 4)) == b"abc\0"


def test_mmio(cpu: Legacy) -> None:
    """A load of MMIO takes its value from user space."""
    size = bits(cpu) // 8
    cpu.begin(LOAD[bits(cpu)], eax=0xAABBCCDD, ebx=1, ecx=hole(cpu))
    got = cpu.vcpu.expect(MmioExit)
    assert (got.phys_addr, got.size, got.is_write) == (int(NOWHERE), size, False)
    got.respond(b"\x11\x22\x33\x44"[:size])
    ended = cpu.end()
    assert (ended.fault, ended["ebx"]) == (None, 2)
    assert ended["eax"] == (0x44332211 if size == 4 else 0xAABB2211)


def test_mmio_to_the_stack(cpu: Legacy) -> None:
    """A PUSH of MMIO has an effect on memory after its exit, by the stack's size."""
    size = bits(cpu) // 8
    stack = 0x7800
    cpu.begin(PUSH[bits(cpu)], ebx=1, ecx=hole(cpu), esp=stack)
    cpu.vcpu.expect(MmioExit).respond(b"\x11\x22\x33\x44"[:size])
    ended = cpu.end()
    assert (ended.fault, ended["esp"], ended["ebx"]) == (None, stack - size, 2)
    assert bytes(cpu.view(stack - size, size)) == b"\x11\x22\x33\x44"[:size]


def _needs_a_busy_tss(cpu: Legacy) -> None:
    if cpu.ring and host.platform_name() != "host":
        pytest.skip("a CPU that takes exceptions of ring 3 with a busy TSS, as KVM tells it: QEMU ends then")


def test_registers_written_at_an_exit(cpu: Legacy) -> None:
    """What user space writes at a completed exit is what the code goes on with, also segment registers."""
    _needs_a_busy_tss(cpu)
    cpu.begin(IN + b"\x8b\x16\x00\xf0" if bits(cpu) == 16 else IN + b"\x8b\x15\x00\xf0\x00\x00", ebx=1)
    cpu.vcpu.expect(IoExit).respond(b"\0\0\0\0"[: bits(cpu) // 8])
    cpu.vcpu.complete_io()
    regs, sregs = cpu.vcpu.regs.get(), cpu.vcpu.regs.get_sregs()
    regs.rbx = 0x40
    if cpu.mode in (LegacyMode.REAL, LegacyMode.VM86):
        sregs.ds.selector, sregs.ds.base = 1, 0x10
    else:
        sregs.ds.base = 0x10
    cpu.view(0xF010, 2)[:] = b"\x34\x12"
    cpu.vcpu.regs.set_sregs(sregs)
    cpu.vcpu.regs.set(regs)
    ended = cpu.end()
    assert (ended.fault, ended["ebx"], ended["dx"]) == (None, 0x41, 0x1234)


@pytest.mark.parametrize("what", ["port", "mmio"])
def test_move(cpu: Legacy, make_vm: MakeVm, what: str) -> None:
    """A guest that is saved at an exit goes on in a new VM behind its instruction, in its mode."""
    _needs_a_busy_tss(cpu)
    size = bits(cpu) // 8
    code = IN if what == "port" else LOAD[bits(cpu)]
    cpu.begin(code + b"\x40", ebx=1, ecx=hole(cpu), flags=0x8D5 & ~0x200)  # inc %eax
    got = cpu.vcpu.expect(IoExit) if what == "port" else cpu.vcpu.expect(MmioExit)
    got.respond(b"\x11\x22\x33\x44"[:size])
    snapshot = cpu.vcpu.save()
    memory = bytes(cpu.vm.memory.shared_view(Gpa(0), 4 << 20))
    before = cpu.vcpu.regs.get_sregs()
    other = cpu.moved_to(make_vm(cpu.vm.program).vcpus[0])
    other.vm.memory.shared_view(Gpa(0), 4 << 20)[:] = memory
    other.vcpu.restore(snapshot)
    assert other.vcpu.regs.get_sregs().to_bytes() == before.to_bytes()
    ended = other.end()
    assert (ended.fault, ended["ebx"]) == (None, 2)
    assert ended["eax"] == (0x44332212 if size == 4 else 0x2212)
