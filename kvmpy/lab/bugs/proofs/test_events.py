# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of events and system management mode."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, KVM_VCPUEVENT_VALID_SHADOW, Agent, Gpa, IoExit, MakeVm

pytestmark = pytest.mark.protections("none")

SMBASE, INT_SHADOW = Gpa(0x30000), 0xFECB


@pytest.mark.bug(90)
def test_two_nmis(agent: Agent) -> None:
    agent.start()
    agent.vcpu.events.nmi()
    agent.vcpu.events.nmi()
    assert agent.vcpu.events.get().nmi.pending == 2


@pytest.mark.bug(91)
def test_shadow_in_smram(make_vm: MakeVm) -> None:
    vm = make_vm(AGENT)
    # mov al, 0x5a; out 0x10, al; rsm
    vm.memory.write(SMBASE + 0x8000, bytes.fromhex("b05a e610 0faa"))
    vm.set_user_memory_region(1 << 16, SMBASE, 0x10000, vm.memory.hva(SMBASE))
    agent = Agent(vm.vcpus[0])
    agent.start()
    vcpu = vm.vcpus[0]
    vcpu.complete_io()
    events = vcpu.events.get()
    events.flags |= KVM_VCPUEVENT_VALID_SHADOW
    events.interrupt.shadow = 1
    vcpu.events.set(events)
    vcpu.events.smi()
    vcpu.expect(IoExit)
    assert vm.memory.read(SMBASE + INT_SHADOW, 1) != b"\0"


@pytest.mark.bug(92)
def test_both_nmis(agent: Agent) -> None:
    agent.start()
    for _ in range(2):
        agent.vcpu.events.nmi()
    agent.vcpu.events.get()
    assert agent.vcpu.events.get().nmi.pending == 2
