# SPDX-License-Identifier: Apache-2.0
"""Which arguments KVM_SET_USER_MEMORY_REGION and KVM_SET_USER_MEMORY_REGION2 accept for a new slot."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kvmpy import (
    KVM_CAP_MULTI_ADDRESS_SPACE,
    KVM_CAP_NR_MEMSLOTS,
    KVM_CAP_READONLY_MEM,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    Mapping,
    Vm,
    ioctls,
    refused,
)

SetRegion = Callable[..., None]

GPA = 0x10_0000
# Indices of dirty bitmaps are 32-bit numbers, of which KVM leaves the upper half out.
MAX_PAGES = (1 << 31) - 1
# No x86 processor has a wider physical address.
PHYSICAL_END = 1 << 52


def delete(set_region: SetRegion, *slots: int) -> None:
    """Delete slots that exist: EINVAL for one that does not."""
    for slot in slots:
        set_region(slot, 0, 0, 0)


def test_a_size_that_is_no_multiple_of_the_page_size_is_refused(set_region: SetRegion, area: Mapping) -> None:
    """A slot is made of whole pages: another memory_size is EINVAL.

    Documentation/virt/kvm/api.rst 4.35; general checks of kvm_set_memory_region(), virt/kvm/kvm_main.c.
    """
    for size in (1, PAGE_SIZE - 1, PAGE_SIZE + 1, PAGE_SIZE + 0x800):
        with refused(errno.EINVAL):
            set_region(0, GPA, size, area.hva)


@pytest.mark.parametrize(("gpa", "hva"), [(1, 0), (0, 1)], ids=["guest", "host"])
def test_an_address_inside_a_page_is_refused(
    set_region: SetRegion, area: Mapping, gpa: int, hva: int
) -> None:
    """A slot starts at a page of guest and host: another guest_phys_addr or userspace_addr is EINVAL.

    Documentation/virt/kvm/api.rst 4.35; general checks of kvm_set_memory_region(), virt/kvm/kvm_main.c.
    """
    for offset in (1, 0x10, 0x800, PAGE_SIZE - 1):
        with refused(errno.EINVAL):
            set_region(0, GPA + gpa * offset, PAGE_SIZE, area.hva + hva * offset)


def test_host_memory_of_the_kernel_is_refused(set_region: SetRegion, area: Mapping) -> None:
    """userspace_addr "must point at user addressable memory for the entire memory slot size", else EINVAL.

    Documentation/virt/kvm/api.rst 4.35.
    """
    for hva in (1 << 63, (1 << 64) - PAGE_SIZE, (1 << 64) - (1 << 30)):
        with refused(errno.EINVAL):
            set_region(0, GPA, PAGE_SIZE, hva)


def test_a_range_that_starts_in_user_memory_and_ends_in_the_kernels_is_refused(
    set_region: SetRegion, area: Mapping
) -> None:
    """userspace_addr "must point at user addressable memory for the entire memory slot size".

    Documentation/virt/kvm/api.rst 4.35.
    """
    with refused(errno.EINVAL):
        set_region(0, 0, 1 << 63, area.hva)


def test_host_memory_need_not_exist_yet(set_region: SetRegion, area: Mapping) -> None:
    """The backing of userspace_addr "is not required to be valid/populated" when the slot is made.

    Documentation/virt/kvm/api.rst 4.140 KVM_SET_USER_MEMORY_REGION2.
    """
    set_region(0, GPA, PAGE_SIZE, 0x1000)
    set_region(0, GPA, 0, 0x1000)


def test_a_guest_range_that_wraps_round_is_refused(set_region: SetRegion, area: Mapping) -> None:
    """guest_phys_addr + memory_size stays below 2**64, else EINVAL.

    General checks of kvm_set_memory_region(), virt/kvm/kvm_main.c.
    """
    for pages in (1, 2):
        with refused(errno.EINVAL):
            set_region(0, (1 << 64) - PAGE_SIZE, pages * PAGE_SIZE, area.hva)


@pytest.mark.parametrize("gpa", [PHYSICAL_END, PHYSICAL_END - PAGE_SIZE], ids=["behind", "across"])
def test_memory_beyond_the_physical_address_space_is_refused(
    set_region: SetRegion, area: Mapping, gpa: int
) -> None:
    """No slot reaches behind the guest's widest physical address, 52 bits on x86: EINVAL.

    kvm_arch_prepare_memory_region(), arch/x86/kvm/x86.c; Intel SDM volume 3, 4.1.4.
    """
    with refused(errno.EINVAL):
        set_region(0, gpa, 2 * PAGE_SIZE, area.hva)


def test_more_pages_than_a_dirty_bitmap_can_count_are_refused(set_region: SetRegion, area: Mapping) -> None:
    """A slot has fewer than 2**31 pages, else EINVAL.

    KVM_MEM_MAX_NR_PAGES, include/linux/kvm_host.h, and kvm_set_memory_region(), virt/kvm/kvm_main.c.
    """
    with refused(errno.EINVAL):
        set_region(0, 0, (MAX_PAGES + 1) * PAGE_SIZE, PAGE_SIZE)


def test_flags_that_mean_nothing_are_refused(set_region: SetRegion, area: Mapping) -> None:
    """Every flag that the documentation does not define is EINVAL.

    Documentation/virt/kvm/api.rst 4.35: "The flags field supports two flags".
    """
    known = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD
    for bit in range(32):
        if known >> bit & 1:
            continue
        with refused(errno.EINVAL, about=f"flag bit {bit}"):
            set_region(0, GPA, PAGE_SIZE, area.hva, 1 << bit)


def test_the_older_ioctl_knows_no_guest_memfd(vm: Vm, area: Mapping) -> None:
    """KVM_MEM_GUEST_MEMFD is EINVAL for the ioctl whose argument has no field for a guest_memfd.

    Documentation/virt/kvm/api.rst 4.140: it "is an extension to KVM_SET_USER_MEMORY_REGION".
    """
    with refused(errno.EINVAL):
        vm.set_user_memory_region(0, GPA, PAGE_SIZE, area.hva, KVM_MEM_GUEST_MEMFD)


@pytest.mark.parametrize("name", ["KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2"])
def test_an_argument_that_cannot_be_read_is_a_fault(vm: Vm, name: str) -> None:
    """A pointer to no memory is EFAULT.

    ioctl(2): "EFAULT argp references an inaccessible memory area".
    """
    if name.endswith("2"):
        vm.need_cap(ioctl_cap(name))
    assert vm.ioctl_raw(ioctls.IOCTLS[name], 0) == (-1, errno.EFAULT)


def ioctl_cap(name: str) -> int:
    from kvmpy import Cap

    return Cap[ioctls.IOCTLS[name].cap or ""]


@pytest.mark.parametrize(
    ("first", "pages"),
    [(4, 4), (2, 4), (6, 4), (5, 1), (2, 8)],
    ids=["same", "low-part", "high-part", "inside", "around"],
)
def test_slots_may_not_overlap(set_region: SetRegion, area: Mapping, first: int, pages: int) -> None:
    """Slots "may not overlap in guest physical address space": EEXIST.

    Documentation/virt/kvm/api.rst 4.35.
    """
    set_region(0, GPA + 4 * PAGE_SIZE, 4 * PAGE_SIZE, area.hva)
    with refused(errno.EEXIST):
        set_region(1, GPA + first * PAGE_SIZE, pages * PAGE_SIZE, area.hva)


def test_slots_may_touch(set_region: SetRegion, area: Mapping) -> None:
    """Slots that lie side by side do not overlap, on either side.

    Documentation/virt/kvm/api.rst 4.35.
    """
    set_region(0, GPA + 4 * PAGE_SIZE, 4 * PAGE_SIZE, area.hva)
    set_region(1, GPA + 3 * PAGE_SIZE, PAGE_SIZE, area.hva)
    set_region(2, GPA + 8 * PAGE_SIZE, PAGE_SIZE, area.hva)
    delete(set_region, 0, 1, 2)


def test_a_refused_slot_leaves_its_number_and_range_free(set_region: SetRegion, area: Mapping) -> None:
    """A slot that was refused does not exist: its number and its range can be used.

    Documentation/virt/kvm/api.rst 4.35: -1 on error, and deleting what is not there is an error.
    """
    set_region(0, GPA, PAGE_SIZE, area.hva)
    with refused(errno.EEXIST):
        set_region(1, GPA, 2 * PAGE_SIZE, area.hva)
    with refused(errno.EINVAL):
        set_region(1, GPA, 0, area.hva)
    set_region(1, GPA + PAGE_SIZE, PAGE_SIZE, area.hva)
    delete(set_region, 0, 1)


def test_slot_numbers_end_at_the_announced_limit(set_region: SetRegion, vm: Vm, area: Mapping) -> None:
    """Slot ids are "less than the maximum number of user memory slots" of KVM_CAP_NR_MEMSLOTS.

    Documentation/virt/kvm/api.rst 4.35; EINVAL from that number on, and the number before it works.
    """
    limit = vm.check_extension(KVM_CAP_NR_MEMSLOTS)
    assert limit >= 32
    for slot in (limit, limit + 1, 0xFFFF):
        with refused(errno.EINVAL):
            set_region(slot, GPA, PAGE_SIZE, area.hva)
    set_region(limit - 1, GPA, PAGE_SIZE, area.hva)
    delete(set_region, limit - 1)


def test_address_spaces_end_at_the_announced_number(set_region: SetRegion, vm: Vm, area: Mapping) -> None:
    """Bits 16-31 of the slot "must be less than the value" of KVM_CAP_MULTI_ADDRESS_SPACE; without it, zero.

    Documentation/virt/kvm/api.rst 4.35; EINVAL.
    """
    spaces = max(1, vm.check_extension(KVM_CAP_MULTI_ADDRESS_SPACE))
    for space in (spaces, spaces + 1, 0xFFFF):
        with refused(errno.EINVAL):
            set_region(space << 16, GPA, PAGE_SIZE, area.hva)
    set_region((spaces - 1) << 16, GPA, PAGE_SIZE, area.hva)
    delete(set_region, (spaces - 1) << 16)


@pytest.mark.requires("KVM_CAP_MULTI_ADDRESS_SPACE>=2")
def test_slots_of_two_address_spaces_are_unrelated(set_region: SetRegion, area: Mapping) -> None:
    """Slots "in separate address spaces are unrelated": the same number and range can be used in each.

    Documentation/virt/kvm/api.rst 4.35.
    """
    set_region(0, GPA, PAGE_SIZE, area.hva)
    set_region(1 << 16, GPA, PAGE_SIZE, area.hva)
    with refused(errno.EEXIST):
        set_region(1 << 16 | 1, GPA, PAGE_SIZE, area.hva)


def test_dirty_logging_and_read_only_go_together(set_region: SetRegion, vm: Vm, area: Mapping) -> None:
    """Both documented flags may be set for a new slot, alone and together.

    Documentation/virt/kvm/api.rst 4.35.
    """
    vm.need_cap(KVM_CAP_READONLY_MEM)
    for slot, flags in enumerate(
        (KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)
    ):
        set_region(slot, GPA + slot * PAGE_SIZE, PAGE_SIZE, area.hva, flags)
    delete(set_region, 0, 1, 2)
