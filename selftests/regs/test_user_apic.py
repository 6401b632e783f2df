# SPDX-License-Identifier: Apache-2.0
"""Fields of kvm_run that stand in for a local APIC when KVM has none: cr8, apic_base, if_flag."""

from __future__ import annotations

import errno

import pytest

from kvmpy import AGENT, Agent, IoExit, MakeVm, Msr, SetTprExit
from kvmpy.core.vcpu import RUN_ERROR


@pytest.fixture
def agent(make_vm: MakeVm) -> Agent:
    """An agent without a local APIC in the kernel, waiting for its first order."""
    agent = Agent(make_vm(AGENT, irqchip=None).vcpus[0])
    assert read_cr8(agent) == 0
    return agent


def execute(agent: Agent, code: bytes, rax: int = 0) -> int:
    """Return RAX behind the code, past the exits that say that the guest lowered its priority."""
    agent.begin(code, rax=rax)
    return agent.value(lambda exit_: isinstance(exit_, SetTprExit))


def read_cr8(agent: Agent) -> int:
    return execute(agent, b"\x44\x0f\x20\xc0")


def write_cr8(agent: Agent, value: int) -> None:
    execute(agent, b"\x44\x0f\x22\xc0", value)


def test_cr8(agent: Agent) -> None:
    """The guest's CR8 is what kvm_run.cr8 held at KVM_RUN, and what the guest writes is there at the exit.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, cr8 ("Both input and output").
    """
    agent.vcpu.run_area.cr8 = 5
    assert read_cr8(agent) == 5
    assert agent.vcpu.run_area.cr8 == 5
    write_cr8(agent, 9)
    assert agent.vcpu.run_area.cr8 == 9
    write_cr8(agent, 2)
    assert read_cr8(agent) == 2
    assert agent.vcpu.run_area.cr8 == 2


def test_cr8_reserved(agent: Agent) -> None:
    """KVM_RUN with reserved bits in kvm_run.cr8 fails with EINVAL; without them the guest goes on.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, cr8; Intel SDM volume 3, 11.8.6 (bits 63:4).
    """
    for bit in (4, 63):
        agent.vcpu.run_area.cr8 = 1 << bit
        assert (agent.vcpu.run_once(), agent.vcpu.run_errno) == (RUN_ERROR, errno.EINVAL)
    agent.vcpu.run_area.cr8 = 3
    assert read_cr8(agent) == 3


def test_apic_base(agent: Agent) -> None:
    """kvm_run.apic_base is the guest's IA32_APIC_BASE.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, apic_base.
    """
    assert agent.rdmsr(Msr.MSR_IA32_APICBASE) == agent.vcpu.run_area.apic_base
    assert agent.vcpu.run_area.apic_base & ~0xFFF == 0xFEE0_0000


@pytest.mark.requires("trait:exits_in_place")
def test_if_flag(agent: Agent) -> None:
    """kvm_run.if_flag is the guest's interrupt flag at the exit.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, if_flag.
    """
    agent.begin(b"\xe6\x80\xfb\xe6\x80\xfa\xe6\x80")  # out; sti; out; cli; out
    for flag in (0, 1, 0):
        agent.vcpu.expect(IoExit)
        assert agent.vcpu.run_area.if_flag == flag
