# SPDX-License-Identifier: Apache-2.0
"""ioeventfd: guest writes that signal an eventfd instead of ending KVM_RUN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmpy import AGENT, Agent, EventFd, Gpa, Gva, IoExit, MakeVm, MmioExit, Msi, MsiRoute

pytestmark = pytest.mark.requires("KVM_CAP_IOEVENTFD")

PORT = 0x510
# Behind the default memory and below the APICs; nothing backs it.
MMIO_GPA = Gpa(0xD000_0000)
MMIO_GVA = Gva(0x7000_0000)


@pytest.fixture
def event() -> Iterator[EventFd]:
    with EventFd() as eventfd:
        yield eventfd


@pytest.fixture
def agent(make_vm: MakeVm) -> Agent:
    """An agent with a page of MMIO."""
    vm = make_vm(AGENT)
    vm.map(MMIO_GVA, MMIO_GPA, 0x1000, private=False)
    return Agent(vm.vcpus[0])


def quiet(agent: Agent, kind: str, offset: int, size: int, value: int) -> None:
    """Let the guest write, to a port ("out") or to memory ("write"), and expect no exit."""
    begin(agent, kind, offset, size, value)
    agent.value()


def begin(agent: Agent, kind: str, offset: int, size: int, value: int) -> None:
    """Order a write, to a port or to memory."""
    if kind == "out":
        agent.begin_out(PORT + offset, value, size)
    else:
        agent.begin_write(MMIO_GVA + offset, value, size)


def exits(agent: Agent, kind: str, offset: int, size: int, value: int) -> None:
    """Let the guest write, and expect an exit with this port or address, size and value."""
    begin(agent, kind, offset, size, value)
    if kind == "out":
        port = agent.vcpu.expect(IoExit)
        assert (port.port, port.size, port.value) == (PORT + offset, size, value)
    else:
        memory = agent.vcpu.expect(MmioExit)
        assert memory.is_write
        assert (memory.phys_addr, memory.size, memory.value) == (MMIO_GPA + offset, size, value)
    agent.value()


@pytest.mark.parametrize(
    ("kind", "size"), [*(("out", size) for size in (1, 2, 4)), *(("write", size) for size in (1, 2, 4, 8))]
)
def test_size(agent: Agent, event: EventFd, kind: str, size: int) -> None:
    """A write of the registered size to the registered port or address signals; all others exit.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    pio = kind == "out"
    agent.vm.io.ioeventfd(event, PORT + 64 if pio else MMIO_GPA + 64, size, pio=pio)
    quiet(agent, kind, 64, size, 7)
    assert event.read() == 1
    exits(agent, kind, 64, 2 if size == 1 else 1, 8)
    exits(agent, kind, 72, size, 9)
    assert event.read() == 0


def test_pio_datamatch(agent: Agent, event: EventFd) -> None:
    """With DATAMATCH only the registered value signals, on a port; all others exit.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    agent.vm.io.ioeventfd(event, PORT, 2, pio=True, datamatch=0x1234)
    quiet(agent, "out", 0, 2, 0x1234)
    exits(agent, "out", 0, 2, 0x1235)
    quiet(agent, "out", 0, 2, 0x1234)
    assert event.read() == 2


def test_mmio_datamatch_zero(agent: Agent, event: EventFd) -> None:
    """The value 0 is matched like any other: DATAMATCH with 0 is not the same as no DATAMATCH.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    agent.vm.io.ioeventfd(event, MMIO_GPA, 4, datamatch=0)
    exits(agent, "write", 0, 4, 1)
    assert event.read() == 0
    quiet(agent, "write", 0, 4, 0)
    assert event.read() == 1


def test_datamatch_compares_whole_value(agent: Agent, event: EventFd) -> None:
    """All 64 bits of an 8-byte write are compared: the same low half alone does not signal.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    value = 0x0123_4567_89AB_CDEF
    agent.vm.io.ioeventfd(event, MMIO_GPA, 8, datamatch=value)
    exits(agent, "write", 0, 8, value & 0xFFFF_FFFF)
    quiet(agent, "write", 0, 8, value)
    assert event.read() == 1


def test_values_share_address(agent: Agent, event: EventFd) -> None:
    """Different values at one address may have an eventfd each, and each value signals its own.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    with EventFd() as second:
        agent.vm.io.ioeventfd(event, PORT, 4, pio=True, datamatch=1)
        agent.vm.io.ioeventfd(second, PORT, 4, pio=True, datamatch=2)
        for value in (2, 1, 2):
            quiet(agent, "out", 0, 4, value)
        assert event.read() == 1
        assert second.read() == 2


def test_bus_is_part_of_address(agent: Agent, event: EventFd) -> None:
    """An ioeventfd on an MMIO address does not hear the port of the same number, and the other way round.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD: KVM_IOEVENTFD_FLAG_PIO.
    """
    agent.vm.io.ioeventfd(event, PORT, 4)
    agent.vm.io.ioeventfd(event, int(MMIO_GPA), 4, pio=True)
    exits(agent, "out", 0, 4, 1)
    exits(agent, "write", 0, 4, 2)
    assert event.read() == 0


@pytest.mark.requires("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_pio_any_length(agent: Agent, event: EventFd) -> None:
    """With length 0 a write of any size to the port signals.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD: KVM_CAP_IOEVENTFD_ANY_LENGTH.
    """
    agent.vm.io.ioeventfd(event, PORT, 0, pio=True)
    for size in (1, 2, 4):
        quiet(agent, "out", 0, size, 5)
    assert event.read() == 3


@pytest.mark.requires("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_mmio_any_length(agent: Agent, event: EventFd) -> None:
    """With length 0 a write of any size to the address signals, once each, and the next address still exits.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD: KVM_CAP_IOEVENTFD_ANY_LENGTH.
    """
    agent.vm.io.ioeventfd(event, MMIO_GPA, 0)
    for size in (1, 2, 4, 8):
        quiet(agent, "write", 0, size, 5)
    exits(agent, "write", 8, 4, 6)
    assert event.read() == 4


@pytest.mark.parametrize("kind", ["in", "read"])
def test_reads_still_exit(agent: Agent, event: EventFd, kind: str) -> None:
    """An ioeventfd takes writes only: a read of its address exits, and user space answers it.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD: "a guest write".
    """
    agent.vm.io.ioeventfd(event, PORT, 4, pio=True)
    agent.vm.io.ioeventfd(event, MMIO_GPA, 4)
    if kind == "in":
        agent.begin_in(PORT, 4)
    else:
        agent.begin_read(MMIO_GVA, 4)
    got = agent.vcpu.next()
    assert isinstance(got, (IoExit, MmioExit))
    got.respond(0xFEED_BEEF)
    assert agent.value() == 0xFEED_BEEF
    assert event.read() == 0


def test_deassign_brings_exits_back(agent: Agent, event: EventFd) -> None:
    """After KVM_IOEVENTFD_FLAG_DEASSIGN the write ends KVM_RUN again and signals nothing.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    vm = agent.vm
    vm.io.ioeventfd(event, PORT, 4, pio=True)
    vm.io.ioeventfd(event, MMIO_GPA, 4)
    quiet(agent, "out", 0, 4, 1)
    quiet(agent, "write", 0, 4, 2)
    assert event.read() == 2
    vm.io.ioeventfd(event, PORT, 4, pio=True, deassign=True)
    vm.io.ioeventfd(event, MMIO_GPA, 4, deassign=True)
    exits(agent, "out", 0, 4, 3)
    exits(agent, "write", 0, 4, 4)
    assert event.read() == 0


@pytest.mark.requires("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_deassign_of_any_length(agent: Agent, event: EventFd) -> None:
    """Deassigning an MMIO ioeventfd of length 0 ends its fast path too.

    virt/kvm/eventfd.c: such an ioeventfd is on two buses.
    """
    agent.vm.io.ioeventfd(event, MMIO_GPA, 0)
    quiet(agent, "write", 0, 4, 2)
    agent.vm.io.ioeventfd(event, MMIO_GPA, 0, deassign=True)
    exits(agent, "write", 0, 4, 4)
    assert event.read() == 1


@pytest.mark.requires("KVM_CAP_IRQFD")
def test_ioeventfd_drives_irqfd(make_vm: MakeVm, event: EventFd) -> None:
    """One eventfd may be ioeventfd and irqfd: the guest's write interrupts the guest, without user space.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD and 4.75 KVM_IRQFD.
    """
    vm = make_vm(LOOP)
    vm.irq.set_gsi_routing([MsiRoute(24, Msi.to(0, 0x51))])
    vm.irq.irqfd(event, 24)
    vm.io.ioeventfd(event, PORT, 4, pio=True)
    vm.launch()
    vm.vcpus[0].run_to_done()
    assert event.read() == 0


LOOP = """
#include "interrupts.h"

void guest_main(void)
{
	u32 n;

	irq_install(0x51);
	apic_enable();
	for (n = 1; n <= 10; n++) {
		outl(0x510, n);
		irq_wait(0x51, n);
		GUEST_ASSERT_EQ(irq_count(0x51), n);
	}
}
"""
