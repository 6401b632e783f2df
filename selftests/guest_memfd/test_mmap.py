# SPDX-License-Identifier: Apache-2.0
"""Mappings of guest_memfd in the host: who may, what they see, where SIGBUS is promised."""

from __future__ import annotations

import ctypes
import errno
import mmap
import signal

import pytest

from kvmpy import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    PAGE_SIZE,
    SIZE_2M,
    Mapping,
    MissingError,
    Vm,
    refused,
)
from selftests.guest_memfd.conftest import Touch
from selftests.guest_memfd.place import Reserved

PAGES = 4
SIZE = PAGES * PAGE_SIZE
BOTH = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
BUS_ERROR = (-signal.SIGBUS, "mapped\n")


def first_bytes(mapping: Mapping) -> list[int]:
    return [mapping.view(page * PAGE_SIZE, 1)[0] for page in range(PAGES)]


@pytest.mark.parametrize("flags", [0, GUEST_MEMFD_FLAG_INIT_SHARED], ids=["no-flags", "init-shared"])
def test_without_the_flag_there_is_no_mmap(gmem_vm: Vm, flags: int) -> None:
    """GUEST_MEMFD_FLAG_MMAP enables "using mmap() on the guest_memfd file descriptor"; without it, ENODEV.

    Documentation/virt/kvm/api.rst 4.142; mmap(2), ENODEV.
    """
    if flags & ~gmem_vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS):
        how = "Linux 6.18 or newer, and a VM type without private memory (KVM_CAP_GUEST_MEMFD_FLAGS)"
        raise MissingError("GUEST_MEMFD_FLAG_INIT_SHARED", how)
    with refused(errno.ENODEV, by=OSError):
        gmem_vm.create_guest_memfd(SIZE, flags).map()


def test_copies_on_write_are_refused(mmap_vm: Vm) -> None:
    """A mapping of guest memory is the memory itself: MAP_PRIVATE is EINVAL.

    kvm_gmem_mmap(), virt/kvm/guest_memfd.c.
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    with refused(errno.EINVAL, by=OSError):
        mmap.mmap(gmem.fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_memory_is_zero_at_first(mmap_vm: Vm) -> None:
    """What nobody wrote to reads as zeroes, to the last byte.

    Documentation/virt/kvm/api.rst 4.142: "roughly analogous to files created via memfd_create()".
    """
    mapping = mmap_vm.own(mmap_vm.create_guest_memfd(SIZE, BOTH).map())
    assert bytes(mapping.view(0, SIZE)) == bytes(SIZE)


def test_mappings_show_the_same_memory(mmap_vm: Vm) -> None:
    """All mappings of the file show one memory, wherever in the file they begin.

    Documentation/virt/kvm/api.rst 4.142: the inode "represents physical memory".
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    whole = mmap_vm.own(gmem.map())
    part = mmap_vm.own(gmem.map(PAGE_SIZE, 2 * PAGE_SIZE))
    whole.view(2 * PAGE_SIZE, 4)[:] = b"whol"
    assert bytes(part.view(0, 4)) == b"whol"
    part.view(PAGE_SIZE - 4, 4)[:] = b"part"
    assert bytes(whole.view(3 * PAGE_SIZE - 4, 4)) == b"part"


def test_memory_outlives_its_mappings(mmap_vm: Vm) -> None:
    """Memory belongs to the file: it is there again when the file is mapped again.

    Documentation/virt/kvm/api.rst 4.142: "automatically released when the last reference is dropped".
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    mapping = gmem.map()
    mapping.view(PAGE_SIZE, 4)[:] = b"stay"
    mapping.close()
    again = mmap_vm.own(gmem.map())
    assert bytes(again.view(PAGE_SIZE, 4)) == b"stay"


def test_another_process_sees_the_same_memory(mmap_vm: Vm, touch: Touch) -> None:
    """The file descriptor may be given to another process, which maps the same memory.

    Documentation/virt/kvm/api.rst 4.142: GUEST_MEMFD_FLAG_MMAP enables mmap() on the file descriptor.
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    mapping = mmap_vm.own(gmem.map())
    mapping.view(PAGE_SIZE + 1, 1)[0] = 0x42
    assert touch(gmem, SIZE, PAGE_SIZE + 1) == (0, "mapped\n66\n")
    assert touch(gmem, SIZE, 3 * PAGE_SIZE, 0x77) == (0, "mapped\n119\n")
    assert mapping.view(3 * PAGE_SIZE, 1)[0] == 0x77


def test_a_hole_is_zero_and_its_neighbours_stay(mmap_vm: Vm) -> None:
    """A punched page is gone from every mapping at once and reads as zeroes; others keep their content.

    Documentation/virt/kvm/api.rst 4.142: PUNCH_HOLE; fallocate(2), Deallocating file space.
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    mapping, other = mmap_vm.own(gmem.map()), mmap_vm.own(gmem.map())
    for page in range(PAGES):
        mapping.view(page * PAGE_SIZE, 1)[0] = 1 + page
    gmem.punch_hole(PAGE_SIZE, 2 * PAGE_SIZE)
    assert first_bytes(mapping) == first_bytes(other) == [1, 0, 0, 4]
    mapping.view(PAGE_SIZE, 1)[0] = 9
    assert first_bytes(other) == [1, 9, 0, 4]


def test_a_hole_may_reach_behind_the_end(mmap_vm: Vm) -> None:
    """A hole behind the end of the file is no error and changes nothing; one across it takes the last pages.

    fallocate(2), Deallocating file space: FALLOC_FL_PUNCH_HOLE does not depend on the file size.
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    mapping = mmap_vm.own(gmem.map())
    for page in range(PAGES):
        mapping.view(page * PAGE_SIZE, 1)[0] = 1 + page
    gmem.punch_hole(SIZE, PAGE_SIZE)
    assert first_bytes(mapping) == [1, 2, 3, 4]
    gmem.punch_hole(SIZE - PAGE_SIZE, 4 * PAGE_SIZE)
    assert first_bytes(mapping) == [1, 2, 3, 0]


def test_allocation_keeps_what_is_there(mmap_vm: Vm) -> None:
    """fallocate() gives pages that were missing, as zeroes, and leaves the others as they are.

    fallocate(2), Allocating disk space.
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    mapping = mmap_vm.own(gmem.map())
    mapping.view(PAGE_SIZE, 1)[0] = 5
    gmem.allocate()
    assert first_bytes(mapping) == [0, 5, 0, 0]


def test_madvise_forgets_the_mapping_not_the_memory(mmap_vm: Vm) -> None:
    """MADV_DONTNEED lets go of a shared mapping's pages only: the file still has them.

    madvise(2), MADV_DONTNEED: later accesses of a shared mapping see "the up-to-date contents".
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    mapping = mmap_vm.own(gmem.map())
    mapping.view(PAGE_SIZE, 4)[:] = b"stay"
    mapping.madvise(mmap.MADV_DONTNEED)
    assert bytes(mapping.view(PAGE_SIZE, 4)) == b"stay"


@pytest.mark.parametrize("value", [-1, 1], ids=["read", "write"])
def test_behind_the_end_is_a_bus_error(mmap_vm: Vm, touch: Touch, value: int) -> None:
    """A mapping may be longer than the file, an access behind the file's end is SIGBUS.

    mmap(2), SIGBUS; kvm_gmem_fault_user_mapping(), virt/kvm/guest_memfd.c.
    """
    gmem = mmap_vm.create_guest_memfd(SIZE, BOTH)
    assert touch(gmem, 4 * SIZE, SIZE, value) == BUS_ERROR
    assert touch(gmem, 4 * SIZE, 4 * SIZE - 1, value) == BUS_ERROR
    assert touch(gmem, 4 * SIZE, SIZE - 1, value)[0] == 0


@pytest.mark.parametrize("value", [-1, 1], ids=["read", "write"])
def test_private_memory_is_a_bus_error(gmem_vm: Vm, touch: Touch, value: int) -> None:
    """Memory "created without INIT_SHARED" is private, and private memory cannot be faulted in: SIGBUS.

    Documentation/virt/kvm/api.rst 4.142.
    """
    if not gmem_vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP:
        raise MissingError("GUEST_MEMFD_FLAG_MMAP", "Linux 6.18 or newer (KVM_CAP_GUEST_MEMFD_FLAGS)")
    gmem = gmem_vm.create_guest_memfd(SIZE, GUEST_MEMFD_FLAG_MMAP)
    assert touch(gmem, SIZE, 0, value) == BUS_ERROR
    assert touch(gmem, SIZE, SIZE - 1, value) == BUS_ERROR


MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25


def test_pages_are_not_collapsed(mmap_vm: Vm) -> None:
    """Large pages may be advised, not forced: MADV_COLLAPSE is EINVAL, and the memory stays as it is.

    madvise(2), MADV_COLLAPSE (Linux 6.1): EINVAL where memory "is not THP eligible".
    """
    gmem = mmap_vm.create_guest_memfd(SIZE_2M, BOTH)
    with Reserved(2 * SIZE_2M) as place:
        aligned = -(-place.address // SIZE_2M) * SIZE_2M
        place.map_fixed(aligned, SIZE_2M, gmem.fd)
        area = (ctypes.c_ubyte * SIZE_2M).from_address(aligned)
        area[0], area[SIZE_2M - 1] = 7, 9
        if place.madvise(aligned, SIZE_2M, MADV_HUGEPAGE) == errno.EINVAL:
            raise MissingError("transparent huge pages", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y")
        assert place.madvise(aligned, SIZE_2M, MADV_COLLAPSE) == errno.EINVAL
        assert place.madvise(aligned, SIZE_2M, mmap.MADV_DONTNEED) == 0
        assert (area[0], area[1], area[SIZE_2M - 1]) == (7, 0, 9)
