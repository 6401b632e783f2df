# SPDX-License-Identifier: Apache-2.0
"""Large pages and conversions, by KVM's own counters of what it maps, and the host's direct map."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, SIZE_2M, GuestVm, MakeVm, MissingError
from kvmpy.coco.sev_platform import large_guest_memfd
from selftests import direct_map
from selftests.private_memory.conftest import MakeRegion, Region

HUGE = SIZE_2M // PAGE_SIZE
VALUE = 0x1A6E_0000

sw_protected = pytest.mark.protections("sw-protected")


def mapped(region: Region) -> tuple[int, int]:
    """How many pages KVM has mapped for the VM: 4 KiB, 2 MiB."""
    stats = region.stats()
    return stats["pages_4k"], stats["pages_2m"]


def huge_region(make_region: MakeRegion, huge_pages: int = 1) -> tuple[Region, tuple[int, int]]:
    """A range of whole 2 MiB pages, in use by the guest, and what was mapped before it was.

    MissingError where the host gave no huge page.
    """
    region = make_region(huge_pages * HUGE, huge="thp")
    for page in range(0, huge_pages * HUGE, HUGE):
        region.host_write(page, VALUE)
    # A page of somewhere else, so that what the guest itself needs is mapped.
    region.launch()
    before = mapped(region)
    region.check_zero(1, HUGE - 1)
    for page in range(0, huge_pages * HUGE, HUGE):
        assert region.read(page) == VALUE
    small, large = mapped(region)
    if large - before[1] < huge_pages:
        raise MissingError(
            "transparent huge pages for this process",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, and free memory in pieces of 2 MiB",
        )
    assert small - before[0] < HUGE
    return region, (small, large)


@sw_protected
def test_shared_memory_is_mapped_in_large_pages(make_region: MakeRegion) -> None:
    """Shared memory of a VM that can have private memory is mapped in 2 MiB pages like that of any VM.

    vm->stat.pages_2m, arch/x86/include/asm/kvm_host.h.
    """
    region, _ = huge_region(make_region, 2)
    assert region.stats()["pages_2m"] >= 2


@sw_protected
@pytest.mark.parametrize("page", [0, 1, 300, HUGE - 1], ids=["first", "second", "middle", "last"])
def test_one_private_page_splits_a_large_one(make_region: MakeRegion, page: int) -> None:
    """A page of 4 KiB that becomes private splits its 2 MiB: 511 small shared pages beside it.

    Documentation/virt/kvm/api.rst 4.141; arch/x86/kvm/mmu/mmu.c, KVM_LPAGE_MIXED_FLAG.
    """
    region, (small, large) = huge_region(make_region)
    region.convert(page, 1, private=True)
    assert mapped(region)[1] == large - 1
    region.check_zero(1, HUGE - 1)
    region.read(0)
    assert mapped(region) == (small + HUGE, large - 1)
    assert region.read(page) == 0


@sw_protected
def test_the_last_conversion_joins_it_again(make_region: MakeRegion) -> None:
    """When the last private page of 2 MiB is shared again, the guest's next access maps 2 MiB at once.

    Documentation/virt/kvm/api.rst 4.141; arch/x86/kvm/mmu/mmu.c, kvm_arch_post_set_memory_attributes().
    """
    region, before = huge_region(make_region)
    for page in (17, 400):
        region.convert(page, 1, private=True)
    region.check_zero(1, HUGE - 1)
    region.convert(17, 1, private=False)
    region.read(17)
    assert mapped(region)[1] == before[1] - 1
    region.convert(400, 1, private=False)
    region.read(400)
    assert mapped(region) == before
    assert region.read(0) == VALUE


@sw_protected
def test_only_its_own_2_mib_are_split(make_region: MakeRegion) -> None:
    """A private page leaves the large pages before and behind its own as they are.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region, (_, large) = huge_region(make_region, 3)
    region.convert(HUGE + 5, 1, private=True)
    region.read(HUGE + 5)
    region.read(0)
    region.read(2 * HUGE)
    assert region.stats()["pages_2m"] == large - 1


@sw_protected
@pytest.mark.parametrize(
    ("first", "pages", "left"),
    [(0, HUGE, 2), (HUGE // 2, HUGE, 1), (HUGE - 1, 2, 1), (0, 3 * HUGE, 0), (HUGE - 1, HUGE + 2, 0)],
    ids=["2M", "halves", "a-page-each", "6M", "2M-and-a-page-each-side"],
)
def test_ranges_split_at_their_ends(make_region: MakeRegion, first: int, pages: int, left: int) -> None:
    """Large pages that a range covers go, those that it cuts are split, all others stay.

    Documentation/virt/kvm/api.rst 4.141.  Private pages are large where the guest_memfd has large folios.
    """
    region, (_, large) = huge_region(make_region, 3)
    region.convert(first, pages, private=True)
    for page in (0, HUGE, 2 * HUGE):
        region.read(page)
    covered = max(0, (first + pages) // HUGE - -(-first // HUGE)) if large_guest_memfd() else 0
    assert region.stats()["pages_2m"] == large - 3 + left + covered
    region.convert(first, pages, private=False)
    for page in (0, first, first + pages - 1):
        region.read(page)
    for page in (0, HUGE, 2 * HUGE):
        assert region.read(page) == VALUE
    assert region.stats()["pages_2m"] == large


@sw_protected
def test_what_is_private_is_mapped_once(make_region: MakeRegion) -> None:
    """2 MiB of private memory are 2 MiB of mappings, in pages of either size; a hole takes its page out.

    vm->stat.pages_4k and pages_2m; Documentation/virt/kvm/api.rst 4.142.
    """
    region = make_region(HUGE)
    region.convert(0, HUGE, private=True)
    region.fill(0, HUGE, VALUE)
    region.check(0, HUGE, VALUE)

    def size() -> int:
        small, large = mapped(region)
        return small * PAGE_SIZE + large * SIZE_2M

    everything = size()
    region.punch(100, 1)
    assert size() <= everything - PAGE_SIZE
    region.check(0, 100, VALUE)
    assert region.read(100) == 0
    region.check(101, HUGE - 101, VALUE + 101)
    assert size() == everything
    region.convert(0, HUGE, private=False)
    assert size() == everything - SIZE_2M


@sw_protected
def test_a_shared_hole_in_private_memory(make_region: MakeRegion) -> None:
    """One 4 KiB page of private 2 MiB that is shared and private again: mappings are as before.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region = make_region(HUGE)
    region.convert(0, HUGE, private=True)
    region.fill(0, HUGE, VALUE)
    region.check(0, HUGE, VALUE)
    before = mapped(region)
    region.convert(100, 1, private=False)
    region.host_write(100, 1)
    assert region.read(100) == 1
    region.check(0, 100, VALUE)
    region.check(101, HUGE - 101, VALUE + 101)
    assert region.stats()["pages_2m"] == 0
    region.convert(100, 1, private=True)
    region.check(0, HUGE, VALUE)
    assert mapped(region) == before


# The host's own mapping of all memory, on any host.

TOUCH = """
#include <kvmpy/guest.h>

void guest_main(u64 address, u64 size)
{
	for (u64 i = 0; i < size; i += 4096)
		*(volatile u64 *)(address + i) = i;
}
"""


def live(make_vm: MakeVm) -> None:
    vm: GuestVm = make_vm(TOUCH)
    size = 4 << 20
    gva = vm.alloc(size)
    vm.vcpus[0].set_entry("guest_main", int(gva), size)
    vm.launch()
    vm.vcpus[0].run_to_done()
    vm.close()


def test_the_direct_map_keeps_its_size(make_vm: MakeVm) -> None:
    """Splits turn large pages of the direct map into small ones and lose none: the sum stays.

    /proc/meminfo, DirectMap4k, DirectMap2M and DirectMap1G (arch/x86/mm/pat/set_memory.c).
    """
    before = sum(direct_map.sizes().values())
    live(make_vm)
    assert sum(direct_map.sizes().values()) == before


def test_split_counters_do_not_go_back(make_vm: MakeVm) -> None:
    """The counters of direct-map splits grow or stand still.

    /proc/vmstat, direct_map_level2_splits and direct_map_level3_splits (Linux commit 575299ea18a8).
    """
    before = direct_map.splits()
    live(make_vm)
    after = direct_map.splits()
    assert after.keys() == before.keys()
    assert all(after[name] >= before[name] for name in before)


def test_only_encryption_splits_the_direct_map(make_vm: MakeVm, protection: str) -> None:
    """Memory of a VM that the CPU does not encrypt stays in large pages of the direct map.

    /proc/vmstat; SEV-SNP needs the host's and the RMP's page sizes to agree, other VMs nothing of the kind.
    """
    from kvmpy.coco import ladder

    if ladder.get(protection).traits.really_encrypts:
        pytest.skip(f"protection {protection} encrypts: its pages may be split")
    # Others on this host may split pages meanwhile, but hardly three times in a row.
    for _ in range(3):
        before = direct_map.splits()
        live(make_vm)
        if direct_map.splits() == before:
            return
    assert direct_map.splits() == before
