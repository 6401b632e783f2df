# SPDX-License-Identifier: Apache-2.0
"""kvm.force_emulation_prefix: UD2 with "kvm" behind it makes KVM's emulator execute the next instruction."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, Agent, Fault, MakeVm

PREFIX = b"\x0f\x0bkvm"
UD = 6
# CRC32 of ECX into EAX, which every CPU with SSE4.2 executes, and KVM's emulator does not know.
CRC32 = b"\xf2\x0f\x38\xf1\xc1"

emulates = pytest.mark.requires("trait:kvm_emulates", "param:kvm.force_emulation_prefix=1")


@emulates
@pytest.mark.parametrize("ring", [0, 3])
def test_the_emulator_executes_it(make_vm: MakeVm, ring: int) -> None:
    """Its result and the next instruction's are there: RIP is behind both.

    arch/x86/kvm/x86.c, handle_ud().
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    add, increment = b"\x48\x01\xc8", b"\x48\xff\xc2"
    end = agent.must(PREFIX + add + increment, ring=ring, rax=0x1_0000_0001, rcx=5, rdx=7)
    assert (end.rax, end.rdx) == (0x1_0000_0006, 8)


@emulates
@pytest.mark.requires("cpuid:xmm4_2")
def test_the_cpu_does_not(make_vm: MakeVm) -> None:
    """An instruction that the CPU executes and the emulator does not know is #UD behind the prefix.

    arch/x86/kvm/x86.c, x86_emulate_instruction() (EMULTYPE_TRAP_UD_FORCED).
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.must(CRC32, rax=1, rcx=2)
    fault = agent.execute(PREFIX + CRC32, rax=1, rcx=2)
    assert isinstance(fault, Fault)
    assert fault.vector == UD


@emulates
def test_cpuid_by_the_emulator(make_vm: MakeVm) -> None:
    """CPUID gives what it gives without the prefix.

    arch/x86/kvm/emulate.c, em_cpuid().
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    plain, forced = (agent.must(code + b"\x0f\xa2") for code in (b"", PREFIX))
    assert (forced.rax, forced.rbx, forced.rcx, forced.rdx) == (plain.rax, plain.rbx, plain.rcx, plain.rdx)


@pytest.mark.requires("param:kvm.force_emulation_prefix=0")
def test_without_the_parameter_it_is_an_invalid_instruction(make_vm: MakeVm) -> None:
    """UD2 with the same bytes behind it raises #UD.

    Intel SDM volume 2B, UD2.
    """
    fault = Agent(make_vm(AGENT).vcpus[0]).execute(PREFIX + b"\x48\x01\xc8")
    assert isinstance(fault, Fault)
    assert fault.vector == UD
