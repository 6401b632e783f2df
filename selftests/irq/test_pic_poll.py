# SPDX-License-Identifier: Apache-2.0
"""The PIC's poll command: interrupts asked for in place of taken."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, Agent, MakeVm

pytestmark = [pytest.mark.requires("KVM_CAP_IRQCHIP"), pytest.mark.protections("none")]

PENDING = 0x80
# mov al, 0x0c; out PORT, al; in al, PORT
POLL = {0x20: bytes.fromhex("b00c e620 e420"), 0xA0: bytes.fromhex("b00c e6a0 e4a0")}


def poll(agent: Agent, port: int) -> int:
    """Return what the PIC answers to a poll command."""
    return agent.must(POLL[port]).rax & 0xFF


@pytest.mark.parametrize(("port", "first"), [(0x20, 0), (0xA0, 8)], ids=["master", "slave"])
@pytest.mark.parametrize("level", [1, 3, 7])
def test_poll(make_vm: MakeVm, port: int, first: int, level: int) -> None:
    """The answer has bit 7 and the level of the highest request, which it acknowledges; else bit 7 is 0.

    8259A data sheet, "Poll command" (OCW3 with P = 1).
    """
    vm = make_vm(AGENT, irqchip="full")
    agent = Agent(vm.vcpus[0])
    agent.start()
    assert not poll(agent, port) & PENDING
    vm.irq.pulse(first + level)
    answer = poll(agent, port)
    assert answer == PENDING | level, f"IRQ {level} is pending: poll answers {answer:#x}"
    answer = poll(agent, port)
    assert not answer & PENDING, f"IRQ {level} was acknowledged: poll answers {answer:#x}"
