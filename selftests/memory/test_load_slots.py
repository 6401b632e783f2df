# SPDX-License-Identifier: Apache-2.0
"""Slots that change beside vCPUs that use them, or others, all the time."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_CAP_NR_MEMSLOTS,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_X86_QUIRK_SLOT_ZAP_ALL,
    PAGE_SIZE,
    SIZE_2M,
    Agent,
    Anonymous,
    Exit,
    Gpa,
    GuestVcpu,
    GuestVm,
    Gva,
    InternalErrorExit,
    LoadedRegion,
    MakeLoad,
    MakeVm,
    MemorySlot,
    MissingError,
    MmioExit,
    ShutdownExit,
    UnexpectedExitError,
    Vm,
)
from kvmpy.testing.host import platform_name
from selftests.conftest import UNDER_LOAD

OTHER_GPA = Gpa(0xA000_0000)
PARTS = (40, 1, 79)
# Without it, an instruction on memory that is not there cannot be carried out by KVM.
EMULATED = pytest.mark.protections("none", "sw-protected")
ZAP_SLOT_ALONE = f"KVM_CAP_DISABLE_QUIRKS2&{int(KVM_X86_QUIRK_SLOT_ZAP_ALL)}"


def zap_slot_alone(vm: GuestVm) -> None:
    """Let KVM drop the mappings of a slot that goes, and no others."""
    vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL)


QUIRK = pytest.mark.parametrize(
    "before_vcpus",
    [
        pytest.param(None, id="zap-all"),
        pytest.param(zap_slot_alone, id="zap-slot", marks=pytest.mark.requires(ZAP_SLOT_ALONE)),
    ],
)


class StandIn:
    """Answers accesses to the region where no slot takes them, from the memory that the slots show."""

    def __init__(self, region: LoadedRegion) -> None:
        self.base = region.slot.gpa
        self.mapping = region.mapping
        self.count = itertools.count()

    def __call__(self, vcpu: GuestVcpu, exit_: Exit) -> bool:
        del vcpu
        if not isinstance(exit_, MmioExit):
            return False
        next(self.count)
        with self.mapping.view(exit_.phys_addr - self.base, exit_.size) as place:
            if exit_.is_write:
                place[:] = exit_.data
            else:
                exit_.respond(bytes(place))
        return True


def remove(slot: MemorySlot) -> None:
    """Take the slot from KVM alone; ``slot.renew()`` brings it back."""
    slot.vm.set_user_memory_region(slot.slot, slot.gpa, 0, slot.hva)


@EMULATED
@QUIRK
def test_slots_come_and_go(
    make_load: MakeLoad, ring: int, rng: random.Random, before_vcpus: Callable[[GuestVm], None] | None
) -> None:
    """No access is lost while the slots in use go, and come back plain, read-only or logged.

    Documentation/virt/kvm/api.rst 4.35; what no slot takes is user space's (5, KVM_EXIT_MMIO).
    """
    region = make_load(pages=sum(PARTS), slots=PARTS, ring=ring, before_vcpus=before_vcpus)
    stand_in = StandIn(region)
    region.load.on_exit = stand_in
    kinds = [0, KVM_MEM_LOG_DIRTY_PAGES]
    if region.vm.protection.traits.readonly_slots:
        kinds.append(KVM_MEM_READONLY)
    with region.load as load:
        for turn in load.turns():
            slot = region.slots[turn % len(PARTS)]
            remove(slot)
            load.wait(PARTS[turn % len(PARTS)] // 4)
            region.check()
            slot.flags = rng.choice(kinds)
            slot.renew()
            region.check()
    region.check()
    assert next(stand_in.count)


@EMULATED
@QUIRK
def test_slots_move_away_and_back(
    make_load: MakeLoad, ring: int, before_vcpus: Callable[[GuestVm], None] | None
) -> None:
    """No access is lost while a slot is elsewhere: its old place is nobody's, its memory stays as it is.

    Documentation/virt/kvm/api.rst 4.35: a slot "may be moved in the guest physical memory space".
    """
    region = make_load(pages=sum(PARTS), slots=PARTS, ring=ring, before_vcpus=before_vcpus)
    stand_in = StandIn(region)
    region.load.on_exit = stand_in
    with region.load as load:
        for turn in load.turns():
            slot = region.slots[turn % len(PARTS)]
            home = Gpa(slot.gpa)
            slot.move(OTHER_GPA + turn % 3 * PAGE_SIZE)
            load.wait(PARTS[turn % len(PARTS)] // 4)
            slot.move(home)
            region.check()
    region.check()
    assert next(stand_in.count)


@UNDER_LOAD
@QUIRK
@pytest.mark.parametrize("page_size", [PAGE_SIZE, SIZE_2M], ids=["4K", "2M"])
def test_other_slots_change(
    make_load: MakeLoad, page_size: int, before_vcpus: Callable[[GuestVm], None] | None
) -> None:
    """vCPUs in one slot notice nothing of others that come, move, change flags and go.

    Documentation/virt/kvm/api.rst 4.35.
    """
    pages = 300 if page_size == PAGE_SIZE else SIZE_2M // PAGE_SIZE
    backing = Anonymous("never" if page_size == PAGE_SIZE else "thp")
    region = make_load(pages=pages, vcpus=4, backing=backing, page_size=page_size, before_vcpus=before_vcpus)
    vm = region.vm
    mapping = vm.own(Anonymous().map(16 * PAGE_SIZE))
    with region.load as load:
        for _ in load.turns():
            others = [
                vm.add_alias(int(OTHER_GPA) + 64 * number * PAGE_SIZE, 16 * PAGE_SIZE, mapping)
                for number in range(4)
            ]
            for number, slot in enumerate(others):
                slot.set_flags(KVM_MEM_LOG_DIRTY_PAGES if number % 2 else 0)
                slot.move(Gpa(slot.gpa + 7 * PAGE_SIZE))
            region.check()
            for slot in others:
                slot.delete()
    region.check()


@UNDER_LOAD
def test_a_slot_before_the_first_use(make_load: MakeLoad) -> None:
    """vCPUs that never touched a part of their memory find it, whatever became of its slot before.

    Documentation/virt/kvm/api.rst 4.35.
    """
    region = make_load(pages=sum(PARTS), slots=PARTS, vcpus=2)
    for slot in region.slots:
        remove(slot)
        slot.renew()
    with region.load as load:
        load.wait(sum(PARTS))
        region.check()


@EMULATED
def test_the_page_tables_go(make_load: MakeLoad, ring: int) -> None:
    """vCPUs whose code, stack and page tables go with their slots leave the guest, each one, and harm nobody.

    Documentation/virt/kvm/api.rst 5: KVM_EXIT_SHUTDOWN or KVM_EXIT_INTERNAL_ERROR, or KVM_EXIT_MMIO for what
    an emulator still translates.
    """
    if platform_name() != "host":
        raise MissingError(
            "a processor that tells which event it delivered when it left",
            "hardware: QEMU 7.2 delivers the page fault of a guest without page tables for ever",
        )
    ends: dict[int, Exit] = {}

    def note(vcpu: GuestVcpu, exit_: Exit) -> bool:
        ends[vcpu.index] = exit_
        return False

    region = make_load(pages=64, ring=ring, vcpus=2, deadline=2.0, on_exit=note)
    region.load.start()
    region.load.wait(64)
    for slot in [slot for slot in region.vm.slots.values() if slot not in region.slots]:
        remove(slot)
    with pytest.raises(UnexpectedExitError):
        region.load.stop()
    assert len(ends) == 2
    assert all(isinstance(end, (ShutdownExit, InternalErrorExit, MmioExit)) for end in ends.values()), ends


def test_a_vcpu_without_memory(vm: Vm) -> None:
    """A vCPU of a VM without any slot ends in an internal error: there is nothing to fetch from.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_INTERNAL_ERROR; 4.44 KVM_SET_NR_MMU_PAGES, for KVM counts them
    by the memory that there is.
    """
    vm.setup.set_nr_mmu_pages(64)
    vcpu = vm.create_vcpu()
    assert isinstance(vcpu.run(timeout=10), InternalErrorExit)


@pytest.mark.protections("none")
def test_as_many_slots_as_kvm_has(make_vm: MakeVm, load_seconds: float) -> None:
    """All of the slots that KVM_CAP_NR_MEMSLOTS names can be set, and each shows its own memory.

    Documentation/virt/kvm/api.rst 4.35.  From both ends of the numbers, as far as ten times --load-seconds
    reach: an emulated processor takes minutes for all of them.
    """
    vm = make_vm(AGENT)
    count = vm.check_extension(KVM_CAP_NR_MEMSLOTS)
    gpa, gva = 0x8000_0000, Gva(0x70_0000_0000)
    mapping = vm.own(Anonymous(huge="never").map(count * PAGE_SIZE))
    vm.map(gva, Gpa(gpa), count * PAGE_SIZE, user=True, nx=True, private=False)
    agent = Agent(vm.vcpus[0], ring=3)
    agent.start()
    made = []
    end = time.monotonic() + 10 * load_seconds
    for turn in range(count):
        number = turn // 2 if turn % 2 else count - 1 - turn // 2
        if number in vm.slots:
            continue
        # Neighbours in the guest are none on the host.
        hva = mapping.hva + (count - 1 - number) * PAGE_SIZE
        vm.set_user_memory_region(number, gpa + number * PAGE_SIZE, PAGE_SIZE, hva)
        made.append(number)
        if time.monotonic() > end:
            break
    assert made[0] == count - 1
    for number in [*made[:: len(made) // 50 + 1], made[-1]]:
        mapping.view((count - 1 - number) * PAGE_SIZE, 8)[:] = (number + 1).to_bytes(8, "little")
        assert agent.read(gva + number * PAGE_SIZE) == number + 1
