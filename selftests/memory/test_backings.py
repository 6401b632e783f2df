# SPDX-License-Identifier: Apache-2.0
"""What may be behind a slot, and how the guest follows changes of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest

from kvmpy import (
    KVM_EXIT_MEMORY_FAULT,
    PAGE_SIZE,
    SIZE_1G,
    SIZE_2M,
    Anonymous,
    Backing,
    Gpa,
    Gva,
    HugeTlb,
    Mapping,
    MemFd,
)
from kvmpy.core.vcpu import RUN_ERROR
from selftests.conftest import Accessor

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
OLD, NEW = 0x01D0_0000_0000_0001, 0x4E30_0000_0000_0002

MAP_FIXED = 0x10
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def replace_by_fresh_memory(hva: int, size: int) -> None:
    """Let mmap(2) put new anonymous memory over a range that is mapped."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    assert libc.mmap(hva, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == hva


def protect(hva: int, protection: int) -> None:
    assert libc.mprotect(hva, PAGE_SIZE, protection) == 0, os.strerror(ctypes.get_errno())


def word(mapping: Mapping, offset: int = 0) -> int:
    return int.from_bytes(mapping.view(offset, 8), "little")


def put(mapping: Mapping, value: int, offset: int = 0) -> None:
    mapping.view(offset, 8)[:] = value.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("backing", "size"),
    [
        pytest.param(Anonymous(huge="never"), SIZE_2M, id="anonymous"),
        pytest.param(Anonymous(huge="thp"), 2 * SIZE_2M, id="thp"),
        pytest.param(HugeTlb(SIZE_2M), 2 * SIZE_2M, id="hugetlb-2M"),
        pytest.param(HugeTlb(SIZE_1G), SIZE_1G, id="hugetlb-1G"),
        pytest.param(MemFd(), SIZE_2M, id="memfd"),
        pytest.param(MemFd(SIZE_2M), 2 * SIZE_2M, id="memfd-hugetlb-2M"),
    ],
)
def test_any_memory_may_be_behind_a_slot(accessor: Accessor, backing: Backing, size: int) -> None:
    """Any object may be behind a slot: guest and host see each other's writes.

    Documentation/virt/kvm/api.rst 4.35: "Any object may back this memory, including anonymous memory,
    ordinary files, and hugetlbfs".
    """
    slot = accessor.vm.add_slot(GPA, size, backing=backing)
    accessor.map(GVA, GPA, size)
    for offset in (0, size // 2 - 8, size // 2, size - 8):
        assert accessor.read(GVA + offset) == 0
        accessor.write(GVA + offset, OLD + offset)
        assert word(slot.mapping, offset) == OLD + offset
        put(slot.mapping, NEW + offset, offset)
        assert accessor.read(GVA + offset) == NEW + offset


def test_an_ordinary_file_may_be_behind_a_slot(accessor: Accessor, tmp_path: Path) -> None:
    """An ordinary file may be behind a slot: the guest reads it and writes into it.

    Documentation/virt/kvm/api.rst 4.35: "Any object may back this memory, including [...] ordinary files".
    """
    with (tmp_path / "memory").open("w+b") as file:
        file.truncate(2 * PAGE_SIZE)
        os.pwrite(file.fileno(), OLD.to_bytes(8, "little"), PAGE_SIZE)
        area = mmap.mmap(file.fileno(), 2 * PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        vm = accessor.vm
        vm.add_alias(int(GPA), 2 * PAGE_SIZE, vm.own(Mapping(area, 2 * PAGE_SIZE)))
        accessor.map(GVA, GPA, 2 * PAGE_SIZE)
        assert accessor.read(GVA + PAGE_SIZE) == OLD
        accessor.write(GVA + PAGE_SIZE, NEW)
        assert os.pread(file.fileno(), 8, PAGE_SIZE) == NEW.to_bytes(8, "little")
        os.pwrite(file.fileno(), OLD.to_bytes(8, "little"), 0)
        assert accessor.read(GVA) == OLD


def test_a_second_mapping_of_the_memfd_is_the_same_memory(accessor: Accessor) -> None:
    """Guest memory in a memfd is what everybody sees who maps or reads the memfd, and the other way round.

    Documentation/virt/kvm/api.rst 4.35: "Any object may back this memory"; memfd_create(2).
    """
    mapping = accessor.vm.own(MemFd().map(2 * PAGE_SIZE))
    accessor.vm.add_alias(int(GPA), 2 * PAGE_SIZE, mapping)
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    accessor.write(GVA + PAGE_SIZE, OLD)
    with mmap.mmap(mapping.fd, 2 * PAGE_SIZE) as other:
        assert int.from_bytes(other[PAGE_SIZE : PAGE_SIZE + 8], "little") == OLD
        other[:8] = NEW.to_bytes(8, "little")
    assert accessor.read(GVA) == NEW


def test_a_slot_may_begin_inside_host_memory(accessor: Accessor) -> None:
    """userspace_addr is any page of the host's: the slot shows memory from that page on.

    Documentation/virt/kvm/api.rst 4.35: memory "is taken starting at the address denoted by" userspace_addr.
    """
    mapping = accessor.vm.own(Anonymous(huge="never").map(4 * PAGE_SIZE))
    accessor.vm.add_alias(int(GPA), 2 * PAGE_SIZE, mapping, offset=PAGE_SIZE)
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    put(mapping, OLD, PAGE_SIZE)
    put(mapping, NEW, 2 * PAGE_SIZE)
    assert [accessor.read(GVA), accessor.read(GVA + PAGE_SIZE)] == [OLD, NEW]


def test_two_guest_pages_may_be_one_host_page(accessor: Accessor) -> None:
    """Two gpas "may alias to the same hva": a write through one slot is read through the other.

    Documentation/virt/kvm/x86/mmu.rst, Memory.
    """
    vm = accessor.vm
    mapping = vm.own(Anonymous(huge="never").map(PAGE_SIZE))
    vm.add_alias(int(GPA), PAGE_SIZE, mapping)
    vm.add_alias(int(GPA) + 4 * PAGE_SIZE, PAGE_SIZE, mapping)
    accessor.map(GVA, GPA, 5 * PAGE_SIZE)
    for here, there, value in ((0, 4, OLD), (4, 0, NEW)):
        accessor.write(GVA + here * PAGE_SIZE + 0x40, value)
        assert accessor.read(GVA + there * PAGE_SIZE + 0x40) == value
    assert word(mapping, 0x40) == NEW


def test_memory_given_back_by_madvise_is_zero(accessor: Accessor) -> None:
    """Changes in the backing "are automatically reflected into the guest": dropped pages read as zeroes.

    Documentation/virt/kvm/api.rst 4.35 ("Another example is madvise(MADV_DROP)"); madvise(2), MADV_DONTNEED.
    """
    slot = accessor.vm.add_slot(GPA, 3 * PAGE_SIZE, backing=Anonymous(huge="never"))
    accessor.map(GVA, GPA, 3 * PAGE_SIZE)
    for page in range(3):
        accessor.write(GVA + page * PAGE_SIZE, OLD + page)
    slot.mapping.madvise(mmap.MADV_DONTNEED, PAGE_SIZE, PAGE_SIZE)
    assert [accessor.read(GVA + page * PAGE_SIZE) for page in range(3)] == [OLD, 0, OLD + 2]
    accessor.write(GVA + PAGE_SIZE, NEW)
    assert word(slot.mapping, PAGE_SIZE) == NEW


def test_memory_mapped_over_the_old_is_seen_at_once(accessor: Accessor) -> None:
    """An mmap() over the memory of a slot "will be made visible immediately".

    Documentation/virt/kvm/api.rst 4.35.
    """
    slot = accessor.vm.add_slot(GPA, 2 * PAGE_SIZE, backing=Anonymous(huge="never"))
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    accessor.write(GVA, OLD)
    accessor.write(GVA + PAGE_SIZE, OLD)
    assert word(slot.mapping, PAGE_SIZE) == OLD
    replace_by_fresh_memory(slot.mapping.hva + PAGE_SIZE, PAGE_SIZE)
    assert [accessor.read(GVA), accessor.read(GVA + PAGE_SIZE)] == [OLD, 0]
    put(slot.mapping, NEW, PAGE_SIZE)
    assert accessor.read(GVA + PAGE_SIZE) == NEW


@pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True)
def test_a_slot_without_accessible_memory_is_a_fault(accessor: Accessor) -> None:
    """KVM_RUN fails with EFAULT at a valid slot whose host memory is not accessible, and can be retried.

    Documentation/virt/kvm/api.rst 8.44: "there is a valid memslot but no backing VMA".
    Ring 3 only: an emulator of ring 0 takes memory that it cannot reach for MMIO.
    """
    slot = accessor.vm.add_slot(GPA, PAGE_SIZE, backing=Anonymous(huge="never"))
    accessor.map(GVA, GPA, PAGE_SIZE)
    put(slot.mapping, OLD)
    protect(slot.mapping.hva, 0)
    accessor.order(GVA, 8)
    vcpu = accessor.vcpu
    vcpu.set_deadline(accessor.vm.deadline)
    try:
        assert (vcpu.run_once(), vcpu.run_errno) == (RUN_ERROR, errno.EFAULT)
        run = vcpu.run_area
        if run.exit_reason == KVM_EXIT_MEMORY_FAULT:  # else: a KVM that tells nothing more
            assert (run.memory_fault.gpa, run.memory_fault.flags) == (int(GPA), 0)
    finally:
        protect(slot.mapping.hva, mmap.PROT_READ | mmap.PROT_WRITE)
    assert accessor.result() == OLD


def test_views_are_the_guests_memory(accessor: Accessor) -> None:
    """A host's view of guest memory is the memory itself: writes of both sides show without any ioctl.

    Documentation/virt/kvm/x86/mmu.rst: "Guest memory (gpa) is part of the user address space of the process".
    """
    vm = accessor.vm
    vm.add_slot(GPA, 2 * PAGE_SIZE)
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    by_gpa = vm.memory.view(GPA, 2 * PAGE_SIZE).cast("Q")
    by_gva = vm.view(GVA, 2 * PAGE_SIZE).cast("Q")
    accessor.write(GVA + PAGE_SIZE + 8, OLD)
    assert by_gpa[513] == by_gva[513] == OLD
    by_gpa[1] = NEW
    assert by_gva[1] == accessor.read(GVA + 8) == NEW
    by_gva[514] = OLD
    assert by_gpa[514] == accessor.read(GVA + PAGE_SIZE + 16) == OLD
