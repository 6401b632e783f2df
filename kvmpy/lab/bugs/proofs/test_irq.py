# SPDX-License-Identifier: Apache-2.0
"""Proofs of the interrupt controllers' bugs."""

from __future__ import annotations

import time

import pytest

from kvmpy import AGENT, Agent, EventFd, Gpa, GuestVm, Gva, MakeVm, RedirectionEntry

pytestmark = pytest.mark.protections("none")

PIN, VECTOR = 20, 0x51
IOAPIC_GPA, IOAPIC = Gpa(0xFEC0_0000), Gva(0x7000_0000)

GUEST = """
#include <kvmpy/guest.h>

static void handler(struct exception_frame *frame)
{
	GUEST_SYNC('h');
	apic_eoi();
}

void guest_main(void)
{
	guest_exception_install(0x51, handler);
	apic_enable();
	for (;;) {
		GUEST_SYNC('i');
		irq_window();
	}
}
"""


def entry(vm: GuestVm) -> RedirectionEntry:
    return RedirectionEntry.from_bits(vm.irq.get_ioapic().redirtbl[PIN].bits)


def program(vm: GuestVm, wanted: RedirectionEntry) -> None:
    state = vm.irq.get_ioapic()
    state.redirtbl[PIN].bits = wanted.bits
    vm.irq.set_ioapic(state)


@pytest.fixture
def writer(make_vm: MakeVm) -> Agent:
    """A guest that reaches the IOAPIC's registers."""
    vm = make_vm(AGENT, irqchip="full")
    vm.map(IOAPIC, IOAPIC_GPA, 0x1000, private=False)
    agent = Agent(vm.vcpus[0])
    assert agent.wrmsr(0x1B, 0xFEE00D00) is None
    assert agent.wrmsr(0x80F, 0x1FF) is None
    return agent


def write_low(agent: Agent, value: int) -> None:
    assert agent.write(IOAPIC, 0x10 + 2 * PIN, 4) is None
    assert agent.write(IOAPIC + 0x10, value, 4) is None


@pytest.mark.bug(20)
def test_rerouted(make_vm: MakeVm) -> None:
    vm = make_vm.start(GUEST, vcpus=2, irqchip="full")
    for vcpu in vm.vcpus:
        assert vcpu.sync().args == (ord("i"),)
    program(vm, RedirectionEntry(vector=VECTOR, level=True))
    vm.irq.line(PIN, 1)
    first = vm.vcpus[0]
    while first.sync().args != (ord("h"),):
        pass
    state = vm.irq.get_ioapic()
    state.redirtbl[PIN].bits = RedirectionEntry.from_bits(state.redirtbl[PIN].bits).bits | 1 << 56
    vm.irq.set_ioapic(state)
    vm.irq.line(PIN, 0)
    assert first.sync().args == (ord("i"),)
    assert not entry(vm).remote_irr


@pytest.mark.bug(21)
def test_edge(writer: Agent) -> None:
    program(writer.vm, RedirectionEntry(vector=VECTOR, level=True, remote_irr=True))
    write_low(writer, VECTOR)
    assert not entry(writer.vm).remote_irr


@pytest.mark.bug(22)
def test_unmask(writer: Agent) -> None:
    with EventFd() as trigger, EventFd() as resample:
        program(writer.vm, RedirectionEntry(vector=VECTOR, level=True, masked=True))
        writer.vm.irq.irqfd(trigger, PIN, resample=resample)
        trigger.signal()
        end = time.monotonic() + 5
        while not writer.vm.irq.get_ioapic().irr & 1 << PIN:
            assert time.monotonic() < end
        write_low(writer, VECTOR | 1 << 15)
        assert not entry(writer.vm).remote_irr


@pytest.mark.bug(23)
def test_poll(writer: Agent) -> None:
    writer.vm.irq.line(3, 1)
    # mov al, 0x0c; out 0x20, al; in al, 0x20
    assert writer.must(b"\xb0\x0c\xe6\x20\xe4\x20").rax & 0xFF == 0x83


@pytest.mark.bug(24)
def test_any_length(writer: Agent) -> None:
    with EventFd() as event:
        writer.vm.io.ioeventfd(event, IOAPIC_GPA + 0x800, 0)
        assert writer.write(IOAPIC + 0x800, 1, 4) is None
        assert event.read() == 1
