# SPDX-License-Identifier: Apache-2.0
"""Translations: leaves of all sizes, levels, and the edges of the address space."""

from __future__ import annotations

import pytest

from kvmpy import CR4, PAGE_SIZE, SIZE_1G, SIZE_2M, Anonymous, Gpa, Gva
from selftests.paging.conftest import MakeProber, Prober

GVA = Gva(0x6000_0000_0000)
GPA = Gpa(0x8000_0000)
MARK = 0x4D41_524B_0000_0000


def test_a_page_table_entry_translates_its_page(prober: Prober) -> None:
    """Each page shows the memory that its own entry names, whatever the order of pages in memory.

    Intel SDM volume 3, 4.5.4 (4-KByte pages); Documentation/virt/kvm/x86/mmu.rst.
    """
    pages = 32
    for number in range(pages):
        page = number * 13 % pages
        prober.page(GVA + page * PAGE_SIZE, MARK + page)
    for page in range(pages):
        assert prober.read(GVA + page * PAGE_SIZE) == MARK + page


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(SIZE_2M, id="2M"),
        pytest.param(SIZE_1G, id="1G", marks=pytest.mark.requires("cpuid:pdpe1gb")),
    ],
)
def test_a_large_leaf_translates_all_of_its_pages(make_prober: MakeProber, ring: int, size: int) -> None:
    """A large leaf maps one piece of memory of its size, from the first byte to the last.

    Intel SDM volume 3, 4.5.4 (2-MByte and 1-GByte pages).
    """
    prober = make_prober(ring=ring, memory=max(64 << 20, 3 * size))
    vm = prober.vm
    # A launch hands private pages over one by one: 2 MiB are enough of that.
    gva = vm.alloc(size, gva=GVA, page_size=size, user=True, private=None if size < SIZE_1G else False)
    assert vm.pages.walk(gva).page_size == size
    gpa = vm.gva_to_gpa(gva)
    offsets = [*range(0, size, size // 32), PAGE_SIZE, size - PAGE_SIZE, size - 8]
    for offset in offsets:
        vm.memory.write(gpa + offset, (MARK + offset).to_bytes(8, "little"))
    for offset in offsets:
        assert prober.read(gva + offset) == MARK + offset
    assert prober.write(gva + size - 16, MARK) is None
    assert prober.read(gva + size - 16) == MARK


def test_leaves_of_two_sizes_are_the_same_memory(prober: Prober) -> None:
    """Memory that is mapped by a large leaf and by small ones is the same through both.

    Intel SDM volume 3, 4.5.4.
    """
    vm = prober.vm
    large = vm.alloc(SIZE_2M, gva=GVA, page_size=SIZE_2M, user=True)
    small = GVA + SIZE_2M
    vm.map(small, vm.gva_to_gpa(large), SIZE_2M, page_size=PAGE_SIZE, user=True)
    assert vm.pages.walk(small).page_size == PAGE_SIZE
    for offset in (0, 5 * PAGE_SIZE + 0x18, SIZE_2M - 8):
        assert prober.write(large + offset, MARK + offset) is None
        assert prober.read(small + offset) == MARK + offset
        assert prober.write(small + offset, ~MARK & (1 << 64) - 1) is None
        assert prober.read(large + offset) == ~MARK & (1 << 64) - 1


@pytest.mark.parametrize("skew", [1, 511], ids=["one-page-off", "one-page-short"])
def test_a_large_leaf_over_skewed_host_memory(prober: Prober, skew: int) -> None:
    """A large leaf shows the right memory also where host memory does not lie on a large page's boundary.

    Documentation/virt/kvm/api.rst 4.35: identical lower 21 bits of both addresses are only recommended.
    """
    vm = prober.vm
    mapping = vm.own(Anonymous(huge="thp").map(2 * SIZE_2M))
    vm.add_alias(int(GPA), SIZE_2M, mapping, offset=skew * PAGE_SIZE)
    vm.map(GVA, GPA, SIZE_2M, page_size=SIZE_2M, user=True, private=False)
    for page in range(0, 512, 13):
        where = (skew + page) * PAGE_SIZE
        mapping.view(where, 8)[:] = (MARK + page).to_bytes(8, "little")
    for page in range(0, 512, 13):
        assert prober.read(GVA + page * PAGE_SIZE) == MARK + page


def test_a_large_leaf_over_two_slots(prober: Prober) -> None:
    """A large leaf may cover several memory slots: each page shows the memory of its slot.

    Documentation/virt/kvm/api.rst 4.35; Documentation/virt/kvm/x86/mmu.rst, "Large pages".
    """
    vm = prober.vm
    halves = [vm.own(Anonymous().map(SIZE_2M // 2)) for _ in range(2)]
    for number, half in enumerate(halves):
        vm.add_alias(int(GPA) + number * SIZE_2M // 2, SIZE_2M // 2, half)
        half.view(0, 8)[:] = (MARK + number).to_bytes(8, "little")
        half.view(SIZE_2M // 2 - 8, 8)[:] = (MARK + 16 + number).to_bytes(8, "little")
    vm.map(GVA, GPA, SIZE_2M, page_size=SIZE_2M, user=True, private=False)
    places = (0, SIZE_2M // 2 - 8, SIZE_2M // 2, SIZE_2M - 8)
    assert [prober.read(GVA + place) for place in places] == [MARK, MARK + 16, MARK + 1, MARK + 17]


def test_two_addresses_of_one_page(prober: Prober) -> None:
    """Two entries that name one page show one memory.

    Intel SDM volume 3, 4.5.4.
    """
    gpa = prober.page(GVA, MARK)
    prober.vm.map(GVA + 9 * PAGE_SIZE, gpa, PAGE_SIZE, user=True)
    assert prober.read(GVA + 9 * PAGE_SIZE) == MARK
    assert prober.write(GVA + 9 * PAGE_SIZE, MARK + 1) is None
    assert prober.read(GVA) == MARK + 1


@pytest.mark.parametrize(
    "gva",
    [Gva(0x7FFF_FFFF_F000), Gva(0xFFFF_8000_0000_0000), Gva(0xFFFF_FFFF_FFFF_F000)],
    ids=["end-of-lower-half", "start-of-upper-half", "last-page"],
)
def test_the_edges_of_the_address_space(prober: Prober, gva: Gva) -> None:
    """The whole canonical address space can be mapped, to the last page of either half.

    Intel SDM volume 3, 4.5 (4-level paging translates 48-bit linear addresses).
    """
    prober.page(gva, MARK)
    assert prober.read(gva) == MARK
    assert prober.write(gva + (PAGE_SIZE - 8), MARK + 1) is None
    assert prober.read(gva + (PAGE_SIZE - 8)) == MARK + 1


@pytest.mark.requires("cpuid:la57")
@pytest.mark.parametrize(
    "gva", [Gva(1 << 48), Gva(0x00FF_FFFF_FFFF_F000), Gva(0xFF00_0000_0000_0000)], ids=hex
)
def test_five_levels_translate_57_bits(make_prober: MakeProber, ring: int, gva: Gva) -> None:
    """With CR4.LA57 addresses have 57 bits: those that four levels cannot translate are mapped.

    Intel SDM volume 3, 4.5 (5-level paging).
    """
    prober = make_prober(ring=ring, levels=5)
    prober.page(gva, MARK)
    assert len(prober.vm.pages.walk(gva).steps) == 5
    assert prober.read(gva) == MARK
    cr4 = prober.kernel.read_cr(4)
    assert isinstance(cr4, int)
    assert cr4 & CR4.LA57


def test_four_levels_leave_la57_off(prober: Prober) -> None:
    """With four levels CR4.LA57 is 0, and the guest runs.

    Intel SDM volume 3, 4.1.1.
    """
    prober.page(GVA, MARK)
    assert prober.read(GVA) == MARK
    cr4 = prober.kernel.read_cr(4)
    assert isinstance(cr4, int)
    assert cr4 & CR4.LA57 == 0
