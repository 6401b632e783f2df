# SPDX-License-Identifier: Apache-2.0
"""The dirty log under manual protection: KVM_GET_DIRTY_LOG only reports, KVM_CLEAR_DIRTY_LOG clears."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    DirtyBitmap,
    Gpa,
    GuestVm,
    Vm,
    refused,
)

from .conftest import PAGES, MakeWriters, Writers

pytestmark = pytest.mark.requires("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
INITIALLY_SET = pytest.mark.requires(f"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2&{int(KVM_DIRTY_LOG_INITIALLY_SET)}")


def manual(vm: GuestVm) -> None:
    vm.dirty.enable_manual_log()


def initially_set(vm: GuestVm) -> None:
    vm.dirty.enable_manual_log(initially_set=True)


def clear(writers: Writers, *pages: int) -> None:
    writers.vm.dirty.clear_log(writers.region.slot, DirtyBitmap.of(PAGES, pages))


def test_reading_the_log_does_not_clear_it(make_writers: MakeWriters) -> None:
    """Under manual protection KVM_GET_DIRTY_LOG leaves the log as it is.

    api.rst 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    """
    writers = make_writers(before_vcpus=manual)
    writers.write([4, 90])
    assert writers.log() == [4, 90]
    assert writers.log() == [4, 90]


def test_only_the_pages_named_are_cleared(make_writers: MakeWriters) -> None:
    """KVM_CLEAR_DIRTY_LOG clears the bits that are set in its bitmap, and no others.

    api.rst 4.117 KVM_CLEAR_DIRTY_LOG.
    """
    writers = make_writers(before_vcpus=manual)
    writers.write([4, 5, 90])
    clear(writers, 4, 90)
    assert writers.log() == [5]


def test_a_cleared_page_is_watched_again(make_writers: MakeWriters) -> None:
    """A write after KVM_CLEAR_DIRTY_LOG makes the page dirty again.

    api.rst 4.117 KVM_CLEAR_DIRTY_LOG: tracking starts anew for the cleared pages.
    """
    writers = make_writers(before_vcpus=manual)
    for _ in range(3):
        writers.write([4])
        assert writers.log() == [4]
        clear(writers, 4)
        assert writers.log() == []


def test_clearing_a_clean_page_changes_nothing(make_writers: MakeWriters) -> None:
    """Bits of pages that are not dirty are ignored, and the pages are still tracked.

    api.rst 4.117 KVM_CLEAR_DIRTY_LOG.
    """
    writers = make_writers(before_vcpus=manual)
    writers.write([4])
    clear(writers, 7)
    assert writers.log() == [4]
    writers.write([7])
    assert writers.log() == [4, 7]


def test_a_part_of_the_slot_is_cleared(make_writers: MakeWriters) -> None:
    """first_page says which page bit 0 of the bitmap stands for.

    api.rst 4.117 KVM_CLEAR_DIRTY_LOG.
    """
    writers = make_writers(before_vcpus=manual)
    writers.write([4, 68])
    writers.vm.dirty.clear_log(writers.region.slot, DirtyBitmap.of(64, [4]), first_page=64)
    assert writers.log() == [4]


def test_the_odd_end_of_a_slot_is_cleared(make_writers: MakeWriters) -> None:
    """num_pages need not be a multiple of 64 where the range ends with the slot.

    api.rst 4.117 KVM_CLEAR_DIRTY_LOG.
    """
    writers = make_writers(pages=100, before_vcpus=manual)
    writers.write([99])
    writers.vm.dirty.clear_log(writers.region.slot, DirtyBitmap.of(36, [35]), first_page=64)
    assert writers.log() == []


def test_the_log_can_be_cleared_without_the_capability(make_writers: MakeWriters) -> None:
    """KVM_CLEAR_DIRTY_LOG works also in a VM that did not enable manual protection.

    api.rst 4.117 KVM_CLEAR_DIRTY_LOG: that the capability is offered is enough.
    """
    writers = make_writers()
    writers.write([4, 5])
    clear(writers, 4)
    assert writers.log() == [5]


@INITIALLY_SET
def test_initially_all_pages_are_dirty(make_writers: MakeWriters) -> None:
    """With KVM_DIRTY_LOG_INITIALLY_SET the log of a slot starts with every bit set.

    api.rst 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    """
    writers = make_writers(before_vcpus=initially_set)
    assert writers.log() == list(range(PAGES))


@INITIALLY_SET
def test_initially_dirty_pages_are_watched_once_cleared(make_writers: MakeWriters) -> None:
    """With KVM_DIRTY_LOG_INITIALLY_SET tracking of a page starts when it is first cleared.

    api.rst 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    """
    writers = make_writers(before_vcpus=initially_set)
    clear(writers, *range(PAGES))
    assert writers.log() == []
    writers.write([17])
    assert writers.log() == [17]


@pytest.fixture
def logged(vm: Vm) -> Vm:
    """A VM whose slot 0 has 100 pages and a log."""
    vm.dirty.enable_manual_log()
    vm.add_slot(Gpa(0), 100 * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
    return vm


@pytest.mark.parametrize(
    ("first_page", "num_pages"),
    [(1, 64), (0, 10), (0, 128), (128, 64), (64, 64)],
    ids=["odd start", "odd end", "behind the end", "start behind the end", "across the end"],
)
def test_ranges_that_are_refused(logged: Vm, first_page: int, num_pages: int) -> None:
    """A range that is not made of 64-page blocks, or leaves the slot, fails with EINVAL.

    api.rst 4.117 KVM_CLEAR_DIRTY_LOG.
    """
    with refused(errno.EINVAL):
        logged.dirty.clear_log(0, bytes(16), first_page=first_page, num_pages=num_pages)


def test_clearing_a_slot_without_a_log(vm: Vm) -> None:
    """KVM_CLEAR_DIRTY_LOG of a slot without KVM_MEM_LOG_DIRTY_PAGES fails with ENOENT.

    virt/kvm/kvm_main.c, kvm_clear_dirty_log_protect().
    """
    vm.dirty.enable_manual_log()
    vm.add_slot(Gpa(0), 64 * PAGE_SIZE)
    with refused(errno.ENOENT):
        vm.dirty.clear_log(0, bytes(8))


def test_an_unknown_flag_is_refused(vm: Vm) -> None:
    """Enabling manual protection with an unknown flag fails with EINVAL.

    api.rst 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    """
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | 1 << 40)


def test_initially_set_needs_manual_protection(vm: Vm) -> None:
    """KVM_DIRTY_LOG_INITIALLY_SET without KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE fails with EINVAL.

    api.rst 7.18 KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: the one depends on the other.
    """
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET)
