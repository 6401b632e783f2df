# SPDX-License-Identifier: Apache-2.0
"""The IOAPIC's registers as the guest writes them, while its line is pending."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kvmpy import AGENT, Agent, EventFd, Gpa, GuestVm, Gva, MakeVm, RedirectionEntry

pytestmark = [
    pytest.mark.requires("KVM_CAP_IRQCHIP", "KVM_CAP_IRQFD_RESAMPLE"),
    pytest.mark.protections("none"),
]

PIN, VECTOR, OTHER = 20, 0x51, 0x61
IOAPIC_GPA, IOAPIC = Gpa(0xFEC0_0000), Gva(0x7000_0000)
LEVEL, MASKED = 1 << 15, 1 << 16
REMOTE_IRR, STATUS = 1 << 14, 1 << 12
APIC_BASE, X2APIC = 0x1B, 0xFEE0_0D00
SPIV, ENABLED = 0x80F, 0x1FF
TIMEOUT = 5.0


def entry(vm: GuestVm) -> RedirectionEntry:
    """Return the pin's entry."""
    return RedirectionEntry.from_bits(vm.irq.get_ioapic().redirtbl[PIN].bits)


def program(vm: GuestVm, bits: int) -> None:
    """Write the pin's entry from user space."""
    state = vm.irq.get_ioapic()
    state.redirtbl[PIN].bits = bits
    vm.irq.set_ioapic(state)


@pytest.fixture
def writer(make_vm: MakeVm) -> Agent:
    """A guest that reaches the IOAPIC's registers, and takes no interrupt."""
    vm = make_vm(AGENT, irqchip="full")
    vm.map(IOAPIC, IOAPIC_GPA, 0x1000, private=False)
    agent = Agent(vm.vcpus[0])
    assert agent.wrmsr(APIC_BASE, X2APIC) is None
    assert agent.wrmsr(SPIV, ENABLED) is None
    return agent


def wait(condition: Callable[[], bool]) -> None:
    """Wait for what KVM does on another thread."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end


def write(agent: Agent, low: int) -> None:
    """Let the guest write the lower half of the pin's entry."""
    assert agent.write(IOAPIC, 0x10 + 2 * PIN, 4) is None
    assert agent.write(IOAPIC + 0x10, low, 4) is None


@pytest.mark.parametrize("trigger", [LEVEL, 0], ids=["level", "edge"])
def test_bits_that_cannot_be_written(writer: Agent, trigger: int) -> None:
    """Remote IRR and delivery status are the IOAPIC's; an edge-triggered entry has no remote IRR.

    82093AA data sheet, 3.2.4 (bits 12 and 14, read-only; remote IRR is for level-triggered ones).
    """
    program(writer.vm, VECTOR | LEVEL | REMOTE_IRR)
    write(writer, OTHER | trigger | MASKED)
    assert entry(writer.vm).remote_irr == bool(trigger), (
        f"the guest wrote {'a level' if trigger else 'an edge'}-triggered entry: remote IRR is wrong for it"
    )
    program(writer.vm, VECTOR | LEVEL)
    write(writer, OTHER | trigger | MASKED | REMOTE_IRR | STATUS)
    assert not entry(writer.vm).remote_irr


@pytest.mark.parametrize("again", [True, False], ids=["still-high", "taken-back"])
def test_unmasked_line(writer: Agent, again: bool) -> None:
    """A level-triggered pin that is unmasked interrupts if its device says so now, not if it did before.

    82093AA data sheet, 3.2.4 (level-triggered: the pin's state); Documentation/virt/kvm/api.rst, 4.75
    KVM_IRQFD (resampling: the line is taken back, and the device asked anew).
    """
    vm = writer.vm
    with EventFd() as trigger, EventFd() as resample:
        program(vm, VECTOR | LEVEL | MASKED)
        vm.irq.irqfd(trigger, PIN, resample=resample)
        trigger.signal()
        wait(lambda: bool(vm.irq.get_ioapic().irr & 1 << PIN))
        write(writer, VECTOR | LEVEL)
        assert not entry(vm).remote_irr, "unmasking delivered an interrupt that the device had taken back"
        assert resample.read() == 1
        if again:
            trigger.signal()
            wait(lambda: entry(vm).remote_irr)
