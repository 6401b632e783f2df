# SPDX-License-Identifier: Apache-2.0
"""Conversions by KVM_SET_MEMORY_ATTRIBUTES: what the guest finds afterwards, and what the host sees."""

from __future__ import annotations

import mmap

import pytest

from kvmpy import PAGE_SIZE, SIZE_2M, Exit, MemoryFaultExit, VcpuThread
from selftests.private_memory.conftest import MakeRegion, Region

pytestmark = pytest.mark.protections("sw-protected")

HUGE = SIZE_2M // PAGE_SIZE
SHARED, PRIVATE, NEW, POISON = 0x5AED_0000_0000, 0x9217_0000_0000, 0x4E31_0000_0000, 0xCC


@pytest.mark.parametrize(
    ("first", "pages"),
    [
        (5, 1),
        (4, 2),
        (3, 16),
        (100, 256),
        (0, HUGE - 1),
        (1, HUGE - 1),
        (0, HUGE),
        (0, HUGE + 1),
        (HUGE - 1, 2),
        (HUGE // 2, HUGE),
        (HUGE, HUGE),
        (HUGE - 1, HUGE + 2),
        (0, 3 * HUGE),
    ],
    ids=[
        "4K",
        "8K",
        "64K",
        "1M",
        "2M-without-its-last-page",
        "2M-without-its-first-page",
        "2M",
        "2M-and-a-page",
        "a-page-each-of-two-2M",
        "halves-of-two-2M",
        "2M-between-2M",
        "2M-and-a-page-each-side",
        "6M",
    ],
)
def test_there_and_back(make_region: MakeRegion, first: int, pages: int) -> None:
    """A page has a shared and a private content: each stays while the other is in use, at every size.

    Documentation/virt/kvm/api.rst 4.140: KVM "consumes userspace_addr vs. guest_memfd, based on the gfn's
    KVM_MEMORY_ATTRIBUTE_PRIVATE state".
    """
    region = make_region(3 * HUGE)
    everything = region.pages
    region.fill(0, everything, SHARED)
    region.convert(first, pages, private=True)
    region.check_zero(first, pages)
    region.fill(first, pages, PRIVATE)
    for start, end in ((0, first), (first + pages, everything)):
        if start < end:
            region.check(start, end - start, SHARED + start)
    region.convert(first, pages, private=False)
    region.check(0, everything, SHARED)
    region.convert(first, pages, private=True)
    region.check(first, pages, PRIVATE)


@pytest.mark.parametrize("own_files", [True, False], ids=["a-file-each", "one-file"])
def test_across_the_border_of_slots(make_region: MakeRegion, own_files: bool) -> None:
    """One conversion covers slots side by side, also where their places in the file are exchanged.

    Documentation/virt/kvm/api.rst 4.141: attributes are of "a range of guest physical memory", not of slots.
    """
    if own_files:
        region = make_region(48, slots=[16, 16, 16])
    else:
        region = make_region(48, slots=[])
        gmem = region.vm.create_guest_memfd(48 * PAGE_SIZE)
        for number, place in enumerate((2, 0, 1)):
            region.add(number * 16, 16, gmem=gmem, offset=place * 16 * PAGE_SIZE)
    region.fill(0, 48, SHARED)
    region.convert(12, 24, private=True)
    region.fill(12, 24, PRIVATE)
    region.check(0, 12, SHARED)
    region.check(36, 12, SHARED + 36)
    region.convert(14, 4, private=False)
    region.check(14, 4, SHARED + 14)
    region.check(12, 2, PRIVATE)
    region.check(18, 18, PRIVATE + 6)


def test_across_a_gap_between_slots(make_region: MakeRegion) -> None:
    """A conversion may span addresses without a slot; the slots around the gap are converted.

    Documentation/virt/kvm/api.rst 4.141: "a range of guest physical memory".
    """
    region = make_region(48, slots=[])
    region.add(0, 16)
    region.add(32, 16)
    region.write(15, SHARED)
    region.write(32, SHARED)
    region.convert(8, 32, private=True)
    assert (region.read(15), region.read(32)) == (0, 0)
    region.convert(8, 32, private=False)
    assert (region.read(15), region.read(32)) == (SHARED, SHARED)


def test_every_second_page(make_region: MakeRegion) -> None:
    """Pages of both kinds can alternate through 2 MiB, and change places.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region = make_region(HUGE)
    region.fill(0, HUGE, SHARED)
    for page in range(1, HUGE, 2):
        region.convert(page, 1, private=True)
    region.fill(0, HUGE, PRIVATE)
    for page in range(HUGE):
        region.convert(page, 1, private=page % 2 == 0)
    for page in (0, 1, 254, 255, 510, 511):
        assert region.read(page) == (0 if page % 2 == 0 else SHARED + page), f"page {page}"


@pytest.mark.parametrize("private", [True, False], ids=["private", "shared"])
def test_a_conversion_to_what_it_is(region: Region, private: bool) -> None:
    """Converting pages to what they are already changes nothing, alone or within a range that does change.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region.convert(4, 8, private=private)
    region.fill(4, 8, NEW)
    region.convert(6, 2, private=private)
    region.check(4, 8, NEW)
    region.convert(0, 16, private=private)
    region.check(4, 8, NEW)


def test_the_host_sees_shared_content_alone(region: Region) -> None:
    """What the guest writes into private pages appears nowhere in the slot's host memory.

    Documentation/virt/kvm/api.rst 4.140.
    """
    region.fill(0, 16, SHARED)
    region.convert(0, 16, private=True)
    before = bytes(region.parts[0].mapping.view(0, 16 * PAGE_SIZE))
    region.fill(0, 16, PRIVATE)
    assert bytes(region.parts[0].mapping.view(0, 16 * PAGE_SIZE)) == before
    assert region.host_read(7) == SHARED + 7


def test_the_host_cannot_change_private_content(region: Region) -> None:
    """What the host writes into the shared memory of a private page is seen when the page is shared again.

    Documentation/virt/kvm/api.rst 4.140.
    """
    region.convert(0, 16, private=True)
    region.fill(0, 16, PRIVATE)
    for page in range(16):
        region.host(page)[:] = bytes([POISON]) * PAGE_SIZE
    region.check(0, 16, PRIVATE)
    region.convert(3, 1, private=False)
    assert region.read(3) == int.from_bytes(bytes([POISON]) * 8, "little")
    region.check(4, 12, PRIVATE + 4)


def test_private_memory_begins_as_zeroes(region: Region) -> None:
    """A page that becomes private for the first time is zero, to its last byte, whatever it held shared.

    Documentation/virt/kvm/api.rst 4.142: "roughly analogous to files created via memfd_create()".
    """
    region.host(5)[:] = b"\xff" * PAGE_SIZE
    region.convert(5, 1, private=True)
    assert [region.read(5, offset) for offset in range(0, PAGE_SIZE, 248)] == [0] * 17
    assert region.read(5, PAGE_SIZE - 8) == 0


@pytest.mark.parametrize("state", ["private", "shared"])
def test_a_hole_is_zero_whenever_it_was_punched(region: Region, state: str) -> None:
    """A hole forgets private content, punched while the page is private or shared; shared content stays.

    Documentation/virt/kvm/api.rst 4.142: PUNCH_HOLE.
    """
    region.fill(0, 16, SHARED)
    region.convert(0, 16, private=True)
    region.fill(0, 16, PRIVATE)
    if state == "shared":
        region.convert(0, 16, private=False)
    region.punch(4, 5)
    if state == "shared":
        region.check(0, 16, SHARED)
        region.convert(0, 16, private=True)
    region.check(0, 4, PRIVATE)
    region.check_zero(4, 5)
    region.check(9, 7, PRIVATE + 9)
    region.convert(0, 16, private=False)
    region.check(0, 16, SHARED)


def test_a_hole_across_slots_and_files(make_region: MakeRegion) -> None:
    """Files are punched one by one: pages of the others keep their content.

    Documentation/virt/kvm/api.rst 4.142.
    """
    region = make_region(32, slots=[16, 16])
    region.convert(0, 32, private=True)
    region.fill(0, 32, PRIVATE)
    first, second = (part.gmem for part in region.parts)
    assert first is not None
    assert second is not None
    second.punch_hole(0, 4 * PAGE_SIZE)
    region.check(0, 16, PRIVATE)
    region.check_zero(16, 4)
    region.check(20, 12, PRIVATE + 20)
    first.punch_hole()
    region.check_zero(0, 20)
    region.check(20, 12, PRIVATE + 20)


def test_allocation_in_advance_changes_nothing(region: Region) -> None:
    """fallocate() on pages in use leaves them; on others it makes zeroes, also while they are shared.

    fallocate(2), Allocating disk space.
    """
    region.convert(0, 8, private=True)
    region.fill(0, 8, PRIVATE)
    region.fill(8, 8, SHARED)
    region.allocate(0, 16)
    region.check(0, 8, PRIVATE)
    region.check(8, 8, SHARED)
    region.convert(8, 8, private=True)
    region.check_zero(8, 8)


def test_shared_memory_can_be_freed_while_it_is_private(region: Region) -> None:
    """Host memory behind private pages may be given back (MADV_DONTNEED): the guest does not notice.

    Documentation/virt/kvm/api.rst 4.140: the host mapping "is not required to be valid/populated".
    """
    region.fill(0, 16, SHARED)
    region.convert(0, 8, private=True)
    region.fill(0, 8, PRIVATE)
    region.parts[0].mapping.madvise(mmap.MADV_DONTNEED, 0, 8 * PAGE_SIZE)
    region.check(0, 8, PRIVATE)
    region.check(8, 8, SHARED + 8)
    region.convert(0, 8, private=False)
    region.check_zero(0, 8)


def test_attributes_outlive_the_slot(region: Region) -> None:
    """Attributes belong to addresses: a slot that is deleted and made anew finds them, and its content.

    Documentation/virt/kvm/api.rst 4.141 and 4.142.
    """
    region.fill(0, 16, SHARED)
    region.convert(4, 4, private=True)
    region.fill(4, 4, PRIVATE)
    region.unbind(region.parts[0])
    region.bind(region.parts[0])
    region.check(0, 4, SHARED)
    region.check(4, 4, PRIVATE)
    region.check(8, 8, SHARED + 8)


def test_attributes_before_the_slot(make_region: MakeRegion) -> None:
    """Attributes of addresses that have no slot yet hold for the slot that comes.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region = make_region(16, slots=[])
    region.convert(4, 4, private=True)
    part = region.add(0, 16)
    for page in range(16):
        region.host_write(page, SHARED + page)
    assert [region.read(page) for page in range(2, 6)] == [SHARED + 2, SHARED + 3, 0, 0]
    assert part.gmem is not None


def test_content_moves_with_the_file(make_region: MakeRegion) -> None:
    """Private content follows its file to other addresses, if those are private; attributes do not follow.

    Documentation/virt/kvm/api.rst 4.142: the inode "represents physical memory".
    """
    region = make_region(32, slots=[16])
    region.convert(0, 16, private=True)
    region.fill(0, 16, PRIVATE)
    part = region.parts[0]
    region.unbind(part)
    part.first = 16
    region.bind(part)
    assert region.read(16) == 0
    region.convert(16, 16, private=True)
    region.check(16, 16, PRIVATE)


def test_conversions_while_the_guest_reads(region: Region) -> None:
    """A vCPU that reads a page during conversions sees one of its two contents, never anything else.

    Documentation/virt/kvm/api.rst 4.140; an access that races with a conversion may end in a memory fault.
    """
    region.write(9, SHARED)
    region.convert(9, 1, private=True)
    region.write(9, PRIVATE)
    region.begin_spin(9, SHARED, PRIVATE)
    vcpu = region.vm.vcpus[0]

    def race(exit_: Exit) -> bool:
        assert isinstance(exit_, MemoryFaultExit)
        assert exit_.gpa == int(region.gpa(9))
        return True

    with VcpuThread(lambda: region.agents[0].value(race), vcpu=vcpu) as thread:
        rounds = region.vm.symbol("rounds")
        for turn in range(60):
            before = rounds.bytes
            region.convert(8 + turn % 2, 2 + turn % 3, private=turn % 2 == 0)
            while rounds.bytes == before:
                assert thread.alive
        region.vm.symbol("stop").u64 = 1
        strange = thread.join(20)
    assert strange == 0
    region.convert(9, 1, private=True)
    assert region.read(9) == PRIVATE
