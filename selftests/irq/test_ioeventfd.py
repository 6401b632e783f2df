# SPDX-License-Identifier: Apache-2.0
"""ioeventfd: guest writes that signal an eventfd instead of ending KVM_RUN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmpy import EventFd, Gpa, GuestVm, Gva, IoExit, MakeVm, MmioExit

pytestmark = pytest.mark.requires("KVM_CAP_IOEVENTFD")

PORT = 0x510
# Behind the default memory and below the APICs; nothing backs it.
MMIO_GPA = Gpa(0xD000_0000)
MMIO_GVA = Gva(0x7000_0000)

# Executes the accesses that the host lists, each followed by a SYNC.
GUEST = """
#include <kvmpy/guest.h>

struct access {
	u64 address;
	u64 value;
	u32 size;
	u8 pio;
	u8 read;
	u16 pad;
};

GUEST_SHARED struct access accesses[8];
GUEST_SHARED u64 nr;

static void port_write(const struct access *a)
{
	switch (a->size) {
	case 1:
		outb(a->address, a->value);
		break;
	case 2:
		outw(a->address, a->value);
		break;
	case 4:
		outl(a->address, a->value);
		break;
	}
}

static void memory_write(const struct access *a)
{
	void *where = (void *)(uintptr_t)a->address;

	switch (a->size) {
	case 1:
		mmio_write8(where, a->value);
		break;
	case 2:
		mmio_write16(where, a->value);
		break;
	case 4:
		mmio_write32(where, a->value);
		break;
	case 8:
		mmio_write64(where, a->value);
		break;
	}
}

void guest_main(void)
{
	u64 i;

	for (i = 0; i < nr; i++) {
		const struct access *a = &accesses[i];

		if (a->read)
			GUEST_SYNC(a->pio ? inl(a->address) : mmio_read32((void *)(uintptr_t)a->address));
		else if (a->pio)
			port_write(a);
		else
			memory_write(a);
		if (!a->read)
			GUEST_SYNC(i);
	}
}
"""


@pytest.fixture
def event() -> Iterator[EventFd]:
    with EventFd() as made:
        yield made


def prepare(make_vm: MakeVm, *accesses: tuple[str, int, int, int]) -> GuestVm:
    """Return a VM whose guest does *accesses*: (kind, offset, size, value); kinds: out, in, write, read."""
    vm = make_vm(GUEST)
    vm.map(MMIO_GVA, MMIO_GPA, 0x1000, private=False)
    raw = b""
    for kind, offset, size, value in accesses:
        pio = kind in ("out", "in")
        address = offset + (PORT if pio else int(MMIO_GVA))
        raw += address.to_bytes(8, "little") + value.to_bytes(8, "little") + size.to_bytes(4, "little")
        raw += bytes([pio, kind in ("in", "read"), 0, 0])
    vm.symbol("accesses").bytes = raw
    vm.symbol("nr").u64 = len(accesses)
    return vm


def quiet(vm: GuestVm, number: int) -> None:
    """Expect that access *number* is over and did not end KVM_RUN."""
    assert vm.vcpus[0].sync().args == (number,)


def pio_exit(vm: GuestVm, number: int) -> tuple[int, int, int]:
    """Expect that access *number* is a port exit; return port, size, value."""
    got = vm.vcpus[0].expect(IoExit)
    quiet(vm, number)
    return got.port, got.size, got.value


def mmio_exit(vm: GuestVm, number: int) -> tuple[int, int, int]:
    """Expect that access *number* is an MMIO exit; return offset, size, value."""
    got = vm.vcpus[0].expect(MmioExit)
    assert got.is_write
    quiet(vm, number)
    return got.phys_addr - int(MMIO_GPA), got.size, got.value


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pio_size(make_vm: MakeVm, event: EventFd, size: int) -> None:
    """A write of the registered size to the registered port signals; other sizes and ports exit.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    other = 2 if size == 1 else 1
    vm = prepare(make_vm, ("out", 0, size, 7), ("out", 0, other, 8), ("out", 8, size, 9))
    vm.ioeventfd(event, PORT, size, pio=True)
    vm.launch()
    quiet(vm, 0)
    assert event.read() == 1
    assert pio_exit(vm, 1) == (PORT, other, 8)
    assert pio_exit(vm, 2) == (PORT + 8, size, 9)
    assert event.read() == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_size(make_vm: MakeVm, event: EventFd, size: int) -> None:
    """A write of the registered size to the registered address signals; other sizes and addresses exit.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    other = 2 if size == 1 else 1
    vm = prepare(make_vm, ("write", 64, size, 7), ("write", 64, other, 8), ("write", 72, size, 9))
    vm.ioeventfd(event, MMIO_GPA + 64, size)
    vm.launch()
    quiet(vm, 0)
    assert event.read() == 1
    assert mmio_exit(vm, 1) == (64, other, 8)
    assert mmio_exit(vm, 2) == (72, size, 9)
    assert event.read() == 0


def test_pio_datamatch(make_vm: MakeVm, event: EventFd) -> None:
    """With DATAMATCH only the registered value signals, on a port; all others exit.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    vm = prepare(make_vm, ("out", 0, 2, 0x1234), ("out", 0, 2, 0x1235), ("out", 0, 2, 0x1234))
    vm.ioeventfd(event, PORT, 2, pio=True, datamatch=0x1234)
    vm.launch()
    quiet(vm, 0)
    assert pio_exit(vm, 1) == (PORT, 2, 0x1235)
    quiet(vm, 2)
    assert event.read() == 2


def test_mmio_datamatch_zero(make_vm: MakeVm, event: EventFd) -> None:
    """The value 0 is matched like any other: DATAMATCH with 0 is not the same as no DATAMATCH.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    vm = prepare(make_vm, ("write", 0, 4, 1), ("write", 0, 4, 0))
    vm.ioeventfd(event, MMIO_GPA, 4, datamatch=0)
    vm.launch()
    assert mmio_exit(vm, 0) == (0, 4, 1)
    assert event.read() == 0
    quiet(vm, 1)
    assert event.read() == 1


def test_datamatch_compares_whole_value(make_vm: MakeVm, event: EventFd) -> None:
    """All 64 bits of an 8-byte write are compared: the same low half alone does not signal.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    value = 0x0123_4567_89AB_CDEF
    vm = prepare(make_vm, ("write", 0, 8, value & 0xFFFF_FFFF), ("write", 0, 8, value))
    vm.ioeventfd(event, MMIO_GPA, 8, datamatch=value)
    vm.launch()
    assert mmio_exit(vm, 0) == (0, 8, value & 0xFFFF_FFFF)
    quiet(vm, 1)
    assert event.read() == 1


def test_values_share_address(make_vm: MakeVm, event: EventFd) -> None:
    """Different values at one address may have an eventfd each, and each value signals its own.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    vm = prepare(make_vm, ("out", 0, 4, 2), ("out", 0, 4, 1), ("out", 0, 4, 2))
    with EventFd() as second:
        vm.ioeventfd(event, PORT, 4, pio=True, datamatch=1)
        vm.ioeventfd(second, PORT, 4, pio=True, datamatch=2)
        vm.launch()
        for number in range(3):
            quiet(vm, number)
        assert event.read() == 1
        assert second.read() == 2


def test_bus_is_part_of_address(make_vm: MakeVm, event: EventFd) -> None:
    """An ioeventfd on an MMIO address does not hear the port of the same number, and the other way round.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD: KVM_IOEVENTFD_FLAG_PIO.
    """
    vm = prepare(make_vm, ("out", 0, 4, 1), ("write", 0, 4, 2))
    vm.ioeventfd(event, PORT, 4)
    vm.ioeventfd(event, int(MMIO_GPA), 4, pio=True)
    vm.launch()
    assert pio_exit(vm, 0) == (PORT, 4, 1)
    assert mmio_exit(vm, 1) == (0, 4, 2)
    assert event.read() == 0


@pytest.mark.requires("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_pio_any_length(make_vm: MakeVm, event: EventFd) -> None:
    """With length 0 a write of any size to the port signals.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD: KVM_CAP_IOEVENTFD_ANY_LENGTH.
    """
    vm = prepare(make_vm, *(("out", 0, size, 5) for size in (1, 2, 4)))
    vm.ioeventfd(event, PORT, 0, pio=True)
    vm.launch()
    for number in range(3):
        quiet(vm, number)
    assert event.read() == 3


@pytest.mark.requires("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_mmio_any_length(make_vm: MakeVm, event: EventFd) -> None:
    """With length 0 a write of any size to the address signals, once each, and the next address still exits.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD: KVM_CAP_IOEVENTFD_ANY_LENGTH.
    """
    vm = prepare(make_vm, *(("write", 0, size, 5) for size in (1, 2, 4, 8)), ("write", 8, 4, 6))
    vm.ioeventfd(event, MMIO_GPA, 0)
    vm.launch()
    for number in range(4):
        quiet(vm, number)
    assert mmio_exit(vm, 4) == (8, 4, 6)
    assert event.read() == 4


@pytest.mark.parametrize("kind", ["in", "read"])
def test_reads_still_exit(make_vm: MakeVm, event: EventFd, kind: str) -> None:
    """An ioeventfd takes writes only: a read of its address exits, and user space answers it.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD: "a guest write".
    """
    vm = prepare(make_vm, (kind, 0, 4, 0))
    vm.ioeventfd(event, PORT, 4, pio=True)
    vm.ioeventfd(event, MMIO_GPA, 4)
    vm.launch()
    got = vm.vcpus[0].next()
    assert isinstance(got, (IoExit, MmioExit))
    got.respond(0xFEED_BEEF)
    assert vm.vcpus[0].sync().args == (0xFEED_BEEF,)
    assert event.read() == 0


def test_deassign_brings_exits_back(make_vm: MakeVm, event: EventFd) -> None:
    """After KVM_IOEVENTFD_FLAG_DEASSIGN the write ends KVM_RUN again and signals nothing.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    vm = prepare(make_vm, ("out", 0, 4, 1), ("write", 0, 4, 2), ("out", 0, 4, 3), ("write", 0, 4, 4))
    vm.ioeventfd(event, PORT, 4, pio=True)
    vm.ioeventfd(event, MMIO_GPA, 4)
    vm.launch()
    quiet(vm, 0)
    quiet(vm, 1)
    assert event.read() == 2
    vm.ioeventfd(event, PORT, 4, pio=True, deassign=True)
    vm.ioeventfd(event, MMIO_GPA, 4, deassign=True)
    assert pio_exit(vm, 2) == (PORT, 4, 3)
    assert mmio_exit(vm, 3) == (0, 4, 4)
    assert event.read() == 0


@pytest.mark.requires("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_deassign_of_any_length(make_vm: MakeVm, event: EventFd) -> None:
    """Deassigning an MMIO ioeventfd of length 0 ends its fast path too.

    virt/kvm/eventfd.c: such an ioeventfd is on two buses.
    """
    vm = prepare(make_vm, ("write", 0, 4, 2), ("write", 0, 4, 4))
    vm.ioeventfd(event, MMIO_GPA, 0)
    vm.launch()
    quiet(vm, 0)
    vm.ioeventfd(event, MMIO_GPA, 0, deassign=True)
    assert mmio_exit(vm, 1) == (0, 4, 4)
    assert event.read() == 1


@pytest.mark.requires("KVM_CAP_IRQFD")
def test_ioeventfd_drives_irqfd(make_vm: MakeVm, event: EventFd) -> None:
    """One eventfd may be ioeventfd and irqfd: the guest's write interrupts the guest, without user space.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD and 4.75 KVM_IRQFD.
    """
    from kvmpy import Msi, MsiRoute

    vm = make_vm(LOOP)
    vm.set_gsi_routing([MsiRoute(24, Msi.to(0, 0x51))])
    vm.irqfd(event, 24)
    vm.ioeventfd(event, PORT, 4, pio=True)
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
