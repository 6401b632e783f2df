# SPDX-License-Identifier: Apache-2.0
"""Slots that come, go and move while the guest uses them."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from kvmpy import (
    AGENT,
    PAGE_SIZE,
    Agent,
    Anonymous,
    Gpa,
    GuestVcpu,
    GuestVm,
    Gva,
    MakeVm,
    Mapping,
    MmioExit,
    Ucall,
    VcpuThread,
    refused,
)
from selftests.conftest import Accessor

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
OLD, NEW, NOTHING, STOP = 0x01D, 0x4E3, 0xFFFF, 0x570

# Reads one place until it finds STOP there, and counts what else it finds.
WATCHER = """
#include <kvmpy/guest.h>

#define OLD	0x01d
#define NEW	0x4e3
#define NOTHING	0xffff
#define STOP	0x570

GUEST_SHARED volatile u64 seen_old, seen_new, seen_nothing;

static GUEST_USER u64 load(u64 address)
{
	return mmio_read64((void *)(uintptr_t)address);
}

static u64 user_stack[256] GUEST_USER_DATA;

void guest_main(u64 address, u64 ring)
{
	for (;;) {
		struct guest_user_exit exit = { .returned = true };

		if (ring) {
			/*
			 * An exit since the last exception: QEMU's TCG leaves that one's type in EXITINTINFO,
			 * where KVM sees an event in delivery and does not emulate the access.
			 */
			cpuid(0, 0);
			exit = guest_user_run(load, address, user_stack + ARRAY_SIZE(user_stack));
		} else {
			exit.value = load(address);
		}
		GUEST_ASSERT(exit.returned);
		switch (exit.value) {
		case OLD:
			seen_old++;
			break;
		case NEW:
			seen_new++;
			break;
		case NOTHING:
			seen_nothing++;
			break;
		case STOP:
			return;
		default:
			GUEST_FAIL("read %llx", exit.value);
		}
	}
}
"""


def fill(mapping: Mapping, value: int, offset: int = 0) -> None:
    mapping.view(offset, 8)[:] = value.to_bytes(8, "little")


@pytest.fixture
def watcher(make_vm: MakeVm, ring: int) -> GuestVm:
    vm = make_vm(WATCHER)
    vm.map(GVA, GPA, PAGE_SIZE, user=True, nx=True, private=False)
    vm.vcpus[0].set_entry("guest_main", int(GVA), ring)
    return vm


def wait_until_seen(vm: GuestVm, name: str, more_than: int = 0) -> None:
    """Wait until the running guest has counted; its own deadline ends it should it never do so."""
    counter = vm.symbol(name)
    deadline = time.monotonic() + vm.deadline
    while counter.u64 <= more_than:
        assert time.monotonic() < deadline, f"the guest never counted {name}"


def test_a_slot_deleted_under_a_running_guest_is_gone(watcher: GuestVm) -> None:
    """Once the deletion returns, the guest's next read of the range is user space's.

    Documentation/virt/kvm/api.rst 4.35 and 5, KVM_EXIT_MMIO.
    """
    slot = watcher.add_slot(GPA, PAGE_SIZE)
    fill(slot.mapping, OLD)
    watcher.launch()
    vcpu = watcher.vcpus[0]
    with VcpuThread(vcpu.next, vcpu=vcpu) as thread:
        wait_until_seen(watcher, "seen_old")
        slot.delete()
        got = thread.join(watcher.deadline)
    assert isinstance(got, MmioExit)
    assert (got.phys_addr, got.is_write, got.size) == (int(GPA), False, 8)
    got.respond(STOP)
    vcpu.run_to_done()


def answer_nothing(vcpu: GuestVcpu) -> None:
    """Run until DONE and answer every read of no memory with NOTHING."""
    while not isinstance(got := vcpu.next(), Ucall):
        assert isinstance(got, MmioExit), got
        got.respond(NOTHING)
    assert vcpu.done


def test_a_slot_added_under_a_running_guest_is_found(watcher: GuestVm) -> None:
    """Once a slot exists, reads that were user space's before find its memory.

    Documentation/virt/kvm/api.rst 4.35.
    """
    watcher.launch()
    vcpu = watcher.vcpus[0]
    with VcpuThread(lambda: answer_nothing(vcpu), vcpu=vcpu) as thread:
        wait_until_seen(watcher, "seen_nothing")
        mapping = watcher.own(Anonymous(huge="never").map(PAGE_SIZE))
        fill(mapping, OLD)
        watcher.add_alias(int(GPA), PAGE_SIZE, mapping)
        wait_until_seen(watcher, "seen_old")
        fill(mapping, STOP)
        thread.join(watcher.deadline)


def test_a_slot_that_is_replaced_shows_old_nothing_or_new(watcher: GuestVm) -> None:
    """A guest that reads while a slot is replaced sees old memory, no memory or new memory, nothing else.

    Documentation/virt/kvm/api.rst 4.35; x86/mmu.rst: "the guest must not be able to touch host memory not
    assigned to it".
    """
    vm = watcher
    mappings = [vm.own(Anonymous(huge="never").map(PAGE_SIZE)) for _ in range(2)]
    for mapping, value in zip(mappings, (OLD, NEW), strict=True):
        fill(mapping, value)
    slot = vm.add_alias(int(GPA), PAGE_SIZE, mappings[0])
    vm.launch()
    vcpu = vm.vcpus[0]
    old, new = vm.symbol("seen_old"), vm.symbol("seen_new")
    with VcpuThread(lambda: answer_nothing(vcpu), vcpu=vcpu) as thread:
        for turn in range(1, 31):
            slot.delete()
            slot = vm.add_alias(int(GPA), PAGE_SIZE, mappings[turn % 2])
            counter, other = (new, old) if turn % 2 else (old, new)
            wait_until_seen(vm, counter.name, counter.u64)
            # What was replaced is never read again.
            gone = other.u64
            wait_until_seen(vm, counter.name, counter.u64 + 1)
            assert other.u64 == gone
        fill(mappings[0], STOP)
        thread.join(vm.deadline)


def test_two_vcpus_lose_a_deleted_slot(make_vm: MakeVm) -> None:
    """A deletion holds for every vCPU: each of them reads no memory afterwards.

    Documentation/virt/kvm/api.rst 4.35.
    """
    vm = make_vm(WATCHER, vcpus=2)
    vm.map(GVA, GPA, 2 * PAGE_SIZE, nx=True, private=False)
    slot = vm.add_slot(GPA, 2 * PAGE_SIZE)
    fill(slot.mapping, OLD)
    fill(slot.mapping, NEW, PAGE_SIZE)
    vm.vcpus[0].set_entry("guest_main", int(GVA))
    vm.vcpus[1].set_entry("guest_main", int(GVA) + PAGE_SIZE)
    vm.launch()
    lost: dict[int, int] = {}
    lock = threading.Lock()

    def until_lost(vcpu: GuestVcpu) -> None:
        got = vcpu.expect(MmioExit)
        with lock:
            lost[vcpu.index] = got.phys_addr
        got.respond(STOP)
        vcpu.run_to_done()

    with (
        VcpuThread(lambda: until_lost(vm.vcpus[0]), vcpu=vm.vcpus[0]) as first,
        VcpuThread(lambda: until_lost(vm.vcpus[1]), vcpu=vm.vcpus[1]) as second,
    ):
        wait_until_seen(vm, "seen_old")
        wait_until_seen(vm, "seen_new")
        slot.delete()
        first.join(vm.deadline)
        second.join(vm.deadline)
    assert lost == {0: int(GPA), 1: int(GPA) + PAGE_SIZE}


def test_a_slot_takes_its_memory_along_when_it_moves(accessor: Accessor) -> None:
    """A slot "may be moved in the guest physical memory space": its memory leaves the old place.

    Documentation/virt/kvm/api.rst 4.35.
    """
    slot = accessor.vm.add_slot(GPA, PAGE_SIZE)
    accessor.map(GVA, GPA, 4 * PAGE_SIZE)
    accessor.write(GVA + 0x30, OLD)
    slot.move(GPA + 2 * PAGE_SIZE)
    assert accessor.read(GVA + 2 * PAGE_SIZE + 0x30) == OLD
    got = accessor.exit_of(GVA + 0x30)
    assert got.phys_addr == int(GPA) + 0x30
    got.respond(0)
    accessor.result()
    accessor.write(GVA + 2 * PAGE_SIZE + 0x30, NEW)
    assert int.from_bytes(slot.mapping.view(0x30, 8), "little") == NEW


def test_a_slot_that_moves_by_a_page_shifts_what_the_guest_sees(accessor: Accessor) -> None:
    """After a move over its own old place a slot shows its memory from the new start, nowhere else.

    Documentation/virt/kvm/api.rst 4.35.
    """
    slot = accessor.vm.add_slot(GPA, 2 * PAGE_SIZE)
    fill(slot.mapping, OLD)
    fill(slot.mapping, NEW, PAGE_SIZE)
    accessor.map(GVA, GPA, 3 * PAGE_SIZE)
    assert [accessor.read(GVA + page * PAGE_SIZE) for page in range(2)] == [OLD, NEW]
    slot.move(GPA + PAGE_SIZE)
    assert [accessor.read(GVA + page * PAGE_SIZE) for page in (1, 2)] == [OLD, NEW]
    got = accessor.exit_of(GVA)
    assert got.phys_addr == int(GPA)


def test_a_refused_move_leaves_the_slot_in_place(accessor: Accessor) -> None:
    """A move that is refused (EEXIST) changes nothing that the guest sees, in either slot.

    Documentation/virt/kvm/api.rst 4.35.
    """
    vm = accessor.vm
    first = vm.add_slot(GPA, PAGE_SIZE)
    second = vm.add_slot(GPA + PAGE_SIZE, PAGE_SIZE)
    fill(first.mapping, OLD)
    fill(second.mapping, NEW)
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    with refused(errno.EEXIST):
        vm.set_user_memory_region(first.slot, int(GPA) + PAGE_SIZE, PAGE_SIZE, first.hva)
    assert [accessor.read(GVA + page * PAGE_SIZE) for page in range(2)] == [OLD, NEW]


def test_a_number_used_again_shows_the_new_memory(accessor: Accessor) -> None:
    """A slot with the number and place of a deleted one shows its own memory, nothing that was cached.

    Documentation/virt/kvm/api.rst 4.35.
    """
    slot = accessor.vm.add_slot(GPA, PAGE_SIZE)
    accessor.map(GVA, GPA, PAGE_SIZE)
    accessor.write(GVA, OLD)
    slot.delete()
    again = accessor.vm.add_slot(GPA, PAGE_SIZE, slot=slot.slot)
    assert accessor.read(GVA) == 0
    accessor.write(GVA, NEW)
    assert int.from_bytes(again.mapping.view(0, 8), "little") == NEW
    assert int.from_bytes(slot.mapping.view(0, 8), "little") == OLD


def test_hundreds_of_slots_each_show_their_own_memory(accessor: Accessor) -> None:
    """With hundreds of slots, made in no order, every guest page shows the memory of its own slot.

    Documentation/virt/kvm/api.rst 4.35: as many slots as KVM_CAP_NR_MEMSLOTS tells.
    """
    vm, count = accessor.vm, 400
    mapping = vm.own(Anonymous(huge="never").map(count * PAGE_SIZE))
    first = max(vm.slots) + 1
    # 147 and 400 have no common divisor: every page gets one slot, and neighbours are far apart.
    for number in range(count):
        page = number * 147 % count
        fill(mapping, 0x10000 + page, page * PAGE_SIZE)
        # Guest pages run backwards through the host's.
        gpa = int(GPA) + (count - 1 - page) * PAGE_SIZE
        vm.set_user_memory_region(first + number, gpa, PAGE_SIZE, mapping.hva + page * PAGE_SIZE)
    accessor.map(GVA, GPA, count * PAGE_SIZE)
    for page in range(0, count, 7):
        assert accessor.read(GVA + (count - 1 - page) * PAGE_SIZE) == 0x10000 + page


def test_private_memory_comes_and_goes_like_shared(make_vm: MakeVm) -> None:
    """Memory whose private side is a slot of its own takes it along: when it moves, when it is deleted.

    Documentation/virt/kvm/api.rst 4.35, for the slot at the address that carries the encryption bit.
    """
    vm = make_vm(AGENT)
    traits = vm.protection.traits
    if not traits.has_private_memory or not traits.host_sees_private:
        pytest.skip("needs a protection whose private memory is in memory slots of its own")
    slot = vm.add_memory(GPA, PAGE_SIZE)
    vm.memory.set_private(GPA, PAGE_SIZE)
    for page in range(2):
        vm.map(GVA + page * PAGE_SIZE, GPA + page * PAGE_SIZE, PAGE_SIZE, nx=True, private=True)
    vm.memory.write(GPA, OLD.to_bytes(8, "little"))
    agent = Agent(vm.vcpus[0])
    assert agent.read(GVA) == OLD
    slot.move(GPA + PAGE_SIZE)
    assert agent.read(GVA + PAGE_SIZE) == OLD
    slot.delete()
    agent.begin_read(GVA + PAGE_SIZE)
    assert agent.vcpu.expect(MmioExit).phys_addr == int(vm.to_raw(GPA + PAGE_SIZE, private=True))
