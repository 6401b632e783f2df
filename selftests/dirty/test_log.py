# SPDX-License-Identifier: Apache-2.0
"""The dirty log: which pages KVM_GET_DIRTY_LOG reports, and when it forgets them."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    SIZE_2M,
    Anonymous,
    Gpa,
    Vm,
    ioctls,
    kvm_dirty_log,
    refused,
)

from .conftest import MakeWriters


def test_written_pages_and_no_others(make_writers: MakeWriters) -> None:
    """The log holds exactly the pages that the guest wrote.

    api.rst 4.8 KVM_GET_DIRTY_LOG.
    """
    writers = make_writers()
    writers.write([3, 64, 127])
    assert writers.log() == [3, 64, 127]


def test_reading_is_not_writing(make_writers: MakeWriters) -> None:
    """A page that the guest only read is not dirty, and its first write afterwards is still noticed.

    api.rst 4.8 KVM_GET_DIRTY_LOG.
    """
    writers = make_writers()
    writers.read([5, 6])
    assert writers.log() == []
    writers.write([6])
    assert writers.log() == [6]


def test_a_call_starts_a_new_log(make_writers: MakeWriters) -> None:
    """KVM_GET_DIRTY_LOG clears what it reports.

    api.rst 4.8 KVM_GET_DIRTY_LOG: what was dirtied since the call before.
    """
    writers = make_writers()
    writers.write([9])
    assert writers.log() == [9]
    assert writers.log() == []


def test_a_page_can_be_dirtied_again(make_writers: MakeWriters) -> None:
    """A page that was reported is reported again after the next write to it.

    api.rst 4.8 KVM_GET_DIRTY_LOG.
    """
    writers = make_writers()
    for _ in range(3):
        writers.write([9])
        assert writers.log() == [9]


def test_logging_starts_with_the_flag(make_writers: MakeWriters) -> None:
    """Writes from before KVM_MEM_LOG_DIRTY_PAGES was set are not reported, later ones to the same page are.

    api.rst 4.35 KVM_SET_USER_MEMORY_REGION: the flag is what makes KVM track writes.
    """
    writers = make_writers(flags=0)
    writers.write([1, 2])
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    assert writers.log() == []
    writers.write([2])
    assert writers.log() == [2]


def test_the_flag_taken_back_and_set_again_gives_an_empty_log(make_writers: MakeWriters) -> None:
    """Taking KVM_MEM_LOG_DIRTY_PAGES back drops the log; setting it again starts with an empty one.

    api.rst 4.35 KVM_SET_USER_MEMORY_REGION.
    """
    writers = make_writers()
    writers.write([1])
    writers.region.set_flags(0)
    writers.write([2])
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    assert writers.log() == []


def test_every_slot_has_its_own_log(make_writers: MakeWriters) -> None:
    """A write is reported in the slot that holds the page, under its number there.

    api.rst 4.8 KVM_GET_DIRTY_LOG: bits are relative to the slot given.
    """
    writers = make_writers()
    other = writers.vm.add_memory(
        Gpa(0x3000_0000), 64 * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES, private=False
    )
    writers.write([100])
    assert list(writers.vm.dirty.get_log(other.slot)) == []
    assert writers.log() == [100]


def test_all_vcpus_write_into_one_log(make_writers: MakeWriters) -> None:
    """The log of a slot unites the writes of all vCPUs.

    api.rst 4.8 KVM_GET_DIRTY_LOG is a VM ioctl.
    """
    writers = make_writers(vcpus=2)
    writers.write([10], vcpu=0)
    writers.write([20], vcpu=1)
    writers.write([10], vcpu=1)
    assert writers.log() == [10, 20]


def test_the_last_page_of_an_odd_slot(make_writers: MakeWriters) -> None:
    """A slot whose size is no multiple of 64 pages reports its last page.

    api.rst 4.8 KVM_GET_DIRTY_LOG: the bitmap is rounded up to whole 64-bit words.
    """
    writers = make_writers(pages=65)
    writers.write([64])
    assert writers.log() == [64]


def test_one_write_into_a_huge_page_dirties_4k(make_writers: MakeWriters) -> None:
    """Memory on huge pages, mapped by the guest with a huge page, is logged in units of 4 KiB.

    api.rst 4.8 KVM_GET_DIRTY_LOG: one bit per page (of the base size).
    """
    writers = make_writers(pages=SIZE_2M // PAGE_SIZE, backing=Anonymous(huge="thp"), page_size=SIZE_2M)
    writers.read([0])
    writers.write([300])
    assert writers.log() == [300]


def test_a_slot_without_the_flag_has_no_log(vm: Vm) -> None:
    """KVM_GET_DIRTY_LOG of a slot without KVM_MEM_LOG_DIRTY_PAGES fails with ENOENT.

    virt/kvm/kvm_main.c, kvm_get_dirty_log().
    """
    slot = vm.add_slot(Gpa(0), 64 * PAGE_SIZE)
    with refused(errno.ENOENT):
        vm.dirty.get_log(slot.slot)


def test_a_slot_that_does_not_exist(vm: Vm) -> None:
    """KVM_GET_DIRTY_LOG of a slot that was never set fails with ENOENT.

    virt/kvm/kvm_main.c, kvm_get_dirty_log().
    """
    with refused(errno.ENOENT):
        vm.dirty.get_log(7, pages=64)


@pytest.mark.parametrize("slot", [0xFFFF, 2 << 16], ids=["slot number", "address space"])
def test_slots_that_cannot_exist(vm: Vm, slot: int) -> None:
    """A slot number or address space beyond KVM's limits fails with EINVAL.

    api.rst 4.8 KVM_GET_DIRTY_LOG: bits 16 and up of slot are the address space (at most two on x86).
    """
    with refused(errno.EINVAL):
        vm.dirty.get_log(slot, pages=64)


def test_a_bitmap_that_cannot_be_written(vm: Vm) -> None:
    """An address where no bitmap can be written fails with EFAULT.

    virt/kvm/kvm_main.c, kvm_get_dirty_log().
    """
    slot = vm.add_slot(Gpa(0), 64 * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
    with refused(errno.EFAULT):
        vm.ioctl(ioctls.KVM_GET_DIRTY_LOG, kvm_dirty_log(slot=slot.slot, dirty_bitmap=8))
