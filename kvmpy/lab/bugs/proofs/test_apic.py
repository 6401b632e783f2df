# SPDX-License-Identifier: Apache-2.0
"""Proofs of the local APIC's bugs."""

from __future__ import annotations

import pytest

from kvmpy import Agent, Fault

pytestmark = pytest.mark.protections("none")

TMCCT, APIC_ID = 0x390, 0x20


def start_timer(agent: Agent) -> None:
    """Start a masked one-shot timer that runs for four seconds."""
    for msr, value in ((0x832, 0x10051), (0x83E, 0xB), (0x838, 0xFFFF_FFFF)):
        assert agent.wrmsr(msr, value) is None


@pytest.mark.bug(1)
def test_current_count(x2apic: Agent) -> None:
    start_timer(x2apic)
    assert x2apic.vcpu.lapic.get_reg(TMCCT) > 0


@pytest.mark.bug(2)
def test_divider(x2apic: Agent) -> None:
    start_timer(x2apic)
    assert x2apic.wrmsr(0x83E, 0xA) is None
    count = x2apic.rdmsr(0x839)
    assert not isinstance(count, Fault)
    assert count > 0x2000_0000


@pytest.mark.bug(3)
def test_upper_bits(x2apic: Agent) -> None:
    assert x2apic.wrmsr(0x808, 1 << 32) is not None


@pytest.mark.bug(4)
def test_self_ipi(x2apic: Agent) -> None:
    assert x2apic.wrmsr(0x83F, 0x151) is not None


@pytest.mark.bug(5)
def test_id(x2apic: Agent) -> None:
    x2apic.vcpu.lapic.set_reg(APIC_ID, 7 << 24)
    assert x2apic.vcpu.lapic.get_reg(APIC_ID) == 0
    assert x2apic.rdmsr(0x802) == 0


@pytest.mark.bug(6)
def test_icr(x2apic: Agent) -> None:
    assert x2apic.wrmsr(0x830, 1 << 20 | 1 << 18 | 0x51) is not None


@pytest.mark.bug(7)
def test_mode(x2apic: Agent) -> None:
    start_timer(x2apic)
    assert x2apic.wrmsr(0x832, 0x30051) is None
    count = x2apic.rdmsr(0x839)
    assert not isinstance(count, Fault)
    assert count > 0
