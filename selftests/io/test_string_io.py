# SPDX-License-Identifier: Apache-2.0
"""INS and OUTS with REP: every element arrives once and in order, in however many exits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Exit, Gva, IoExit, MakeVm, Registers

PORT = 0x600
BUFFER = Gva(0x7000_0000)
# By the size of an element.
INSTRUCTIONS = {
    "rep_outs": {1: b"\xf3\x6e", 2: b"\x66\xf3\x6f", 4: b"\xf3\x6f"},
    "rep_ins": {1: b"\xf3\x6c", 2: b"\x66\xf3\x6d", 4: b"\xf3\x6d"},
}
STD, CLD = b"\xfd", b"\xfc"


def pattern(size: int) -> bytes:
    """Return *size* bytes in which every four neighbours differ from all others nearby."""
    return bytes((index * 7 + (index >> 8) * 13 + 1) & 0xFF for index in range(size))


@pytest.fixture
def agent(make_vm: MakeVm) -> Agent:
    """An agent with two shared pages at BUFFER that are not neighbours in physical memory."""
    vm = make_vm(AGENT)
    vm.alloc(PAGE_SIZE, gva=BUFFER + PAGE_SIZE, private=False)
    vm.alloc(PAGE_SIZE, gva=BUFFER, private=False)
    assert vm.gva_to_gpa(BUFFER + PAGE_SIZE) != vm.gva_to_gpa(BUFFER) + PAGE_SIZE
    return Agent(vm.vcpus[0])


def begin(
    agent: Agent, instruction: str, address: Gva, size: int, count: int, *, backwards: bool = False
) -> None:
    """Order a string instruction with REP."""
    code = INSTRUCTIONS[instruction][size]
    if backwards:
        code = STD + code + CLD
    agent.begin(code, rsi=int(address), rdi=int(address), rcx=count, rdx=PORT)


def ends(agent: Agent, on_exit: Callable[[IoExit], None]) -> tuple[int, int, int]:
    """Run through the exits; return RSI, RDI and RCX behind the instruction."""

    def take(got: Exit) -> bool:
        assert isinstance(got, IoExit)
        on_exit(got)
        return True

    end = agent.end(take)
    assert isinstance(end, Registers)
    return end.rsi, end.rdi, end.rcx


def outs(
    agent: Agent, address: Gva, size: int, count: int, *, backwards: bool = False
) -> tuple[bytes, tuple[int, int]]:
    """Run an OUTS; return all of its data, and RSI and RCX behind it."""
    parts: list[bytes] = []

    def collect(got: IoExit) -> None:
        assert (got.port, got.direction, got.size) == (PORT, "out", size)
        assert len(got.data) == size * got.count
        parts.append(got.data)

    begin(agent, "rep_outs", address, size, count, backwards=backwards)
    rsi, _, rcx = ends(agent, collect)
    return b"".join(parts), (rsi, rcx)


def ins(
    agent: Agent, address: Gva, size: int, source: bytes, *, backwards: bool = False
) -> tuple[int, tuple[int, int]]:
    """Run an INS and answer from *source*; return how many bytes it took, and RDI and RCX behind it."""
    taken = 0

    def feed(got: IoExit) -> None:
        nonlocal taken
        assert (got.port, got.direction, got.size) == (PORT, "in", size)
        length = size * got.count
        got.respond(source[taken : taken + length])
        taken += length

    begin(agent, "rep_ins", address, size, len(source) // size, backwards=backwards)
    _, rdi, rcx = ends(agent, feed)
    return taken, (rdi, rcx)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.requires("trait:has_string_io")
def test_outs(agent: Agent, size: int) -> None:
    """REP OUTS hands all elements to user space once, in ascending order, across a page boundary.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO ("a packed array"); Intel SDM
    volume 2, OUTS.
    """
    count = 48
    start = BUFFER + PAGE_SIZE - 10 * size
    expected = pattern(size * count)
    agent.vm.write(start, expected)
    assert outs(agent, start, size, count) == (expected, (start + size * count, 0))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.requires("trait:has_string_io")
def test_outs_backwards(agent: Agent, size: int) -> None:
    """With the direction flag set REP OUTS goes down in memory, each element itself in memory order.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 2, OUTS.
    """
    count = 12
    first = BUFFER + PAGE_SIZE + 5 * size
    lowest = first - size * (count - 1)
    memory = pattern(size * count)
    agent.vm.write(lowest, memory)
    elements = [memory[offset : offset + size] for offset in range(0, len(memory), size)]
    expected = b"".join(reversed(elements))
    assert outs(agent, first, size, count, backwards=True) == (expected, (first - size * count, 0))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.requires("trait:has_string_io")
def test_ins(agent: Agent, size: int) -> None:
    """REP INS stores exactly the elements that user space gives, across a page boundary.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 2, INS.
    """
    count = 48
    start = BUFFER + PAGE_SIZE - 10 * size
    vm = agent.vm
    vm.write(start - 8, b"\xcc" * (size * count + 16))
    source = pattern(size * count)
    assert ins(agent, start, size, source) == (size * count, (start + size * count, 0))
    assert vm.read(start - 8, size * count + 16) == b"\xcc" * 8 + source + b"\xcc" * 8


@pytest.mark.requires("trait:has_string_io")
def test_ins_backwards(agent: Agent) -> None:
    """With the direction flag set REP INS stores its elements at falling addresses.

    Intel SDM volume 2, INS.
    """
    count, size = 12, 2
    first = BUFFER + PAGE_SIZE + 5 * size
    lowest = first - size * (count - 1)
    source = pattern(size * count)
    assert ins(agent, first, size, source, backwards=True) == (size * count, (first - size * count, 0))
    elements = [source[offset : offset + size] for offset in range(0, len(source), size)]
    assert agent.vm.read(lowest, size * count) == b"".join(reversed(elements))


@pytest.mark.parametrize("entry", ["rep_outs", "rep_ins"])
@pytest.mark.requires("trait:has_string_io")
def test_zero_count(agent: Agent, entry: str) -> None:
    """A REP string instruction with RCX 0 accesses no port and moves nothing.

    Intel SDM volume 2, REP.
    """
    begin(agent, entry, BUFFER, 4, 0)
    end = agent.end()
    assert isinstance(end, Registers)
    assert (end.rsi, end.rdi, end.rcx) == (BUFFER, BUFFER, 0)


@pytest.mark.requires("trait:has_string_io")
def test_single(agent: Agent) -> None:
    """Without REP one element is moved, whatever RCX holds.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 2, INS and OUTS.
    """
    vm, vcpu = agent.vm, agent.vcpu
    vm.write(BUFFER, pattern(8))
    agent.begin(b"\x6f\x6d", rsi=int(BUFFER), rdi=int(BUFFER) + 64, rcx=7, rdx=PORT)  # outsl; insl
    out = vcpu.expect(IoExit)
    assert (out.direction, out.size, out.count, out.data) == ("out", 4, 1, pattern(4))
    answer = vcpu.expect(IoExit)
    assert (answer.direction, answer.size, answer.count) == ("in", 4, 1)
    answer.respond(b"wxyz")
    end = agent.end()
    assert isinstance(end, Registers)
    assert (end.rsi, end.rdi, end.rcx) == (BUFFER + 4, BUFFER + 68, 7)
    assert vm.read(BUFFER + 64, 8) == b"wxyz\0\0\0\0"


@pytest.mark.requires("trait:has_string_io")
def test_ins_ends_at_its_count(agent: Agent) -> None:
    """No exit of a REP INS asks for more elements than are left of its count, however they are bundled.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO (count).
    """
    count = 1500
    begin(agent, "rep_ins", BUFFER, 1, count)
    left = count

    def feed(got: IoExit) -> None:
        nonlocal left
        assert 1 <= got.count <= left
        got.respond(bytes([got.count & 0xFF]) * got.count)
        left -= got.count

    assert ends(agent, feed) == (BUFFER, BUFFER + count, 0)
    assert left == 0
