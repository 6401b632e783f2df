# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of port and memory-mapped I/O."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, Agent, Gpa, Gva, IoExit, MakeVm

pytestmark = pytest.mark.protections("none")

DEVICE_GPA, DEVICE = Gpa(0xD000_0000), Gva(0x7000_0000)


@pytest.mark.bug(30)
def test_room(make_vm: MakeVm) -> None:
    vm = make_vm(AGENT)
    vm.map(DEVICE, DEVICE_GPA, 0x1000, private=False)
    vm.io.register_coalesced_mmio(DEVICE_GPA, 0x1000)
    # again: mov [rdi], eax; dec ecx; jnz again
    Agent(vm.vcpus[0]).must(b"\x89\x07\xff\xc9\x75\xfa", rdi=int(DEVICE), rcx=100)


@pytest.mark.bug(31)
def test_rip(agent: Agent) -> None:
    # out dx, al; mov eax, 1; ret; nop; mov eax, 2
    agent.begin(b"\xee\xb8\x01\0\0\0\xc3\x90\xb8\x02\0\0\0", rdx=0x80)
    agent.vcpu.expect(IoExit)
    regs = agent.vcpu.regs.get()
    regs.rip += 8
    agent.vcpu.regs.set(regs)
    assert agent.value() == 2
