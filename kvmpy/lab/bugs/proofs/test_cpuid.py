# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of CPUID."""

from __future__ import annotations

import pytest

from kvmpy import Agent, ioctls, kvm_cpuid2, kvm_cpuid_entry2

pytestmark = pytest.mark.protections("none")

OSXSAVE = 1 << 18


@pytest.mark.bug(100)
def test_same_table(agent: Agent) -> None:
    agent.start()
    table = agent.vcpu.cpuid.get()
    value = agent.read_cr(4)
    assert isinstance(value, int)
    assert agent.write_cr(4, value ^ OSXSAVE) is None
    agent.vcpu.cpuid.set(table)


@pytest.mark.bug(101)
def test_number(agent: Agent) -> None:
    agent.start()
    arg = kvm_cpuid2.of([kvm_cpuid_entry2() for _ in range(200)])
    assert agent.vcpu.ioctl_raw(ioctls.KVM_GET_CPUID2, arg) == (0, 0)
    assert arg.nent < 200
