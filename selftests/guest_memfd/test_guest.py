# SPDX-License-Identifier: Apache-2.0
"""guest_memfd as the memory of a guest, in VMs of the default type."""

from __future__ import annotations

import errno
import socket

import pytest

from kvmpy import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CAP_MEMORY_FAULT_INFO,
    KVM_MEM_GUEST_MEMFD,
    PAGE_SIZE,
    Anonymous,
    Gpa,
    GuestMemfd,
    Gva,
    Mapping,
    MemoryFaultExit,
    MissingError,
    MmioExit,
    Vm,
    VmType,
)
from selftests.conftest import Accessor
from selftests.guest_memfd.conftest import Touch

pytestmark = pytest.mark.requires("KVM_CAP_USER_MEMORY2")
# Where userspace_addr is not the guest_memfd: KVM's emulator, which may run ring 0, uses userspace_addr.
RING3 = pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True)

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
SLOT = 1000
PAGES = 4
SIZE = PAGES * PAGE_SIZE
BOTH = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
OLD, NEW = 0x01D0_0000_0000_0001, 0x4E30_0000_0000_0002


def create(vm: Vm, flags: int = BOTH) -> GuestMemfd:
    """Make a guest_memfd; skip where this VM's type is not the default one, or KVM does not offer that."""
    if vm.vm_type != VmType.KVM_X86_DEFAULT_VM:
        pytest.skip("this is about VMs of the default type")
    vm.need_cap(KVM_CAP_GUEST_MEMFD, "CONFIG_KVM_GUEST_MEMFD, and Linux 6.18 for VMs of the default type")
    if flags & ~vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS):
        raise MissingError(f"guest_memfd flags {flags:#x}", "Linux 6.18 or newer (KVM_CAP_GUEST_MEMFD_FLAGS)")
    return vm.create_guest_memfd(SIZE, flags)


def bind(
    vm: Vm,
    gmem: GuestMemfd | int,
    hva: int,
    *,
    gpa: Gpa = GPA,
    first: int = 0,
    pages: int = PAGES,
    slot: int = SLOT,
) -> None:
    vm.set_user_memory_region2(
        slot, gpa, pages * PAGE_SIZE, hva, KVM_MEM_GUEST_MEMFD, gmem=gmem, gmem_offset=first * PAGE_SIZE
    )


def word(mapping: Mapping, offset: int = 0) -> int:
    return int.from_bytes(mapping.view(offset, 8), "little")


def put(mapping: Mapping, value: int, offset: int = 0) -> None:
    mapping.view(offset, 8)[:] = value.to_bytes(8, "little")


@pytest.fixture
def gmem(accessor: Accessor) -> GuestMemfd:
    return create(accessor.vm)


@pytest.fixture
def mapping(accessor: Accessor, gmem: GuestMemfd) -> Mapping:
    """The guest_memfd, mapped here and bound to PAGES pages of the guest at GVA."""
    vm = accessor.vm
    mapping = vm.own(gmem.map())
    bind(vm, gmem, mapping.hva)
    accessor.map(GVA, GPA, 2 * SIZE)
    return mapping


def test_guest_and_host_share_it(accessor: Accessor, mapping: Mapping) -> None:
    """A guest_memfd that is mapped and bound is one memory: each side reads what the other wrote.

    Documentation/virt/kvm/api.rst 4.142: a guest fault "will always be consumed from guest_memfd".
    """
    for offset in (0, PAGE_SIZE + 0x10, SIZE - 8):
        assert accessor.read(GVA + offset) == 0
        accessor.write(GVA + offset, OLD + offset)
        assert word(mapping, offset) == OLD + offset
        put(mapping, NEW + offset, offset)
        assert accessor.read(GVA + offset) == NEW + offset


def test_a_hole_is_zero_in_the_guest(accessor: Accessor, gmem: GuestMemfd, mapping: Mapping) -> None:
    """A hole that is punched while the guest has the page mapped reads as zeroes there; neighbours stay.

    Documentation/virt/kvm/api.rst 4.142: "guest_memfd files do however support PUNCH_HOLE".
    """
    for page in range(PAGES):
        accessor.write(GVA + page * PAGE_SIZE, OLD + page)
    gmem.punch_hole(PAGE_SIZE, 2 * PAGE_SIZE)
    values = [accessor.read(GVA + page * PAGE_SIZE) for page in range(PAGES)]
    assert values == [OLD, 0, 0, OLD + 3]
    accessor.write(GVA + PAGE_SIZE, NEW)
    assert [word(mapping, page * PAGE_SIZE) for page in range(PAGES)] == [OLD, NEW, 0, OLD + 3]


def test_allocation_changes_nothing_for_the_guest(
    accessor: Accessor, gmem: GuestMemfd, mapping: Mapping
) -> None:
    """Allocating pages in advance leaves what the guest wrote, and zeroes elsewhere.

    fallocate(2), Allocating disk space.
    """
    accessor.write(GVA + PAGE_SIZE, OLD)
    gmem.allocate()
    assert [accessor.read(GVA + page * PAGE_SIZE) for page in range(3)] == [0, OLD, 0]


def test_the_offset_selects_the_pages(accessor: Accessor, gmem: GuestMemfd) -> None:
    """The slot shows [guest_memfd_offset, guest_memfd_offset + memory_size] of the file.

    Documentation/virt/kvm/api.rst 4.140.
    """
    vm = accessor.vm
    mapping = vm.own(gmem.map())
    for page in range(PAGES):
        put(mapping, OLD + page, page * PAGE_SIZE)
    half = SIZE // 2
    bind(vm, gmem, mapping.hva + half, gpa=GPA, first=2, pages=2, slot=SLOT)
    bind(vm, gmem, mapping.hva, gpa=GPA + half, first=0, pages=2, slot=SLOT + 1)
    accessor.map(GVA, GPA, SIZE)
    values = [accessor.read(GVA + page * PAGE_SIZE) for page in range(PAGES)]
    assert values == [OLD + 2, OLD + 3, OLD, OLD + 1]


def test_a_deleted_slot_is_no_memory(accessor: Accessor, mapping: Mapping) -> None:
    """Deleting the slot takes the memory from the guest (KVM_EXIT_MMIO), not from the file.

    Documentation/virt/kvm/api.rst 4.35 and 5, KVM_EXIT_MMIO.
    """
    accessor.write(GVA, OLD)
    accessor.vm.set_user_memory_region(SLOT, GPA, 0, 0)
    got = accessor.exit_of(GVA)
    assert got.phys_addr == int(GPA)
    got.respond(NEW)
    assert accessor.result() == NEW
    assert word(mapping) == OLD


def test_memory_goes_with_the_file_to_another_place(
    accessor: Accessor, gmem: GuestMemfd, mapping: Mapping
) -> None:
    """The file is the memory: unbound and bound to other addresses, it shows the same content there.

    Documentation/virt/kvm/api.rst 4.142: "the inode backing a guest_memfd file represents physical memory".
    """
    for page in range(PAGES):
        accessor.write(GVA + page * PAGE_SIZE, OLD + page)
    accessor.vm.set_user_memory_region(SLOT, GPA, 0, 0)
    bind(accessor.vm, gmem, mapping.hva, gpa=GPA + SIZE)
    values = [accessor.read(GVA + SIZE + page * PAGE_SIZE) for page in range(PAGES)]
    assert values == [OLD + page for page in range(PAGES)]


@RING3
def test_the_guests_faults_are_served_from_the_file(accessor: Accessor, gmem: GuestMemfd) -> None:
    """With GUEST_MEMFD_FLAG_MMAP a fault "will always be consumed from guest_memfd", not userspace_addr.

    Documentation/virt/kvm/api.rst 4.142.
    """
    vm = accessor.vm
    mapping = vm.own(gmem.map())
    elsewhere = vm.own(Anonymous(huge="never").map(SIZE))
    put(mapping, OLD)
    put(elsewhere, NEW)
    bind(vm, gmem, elsewhere.hva)
    accessor.map(GVA, GPA, SIZE)
    assert accessor.read(GVA) == OLD
    accessor.write(GVA + 8, NEW)
    assert (word(mapping, 8), word(elsewhere, 8)) == (NEW, 0)


@RING3
def test_private_memory_serves_the_guest_too(accessor: Accessor, touch: Touch) -> None:
    """Memory that the host cannot touch holds what the guest writes, also when it is bound anew.

    Documentation/virt/kvm/api.rst 4.142: with GUEST_MEMFD_FLAG_MMAP the file serves faults "regardless of
    whether it is a shared or a private fault".
    """
    vm = accessor.vm
    gmem = create(vm, GUEST_MEMFD_FLAG_MMAP)
    elsewhere = vm.own(Anonymous(huge="never").map(SIZE))
    bind(vm, gmem, elsewhere.hva)
    accessor.map(GVA, GPA, 2 * SIZE)
    accessor.write(GVA + PAGE_SIZE, OLD)
    assert accessor.read(GVA + PAGE_SIZE) == OLD
    assert word(elsewhere, PAGE_SIZE) == 0
    assert touch(gmem, SIZE, PAGE_SIZE)[0] < 0
    vm.set_user_memory_region(SLOT, GPA, 0, 0)
    bind(vm, gmem, elsewhere.hva, gpa=GPA + SIZE)
    assert accessor.read(GVA + SIZE + PAGE_SIZE) == OLD


@pytest.mark.parametrize("flags", [0, GUEST_MEMFD_FLAG_INIT_SHARED], ids=["no-flags", "init-shared"])
def test_without_mmap_shared_memory_is_userspace_addr(accessor: Accessor, flags: int) -> None:
    """Without GUEST_MEMFD_FLAG_MMAP memory that is shared "consumes userspace_addr", not the guest_memfd.

    Documentation/virt/kvm/api.rst 4.140: "At VM creation time, all memory is shared".
    """
    vm = accessor.vm
    gmem = create(vm, flags)
    memory = vm.own(Anonymous(huge="never").map(SIZE))
    bind(vm, gmem, memory.hva)
    accessor.map(GVA, GPA, SIZE)
    put(memory, OLD)
    assert accessor.read(GVA) == OLD
    accessor.write(GVA + 8, NEW)
    assert word(memory, 8) == NEW
    gmem.punch_hole()
    assert (accessor.read(GVA), accessor.read(GVA + 8)) == (OLD, NEW)


@RING3
def test_closing_the_file_takes_the_memory_away(accessor: Accessor, gmem: GuestMemfd) -> None:
    """When the last reference to the file is gone, the guest's access is a memory fault (EFAULT).

    Documentation/virt/kvm/api.rst 8.44 KVM_CAP_MEMORY_FAULT_INFO; kvm_gmem_release(), virt/kvm/guest_memfd.c.
    """
    vm = accessor.vm
    vm.need_cap(KVM_CAP_MEMORY_FAULT_INFO)
    elsewhere = vm.own(Anonymous(huge="never").map(SIZE))
    bind(vm, gmem, elsewhere.hva)
    accessor.map(GVA, GPA, SIZE)
    accessor.write(GVA + PAGE_SIZE, OLD)
    gmem.close()
    accessor.order(GVA + PAGE_SIZE + 0x10, 8)
    got = accessor.vcpu.expect(MemoryFaultExit)
    assert (got.errno, got.gpa, got.size) == (errno.EFAULT, int(GPA) + PAGE_SIZE, PAGE_SIZE)
    # The slot without its file can be deleted; the guest then tries again, and meets no memory.
    vm.set_user_memory_region(SLOT, GPA, 0, 0)
    again = accessor.vcpu.expect(MmioExit)
    assert again.phys_addr == int(GPA) + PAGE_SIZE + 0x10
    again.respond(NEW)
    assert accessor.result() == NEW


def test_a_mapping_keeps_the_file(accessor: Accessor, gmem: GuestMemfd, mapping: Mapping) -> None:
    """A mapping is a reference to the file: the guest's memory stays when the descriptor is closed.

    Documentation/virt/kvm/api.rst 4.142: "released when the last reference is dropped"; mmap(2).
    """
    accessor.write(GVA, OLD)
    gmem.close()
    assert accessor.read(GVA) == OLD
    accessor.write(GVA + PAGE_SIZE, NEW)
    assert word(mapping, PAGE_SIZE) == NEW


def test_a_descriptor_that_was_passed_on_is_the_same_file(accessor: Accessor, gmem: GuestMemfd) -> None:
    """A descriptor received over a Unix socket is the guest_memfd: it binds and outlives the original.

    Documentation/virt/kvm/api.rst 4.142: "returns a file descriptor that refers to it"; unix(7), SCM_RIGHTS.
    """
    vm = accessor.vm
    mapping = vm.own(gmem.map())
    put(mapping, OLD)
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"x"], [gmem.fd])
        _, (received,), _, _ = socket.recv_fds(right, 1, 1)
    copy = GuestMemfd(vm, received, gmem.size, gmem.flags)
    with copy:
        gmem.close()
        bind(vm, copy, mapping.hva)
        accessor.map(GVA, GPA, SIZE)
        assert accessor.read(GVA) == OLD
        copy.punch_hole()
        assert accessor.read(GVA) == 0


def test_another_process_writes_the_guests_memory(
    accessor: Accessor, gmem: GuestMemfd, mapping: Mapping, touch: Touch
) -> None:
    """What another process writes through its own mapping of the file, the guest reads.

    Documentation/virt/kvm/api.rst 4.142: GUEST_MEMFD_FLAG_MMAP.
    """
    assert accessor.read(GVA + PAGE_SIZE) == 0
    assert touch(gmem, SIZE, PAGE_SIZE, 0x5A) == (0, "mapped\n90\n")
    assert accessor.read(GVA + PAGE_SIZE) == 0x5A
