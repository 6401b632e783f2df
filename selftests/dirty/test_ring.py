# SPDX-License-Identifier: Apache-2.0
"""The dirty ring: one queue of dirty pages per vCPU (api.rst 7.36 KVM_CAP_DIRTY_LOG_RING)."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    DirtyGfn,
    DirtyRing,
    DirtyRingFullExit,
    Exit,
    Gpa,
    GuestVm,
    Vm,
    ioctls,
    refused,
)
from kvmpy.core.dirty import GFN_SIZE

from .conftest import MakeWriters, Writers

pytestmark = pytest.mark.requires("KVM_CAP_DIRTY_LOG_RING")
ENTRIES = 1024


def with_ring(vm: GuestVm) -> None:
    vm.dirty.enable_ring(ENTRIES)


def ring_of(writers: Writers, vcpu: int = 0) -> DirtyRing:
    return writers.vm.dirty.ring(writers.vm.vcpus[vcpu])


def entries(writers: Writers, *pages: int) -> list[DirtyGfn]:
    return [DirtyGfn(writers.region.slot, page) for page in pages]


def test_entries_name_slot_and_page_in_the_order_of_the_writes(make_writers: MakeWriters) -> None:
    """Each page that the guest dirties is queued once it is written, with its slot and its number there.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING.
    """
    writers = make_writers(before_vcpus=with_ring)
    ring = ring_of(writers)
    writers.write([100, 3, 64])
    assert ring.harvest() == entries(writers, 100, 3, 64)


def test_reading_queues_nothing(make_writers: MakeWriters) -> None:
    """A page that the guest only reads is not queued.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING.
    """
    writers = make_writers(before_vcpus=with_ring)
    ring = ring_of(writers)
    writers.read([1, 2])
    assert ring.harvest() == []


def test_slots_without_logging_queue_nothing(make_writers: MakeWriters) -> None:
    """Only slots with KVM_MEM_LOG_DIRTY_PAGES are tracked.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING.
    """
    writers = make_writers(before_vcpus=with_ring, flags=0)
    ring = ring_of(writers)
    writers.write([1])
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write([2])
    assert ring.harvest() == entries(writers, 2)


def test_reset_counts_what_was_harvested(make_writers: MakeWriters) -> None:
    """KVM_RESET_DIRTY_RINGS returns the number of harvested entries, and takes no others.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING: entries go from dirty to harvested to reset.
    """
    writers = make_writers(before_vcpus=with_ring)
    ring = ring_of(writers)
    writers.write([1, 2, 3])
    assert writers.vm.dirty.reset_rings() == 0
    assert len(ring.harvest(2)) == 2
    assert writers.vm.dirty.reset_rings() == 2
    assert ring.harvest() == entries(writers, 3)
    assert writers.vm.dirty.reset_rings() == 1


def test_a_page_is_watched_again_after_the_reset(make_writers: MakeWriters) -> None:
    """A page whose entry was reset is queued again at the next write.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING: the reset protects the pages anew.
    """
    writers = make_writers(before_vcpus=with_ring)
    ring = ring_of(writers)
    for _ in range(3):
        writers.write([8])
        assert ring.harvest() == entries(writers, 8)
        assert writers.vm.dirty.reset_rings() == 1


def test_every_vcpu_has_its_own_ring(make_writers: MakeWriters) -> None:
    """A write is queued in the ring of the vCPU that did it.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING: one ring per vCPU.
    """
    writers = make_writers(vcpus=2, before_vcpus=with_ring)
    rings = [ring_of(writers, 0), ring_of(writers, 1)]
    writers.write([10], vcpu=0)
    writers.write([20, 21], vcpu=1)
    assert rings[0].harvest() == entries(writers, 10)
    assert rings[1].harvest() == entries(writers, 20, 21)
    assert writers.vm.dirty.reset_rings() == 3


def fill(writers: Writers) -> None:
    """Let the guest write pages, from the first one on, until the ring is full."""
    for page in range(2 * ENTRIES):
        writers.begin(page)
        if isinstance(writers.vm.vcpus[0].next(), DirtyRingFullExit):
            return
    pytest.fail(f"{2 * ENTRIES} pages did not fill a ring of {ENTRIES} entries")


def test_a_full_ring_stops_the_vcpu(make_writers: MakeWriters) -> None:
    """KVM_RUN ends with KVM_EXIT_DIRTY_RING_FULL, again and again, until entries are harvested and reset.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING.
    """
    writers = make_writers(pages=2 * ENTRIES, before_vcpus=with_ring)
    vcpu = writers.vm.vcpus[0]
    ring = ring_of(writers)
    fill(writers)
    assert isinstance(vcpu.next(), DirtyRingFullExit)
    ring.harvest()
    assert isinstance(vcpu.next(), DirtyRingFullExit)
    assert writers.vm.dirty.reset_rings() > 0
    writers.agents[0].value()


def test_no_page_is_lost_when_the_ring_wraps(make_writers: MakeWriters) -> None:
    """Harvesting at every full ring finds each page that the guest wrote, in order.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING.
    """
    writers = make_writers(pages=3 * ENTRIES, before_vcpus=with_ring)
    ring = ring_of(writers)
    seen: list[int] = []
    times_full = 0

    def full(exit_: Exit) -> bool:
        nonlocal times_full
        times_full += 1
        seen.extend(entry.offset for entry in ring.harvest())
        writers.vm.dirty.reset_rings()
        return isinstance(exit_, DirtyRingFullExit)

    for page in range(3 * ENTRIES):
        writers.begin(page)
        writers.agents[0].value(full)
    seen += [entry.offset for entry in ring.harvest()]
    assert list(dict.fromkeys(seen)) == list(range(3 * ENTRIES))
    assert times_full >= 2


def test_the_ring_replaces_the_log(make_writers: MakeWriters) -> None:
    """KVM_GET_DIRTY_LOG fails with ENXIO in a VM with dirty rings.

    virt/kvm/kvm_main.c, kvm_get_dirty_log(); x86 does not offer KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP.
    """
    writers = make_writers(before_vcpus=with_ring)
    with refused(errno.ENXIO):
        writers.log()


@pytest.mark.parametrize("size", [0, 3 * 4096, 2048], ids=["none", "no power of two", "less than a page"])
def test_sizes_that_are_refused(vm: Vm, size: int) -> None:
    """A ring whose size in bytes is no power of two, or below a page, fails with EINVAL.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING; virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_dirty_log_ring().
    """
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, size)


def test_a_ring_above_the_limit_is_refused(vm: Vm) -> None:
    """A ring of twice the size that KVM_CHECK_EXTENSION names fails with E2BIG.

    virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_dirty_log_ring().
    """
    limit = vm.check_extension(KVM_CAP_DIRTY_LOG_RING)
    with refused(errno.E2BIG):
        vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, 2 * limit)


def test_the_largest_ring_is_taken(vm: Vm) -> None:
    """KVM_CHECK_EXTENSION(KVM_CAP_DIRTY_LOG_RING) names the largest size in bytes that is accepted.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING.
    """
    limit = vm.check_extension(KVM_CAP_DIRTY_LOG_RING)
    vm.dirty.enable_ring(limit // GFN_SIZE)
    with vm.create_vcpu() as vcpu:
        assert vm.dirty.ring(vcpu).harvest() == []


def test_the_size_is_set_once(vm: Vm) -> None:
    """A second size for the rings of a VM fails with EINVAL.

    virt/kvm/kvm_main.c, kvm_vm_ioctl_enable_dirty_log_ring().
    """
    vm.dirty.enable_ring(ENTRIES)
    with refused(errno.EINVAL):
        vm.dirty.enable_ring(ENTRIES)


def test_vcpus_come_after_the_ring(vm: Vm) -> None:
    """Enabling dirty rings in a VM that has a vCPU fails with EINVAL.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING: only before any vCPU is made.
    """
    vm.create_vcpu()
    with refused(errno.EINVAL):
        vm.dirty.enable_ring(ENTRIES)


def test_reset_without_rings(vm: Vm) -> None:
    """KVM_RESET_DIRTY_RINGS in a VM without dirty rings fails with EINVAL.

    virt/kvm/kvm_main.c, kvm_vm_ioctl_reset_dirty_pages().
    """
    with refused(errno.EINVAL):
        vm.ioctl(ioctls.KVM_RESET_DIRTY_RINGS)


def test_tracking_of_a_slot_is_switched_off_and_on(vm: Vm) -> None:
    """KVM_MEM_LOG_DIRTY_PAGES of a slot can be taken back and set again while rings are enabled.

    api.rst 7.36 KVM_CAP_DIRTY_LOG_RING.
    """
    vm.dirty.enable_ring(ENTRIES)
    slot = vm.add_slot(Gpa(0), 64 * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
    slot.set_flags(0)
    slot.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    assert vm.dirty.reset_rings() == 0
