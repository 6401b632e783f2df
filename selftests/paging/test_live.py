# SPDX-License-Identifier: Apache-2.0
"""Page tables that change while the guest runs: what it sees once it has flushed the translation."""

from __future__ import annotations

from functools import partial

import pytest

from kvmpy import PAGE_SIZE, SIZE_2M, Gpa, Gva, PageTables, PfErr
from kvmpy.x86.entry import PRESENT, USER, WRITABLE
from selftests.paging.conftest import MakeProber, PageFault, Prober

pytestmark = pytest.mark.usefixtures("open_tables")

GVA = Gva(0x6000_0000_0000)
MARK = 0x4D41_524B
CODE = b"\xb8" + MARK.to_bytes(4, "little") + b"\xc3"  # mov eax, MARK; ret


@pytest.fixture
def u(ring: int) -> int:
    """The U bit of error codes for accesses of this ring."""
    return int(PfErr.U) if ring else 0


def another_page(prober: Prober, content: int) -> Gpa:
    """A page of the default kind that is not mapped yet."""
    gpa = prober.new()
    prober.vm.memory.write(gpa, content.to_bytes(8, "little"))
    return gpa


def test_another_page(prober: Prober) -> None:
    """When an entry names another page, the guest sees that one after INVLPG, and writes to it alone.

    Intel SDM volume 3, 4.10.4.1.
    """
    # Both pages are looked at afterwards.
    private = None if prober.vm.protection.traits.host_sees_private else False
    old = prober.page(GVA, MARK, private=private)
    assert prober.read(GVA) == MARK
    new = another_page(prober, MARK + 1)
    prober.edit(lambda: prober.vm.pages.remap(GVA, new, PAGE_SIZE), GVA)
    prober.kernel.invlpg(GVA)
    assert prober.read(GVA) == MARK + 1
    assert prober.write(GVA, MARK + 2) is None
    assert prober.vm.memory.read(new, 8) == (MARK + 2).to_bytes(8, "little")
    assert prober.vm.memory.read(old, 8) == MARK.to_bytes(8, "little")


def test_a_load_of_cr3_flushes_too(prober: Prober) -> None:
    """Loading CR3 flushes every translation that is not global: one load, many changed pages.

    Intel SDM volume 3, 4.10.4.1, MOV to CR3.
    """
    pages = 8
    for number in range(pages):
        prober.page(GVA + number * PAGE_SIZE, MARK + number)
        assert prober.read(GVA + number * PAGE_SIZE) == MARK + number
    for number in range(pages):
        gva = GVA + number * PAGE_SIZE
        gpa = another_page(prober, MARK - number)
        prober.edit(partial(prober.vm.pages.remap, gva, gpa, PAGE_SIZE), gva)
    prober.kernel.flush_tlb()
    values = [prober.read(GVA + number * PAGE_SIZE) for number in range(pages)]
    assert values == [MARK - number for number in range(pages)]


def test_a_page_that_goes_away(prober: Prober, page_fault: PageFault, u: int) -> None:
    """A page that was unmapped faults after INVLPG as one that never was; its neighbour stays.

    Intel SDM volume 3, 4.10.4.1 and 4.7.
    """
    prober.page(GVA, MARK)
    prober.page(GVA + PAGE_SIZE, MARK + 1)
    assert prober.read(GVA) == MARK
    prober.edit(lambda: prober.vm.pages.unmap(GVA, PAGE_SIZE), GVA)
    prober.kernel.invlpg(GVA)
    assert prober.read(GVA) == page_fault(u, GVA)
    assert prober.read(GVA + PAGE_SIZE) == MARK + 1


def test_a_page_that_comes(prober: Prober, page_fault: PageFault, u: int) -> None:
    """A page that becomes present needs no flush, not even after it was found missing.

    Intel SDM volume 3, 4.10.2.3: translations with P clear are not cached; 4.10.4.3.
    """
    prober.page(GVA, MARK)
    for size in (PAGE_SIZE, 1 << 21, 1 << 30, 1 << 39):
        gva = GVA + size
        assert prober.read(gva) == page_fault(u, gva)
        prober.page(gva, MARK + size)
        assert prober.read(gva) == MARK + size


def test_writes_forbidden_and_allowed_again(prober: Prober, page_fault: PageFault, u: int) -> None:
    """After INVLPG a change of R/W holds, in both directions, as often as it changes.

    Intel SDM volume 3, 4.10.4.1 and 4.6.1.
    """
    prober.page(GVA, 0)
    for turn in range(1, 4):
        assert prober.write(GVA, turn) is None
        prober.edit(lambda: prober.vm.pages.protect(GVA, PAGE_SIZE, writable=False), GVA)
        prober.kernel.invlpg(GVA)
        assert prober.write(GVA, 99) == page_fault(PfErr.P | PfErr.W | u, GVA)
        assert prober.read(GVA) == turn
        prober.edit(lambda: prober.vm.pages.protect(GVA, PAGE_SIZE, writable=True), GVA)
        prober.kernel.invlpg(GVA)


def test_execution_forbidden_and_allowed_again(prober: Prober, page_fault: PageFault, u: int) -> None:
    """After INVLPG a change of XD holds, in both directions.

    Intel SDM volume 3, 4.10.4.1 and 4.6.2.
    """
    prober.page(GVA, CODE)
    assert prober.fetch(GVA) == MARK
    prober.edit(lambda: prober.vm.pages.protect(GVA, PAGE_SIZE, nx=True), GVA)
    prober.kernel.invlpg(GVA)
    assert prober.fetch(GVA) == page_fault(PfErr.P | PfErr.I | u, GVA)
    prober.edit(lambda: prober.vm.pages.protect(GVA, PAGE_SIZE, nx=False), GVA)
    prober.kernel.invlpg(GVA)
    assert prober.fetch(GVA) == MARK


def test_ring_3_locked_out_and_let_in_again(make_prober: MakeProber, page_fault: PageFault) -> None:
    """After INVLPG a change of U/S holds, in both directions, and ring 0 does not notice.

    Intel SDM volume 3, 4.10.4.1 and 4.6.
    """
    prober = make_prober()
    prober.page(GVA, MARK)
    for user in (True, False, True):
        prober.edit(partial(prober.vm.pages.protect, GVA, PAGE_SIZE, user=user), GVA)
        prober.kernel.invlpg(GVA)
        expected = MARK if user else page_fault(PfErr.P | PfErr.U, GVA)
        assert prober.read(GVA, ring=3) == expected
        assert prober.read(GVA) == MARK


def test_a_large_page_that_is_split(prober: Prober, page_fault: PageFault, u: int) -> None:
    """A large page that was split shows the same memory, and then each part may be protected by itself.

    Intel SDM volume 3, 4.10.4.1.
    """
    vm = prober.vm
    gva = vm.alloc(SIZE_2M, gva=GVA, page_size=SIZE_2M, user=True)
    parts = (0, 1, 77, 511)
    for part in parts:
        assert prober.write(gva + part * PAGE_SIZE, MARK + part) is None
    prober.edit(lambda: vm.pages.split(gva), gva)
    assert vm.pages.walk(gva).page_size == PAGE_SIZE
    prober.kernel.invlpg(gva)
    assert [prober.read(gva + part * PAGE_SIZE) for part in parts] == [MARK + part for part in parts]
    part_77 = gva + 77 * PAGE_SIZE
    prober.edit(lambda: vm.pages.protect(part_77, PAGE_SIZE, writable=False), part_77)
    prober.kernel.invlpg(gva + 77 * PAGE_SIZE)
    refused = page_fault(PfErr.P | PfErr.W | u, gva + 77 * PAGE_SIZE)
    assert [prober.write(gva + part * PAGE_SIZE, 1) for part in parts] == [None, None, refused, None]


def test_small_pages_that_become_a_large_one(prober: Prober) -> None:
    """A large leaf that replaces a table of small ones shows its own memory after INVLPG.

    Intel SDM volume 3, 4.10.4.1.
    """
    vm = prober.vm
    for page in (0, 3, 511):
        prober.page(GVA + page * PAGE_SIZE, MARK + page)
        assert prober.read(GVA + page * PAGE_SIZE) == MARK + page
    gpa = prober.new(512, align=SIZE_2M)
    for page in (0, 3, 511):
        vm.memory.write(gpa + page * PAGE_SIZE, (MARK - page).to_bytes(8, "little"))
    prober.edit(lambda: vm.map(GVA, gpa, SIZE_2M, page_size=SIZE_2M, user=True, overwrite=True), GVA)
    for page in (0, 3, 511):
        prober.kernel.invlpg(GVA + page * PAGE_SIZE)
    assert [prober.read(GVA + page * PAGE_SIZE) for page in (0, 3, 511)] == [MARK, MARK - 3, MARK - 511]


@pytest.mark.parametrize("level", [2, 3, 4], ids=["PDE", "PDPTE", "PML4E"])
def test_a_table_that_is_unlinked(prober: Prober, page_fault: PageFault, u: int, level: int) -> None:
    """Clearing P of an upper entry unmaps all below it after INVLPG; setting it again needs no flush.

    Intel SDM volume 3, 4.10.4.1: INVLPG also drops the paging-structure caches.
    """
    prober.page(GVA, MARK)
    assert prober.read(GVA) == MARK
    prober.change_entry(GVA, level, clear=PRESENT)
    prober.kernel.invlpg(GVA)
    assert prober.read(GVA) == page_fault(u, GVA)
    prober.change_entry(GVA, level, set_=PRESENT)
    assert prober.read(GVA) == MARK


def test_another_vcpu_sees_it_after_its_own_flush(make_prober: MakeProber, ring: int) -> None:
    """A change of the tables holds on every vCPU that flushes the translation, whoever else did.

    Intel SDM volume 3, 4.10.5 (propagation to multiple processors).
    """
    first = make_prober(ring=ring, vcpus=2)
    second = first.on_vcpu(1)
    first.page(GVA, MARK)
    assert (first.read(GVA), second.read(GVA)) == (MARK, MARK)
    gpa = another_page(first, MARK + 1)
    first.edit(lambda: first.vm.pages.remap(GVA, gpa, PAGE_SIZE), GVA)
    first.kernel.invlpg(GVA)
    second.kernel.invlpg(GVA)
    assert (first.read(GVA), second.read(GVA)) == (MARK + 1, MARK + 1)
    assert second.write(GVA, MARK + 2) is None
    assert first.read(GVA) == MARK + 2


def twin_tables(prober: Prober) -> PageTables:
    """Page tables of their own that map all that the guest's do."""
    vm = prober.vm
    tables = PageTables(vm.memory, vm.allocator, encryption=vm.encryption)
    for item in vm.pages.mappings():
        tables.map(
            item.gva,
            item.gpa,
            item.size,
            page_size=item.page_size,
            writable=bool(item.entry & WRITABLE),
            user=bool(item.entry & USER),
            nx=bool(item.entry >> 63),
            private=item.private,
        )
    return tables


def test_address_spaces_are_switched_by_cr3(prober: Prober, page_fault: PageFault, u: int) -> None:
    """Each value of CR3 has its own translations: there and back the guest sees what belongs to it.

    Intel SDM volume 3, 4.5 and 4.10.4.1.
    """
    prober.page(GVA, MARK)
    prober.page(GVA + PAGE_SIZE, MARK)
    twin = twin_tables(prober)
    twin.remap(GVA, another_page(prober, MARK + 1), PAGE_SIZE)
    twin.unmap(GVA + PAGE_SIZE, PAGE_SIZE)
    for _ in range(3):
        assert (prober.read(GVA), prober.read(GVA + PAGE_SIZE)) == (MARK, MARK)
        assert prober.kernel.write_cr(3, int(twin.cr3)) is None
        assert prober.read(GVA) == MARK + 1
        assert prober.read(GVA + PAGE_SIZE) == page_fault(u, GVA + PAGE_SIZE)
        assert prober.kernel.write_cr(3, int(prober.vm.pages.cr3)) is None


def test_the_guest_changes_its_own_tables(prober: Prober, page_fault: PageFault, u: int) -> None:
    """Tables are memory: what the guest writes into them holds after its INVLPG, time and again.

    Documentation/virt/kvm/x86/mmu.rst: "the guest should not be able to determine that it is running
    on an emulated mmu".
    """
    prober.page(GVA, MARK)
    others = [another_page(prober, MARK + number) for number in range(1, 9)]
    step = prober.entry(GVA, 1)
    where, entry, flags = prober.show(step.table) + 8 * step.index, step.value, step.value & 0xFFF
    assert prober.read(GVA) == MARK
    for number, gpa in enumerate(others, 1):
        assert prober.write(where, int(prober.vm.to_raw(gpa)) | flags, ring=0) is None
        prober.kernel.invlpg(GVA)
        assert prober.read(GVA) == MARK + number
    assert prober.write(where, 0, ring=0) is None
    prober.kernel.invlpg(GVA)
    assert prober.read(GVA) == page_fault(u, GVA)
    assert prober.write(where, entry, ring=0) is None
    assert prober.read(GVA) == MARK


def test_a_table_becomes_ordinary_memory(prober: Prober, page_fault: PageFault, u: int) -> None:
    """A page that was a table and was unlinked is memory like any other: it keeps what the guest writes.

    Documentation/virt/kvm/x86/mmu.rst, "Memory" and "Shadow pages".
    """
    prober.page(GVA, MARK)
    assert prober.read(GVA) == MARK
    table = prober.show(prober.entry(GVA, 1).table)
    prober.change_entry(GVA, 2, clear=PRESENT)
    prober.kernel.flush_tlb()
    for offset in range(0, PAGE_SIZE, 256):
        assert prober.write(table + offset, MARK + offset, ring=0) is None
    for offset in range(0, PAGE_SIZE, 256):
        assert prober.read(table + offset, ring=0) == MARK + offset
    assert prober.read(GVA) == page_fault(u, GVA)
