# SPDX-License-Identifier: Apache-2.0
"""Binding a range of a guest_memfd to a memory slot: what KVM_SET_USER_MEMORY_REGION2 accepts."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from kvmpy import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    Anonymous,
    GuestMemfd,
    Mapping,
    MemFd,
    Vm,
    refused,
)

GPA = 0x10_0000
PAGES = 8
SIZE = PAGES * PAGE_SIZE
# Host memory that slots name, and never touch here.
HVA = 0x10_0000

# EEXIST in Linux 7.2; before, the same code returned EINVAL for this as for every other mistake.
RANGE_TAKEN = (errno.EEXIST, errno.EINVAL)

Bind = Callable[..., None]


@pytest.fixture
def gmem(gmem_vm: Vm) -> GuestMemfd:
    return gmem_vm.create_guest_memfd(SIZE)


@pytest.fixture
def bind(gmem_vm: Vm, gmem: GuestMemfd) -> Bind:
    """Bind pages of the guest_memfd to the same pages behind GPA, or as told."""

    def bind_pages(
        slot: int,
        first: int,
        pages: int,
        *,
        gpa: int | None = None,
        flags: int = KVM_MEM_GUEST_MEMFD,
        fd: GuestMemfd | int = gmem,
    ) -> None:
        where = GPA + first * PAGE_SIZE if gpa is None else gpa
        gmem_vm.set_user_memory_region2(
            slot, where, pages * PAGE_SIZE, HVA, flags, gmem=fd, gmem_offset=first * PAGE_SIZE
        )

    return bind_pages


def delete(vm: Vm, slot: int) -> None:
    vm.set_user_memory_region2(slot, 0, 0, 0)


def test_ranges_of_one_file_can_be_bound_to_many_slots(bind: Bind) -> None:
    """Any number of slots "can be bound to a single guest_memfd file", in any order and anywhere.

    Documentation/virt/kvm/api.rst 4.142.
    """
    for slot, first in enumerate((6, 0, 4, 2)):
        bind(slot, first, 2, gpa=GPA + slot * 16 * PAGE_SIZE)
    for page in range(PAGES):
        with refused(*RANGE_TAKEN):
            bind(9, page, 1, gpa=GPA + 256 * PAGE_SIZE)


@pytest.mark.parametrize(
    ("first", "pages"),
    [(2, 4), (1, 2), (5, 2), (3, 1), (0, 8)],
    ids=["same", "low-part", "high-part", "inside", "around"],
)
def test_a_page_is_bound_once(bind: Bind, first: int, pages: int) -> None:
    """Binding several slots to one range of a guest_memfd "is not allowed".

    Documentation/virt/kvm/api.rst 4.142; kvm_gmem_bind(), virt/kvm/guest_memfd.c.
    """
    bind(0, 2, 4)
    with refused(*RANGE_TAKEN):
        bind(1, first, pages, gpa=GPA + 64 * PAGE_SIZE)


def test_a_range_that_is_taken_exists(bind: Bind) -> None:
    """The error tells a range that is taken, EEXIST, from one that cannot be, EINVAL.

    KVM_SET_USER_MEMORY_REGION2; Documentation/virt/kvm/api.rst 4.35 has it so for addresses that overlap.
    """
    bind(0, 2, 4)
    for first, pages, error in ((2, 4, errno.EEXIST), (5, 1, errno.EEXIST), (0, PAGES + 1, errno.EINVAL)):
        with refused(error):
            bind(1, first, pages, gpa=GPA + 64 * PAGE_SIZE)


def test_a_range_is_free_again_when_its_slot_is_gone(gmem_vm: Vm, bind: Bind) -> None:
    """Deleting a slot gives its range of the file back, to be bound somewhere else.

    Documentation/virt/kvm/api.rst 4.140: "the target range must not be bound to any other memory region".
    """
    bind(0, 0, 4)
    delete(gmem_vm, 0)
    bind(1, 2, 4, gpa=GPA + 64 * PAGE_SIZE)
    delete(gmem_vm, 1)


def test_a_refused_slot_binds_nothing(gmem_vm: Vm, bind: Bind) -> None:
    """A slot that is refused for its place leaves its range of the file free.

    Documentation/virt/kvm/api.rst 4.140.
    """
    bind(0, 0, 2)
    with refused(errno.EEXIST):
        bind(1, 4, 2, gpa=GPA + PAGE_SIZE)
    bind(1, 4, 2)
    delete(gmem_vm, 1)


@pytest.mark.parametrize(
    "offset",
    [1, 0x800, PAGE_SIZE - 1, SIZE + 1, (1 << 63) - PAGE_SIZE, 1 << 63, (1 << 64) - PAGE_SIZE],
    ids=["1", "2048", "4095", str(SIZE + 1), "largest", "negative", "minus-a-page"],
)
def test_an_offset_that_is_no_page_of_a_file_is_refused(gmem_vm: Vm, gmem: GuestMemfd, offset: int) -> None:
    """guest_memfd_offset is a page of the file: inside one, or so large that its end wraps round, is EINVAL.

    Documentation/virt/kvm/api.rst 4.140: "All standard bounds checks apply".
    """
    with refused(errno.EINVAL):
        gmem_vm.set_user_memory_region2(
            0, GPA, PAGE_SIZE, HVA, KVM_MEM_GUEST_MEMFD, gmem=gmem, gmem_offset=offset
        )


@pytest.mark.parametrize(
    ("first", "pages"), [(8, 1), (7, 2), (0, 9)], ids=["behind", "across", "whole-and-more"]
)
def test_a_range_behind_the_end_of_the_file_is_refused(bind: Bind, first: int, pages: int) -> None:
    """[guest_memfd_offset, guest_memfd_offset + memory_size] lies in the file: EINVAL otherwise.

    Documentation/virt/kvm/api.rst 4.140: "All standard bounds checks apply".
    """
    with refused(errno.EINVAL):
        bind(0, first, pages)


def test_another_file_is_refused(bind: Bind, gmem_vm: Vm) -> None:
    """The guest_memfd "must point at a file created via KVM_CREATE_GUEST_MEMFD": another file is EINVAL.

    Documentation/virt/kvm/api.rst 4.140.
    """
    memfd = gmem_vm.own(MemFd().map(SIZE))
    for fd in (memfd.fd, gmem_vm.fd, gmem_vm.kvm.fd):
        with refused(errno.EINVAL):
            bind(0, 0, 1, fd=fd)


def test_a_descriptor_that_is_not_open_is_refused(bind: Bind) -> None:
    """A file descriptor that is not open is EBADF.

    kvm_gmem_bind(), virt/kvm/guest_memfd.c.
    """
    closed = os.dup(0)
    os.close(closed)
    for fd in (closed, 0x7FFF_FFFF, 0xFFFF_FFFF):
        with refused(errno.EBADF):
            bind(0, 0, 1, fd=fd)


def test_the_file_of_another_vm_is_refused(gmem_vm: Vm, gmem: GuestMemfd) -> None:
    """The guest_memfd must have been created "on the current VM": one of another VM is EINVAL.

    Documentation/virt/kvm/api.rst 4.140.
    """
    with gmem_vm.kvm.create_vm() as other, refused(errno.EINVAL):
        other.set_user_memory_region2(0, GPA, PAGE_SIZE, HVA, KVM_MEM_GUEST_MEMFD, gmem=gmem)


@pytest.mark.parametrize("flag", [KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES], ids=["read-only", "dirty-log"])
def test_the_other_flags_do_not_go_with_guest_memfd(gmem_vm: Vm, bind: Bind, flag: int) -> None:
    """A guest_memfd slot is neither read-only nor dirty logged: EINVAL.

    check_memory_region_flags(), virt/kvm/kvm_main.c; emulated MMIO and dirty logging are for shared memory.
    """
    with refused(errno.EINVAL):
        bind(0, 0, 1, flags=KVM_MEM_GUEST_MEMFD | flag)
    bind(0, 0, 1)
    delete(gmem_vm, 0)


def test_a_bound_slot_does_not_move(bind: Bind) -> None:
    """A guest_memfd slot can be deleted, not changed: moving it is EINVAL.

    kvm_set_memory_region(), virt/kvm/kvm_main.c: "Private memslots are immutable, they can only be deleted."
    """
    bind(0, 0, 2)
    with refused(errno.EINVAL):
        bind(0, 0, 2, gpa=GPA + 64 * PAGE_SIZE)


def test_a_bound_slot_stays_bound(gmem_vm: Vm, bind: Bind) -> None:
    """A guest_memfd slot can be deleted, not changed: taking its file away is EINVAL, with either ioctl.

    kvm_set_memory_region(), virt/kvm/kvm_main.c: "Private memslots are immutable, they can only be deleted."
    """
    bind(0, 0, 2)
    for change in (gmem_vm.set_user_memory_region, gmem_vm.set_user_memory_region2):
        with refused(errno.EINVAL):
            change(0, GPA, 2 * PAGE_SIZE, HVA)


def test_a_plain_slot_gets_no_guest_memfd_later(gmem_vm: Vm, bind: Bind) -> None:
    """KVM_MEM_GUEST_MEMFD is decided when the slot is made: adding it is EINVAL.

    kvm_set_memory_region(), virt/kvm/kvm_main.c.
    """
    gmem_vm.set_user_memory_region2(0, GPA, 2 * PAGE_SIZE, HVA)
    with refused(errno.EINVAL):
        bind(0, 0, 2)


def test_the_older_ioctl_deletes_bound_slots_too(gmem_vm: Vm, bind: Bind) -> None:
    """Deletion needs no guest_memfd, so both ioctls delete a bound slot and give its range back.

    Documentation/virt/kvm/api.rst 4.35: "Deleting a slot is done by passing zero for memory_size."
    """
    bind(0, 0, PAGES)
    gmem_vm.set_user_memory_region(0, GPA, 0, HVA)
    bind(1, 0, PAGES)
    delete(gmem_vm, 1)


def test_without_the_flag_the_descriptor_is_ignored(gmem_vm: Vm, gmem: GuestMemfd, bind: Bind) -> None:
    """guest_memfd means something with KVM_MEM_GUEST_MEMFD only: a plain slot binds nothing.

    Documentation/virt/kvm/api.rst 4.140: "Userspace can set KVM_MEM_GUEST_MEMFD in flags to have KVM bind".
    """
    gmem_vm.set_user_memory_region2(0, GPA, PAGE_SIZE, HVA, 0, gmem=gmem, gmem_offset=1)
    bind(1, 0, PAGES, gpa=GPA + 64 * PAGE_SIZE)
    delete(gmem_vm, 0)
    delete(gmem_vm, 1)


def test_host_memory_must_be_addressable_all_the_same(gmem_vm: Vm, gmem: GuestMemfd) -> None:
    """A guest_memfd slot "must have" a legal userspace_addr as well: EINVAL for an odd one or the kernel's.

    Documentation/virt/kvm/api.rst 4.140.
    """
    for hva in (HVA + 1, 1 << 63):
        with refused(errno.EINVAL):
            gmem_vm.set_user_memory_region2(0, GPA, PAGE_SIZE, hva, KVM_MEM_GUEST_MEMFD, gmem=gmem)


def test_slots_with_and_without_guest_memfd_may_not_overlap(gmem_vm: Vm, bind: Bind) -> None:
    """Slots "may not overlap in guest physical address space", whatever is behind them: EEXIST.

    Documentation/virt/kvm/api.rst 4.35.
    """
    plain: Mapping = gmem_vm.own(Anonymous(huge="never").map(PAGE_SIZE))
    bind(0, 0, 2)
    with refused(errno.EEXIST):
        gmem_vm.set_user_memory_region(1, GPA + PAGE_SIZE, PAGE_SIZE, plain.hva)
