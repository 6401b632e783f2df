# SPDX-License-Identifier: Apache-2.0
"""KVM_EXIT_MEMORY_FAULT on private memory: when it comes, and what it says."""

from __future__ import annotations

import errno

import pytest

from kvmpy import KVM_MEMORY_EXIT_FLAG_PRIVATE, PAGE_SIZE, GuestVm, Gva, MemoryFaultExit, MmioExit, VcpuThread
from selftests.private_memory.conftest import ADD_RETURN, MakeRegion, Region

pytestmark = [pytest.mark.protections("sw-protected"), pytest.mark.requires("KVM_CAP_MEMORY_FAULT_INFO")]

ACCESSES = pytest.mark.parametrize("access", ["read", "write", "fetch"])
VALUE, OTHER = 0x5A5A_0001, 0xA5A5_0002
PRIVATE_FAULT = KVM_MEMORY_EXIT_FLAG_PRIVATE


def told(got: MemoryFaultExit) -> tuple[int, int, int, int]:
    return got.errno, got.gpa, got.size, got.flags


@ACCESSES
def test_private_page_without_a_guest_memfd(make_region: MakeRegion, access: str) -> None:
    """A private access where the slot has no guest_memfd is a memory fault: EFAULT, the page, PRIVATE alone.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MEMORY_FAULT; 4.140: KVM "consumes userspace_addr vs.
    guest_memfd" by the attribute.
    """
    region = make_region(gmem=False)
    region.host(5)[:] = ADD_RETURN.ljust(PAGE_SIZE, b"\0")
    region.convert(5, 1, private=True)
    got = region.fault(access, 5, VALUE)
    assert told(got) == (errno.EFAULT, int(region.gpa(5)), PAGE_SIZE, PRIVATE_FAULT)
    assert got.private


@pytest.mark.parametrize("offset", [8, 0x7F8, PAGE_SIZE - 8])
def test_the_address_is_that_of_the_page(make_region: MakeRegion, offset: int) -> None:
    """gpa and size name the whole page, wherever in it the access was.

    Documentation/virt/kvm/api.rst 5: "the guest physical address range [gpa, gpa + size) of the fault".
    """
    region = make_region(gmem=False)
    region.convert(3, 2, private=True)
    got = region.fault("read", 4, offset=offset)
    assert (got.gpa, got.size) == (int(region.gpa(4)), PAGE_SIZE)


@ACCESSES
def test_private_page_without_a_slot(region: Region, access: str) -> None:
    """A private access where there is no slot is a memory fault and no MMIO: a device cannot be private.

    Documentation/virt/kvm/api.rst 5; kvm_handle_noslot_fault(), arch/x86/kvm/mmu/mmu.c.
    """
    region.unbind(region.parts[0])
    region.convert(2, 1, private=True)
    got = region.fault(access, 2, VALUE)
    assert told(got) == (errno.EFAULT, int(region.gpa(2)), PAGE_SIZE, PRIVATE_FAULT)


def test_shared_page_without_a_slot(region: Region) -> None:
    """The same address, shared again, is MMIO: with address, length and data of the access itself.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MMIO.
    """
    region.unbind(region.parts[0])
    region.convert(2, 1, private=True)
    region.fault("write", 2, VALUE, offset=0x20)
    region.convert(2, 1, private=False)
    again = region.vm.vcpus[0].expect(MmioExit)
    assert (again.phys_addr, again.is_write, again.size) == (int(region.gpa(2)) + 0x20, True, 8)
    assert again.value == VALUE
    region.result()


def test_an_access_across_pages_faults_on_the_private_one(make_region: MakeRegion) -> None:
    """An access that begins in a shared page and ends in a private one reports the private page.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MEMORY_FAULT.
    """
    region = make_region(gmem=False)
    region.convert(6, 1, private=True)
    got = region.fault("read", 5, offset=PAGE_SIZE - 4)
    assert (got.gpa, got.flags) == (int(region.gpa(6)), PRIVATE_FAULT)


def test_an_instruction_across_pages_faults_on_the_private_one(make_region: MakeRegion) -> None:
    """An instruction whose last bytes are private and out of reach reports their page.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MEMORY_FAULT.
    """
    region = make_region(gmem=False)
    region.host(5)[-6:] = ADD_RETURN[:6]
    region.convert(6, 1, private=True)
    got = region.fault("fetch", 5, offset=PAGE_SIZE - 6)
    assert (got.gpa, got.flags) == (int(region.gpa(6)), PRIVATE_FAULT)


def test_a_page_table_that_is_private(make_region: MakeRegion) -> None:
    """A page table in private memory that nothing backs is reported as its page, not as the page looked for.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MEMORY_FAULT; the CPU walks guest page tables by
    guest-physical address.
    """
    region = make_region(gmem=False)
    vm: GuestVm = region.vm
    elsewhere = Gva(0x6000_0000_0000)
    root = vm.memory.view(vm.pages.root, PAGE_SIZE)
    index = int(elsewhere) >> 39 & 511
    assert not any(root[8 * index : 8 * index + 8])
    root[8 * index : 8 * index + 8] = (int(region.gpa(7)) | 3).to_bytes(8, "little")
    region.convert(7, 1, private=True)
    region.agents[0].begin_read(elsewhere)
    got = vm.vcpus[0].expect(MemoryFaultExit)
    assert told(got) == (errno.EFAULT, int(region.gpa(7)), PAGE_SIZE, PRIVATE_FAULT)


def test_the_access_is_retried(make_region: MakeRegion) -> None:
    """The same fault comes again as long as its cause is there; then the access happens, once.

    Documentation/virt/kvm/api.rst 8.44: "Userspaces which attempt to resolve memory faults so that they can
    retry KVM_RUN".
    """
    region = make_region(gmem=False)
    region.host_write(5, OTHER)
    region.convert(5, 1, private=True)
    first = region.fault("write", 5, VALUE)
    vcpu = region.vm.vcpus[0]
    for _ in range(3):
        assert told(vcpu.expect(MemoryFaultExit)) == told(first)
    assert region.host_read(5) == OTHER
    region.convert(5, 1, private=False)
    region.result()
    assert region.host_read(5) == VALUE


def test_a_slot_with_a_guest_memfd_repairs_it(make_region: MakeRegion) -> None:
    """Replacing the plain slot by one with a guest_memfd lets the private access go on, in the file.

    Documentation/virt/kvm/api.rst 4.140.
    """
    region = make_region(gmem=False)
    region.convert(5, 1, private=True)
    region.fault("write", 5, VALUE)
    part = region.parts[0]
    region.unbind(part)
    part.gmem = region.vm.create_guest_memfd(part.pages * PAGE_SIZE)
    region.bind(part)
    region.result()
    assert region.read(5) == VALUE
    assert region.host_read(5) == 0


@ACCESSES
def test_the_guest_memfd_was_closed(region: Region, access: str) -> None:
    """A private page whose file is gone is a memory fault; the slot's shared pages go on.

    Documentation/virt/kvm/api.rst 4.142: "released when the last reference is dropped"; kvm_gmem_release().
    """
    region.convert(5, 1, private=True)
    region.write(5, VALUE)
    region.write(6, OTHER)
    gmem = region.parts[0].gmem
    assert gmem is not None
    gmem.close()
    got = region.fault(access, 5, VALUE)
    assert told(got) == (errno.EFAULT, int(region.gpa(5)), PAGE_SIZE, PRIVATE_FAULT)
    region.convert(5, 1, private=False)
    region.host(5)[:] = ADD_RETURN.ljust(PAGE_SIZE, b"\0")
    region.result()
    assert region.read(6) == OTHER


def running(region: Region, page: int) -> VcpuThread[MemoryFaultExit]:
    """A thread in which the guest reads a page in a loop, until a memory fault ends it."""
    region.begin_spin(page, VALUE, OTHER)
    vcpu = region.vm.vcpus[0]
    thread = VcpuThread(lambda: vcpu.expect(MemoryFaultExit), vcpu=vcpu).start()
    before = region.vm.symbol("rounds").bytes
    while region.vm.symbol("rounds").bytes == before:
        assert thread.alive
    return thread


def test_the_slot_is_deleted_under_a_running_vcpu(region: Region) -> None:
    """A vCPU that reads private memory while its slot is deleted ends in a memory fault at that page.

    Documentation/virt/kvm/api.rst 4.35, deletion of a slot; 5, KVM_EXIT_MEMORY_FAULT.
    """
    region.convert(0, 16, private=True)
    region.write(9, VALUE)
    with running(region, 9) as thread:
        region.unbind(region.parts[0])
        got = thread.join(20)
    assert got is not None
    assert told(got) == (errno.EFAULT, int(region.gpa(9)), PAGE_SIZE, PRIVATE_FAULT)


def test_the_file_is_closed_under_a_running_vcpu(region: Region) -> None:
    """A vCPU that reads private memory while its file is closed ends in a memory fault at that page.

    kvm_gmem_release(), virt/kvm/guest_memfd.c: the pages are taken from all vCPUs.
    """
    region.convert(0, 16, private=True)
    region.write(9, VALUE)
    gmem = region.parts[0].gmem
    assert gmem is not None
    with running(region, 9) as thread:
        gmem.close()
        got = thread.join(20)
    assert got is not None
    assert told(got) == (errno.EFAULT, int(region.gpa(9)), PAGE_SIZE, PRIVATE_FAULT)


def test_a_slot_that_comes_back_lets_the_vcpu_go_on(region: Region) -> None:
    """Private content belongs to the file: with the slot back, the guest goes on as if nothing had been.

    Documentation/virt/kvm/api.rst 4.142: the inode "represents physical memory".
    """
    region.convert(0, 16, private=True)
    region.write(9, VALUE)
    with running(region, 9) as thread:
        region.unbind(region.parts[0])
        assert thread.join(20) is not None
    region.bind(region.parts[0])
    region.vm.symbol("stop").u64 = 1
    assert region.result() == 0
    assert region.read(9) == VALUE


def test_holes_are_punched_under_a_running_vcpu(region: Region) -> None:
    """A vCPU that reads private memory while holes are punched there sees its value or zero, and goes on.

    Documentation/virt/kvm/api.rst 4.142: PUNCH_HOLE; no exit is needed to allocate the page anew.
    """
    region.convert(0, 16, private=True)
    region.write(9, VALUE)
    region.begin_spin(9, VALUE, OTHER)
    vcpu = region.vm.vcpus[0]
    with VcpuThread(region.result, vcpu=vcpu) as thread:
        rounds = region.vm.symbol("rounds")
        for _ in range(40):
            before = rounds.bytes
            region.punch(8, 3)
            while rounds.bytes == before:
                assert thread.alive
        region.vm.symbol("stop").u64 = 1
        strange = thread.join(20)
    assert strange == 0
    assert region.read(9) == 0
