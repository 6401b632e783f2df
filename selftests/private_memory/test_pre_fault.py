# SPDX-License-Identifier: Apache-2.0
"""KVM_PRE_FAULT_MEMORY: what it maps, what it leaves, what it refuses."""

from __future__ import annotations

import errno
import functools
import time

import pytest

from kvmpy import (
    KVM_CAP_PRE_FAULT_MEMORY,
    PAGE_SIZE,
    SIZE_2M,
    KvmError,
    MissingError,
    VcpuThread,
    Vm,
    ioctls,
    kvm_pre_fault_memory,
    refused,
)
from selftests.private_memory.conftest import MakeRegion, Region

pytestmark = [pytest.mark.protections("sw-protected"), pytest.mark.requires("KVM_CAP_PRE_FAULT_MEMORY")]

HUGE = SIZE_2M // PAGE_SIZE
VALUE = 0x9E7F_0000
KINDS = pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])


def pre_fault(region: Region, first: int, pages: int, *, size: int | None = None) -> tuple[int, int]:
    """Pre-fault pages by the first vCPU: the page that is left to do, and the bytes."""
    region.launch()
    wanted = pages * PAGE_SIZE if size is None else size
    gpa, left = region.vm.vcpus[0].pre_fault_memory(region.gpa(first), wanted)
    return (gpa - int(region.gpa(0))) // PAGE_SIZE, left


def refuse(region: Region, gpa: int, size: int, number: int, flags: int = 0) -> None:
    """Pre-fault what KVM must refuse with errno *number*, and see that it counts nothing as done."""
    region.launch()
    arg = kvm_pre_fault_memory(gpa=gpa, size=size, flags=flags)
    with refused(number, about=f"flags {flags:#x}"):
        region.vm.vcpus[0].ioctl(ioctls.KVM_PRE_FAULT_MEMORY, arg)
    assert (arg.gpa, arg.size) == (gpa, size)


@KINDS
def test_the_guest_takes_no_more_faults(make_region: MakeRegion, private: bool) -> None:
    """After it, the guest reads the range without a single page fault.

    Documentation/virt/kvm/api.rst 4.143: it "populates KVM's stage-2 page tables".
    """
    region = make_region(64)
    region.convert(0, 64, private=private)
    # Whatever the guest needs to do anything at all is mapped by then.
    region.check_zero(63, 1)
    assert pre_fault(region, 0, 63) == (63, 0)
    before = region.stats()["pf_taken"]
    region.check_zero(0, 63)
    assert region.stats()["pf_taken"] == before


@KINDS
def test_without_it_every_page_faults(make_region: MakeRegion, private: bool) -> None:
    """The same walk without it takes a fault for each page: the test above can see them.

    Documentation/virt/kvm/api.rst 4.143.
    """
    region = make_region(64)
    region.convert(0, 64, private=private)
    region.check_zero(63, 1)
    before = region.stats()["pf_taken"]
    region.check_zero(0, 63)
    assert region.stats()["pf_taken"] == before + 63


@KINDS
def test_pages_appear_in_the_statistics(make_region: MakeRegion, private: bool) -> None:
    """Each page that it maps is one more of pages_4k, once: doing it twice adds nothing.

    Documentation/virt/kvm/api.rst 4.143; vm->stat.pages_4k.
    """
    region = make_region(64)
    region.convert(0, 64, private=private)
    region.launch()
    before = region.stats()["pages_4k"]
    assert pre_fault(region, 8, 40) == (48, 0)
    assert region.stats()["pages_4k"] == before + 40
    assert pre_fault(region, 8, 40) == (48, 0)
    assert region.stats()["pages_4k"] == before + 40


def test_a_range_of_both_kinds(region: Region) -> None:
    """Private and shared pages of one range are mapped each from its own memory.

    Documentation/virt/kvm/api.rst 4.143: "as if the vCPU generated a stage-2 read page fault".
    """
    for page in range(16):
        region.host_write(page, VALUE + page)
    region.convert(4, 4, private=True)
    assert pre_fault(region, 0, 16) == (16, 0)
    assert [region.read(page) for page in (3, 4, 7, 8)] == [VALUE + 3, 0, 0, VALUE + 8]


@KINDS
def test_content_stays(region: Region, private: bool) -> None:
    """It maps what is there: content of either kind is not touched.

    Documentation/virt/kvm/api.rst 4.143.
    """
    region.convert(0, 16, private=private)
    region.fill(0, 16, VALUE)
    region.unbind(region.parts[0])
    region.bind(region.parts[0])
    assert pre_fault(region, 0, 16) == (16, 0)
    region.check(0, 16, VALUE)


@KINDS
def test_the_end_of_the_slot(region: Region, private: bool) -> None:
    """A range that leaves the slot is done up to there; what is left is told, and fails when it is asked for.

    Documentation/virt/kvm/api.rst 4.143: "0 if at least one page is processed"; ENOENT.
    """
    region.convert(0, 16, private=private)
    assert pre_fault(region, 12, 8) == (16, 4 * PAGE_SIZE)
    refuse(region, int(region.gpa(16)), 4 * PAGE_SIZE, errno.ENOENT)


def test_private_addresses_behind_the_slot(region: Region) -> None:
    """Where no slot is, a private address is EFAULT: it could not be MMIO either.

    kvm_handle_noslot_fault(), arch/x86/kvm/mmu/mmu.c.
    """
    region.convert(16, 4, private=True)
    refuse(region, int(region.gpa(16)), PAGE_SIZE, errno.EFAULT)


def test_private_page_without_a_guest_memfd(make_region: MakeRegion) -> None:
    """A private page that nothing backs is EFAULT; shared pages before it are done.

    Documentation/virt/kvm/api.rst 4.143.
    """
    region = make_region(gmem=False)
    region.convert(4, 1, private=True)
    assert pre_fault(region, 2, 6) == (4, 4 * PAGE_SIZE)
    refuse(region, int(region.gpa(4)), PAGE_SIZE, errno.EFAULT)
    assert pre_fault(region, 5, 3) == (8, 0)


def test_across_slots(make_region: MakeRegion) -> None:
    """A range may cover several slots.

    Documentation/virt/kvm/api.rst 4.143.
    """
    region = make_region(48, slots=[16, 16, 16])
    region.convert(16, 24, private=True)
    assert pre_fault(region, 0, 48) == (48, 0)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0x8000_0001, PAGE_SIZE),
        (0x8000_0FFF, PAGE_SIZE),
        (0x8000_0000, 1),
        (0x8000_0000, PAGE_SIZE - 1),
        (0x8000_0000, PAGE_SIZE + 8),
        (0x8000_0000, 0),
        (0x8000_0000, (1 << 64) - 0x8000_0000),
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE),
    ],
    ids=["gpa+1", "gpa-1", "byte", "size-1", "size+8", "zero", "overflow", "last-page"],
)
def test_bad_ranges_are_refused(region: Region, gpa: int, size: int) -> None:
    """gpa and size "not page aligned, causes an overflow, or size is zero": EINVAL.

    Documentation/virt/kvm/api.rst 4.143.
    """
    refuse(region, gpa, size, errno.EINVAL)


def test_flags_must_be_zero(region: Region) -> None:
    """ "flags must currently be zero": each bit is EINVAL.

    Documentation/virt/kvm/api.rst 4.143.
    """
    for bit in range(64):
        refuse(region, int(region.gpa(0)), PAGE_SIZE, errno.EINVAL, 1 << bit)


def test_an_argument_out_of_reach(region: Region) -> None:
    """ "The parameter address was invalid": EFAULT.

    Documentation/virt/kvm/api.rst 4.143.
    """
    region.launch()
    assert region.vm.vcpus[0].ioctl_raw(ioctls.KVM_PRE_FAULT_MEMORY, 8) == (-1, errno.EFAULT)


def test_it_does_not_break_copy_on_write(region: Region) -> None:
    """Faults are those of reads: memory that was never written stays unwritten, and the guest reads zero.

    Documentation/virt/kvm/api.rst 4.143: "doesn't break CoW".
    """
    mapping = region.parts[0].mapping
    assert pre_fault(region, 0, 16) == (16, 0)
    region.check_zero(0, 16)
    region.write(3, VALUE)
    assert region.host_read(3) == VALUE
    assert bytes(mapping.view(4 * PAGE_SIZE, PAGE_SIZE)) == bytes(PAGE_SIZE)


def test_after_it_a_page_converts_as_ever(region: Region) -> None:
    """Pages that were mapped in advance are taken away by a conversion like others.

    Documentation/virt/kvm/api.rst 4.141 and 4.143.
    """
    region.host_write(5, VALUE)
    region.convert(0, 16, private=True)
    assert pre_fault(region, 0, 16) == (16, 0)
    region.convert(5, 1, private=False)
    assert region.read(5) == VALUE
    assert pre_fault(region, 0, 16) == (16, 0)
    region.convert(5, 1, private=True)
    assert region.read(5) == 0


def test_holes_after_it(region: Region) -> None:
    """A page that was mapped in advance and punched is allocated anew by the guest's access.

    Documentation/virt/kvm/api.rst 4.142: PUNCH_HOLE.
    """
    region.convert(0, 16, private=True)
    region.fill(0, 16, VALUE)
    assert pre_fault(region, 0, 16) == (16, 0)
    region.punch(5, 1)
    assert [region.read(page) for page in (4, 5, 6)] == [VALUE + 4, 0, VALUE + 6]


def test_any_vcpu_may_do_it(make_region: MakeRegion) -> None:
    """What one vCPU mapped, the others need not: vCPUs share the tables.

    Documentation/virt/kvm/api.rst 4.143: "multiple vCPUs might share the page tables".
    """
    region = make_region(64, vcpus=2)
    region.convert(0, 64, private=True)
    region.check_zero(63, 1)
    region.vm.vcpus[1].pre_fault_memory(region.gpa(0), 63 * PAGE_SIZE)
    before = region.stats()["pf_taken"]
    region.check_zero(0, 63)
    assert region.stats()["pf_taken"] == before


def test_vcpus_in_parallel(make_region: MakeRegion) -> None:
    """Several vCPUs may do it for one range at once: every page is mapped once.

    Documentation/virt/kvm/api.rst 4.143: "the ioctl can be called in parallel".
    """
    region = make_region(256, vcpus=4)
    region.convert(0, 256, private=True)
    region.launch()
    before = region.stats()["pages_4k"]

    def body(number: int) -> int:
        gpa, left = int(region.gpa(0)), 256 * PAGE_SIZE
        while left:
            gpa, left = region.vm.vcpus[number].pre_fault_memory(gpa, left)
        return gpa

    threads = [VcpuThread(functools.partial(body, number)).start() for number in range(4)]
    assert [thread.join(30) for thread in threads] == [int(region.gpa(256))] * 4
    assert region.stats()["pages_4k"] == before + 256


def test_the_slot_goes_meanwhile(make_region: MakeRegion) -> None:
    """While the slot is deleted and made anew it fails with ENOENT, EAGAIN or EFAULT, or does a part; in the
    end all is mapped.

    Documentation/virt/kvm/api.rst 4.143; kvm_mmu_faultin_pfn(): EAGAIN for a slot that is being deleted.
    """
    region = make_region(256)
    region.convert(0, 128, private=True)
    region.launch()
    vcpu = region.vm.vcpus[0]
    part = region.parts[0]

    def body() -> int:
        calls, gpa, left = 0, int(region.gpa(0)), 256 * PAGE_SIZE
        deadline = time.monotonic() + 30
        while left and time.monotonic() < deadline:
            calls += 1
            try:
                after, rest = vcpu.pre_fault_memory(gpa, left)
            except KvmError as error:
                if error.errno not in (errno.ENOENT, errno.EAGAIN, errno.EFAULT):
                    raise
                continue
            assert rest < left
            assert after + rest == gpa + left
            gpa, left = after, rest
        return left

    with VcpuThread(body) as thread:
        for _ in range(5):
            region.unbind(part)
            region.bind(part)
        assert thread.join(60) == 0
    assert pre_fault(region, 0, 256) == (256, 0)


def test_the_vm_says_that_it_can(region: Region) -> None:
    """KVM_CAP_PRE_FAULT_MEMORY is told by VM and system alike.

    Documentation/virt/kvm/api.rst 4.143.
    """
    vm: Vm = region.vm
    assert vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY) == 1
    assert vm.kvm.check_extension(KVM_CAP_PRE_FAULT_MEMORY) == 1


PLAIN = pytest.mark.protections("none", "cbit", "sw-protected")


@PLAIN
def test_plain_slots(make_region: MakeRegion) -> None:
    """It works on slots without guest_memfd, for VMs of every type: no fault afterwards, ENOENT behind them.

    Documentation/virt/kvm/api.rst 4.143.
    """
    region = make_region(64, gmem=False, mapped=65)
    region.check_zero(63, 1)
    assert pre_fault(region, 0, 65) == (64, PAGE_SIZE)
    before = region.stats()["pf_taken"]
    region.check_zero(0, 64)
    assert region.stats()["pf_taken"] == before
    refuse(region, int(region.gpa(64)), PAGE_SIZE, errno.ENOENT)


@PLAIN
@pytest.mark.parametrize(("first", "pages"), [(0, HUGE), (100, 1), (0, 1), (HUGE - 1, 1), (10, HUGE - 10)])
def test_one_large_page(make_region: MakeRegion, first: int, pages: int) -> None:
    """Any part of 2 MiB that the host has as one page is mapped by one page of 2 MiB; only the part is told.

    Documentation/virt/kvm/api.rst 4.143: "the input values are updated to point to the remaining range".
    """
    region = make_region(HUGE, gmem=False, huge="thp")
    region.host_write(0, VALUE)
    region.launch()
    before = region.stats()
    assert pre_fault(region, first, pages) == (first + pages, 0)
    after = region.stats()
    if after["pages_2m"] == before["pages_2m"]:
        raise MissingError(
            "transparent huge pages", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )
    assert (after["pages_2m"], after["pages_4k"]) == (before["pages_2m"] + 1, before["pages_4k"])
