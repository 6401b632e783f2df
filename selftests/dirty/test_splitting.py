# SPDX-License-Identifier: Apache-2.0
"""Dirty logging works page by page, so large pages are split for it, and joined when it is over."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    SIZE_2M,
    Agent,
    Anonymous,
    Gpa,
    GuestVm,
    Gva,
    MakeVm,
    MissingError,
)

from .conftest import REGION_GPA, MakeWriters, Writers

pytestmark = [
    # Hosts that emulate ring 0 map nothing for it.
    pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True)
]

HUGE = SIZE_2M // PAGE_SIZE


@pytest.fixture
def writers(make_writers: MakeWriters) -> Writers:
    """Two pages of 2 MiB, not logged."""
    assert int(REGION_GPA) % SIZE_2M == 0
    new_writers = make_writers(pages=2 * HUGE, flags=0, backing=Anonymous("thp"), page_size=SIZE_2M)
    mapping = new_writers.region.mapping
    for page in (0, HUGE):
        mapping.view(page * PAGE_SIZE, 1)[0] = 1
    return new_writers


def mapped(vm: GuestVm) -> tuple[int, int]:
    stats = vm.stats.get()
    return stats["pages_4k"].value, stats["pages_2m"].value


@pytest.fixture
def large(writers: Writers) -> tuple[int, int]:
    """Let the guest use both large pages; how many pages of 4 KiB and 2 MiB were mapped before.

    MissingError unless they are mapped as such.
    """
    # Whatever else the guest needs is in use by then.
    writers.write([0])
    small, huge = mapped(writers.vm)
    if not huge:
        raise MissingError(
            "transparent huge pages for guest memory",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, and free memory in pieces of 2 MiB",
        )
    writers.write([HUGE])
    assert mapped(writers.vm) == (small, huge + 1)
    return small, huge - 1


def test_written_pages_are_small(writers: Writers, large: tuple[int, int]) -> None:
    """While a slot is logged its memory is mapped in pages of 4 KiB, and each written one is reported.

    Documentation/virt/kvm/api.rst 4.35, KVM_MEM_LOG_DIRTY_PAGES; vm->stat.pages_2m.
    """
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write([3, 300, HUGE + 5, HUGE - 1])
    assert mapped(writers.vm)[1] == large[1]
    assert mapped(writers.vm)[0] >= large[0] + 4
    assert writers.log() == [3, 300, HUGE - 1, HUGE + 5]


def test_every_page_of_it(writers: Writers, large: tuple[int, int]) -> None:
    """Written page by page, 2 MiB are 512 pages of the log and 512 mappings.

    Documentation/virt/kvm/api.rst 4.35, KVM_MEM_LOG_DIRTY_PAGES.
    """
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write(range(HUGE))
    # The other large page is not written: it is whole, or was split beforehand (kvm.eager_page_split).
    assert mapped(writers.vm) in ((large[0] + HUGE, large[1] + 1), (large[0] + 2 * HUGE, large[1]))
    assert writers.log() == list(range(HUGE))


def test_they_are_joined_when_logging_ends(writers: Writers, large: tuple[int, int]) -> None:
    """When logging is switched off the guest's next accesses map 2 MiB at once, as before.

    Documentation/virt/kvm/api.rst 4.35; kvm_arch_commit_memory_region(), arch/x86/kvm/x86.c.
    """
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write([3, 300, HUGE + 5])
    writers.region.set_flags(0)
    writers.write([4, HUGE + 6])
    assert mapped(writers.vm) == (large[0], large[1] + 2)


def test_content_stays(writers: Writers, large: tuple[int, int]) -> None:
    """Neither splitting nor joining touches what is in the pages.

    Documentation/virt/kvm/api.rst 4.35.
    """
    del large
    view = writers.region.mapping.view(0, 2 * SIZE_2M)
    view[8 : 2 * SIZE_2M : PAGE_SIZE] = bytes(range(256)) * 4
    expected = bytes(view[8 : 2 * SIZE_2M : PAGE_SIZE])
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write([1, 511, 513])
    writers.region.set_flags(0)
    writers.write([2, 512])
    assert bytes(view[8 : 2 * SIZE_2M : PAGE_SIZE]) == expected
    view.release()


# Two slots of two large pages each.
SLOTS = [(Gpa(0x1000_0000), Gva(0x6000_0000)), (Gpa(0x2000_0000), Gva(0x6800_0000))]
SLOT_PAGES = 2 * HUGE


@pytest.mark.requires(
    "param:kvm.tdp_mmu=Y", "param:kvm.eager_page_split=Y", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"
)
@pytest.mark.parametrize("manual", [False, True], ids=["at once", "at the first clear"])
def test_pages_are_split_before_anybody_writes(make_vm: MakeVm, ring: int, manual: bool) -> None:
    """With kvm.eager_page_split no large page is left once logging is on, or, set beforehand, once the
    log was cleared, in all slots and for all vCPUs; afterwards the mappings are as they were.

    Documentation/admin-guide/kernel-parameters.txt, kvm.eager_page_split; Documentation/virt/kvm/api.rst,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    """

    def protect(vm: GuestVm) -> None:
        mode = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET if manual else 0
        vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, mode)

    vm = make_vm(AGENT, vcpus=2, before_vcpus=protect)
    size = SLOT_PAGES * PAGE_SIZE
    slots = [vm.add_memory(gpa, size, backing=Anonymous("thp"), private=False) for gpa, _ in SLOTS]
    for (gpa, gva), slot in zip(SLOTS, slots, strict=True):
        vm.map(gva, gpa, size, page_size=SIZE_2M, user=True, nx=True, private=False)
        for start in range(0, size, SIZE_2M):
            slot.mapping.view(start, 1)[0] = 1
    agents = [Agent(vcpu, ring=ring) for vcpu in vm.vcpus]

    def touch() -> None:
        for agent in agents:
            for _, gva in SLOTS:
                for start in range(0, size, SIZE_2M):
                    agent.write(gva + start, 1)

    for agent in agents:
        agent.start()
    # What else the guest needs is in use by then.
    touch()
    before = mapped(vm)
    if before[1] < 4:
        raise MissingError(
            "transparent huge pages for guest memory",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, and free memory in pieces of 2 MiB",
        )
    rest = before[1] - 4
    split = (before[0] + 4 * HUGE, rest)
    for slot in slots:
        slot.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    if manual:
        assert mapped(vm) == before
        for slot in slots:
            vm.dirty.clear_log(slot.slot, vm.dirty.get_log(slot.slot))
    assert mapped(vm) == split
    touch()
    assert mapped(vm) == split
    for slot in slots:
        slot.set_flags(0)
    touch()
    assert mapped(vm) == before
