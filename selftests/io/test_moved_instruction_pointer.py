# SPDX-License-Identifier: Apache-2.0
"""User space that moves RIP at an exit: the guest goes on there, and not an instruction behind it."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, Agent, IoExit, MakeVm

pytestmark = pytest.mark.protections("none")

# What runs without the move, and what runs with it: one byte later it is something else.
ACCESS = {"out": b"\xee", "in": b"\xec", "out-word": b"\x66\xef", "in-long": b"\xed"}
NOT_MOVED, MOVED = b"\xb8\x01\0\0\0\xc3", b"\xb8\x02\0\0\0"
PORT = 0x80


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "left"])
def test_goes_on_there(make_vm: MakeVm, access: str, moved: bool) -> None:
    """After a port access whose exit user space answers with another RIP the guest runs what is there.

    Documentation/virt/kvm/api.rst, 5 (KVM_EXIT_IO, completed by the next KVM_RUN) and 4.8 KVM_SET_REGS.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    distance = len(ACCESS[access] + NOT_MOVED).to_bytes(4, "little")
    # lea rbx, [rip + distance]: where user space sends it.
    agent.begin(b"\x48\x8d\x1d" + distance + ACCESS[access] + NOT_MOVED + MOVED, rdx=PORT)
    got = agent.vcpu.expect(IoExit)
    if access.startswith("in"):
        got.respond(0)
    if moved:
        regs = agent.vcpu.regs.get()
        regs.rip = regs.rbx
        agent.vcpu.regs.set(regs)
    ran = agent.value()
    assert ran == (2 if moved else 1), f"RIP was {'moved' if moved else 'left'}: what ran returned {ran}"
