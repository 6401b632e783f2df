# SPDX-License-Identifier: Apache-2.0
"""The agent: a guest that runs the instructions that the host gives it, and tells what they left."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    CR0,
    CR4,
    PAGE_SIZE,
    Agent,
    AgentFaultError,
    Exit,
    Fault,
    Gpa,
    Gva,
    IoExit,
    MakeVm,
    MmioExit,
    PfErr,
    Registers,
    UnexpectedExitError,
    Vector,
)

NOWHERE = Gva(0x6000_0000_0000)
MARK = 0x1122_3344_5566_7788
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


@pytest.fixture
def agent(make_vm: MakeVm, ring: int) -> Agent:
    """An agent in ring 0 or 3."""
    return Agent(make_vm(AGENT).vcpus[0], ring=ring)


def test_registers_go_in_and_come_out(agent: Agent) -> None:
    """Every general register has the given value in the code, and the code's value afterwards.

    The promise of Agent.execute() (kvmpy/guest/agent.py).
    """
    given = {name: 0x0101_0101_0101_0101 * number for number, name in enumerate(REGISTERS, start=1)}
    result = agent.must(b"\x48\xff\xc0\x49\xff\xcf", **given)  # inc %rax; dec %r15
    expected = {**given, "rax": given["rax"] + 1, "r15": given["r15"] - 1}
    assert {name: getattr(result, name) for name in REGISTERS} == expected


def test_flags_come_out(agent: Agent) -> None:
    """RFLAGS is that of the code's last instruction: carry and zero after an addition that wraps."""
    result = agent.must(b"\x48\x01\xd8", rax=(1 << 64) - 1, rbx=1)  # add %rbx, %rax
    assert (result.rax, result.rflags & 0x41) == (0, 0x41)
    assert agent.must(b"\x48\x01\xd8", rax=1, rbx=1).rflags & 0x41 == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_memory_in_each_size(agent: Agent, size: int) -> None:
    """A write changes as many bytes as it has, and a read of any size sees them."""
    gva = agent.vm.alloc(PAGE_SIZE, user=True, private=False)
    assert agent.write(gva, MARK) is None
    assert agent.write(gva, 0, size) is None
    assert agent.read(gva) == MARK >> 8 * size << 8 * size
    assert agent.read(gva + size, 1) == (MARK >> 8 * size & 0xFF if size < 8 else 0)


def test_page_faults(agent: Agent) -> None:
    """An access that faults tells vector, error code and address, and the agent goes on.

    AMD APM volume 2, 8.4.2 "Page-Fault Error Code".
    """
    user = PfErr.U if agent.ring else 0
    assert agent.read(NOWHERE) == Fault(Vector.PF, user, int(NOWHERE))
    assert agent.write(NOWHERE, 1) == Fault(Vector.PF, user | PfErr.W, int(NOWHERE))
    assert agent.call(NOWHERE) == Fault(Vector.PF, user | PfErr.I, int(NOWHERE))
    assert agent.must(b"").rax == 0


def test_other_exceptions(agent: Agent) -> None:
    """So does code that is no instruction, or may not run in this ring."""
    assert agent.execute(b"\x0f\x0b") == Fault(Vector.UD, 0)
    with pytest.raises(AgentFaultError, match="#UD") as caught:
        agent.must(b"\x90\x0f\x0b")
    assert caught.value.fault.vector == Vector.UD
    if agent.ring:
        assert agent.execute(b"\xf4") == Fault(Vector.GP, 0)  # HLT


def test_a_function_of_the_guests_own(make_vm: MakeVm) -> None:
    """call() runs a function, by name or by address, with up to six arguments, and returns its result."""
    vm = make_vm(
        AGENT + "u64 mix(u64 a, u64 b, u64 c, u64 d, u64 e, u64 f) { return a * f - b - c - d - e; }\n"
    )
    agent = Agent(vm.vcpus[0])
    assert agent.call("mix", 100, 1, 2, 3, 4, 5) == 490
    assert agent.call(vm.symbol("mix").gva, 21, 0, 0, 0, 0, 2) == 42
    agent.begin_call("mix", 7, 1)
    assert agent.value() == (1 << 64) - 1


@pytest.mark.requires("KVM_CAP_IRQCHIP")
def test_two_vcpus_at_once(make_vm: MakeVm, ring: int) -> None:
    """Agents of two vCPUs have orders, code and answers of their own, in whatever order they end."""
    vm = make_vm(AGENT, vcpus=2)
    first, second = (Agent(vcpu, ring=ring) for vcpu in vm.vcpus)
    first.start()
    second.start()
    first.begin(b"\x48\xff\xc0", rax=10)  # inc
    second.begin(b"\x48\xff\xc8", rax=20)  # dec
    results = [agent.end() for agent in (second, first)]
    assert [r.rax for r in results if isinstance(r, Registers)] == [19, 11]


def test_ports(make_vm: MakeVm) -> None:
    """A port access is an exit between begin() and end(), with the width that was asked for."""
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.begin_out(0x80, 0x1234, 2)
    exit_ = agent.vcpu.expect(IoExit)
    assert (exit_.port, exit_.direction, exit_.data) == (0x80, "out", b"\x34\x12")
    assert agent.value() == 0x1234
    agent.begin_in(0x81, 4)
    agent.vcpu.expect(IoExit).respond(b"\x78\x56\x34\x12")
    assert agent.value() == 0x1234_5678


def test_exits_on_the_way(make_vm: MakeVm) -> None:
    """end() hands the exits of an order to a function; one that it does not take is an error."""
    agent = Agent(make_vm(AGENT).vcpus[0])
    seen: list[int] = []

    def take(exit_: Exit) -> bool:
        assert isinstance(exit_, IoExit)
        seen.append(exit_.port)
        return exit_.port != 0x82

    for last in (0x81, 0x82):
        agent.begin(bytes((0xE6, 0x80, 0xE6, last)))  # out %al, $0x80; out %al, $last
        if last == 0x81:
            agent.value(take)
        else:
            with pytest.raises(UnexpectedExitError, match="expected the end of the order"):
                agent.value(take)
    assert seen == [0x80, 0x81, 0x80, 0x82]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_devices(make_vm: MakeVm, size: int) -> None:
    """An access to memory that is not there is an exit, too."""
    vm = make_vm(AGENT)
    agent = Agent(vm.vcpus[0])
    vm.map(NOWHERE, Gpa(0xD000_0000), PAGE_SIZE, private=False)
    agent.begin_write(NOWHERE, MARK, size)
    exit_ = vm.vcpus[0].expect(MmioExit)
    assert exit_.data == MARK.to_bytes(8, "little")[:size]
    assert agent.value() == 0
    agent.begin_read(NOWHERE, size)
    vm.vcpus[0].expect(MmioExit).respond(MARK.to_bytes(8, "little")[:size])
    assert agent.value() == MARK & (1 << 8 * size) - 1


def test_control_registers(make_vm: MakeVm) -> None:
    """Control registers read back what was written, and paging without protection is #GP.

    AMD APM volume 2, 3.1.1, "Paging Enable".
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    before = agent.read_cr(4)
    assert agent.change_cr(4, put=CR4.TSD) is None
    assert isinstance(before, int)
    assert agent.read_cr(4) == before | CR4.TSD
    assert agent.change_cr(0, clear=CR0.PE) == Fault(Vector.GP, 0)
    assert agent.change_cr(4, clear=CR4.TSD) is None
    assert agent.read_cr(4) == before
    assert agent.write_cr(2, MARK) is None
    assert agent.read_cr(2) == MARK


def test_debug_registers(make_vm: MakeVm) -> None:
    """A debug register reads back what was written, and the upper half of DR6 is #GP.

    AMD APM volume 2, 13.1.1, "Debug Registers".
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    assert agent.write_dr(3, MARK) is None
    assert (agent.read_dr(3), agent.read_dr(2)) == (MARK, 0)
    assert agent.write_dr(6, 1 << 32) == Fault(Vector.GP, 0)


def test_what_is_refused(agent: Agent) -> None:
    """Too much code and a register that is none are errors, and the agent goes on."""
    with pytest.raises(ValueError, match="at most 55 bytes"):
        agent.execute(b"\x90" * 56)
    with pytest.raises(TypeError, match="eax"):
        agent.execute(b"", eax=1)
    assert agent.must(b"\x90" * 55, rax=1).rax == 1
