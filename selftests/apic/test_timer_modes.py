# SPDX-License-Identifier: Apache-2.0
"""The APIC timer's mode, changed while the timer runs."""

from __future__ import annotations

import itertools

import pytest

from kvmpy import AGENT, Agent, Fault, MakeVm

pytestmark = [
    pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP", "KVM_CAP_TSC_DEADLINE_TIMER"),
    pytest.mark.protections("none", "cbit"),
]

SPIV, LVTT, TMICT, TMCCT, TDCR, TSC_DEADLINE = 0x80F, 0x832, 0x838, 0x839, 0x83E, 0x6E0
MASKED = 1 << 16
MODES = {"one-shot": 0, "periodic": 1 << 17, "deadline": 2 << 17}
LONG = 0xFFFF_FFFF


@pytest.fixture
def guest(make_vm: MakeVm) -> Agent:
    """A guest in x2APIC mode whose timer is undivided."""
    agent = Agent(make_vm(AGENT).vcpus[0])
    for msr, value in ((0x1B, 0xFEE0_0D00), (SPIV, 0x1FF), (TDCR, 0xB)):
        assert agent.wrmsr(msr, value) is None
    return agent


def value(agent: Agent, msr: int) -> int:
    """Return what the guest reads."""
    got = agent.rdmsr(msr)
    assert not isinstance(got, Fault)
    return got


@pytest.mark.parametrize(("first", "second"), list(itertools.product(MODES, repeat=2)))
def test_changed(guest: Agent, first: str, second: str) -> None:
    """Between one-shot and periodic the timer goes on; a change to or from TSC-deadline mode disarms it.

    Intel SDM 3A, 12.5.4 and 12.5.4.1 (TSC-Deadline Mode: "a write to the LVT timer register that changes the
    timer mode disarms").
    """
    assert guest.wrmsr(LVTT, MASKED | MODES[first] | 0x51) is None
    armed, far = (TSC_DEADLINE, 1 << 62) if first == "deadline" else (TMICT, LONG)
    assert guest.wrmsr(armed, far) is None
    assert guest.wrmsr(LVTT, MASKED | MODES[second] | 0x52) is None
    got = {"count": value(guest, TMCCT) > 0, "deadline": value(guest, TSC_DEADLINE) > 0}
    same = (first == "deadline") == (second == "deadline")
    expected = {
        "count": same and first != "deadline",
        "deadline": same and first == "deadline",
    }
    assert got == expected, f"{first} to {second}: which of both runs"
