# SPDX-License-Identifier: Apache-2.0
"""Instructions that KVM's emulator does not know: who is told, and what comes after."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    KVM_INTERNAL_ERROR_EMULATION,
    PAGE_SIZE,
    Agent,
    Fault,
    Gpa,
    Gva,
    InternalErrorExit,
    MakeVm,
    Registers,
    Vector,
)

pytestmark = [pytest.mark.protections("none"), pytest.mark.requires("trait:kvm_emulates")]

MMIO_GPA, MMIO = Gpa(0xD000_0000), Gva(0x7000_0000)
INCREMENT = b"\x48\xff\xc0"
UNKNOWN = {
    "x87 load": b"\xd9\x07",
    "x87 arithmetic": b"\xdc\x07",
    "SSE addition": b"\x0f\x58\x07",
    "PADDB": b"\x66\x0f\xfc\x07",
    "POPCNT": b"\xf3\x48\x0f\xb8\x07",
    "CRC32": b"\xf2\x0f\x38\xf1\x07",
    "LDMXCSR": b"\x0f\xae\x17",
}


def prepare(make_vm: MakeVm, ring: int, *, always: bool = False) -> Agent:
    """Return an agent with a page that nothing backs."""
    vm = make_vm(AGENT)
    if always:
        vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
    vm.map(MMIO, MMIO_GPA, PAGE_SIZE, page_size=PAGE_SIZE, user=True, private=False)
    return Agent(vm.vcpus[0], ring=ring)


def failure(agent: Agent, code: bytes) -> InternalErrorExit:
    """Run the instruction; return the exit that tells that KVM could not emulate it."""
    agent.begin(code + INCREMENT, rdi=MMIO, rax=7)
    got = agent.vcpu.expect(InternalErrorExit)
    assert got.suberror == KVM_INTERNAL_ERROR_EMULATION
    assert agent.vm.read(Gva(agent.vcpu.regs.get().rip), len(code)) == code
    return got


@pytest.mark.parametrize("name", UNKNOWN)
def test_ring_0_is_told_to_user_space(make_vm: MakeVm, name: str) -> None:
    """In ring 0 it is KVM_INTERNAL_ERROR_EMULATION with the instruction's bytes; the guest may go on behind.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_INTERNAL_ERROR_EMULATION; x86.c,
    handle_emulation_failure().
    """
    agent = prepare(make_vm, 0)
    code = UNKNOWN[name]
    got = failure(agent, code)
    assert got.instruction[: len(code)] == code
    regs = agent.vcpu.regs.get()
    regs.rip += len(code)
    agent.vcpu.regs.set(regs)
    end = agent.end()
    assert isinstance(end, Registers)
    assert (end.rax, end.rdi) == (8, int(MMIO))


@pytest.mark.parametrize("name", UNKNOWN)
def test_ring_3_gets_an_exception(make_vm: MakeVm, name: str) -> None:
    """In ring 3 it is #UD at the instruction, which only ends the guest's own program.

    arch/x86/kvm/x86.c, handle_emulation_failure().
    """
    agent = prepare(make_vm, 3)
    assert agent.execute(UNKNOWN[name] + INCREMENT, rdi=MMIO) == Fault(Vector.UD, 0)
    assert agent.must(INCREMENT, rax=4).rax == 5


@pytest.mark.requires("KVM_CAP_EXIT_ON_EMULATION_FAILURE")
@pytest.mark.parametrize("name", UNKNOWN)
def test_ring_3_is_told_on_request(make_vm: MakeVm, name: str) -> None:
    """With KVM_CAP_EXIT_ON_EMULATION_FAILURE user space is told of ring 3, too.

    Documentation/virt/kvm/api.rst, 7.27 KVM_CAP_EXIT_ON_EMULATION_FAILURE.
    """
    agent = prepare(make_vm, 3, always=True)
    code = UNKNOWN[name]
    assert failure(agent, code).instruction[: len(code)] == code
