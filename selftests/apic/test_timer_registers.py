# SPDX-License-Identifier: Apache-2.0
"""The APIC timer's registers as guest and user space see them while it runs."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, Agent, Fault, MakeVm, apic

pytestmark = [
    pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP"),
    pytest.mark.protections("none"),
]

X2APIC_BASE, X2APIC = 0x1B, 0xFEE0_0D00
SPIV, LVTT, TMICT, TMCCT, TDCR = 0x80F, 0x832, 0x838, 0x839, 0x83E
ENABLED = 0x1FF
MASKED = 1 << 16
# More than four seconds at KVM's clock of 1 GHz.
LONG = 0xFFFF_FFFF
DIVIDERS = {1: 0xB, 2: 0, 4: 1, 8: 2, 16: 3, 32: 8, 64: 9, 128: 0xA}


def current(agent: Agent) -> int:
    """Return the count that the guest reads."""
    count = agent.rdmsr(TMCCT)
    assert not isinstance(count, Fault)
    return count


def write(agent: Agent, **registers: int) -> None:
    """Let the guest write registers, by name."""
    for name, value in registers.items():
        assert agent.wrmsr(globals()[name], value) is None


@pytest.fixture
def timer(make_vm: MakeVm) -> Agent:
    """A guest whose one-shot timer counts down from LONG, undivided and masked."""
    agent = Agent(make_vm(AGENT).vcpus[0])
    assert agent.wrmsr(X2APIC_BASE, X2APIC) is None
    write(agent, SPIV=ENABLED, LVTT=MASKED | 0x51, TDCR=DIVIDERS[1], TMICT=LONG)
    return agent


@pytest.mark.parametrize("divider", DIVIDERS)
def test_user_space_sees_the_count(timer: Agent, divider: int) -> None:
    """KVM_GET_LAPIC shows a current count between what the guest reads before and after.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC (the APIC's registers); Intel SDM 3A, 12.5.4.
    """
    write(timer, TDCR=DIVIDERS[divider], TMICT=LONG)
    before = current(timer)
    shown = timer.vcpu.lapic.get_reg(apic.TIMER_CURRENT)
    after = current(timer)
    assert LONG >= before >= shown >= after > 0, (
        f"KVM_GET_LAPIC shows a count of {shown}, the guest read {before} before and {after} afterwards"
    )


@pytest.mark.parametrize("divider", [divider for divider in DIVIDERS if divider > 1])
def test_a_change_of_the_divider_keeps_the_count(timer: Agent, divider: int) -> None:
    """The divider is the clock's, not the count's: a change leaves the count, and slows it from then on.

    Intel SDM 3A, 12.5.4 (divide configuration register).
    """
    before = current(timer)
    write(timer, TDCR=DIVIDERS[divider])
    after = current(timer)
    assert before >= after > before - before // 4, f"the new divider makes {after} of a count of {before}"
    write(timer, TDCR=DIVIDERS[1])
    assert after >= current(timer) > after - after // 4
