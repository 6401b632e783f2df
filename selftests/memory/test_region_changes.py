# SPDX-License-Identifier: Apache-2.0
"""What may change about a slot that exists, and what its deletion needs."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kvmpy import (
    KVM_CAP_READONLY_MEM,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    Mapping,
    Vm,
    refused,
)

SetRegion = Callable[..., None]

GPA = 0x10_0000
SIZE = 4 * PAGE_SIZE


def delete(set_region: SetRegion, *slots: int) -> None:
    """Delete slots that exist: EINVAL for one that does not."""
    for slot in slots:
        set_region(slot, 0, 0, 0)


def test_a_slot_that_does_not_exist_cannot_be_deleted(set_region: SetRegion, area: Mapping) -> None:
    """Passing zero for memory_size deletes a slot; without that slot it is EINVAL.

    Documentation/virt/kvm/api.rst 4.35; kvm_set_memory_region(), virt/kvm/kvm_main.c.
    """
    with refused(errno.EINVAL):
        set_region(0, GPA, 0, area.hva)


def test_a_slot_is_deleted_once(set_region: SetRegion, area: Mapping) -> None:
    """A deleted slot is gone: deleting it again is EINVAL.

    Documentation/virt/kvm/api.rst 4.35; kvm_set_memory_region(), virt/kvm/kvm_main.c.
    """
    set_region(0, GPA, SIZE, area.hva)
    set_region(0, GPA, 0, area.hva)
    with refused(errno.EINVAL):
        set_region(0, GPA, 0, area.hva)


def test_deletion_needs_the_number_alone(set_region: SetRegion, area: Mapping) -> None:
    """Deletion "is done by passing zero for memory_size": its addresses need not be given.

    Documentation/virt/kvm/api.rst 4.35.
    """
    set_region(0, GPA, SIZE, area.hva)
    set_region(0, 0, 0, 0)
    set_region(1, GPA, SIZE, area.hva)
    delete(set_region, 1)


def test_a_deleted_slot_can_be_made_anew(set_region: SetRegion, area: Mapping) -> None:
    """After deletion the number is free for a slot of another size, place and memory.

    Documentation/virt/kvm/api.rst 4.35.
    """
    set_region(0, GPA, SIZE, area.hva)
    set_region(0, GPA, 0, area.hva)
    set_region(0, GPA + PAGE_SIZE, 2 * SIZE, area.hva + PAGE_SIZE)
    delete(set_region, 0)


@pytest.mark.parametrize(
    ("size", "offset"),
    [(SIZE - PAGE_SIZE, 0), (SIZE + PAGE_SIZE, 0), (SIZE, PAGE_SIZE)],
    ids=["smaller", "larger", "other-memory"],
)
def test_size_and_host_memory_of_a_slot_stay(
    set_region: SetRegion, area: Mapping, size: int, offset: int
) -> None:
    """An existing slot "may not be resized", and its userspace_addr may not change: EINVAL.

    Documentation/virt/kvm/api.rst 4.35; kvm_set_memory_region(), virt/kvm/kvm_main.c.
    """
    set_region(0, GPA, SIZE, area.hva)
    with refused(errno.EINVAL):
        set_region(0, GPA, size, area.hva + offset)


def test_setting_a_slot_to_what_it_is_changes_nothing(set_region: SetRegion, area: Mapping) -> None:
    """The same call again succeeds.

    kvm_set_memory_region(), virt/kvm/kvm_main.c: "Nothing to change."
    """
    for _ in range(3):
        set_region(0, GPA, SIZE, area.hva)
    delete(set_region, 0)
    with refused(errno.EINVAL):
        delete(set_region, 0)


@pytest.mark.parametrize("flags", [0, KVM_MEM_READONLY], ids=["make-read-only", "make-writable"])
def test_read_only_is_decided_when_the_slot_is_made(
    set_region: SetRegion, vm: Vm, area: Mapping, flags: int
) -> None:
    """KVM_MEM_READONLY makes "a new slot read-only"; it cannot be set or cleared later: EINVAL.

    Documentation/virt/kvm/api.rst 4.35.
    """
    vm.need_cap(KVM_CAP_READONLY_MEM)
    set_region(0, GPA, SIZE, area.hva, flags)
    with refused(errno.EINVAL):
        set_region(0, GPA, SIZE, area.hva, flags ^ KVM_MEM_READONLY)


def test_dirty_logging_can_be_switched_on_and_off(set_region: SetRegion, vm: Vm, area: Mapping) -> None:
    """The flags of a slot "may be modified": there is a dirty log while KVM_MEM_LOG_DIRTY_PAGES is set.

    Documentation/virt/kvm/api.rst 4.35 and 4.8 KVM_GET_DIRTY_LOG; ENOENT for a slot without one.
    """
    set_region(0, GPA, SIZE, area.hva)
    with refused(errno.ENOENT):
        vm.dirty.get_log(0, SIZE // PAGE_SIZE)
    set_region(0, GPA, SIZE, area.hva, KVM_MEM_LOG_DIRTY_PAGES)
    assert list(vm.dirty.get_log(0, SIZE // PAGE_SIZE)) == []
    set_region(0, GPA, SIZE, area.hva)
    with refused(errno.ENOENT):
        vm.dirty.get_log(0, SIZE // PAGE_SIZE)


def test_a_slot_may_not_be_moved_onto_another(set_region: SetRegion, area: Mapping) -> None:
    """A move that would let two slots overlap is EEXIST.

    Documentation/virt/kvm/api.rst 4.35: "Slots may not overlap in guest physical address space."
    """
    set_region(0, GPA, SIZE, area.hva)
    set_region(1, GPA + SIZE, SIZE, area.hva)
    with refused(errno.EEXIST):
        set_region(1, GPA + SIZE - PAGE_SIZE, SIZE, area.hva)
    with refused(errno.EEXIST):
        set_region(2, GPA + 2 * SIZE - PAGE_SIZE, PAGE_SIZE, area.hva)


def test_a_slot_may_be_moved_over_its_own_old_place(set_region: SetRegion, area: Mapping) -> None:
    """A slot does not overlap itself: it may move by less than its size.

    Documentation/virt/kvm/api.rst 4.35; kvm_check_memslot_overlap(), virt/kvm/kvm_main.c.
    """
    set_region(0, GPA, SIZE, area.hva)
    set_region(0, GPA + PAGE_SIZE, SIZE, area.hva)
    set_region(1, GPA, PAGE_SIZE, area.hva)
    with refused(errno.EEXIST):
        set_region(2, GPA + SIZE, PAGE_SIZE, area.hva)
    delete(set_region, 0, 1)


def test_place_and_flags_may_change_at_once(set_region: SetRegion, vm: Vm, area: Mapping) -> None:
    """One call may move a slot and switch its dirty log on.

    Documentation/virt/kvm/api.rst 4.35: "it may be moved [...], or its flags may be modified".
    """
    set_region(0, GPA, SIZE, area.hva)
    set_region(0, GPA + SIZE, SIZE, area.hva, KVM_MEM_LOG_DIRTY_PAGES)
    assert list(vm.dirty.get_log(0, SIZE // PAGE_SIZE)) == []
    set_region(1, GPA, SIZE, area.hva)
    delete(set_region, 0, 1)
