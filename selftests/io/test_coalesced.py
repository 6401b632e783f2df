# SPDX-License-Identifier: Apache-2.0
"""Coalesced MMIO and PIO: writes that KVM collects in a ring instead of exiting."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from kvmpy import (
    KVM_CAP_COALESCED_MMIO,
    KVM_CAP_COALESCED_PIO,
    KVM_COALESCED_MMIO_PAGE_OFFSET,
    PAGE_SIZE,
    CoalescedRing,
    CoalescedWrite,
    Gpa,
    GuestVcpu,
    GuestVm,
    Gva,
    IoExit,
    MakeVm,
    MmioExit,
    Vm,
    refused,
)
from kvmpy.core.coalesced import ENTRIES

pytestmark = pytest.mark.requires("KVM_CAP_COALESCED_MMIO")
needs_pio = pytest.mark.requires("KVM_CAP_COALESCED_PIO")

MMIO_GPA = Gpa(0xD000_0000)
MMIO = Gva(0x7000_0000)
PORT = 0x600

GUEST = """
#include <kvmpy/guest.h>

#define MMIO	((u8 *)0x70000000ul)

void sizes(void)
{
	mmio_write8(MMIO + 0x10, 0x11);
	mmio_write16(MMIO + 0x14, 0x2222);
	mmio_write32(MMIO + 0x18, 0x33333333);
	mmio_write64(MMIO + 0x20, 0x4444444444444444);
	GUEST_SYNC(1);
}

void ports(void)
{
	outb(0x600, 0x11);
	outw(0x602, 0x2222);
	outl(0x604, 0x33333333);
	GUEST_SYNC(1);
}

void strings(u64 from)
{
	outsb(0x600, (void *)(uintptr_t)from, 5);
	GUEST_SYNC(1);
}

void edges(void)
{
	mmio_write32(MMIO + 0x0c, 1);
	mmio_write32(MMIO + 0x0e, 2);
	mmio_write32(MMIO + 0x10, 3);
	mmio_write32(MMIO + 0x1c, 4);
	mmio_write32(MMIO + 0x1e, 5);
	mmio_write32(MMIO + 0x20, 6);
	GUEST_SYNC(1);
}

void read_between(void)
{
	mmio_write32(MMIO, 1);
	GUEST_SYNC(mmio_read32(MMIO));
}

void many(u64 count)
{
	for (u64 i = 0; i < count; i++)
		mmio_write32(MMIO, i);
	GUEST_SYNC(count);
	mmio_write32(MMIO, 0xffff);
	GUEST_SYNC(0);
}

/* Fill the ring with both kinds in turn, and write one more of each; again and again. */
void alternate(u64 room)
{
	for (u64 i = 0;; i++) {
		for (u64 n = 0; n < room; n++) {
			if (n & 1)
				outl(0x600, n);
			else
				mmio_write64(MMIO, n << 32 | i);
		}
		mmio_write64(MMIO, 0xaaaa);
		outl(0x600, 0xbbbb);
		GUEST_SYNC(i);
	}
}

void both_spaces(void)
{
	mmio_write8(MMIO, 1);
	outb(0x600, 2);
	GUEST_SYNC(1);
}

void forever(void)
{
	for (u64 i = 0;; i++) {
		mmio_write32(MMIO, i);
		GUEST_SYNC(i);
	}
}

void one_each(u64 value)
{
	mmio_write64(MMIO + 8, value);
}
"""


def with_mmio(make_vm: MakeVm, vcpus: int = 1) -> GuestVm:
    """Return a VM with a page of MMIO."""
    vm = make_vm(GUEST, vcpus=vcpus)
    vm.map(MMIO, MMIO_GPA, PAGE_SIZE, private=False)
    return vm


@pytest.fixture
def guest(make_vm: MakeVm) -> GuestVm:
    """A VM with a page of MMIO and one vCPU."""
    return with_mmio(make_vm)


@pytest.fixture
def ring(guest: GuestVm) -> Iterator[CoalescedRing]:
    """The ring of that VM, mapped through its first vCPU."""
    new_ring = guest.vcpus[0].vm.io.coalesced_ring(guest.vcpus[0])
    yield new_ring
    new_ring.release()


def start(vm: GuestVm, entry: str, *args: int) -> GuestVcpu:
    """Launch *vm* with its first vCPU in *entry*."""
    vcpu = vm.vcpus[0]
    vcpu.set_entry(entry, *args)
    vm.launch()
    return vcpu


def mmio_write(vcpu: GuestVcpu) -> tuple[int, int]:
    """Expect the exit of a write; return its offset in the page and its value."""
    got = vcpu.expect(MmioExit)
    assert got.is_write
    return got.phys_addr - int(MMIO_GPA), got.value


def test_writes_are_collected(guest: GuestVm, ring: CoalescedRing) -> None:
    """Writes into a zone do not exit; the ring holds them in order, with address, length and data.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO.
    """
    guest.io.register_coalesced_mmio(MMIO_GPA, PAGE_SIZE)
    vcpu = start(guest, "sizes")
    assert vcpu.sync().args == (1,)
    assert ring.drain() == [
        CoalescedWrite(MMIO_GPA + 0x10, b"\x11", pio=False),
        CoalescedWrite(MMIO_GPA + 0x14, b"\x22" * 2, pio=False),
        CoalescedWrite(MMIO_GPA + 0x18, b"\x33" * 4, pio=False),
        CoalescedWrite(MMIO_GPA + 0x20, b"\x44" * 8, pio=False),
    ]
    assert len(ring) == 0


@needs_pio
def test_port_writes_are_collected(guest: GuestVm, ring: CoalescedRing) -> None:
    """OUTs to a port zone do not exit; the ring holds them in order and marks them as port writes.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO (coalesced pio).
    """
    guest.io.register_coalesced_mmio(PORT, 8, pio=True)
    vcpu = start(guest, "ports")
    assert vcpu.sync().args == (1,)
    assert ring.drain() == [
        CoalescedWrite(PORT, b"\x11", pio=True),
        CoalescedWrite(PORT + 2, b"\x22" * 2, pio=True),
        CoalescedWrite(PORT + 4, b"\x33" * 4, pio=True),
    ]


@needs_pio
@pytest.mark.requires("trait:has_string_io")
def test_string_elements_are_collected(guest: GuestVm, ring: CoalescedRing) -> None:
    """Each element of a REP OUTS to a port zone becomes one entry of the ring.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO (coalesced pio).
    """
    source = guest.alloc(PAGE_SIZE, private=False)
    guest.write(source, b"abcde")
    guest.io.register_coalesced_mmio(PORT, 4, pio=True)
    vcpu = start(guest, "strings", source)
    assert vcpu.sync().args == (1,)
    assert [(write.addr, write.data) for write in ring.drain()] == [
        (PORT, bytes([letter])) for letter in b"abcde"
    ]


def test_edges(guest: GuestVm, ring: CoalescedRing) -> None:
    """Only writes that lie in the zone as a whole are collected; those that reach over an edge exit.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO.
    """
    guest.io.register_coalesced_mmio(MMIO_GPA + 0x10, 0x10)
    vcpu = start(guest, "edges")
    assert [mmio_write(vcpu) for _ in range(4)] == [(0x0C, 1), (0x0E, 2), (0x1E, 5), (0x20, 6)]
    assert vcpu.sync().args == (1,)
    assert [(write.addr - int(MMIO_GPA), write.value) for write in ring.drain()] == [(0x10, 3), (0x1C, 4)]


def test_reads_exit(guest: GuestVm, ring: CoalescedRing) -> None:
    """A read from a zone exits as ever, with the writes before it in the ring by then.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO ("deferred until a read").
    """
    guest.io.register_coalesced_mmio(MMIO_GPA, PAGE_SIZE)
    vcpu = start(guest, "read_between")
    got = vcpu.expect(MmioExit)
    assert (got.is_write, got.phys_addr) == (False, MMIO_GPA)
    assert [write.value for write in ring.drain()] == [1]
    got.respond(0x55)
    assert vcpu.sync().args == (0x55,)


def test_full_ring(guest: GuestVm, ring: CoalescedRing) -> None:
    """A write that finds the ring full exits and is not lost; drained, the ring collects again.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO; one entry stays free
    (virt/kvm/coalesced_mmio.c).
    """
    room = ENTRIES - 1
    guest.io.register_coalesced_mmio(MMIO_GPA, PAGE_SIZE)
    vcpu = start(guest, "many", room + 2)
    for expected in (room, room + 1):
        offset, value = mmio_write(vcpu)
        assert (offset, value) == (0, expected), f"write {value} exits, {len(ring)} of {room} are in the ring"
    assert vcpu.sync().args == (room + 2,)
    assert len(ring) == room
    assert [write.value for write in ring.drain()] == list(range(room))
    assert vcpu.sync().args == (0,)
    assert [write.value for write in ring.drain()] == [0xFFFF]


@needs_pio
def test_full_ring_of_both_kinds(guest: GuestVm, ring: CoalescedRing, rng: random.Random) -> None:
    """Wherever the ring begins it takes MMIO and port writes in turn, and the next of each kind exits.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO (coalesced pio); one entry stays
    free.
    """
    room = ENTRIES - 1
    guest.io.register_coalesced_mmio(MMIO_GPA, PAGE_SIZE)
    guest.io.register_coalesced_mmio(PORT, 4, pio=True)
    vcpu = start(guest, "alternate", room)
    for number, begin in enumerate([0, 1, ENTRIES - 1, *(rng.randrange(ENTRIES) for _ in range(5))]):
        ring.begin_at(begin)
        assert mmio_write(vcpu) == (0, 0xAAAA)
        got = vcpu.expect(IoExit)
        assert (got.port, got.data) == (PORT, (0xBBBB).to_bytes(4, "little"))
        assert vcpu.sync().args == (number,)
        assert len(ring) == room
        writes = list(ring.drain())
        assert [write.pio for write in writes] == [index % 2 == 1 for index in range(room)]
        assert [write.value for write in writes] == [
            index if index % 2 else index << 32 | number for index in range(room)
        ]


def test_ring_wraps(guest: GuestVm, ring: CoalescedRing) -> None:
    """Entries go round: more writes than the ring has places arrive complete when it is drained in time.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO.
    """
    guest.io.register_coalesced_mmio(MMIO_GPA, PAGE_SIZE)
    vcpu = start(guest, "forever")
    values: list[int] = []
    for number in range(ENTRIES + 20):
        assert vcpu.sync().args == (number,)
        if number % 50 == 49:
            values += [write.value for write in ring.drain()]
    values += [write.value for write in ring.drain()]
    assert values == list(range(ENTRIES + 20))


def test_unregister(guest: GuestVm, ring: CoalescedRing) -> None:
    """After its zone is unregistered a write exits again, and what was collected before stays in the ring.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO.
    """
    guest.io.register_coalesced_mmio(MMIO_GPA, PAGE_SIZE)
    vcpu = start(guest, "forever")
    assert vcpu.sync().args == (0,)
    guest.io.unregister_coalesced_mmio(MMIO_GPA, PAGE_SIZE)
    assert mmio_write(vcpu) == (0, 1)
    assert vcpu.sync().args == (1,)
    assert [write.value for write in ring.drain()] == [0]


def test_unregister_part(guest: GuestVm, ring: CoalescedRing) -> None:
    """Unregistering a part of a zone removes the whole zone, and leaves zones that do not hold the part.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO; virt/kvm/coalesced_mmio.c.
    """
    guest.io.register_coalesced_mmio(MMIO_GPA + 0x10, 8)
    guest.io.register_coalesced_mmio(MMIO_GPA + 0x18, 0x10)
    guest.io.unregister_coalesced_mmio(MMIO_GPA + 0x10, 1)
    vcpu = start(guest, "sizes")
    assert mmio_write(vcpu) == (0x10, 0x11)
    assert mmio_write(vcpu) == (0x14, 0x2222)
    assert vcpu.sync().args == (1,)
    assert [write.addr - int(MMIO_GPA) for write in ring.drain()] == [0x18, 0x20]


@needs_pio
def test_spaces_are_apart(guest: GuestVm, ring: CoalescedRing) -> None:
    """A zone of memory neither collects port writes at its number nor goes away as a port zone.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO (pio).
    """
    guest.io.register_coalesced_mmio(PORT, 8)
    guest.io.register_coalesced_mmio(MMIO_GPA, 8)
    guest.io.unregister_coalesced_mmio(MMIO_GPA, 8, pio=True)
    vcpu = start(guest, "both_spaces")
    out = vcpu.expect(IoExit)
    assert (out.port, out.value) == (PORT, 2)
    assert vcpu.sync().args == (1,)
    assert ring.drain() == [CoalescedWrite(int(MMIO_GPA), b"\x01", pio=False)]


def test_one_ring_for_all_vcpus(make_vm: MakeVm) -> None:
    """Writes of all vCPUs are collected in one ring, which every vCPU's mapping shows.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO; 4.5 KVM_GET_VCPU_MMAP_SIZE.
    """
    vm = with_mmio(make_vm, vcpus=2)
    vm.io.register_coalesced_mmio(MMIO_GPA, PAGE_SIZE)
    for vcpu in vm.vcpus:
        vcpu.set_entry("one_each", 0x100 + vcpu.index)
    vm.launch()
    vm.run_all()
    first, second = (vcpu.vm.io.coalesced_ring(vcpu) for vcpu in vm.vcpus)
    try:
        assert (len(first), len(second)) == (2, 2)
        assert sorted(write.value for write in second.drain()) == [0x100, 0x101]
        assert len(first) == 0
    finally:
        first.release()
        second.release()


@pytest.mark.parametrize("pio", [2, 0xFFFF_FFFF])
@pytest.mark.parametrize("method", ["register_coalesced_mmio", "unregister_coalesced_mmio"])
def test_bad_address_space(vm: Vm, method: str, pio: int) -> None:
    """A zone whose pio is neither 0 nor 1 is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO; virt/kvm/coalesced_mmio.c.
    """
    vm.need_cap(KVM_CAP_COALESCED_PIO)
    with refused(errno.EINVAL):
        getattr(vm.io, method)(0x1000, 8, pio=pio)


def test_unregister_nothing(vm: Vm) -> None:
    """Unregistering a zone that was never registered succeeds.

    Documentation/virt/kvm/api.rst, 4.116 KVM_(UN)REGISTER_COALESCED_MMIO; virt/kvm/coalesced_mmio.c.
    """
    vm.io.unregister_coalesced_mmio(0x1000, 8)


def test_capability_is_the_page(vm: Vm) -> None:
    """KVM_CAP_COALESCED_MMIO says which page of a vCPU's mapping holds the ring.

    Documentation/virt/kvm/api.rst, 4.5 KVM_GET_VCPU_MMAP_SIZE ("this page is included in the result").
    """
    assert vm.check_extension(KVM_CAP_COALESCED_MMIO) == KVM_COALESCED_MMIO_PAGE_OFFSET
    assert vm.kvm.get_vcpu_mmap_size() >= (KVM_COALESCED_MMIO_PAGE_OFFSET + 1) * PAGE_SIZE
