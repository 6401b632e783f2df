# SPDX-License-Identifier: Apache-2.0
"""What entries forbid, and the error code of the #PF that says so."""

from __future__ import annotations

import pytest

from kvmpy import CR0, CR4, PAGE_SIZE, Gva, PfErr
from kvmpy.x86.entry import NO_EXECUTE, USER, WRITABLE
from selftests.paging.conftest import MakeProber, PageFault, Prober

GVA = Gva(0x6000_0000_0000)
MARK = 0x4D41_524B
CODE = b"\xb8" + MARK.to_bytes(4, "little") + b"\xc3"  # mov eax, MARK; ret
UPPER = pytest.mark.parametrize("level", [2, 3, 4], ids=["PDE", "PDPTE", "PML4E"])


@pytest.fixture
def u(ring: int) -> int:
    """The U bit of error codes for accesses of this ring."""
    return int(PfErr.U) if ring else 0


def test_nothing_is_mapped(prober: Prober, page_fault: PageFault, u: int) -> None:
    """Without translation an access faults with P clear, W for writes, U for ring 3, I for fetches, and CR2.

    Intel SDM volume 3, 4.7 (page-fault exceptions).
    """
    prober.page(GVA, MARK)
    hole = GVA + PAGE_SIZE
    assert prober.read(hole + 0x123) == page_fault(u, hole + 0x123)
    assert prober.write(hole + 0x128, 1) == page_fault(u | PfErr.W, hole + 0x128)
    assert prober.fetch(hole + 0x33) == page_fault(u | PfErr.I, hole + 0x33)
    assert prober.read(GVA) == MARK


def test_no_table_at_any_level(prober: Prober, page_fault: PageFault, u: int) -> None:
    """The error code is the same at whatever level the translation ends.

    Intel SDM volume 3, 4.7: the P flag is 0 if "there is no translation for the linear address".
    """
    prober.page(GVA, MARK)
    for size in (1 << 21, 1 << 30, 1 << 39):
        assert prober.read(GVA + size) == page_fault(u, GVA + size)


def test_a_page_that_may_not_be_written(prober: Prober, page_fault: PageFault, u: int) -> None:
    """With R/W clear reads go on and a write faults with P and W; memory does not change.

    Intel SDM volume 3, 4.6.1 and 4.7; CR0.WP is 1.
    """
    prober.page(GVA, MARK, writable=False)
    assert prober.read(GVA) == MARK
    assert prober.write(GVA, 1) == page_fault(PfErr.P | PfErr.W | u, GVA)
    assert prober.read(GVA) == MARK


def test_write_protection_of_ring_0_can_be_lifted(make_prober: MakeProber, page_fault: PageFault) -> None:
    """With CR0.WP clear ring 0 writes pages whose R/W is clear, ring 3 does not, and setting it again holds.

    Intel SDM volume 3, 4.6.1.
    """
    prober = make_prober()
    prober.page(GVA, MARK, writable=False)
    refused = page_fault(PfErr.P | PfErr.W, GVA)
    assert prober.write(GVA, 1) == refused
    assert prober.kernel.change_cr(0, clear=CR0.WP) is None
    assert prober.write(GVA, 2) is None
    assert prober.read(GVA) == 2
    assert prober.write(GVA, 3, ring=3) == page_fault(PfErr.P | PfErr.W | PfErr.U, GVA)
    assert prober.kernel.change_cr(0, put=CR0.WP) is None
    assert prober.write(GVA, 4) == refused
    assert prober.read(GVA, ring=3) == 2


def test_a_supervisor_page_is_closed_to_ring_3(make_prober: MakeProber, page_fault: PageFault) -> None:
    """With U/S clear accesses of ring 3 fault with P and U, while ring 0 reads, writes and runs the page.

    Intel SDM volume 3, 4.6.1 and 4.7.
    """
    prober = make_prober()
    prober.page(GVA, CODE, user=False)
    closed = PfErr.P | PfErr.U
    assert prober.read(GVA, ring=3) == page_fault(closed, GVA)
    assert prober.write(GVA, 1, ring=3) == page_fault(closed | PfErr.W, GVA)
    assert prober.fetch(GVA, ring=3) == page_fault(closed | PfErr.I, GVA)
    assert prober.fetch(GVA) == MARK
    assert prober.write(GVA, 1) is None
    assert prober.read(GVA) == 1


def test_a_user_page_is_open_to_both_rings(make_prober: MakeProber) -> None:
    """With U/S set both rings read, write and run the page, SMEP and SMAP being off.

    Intel SDM volume 3, 4.6.1.
    """
    prober = make_prober()
    prober.page(GVA, CODE)
    for ring in (0, 3):
        assert prober.fetch(GVA, ring=ring) == MARK
        assert prober.write(GVA + 8, ring, ring=ring) is None
        assert prober.read(GVA + 8, ring=3 - ring) == ring


def test_a_page_that_may_not_be_run(prober: Prober, page_fault: PageFault, u: int) -> None:
    """With XD set a fetch faults with P and I, and data accesses go on.

    Intel SDM volume 3, 4.6.2 and 4.7; EFER.NXE is 1.
    """
    prober.page(GVA, CODE, nx=True)
    assert prober.fetch(GVA) == page_fault(PfErr.P | PfErr.I | u, GVA)
    assert prober.write(GVA + 8, 1) is None
    assert prober.read(GVA + 8) == 1


def test_a_page_that_may_be_run(prober: Prober) -> None:
    """With XD clear code runs, also where it may not be written.

    Intel SDM volume 3, 4.6.2.
    """
    prober.page(GVA, CODE, writable=False)
    assert prober.fetch(GVA) == MARK


@UPPER
@pytest.mark.usefixtures("open_tables")
def test_upper_entries_forbid_writes(prober: Prober, page_fault: PageFault, u: int, level: int) -> None:
    """A page may be written only if R/W is set in every entry of its translation.

    Intel SDM volume 3, 4.6.1.
    """
    prober.page(GVA, MARK)
    prober.change_entry(GVA, level, clear=WRITABLE)
    assert prober.read(GVA) == MARK
    assert prober.write(GVA, 1) == page_fault(PfErr.P | PfErr.W | u, GVA)


@UPPER
@pytest.mark.usefixtures("open_tables")
def test_upper_entries_close_to_ring_3(make_prober: MakeProber, page_fault: PageFault, level: int) -> None:
    """Ring 3 reaches a page only if U/S is set in every entry of its translation.

    Intel SDM volume 3, 4.6.
    """
    prober = make_prober()
    prober.page(GVA, MARK)
    prober.change_entry(GVA, level, clear=USER)
    assert prober.read(GVA, ring=3) == page_fault(PfErr.P | PfErr.U, GVA)
    assert prober.read(GVA) == MARK


@UPPER
@pytest.mark.usefixtures("open_tables")
def test_upper_entries_forbid_fetches(prober: Prober, page_fault: PageFault, u: int, level: int) -> None:
    """Code runs only if XD is clear in every entry of its translation.

    Intel SDM volume 3, 4.6.2.
    """
    prober.page(GVA, CODE)
    prober.change_entry(GVA, level, set_=NO_EXECUTE)
    assert prober.fetch(GVA) == page_fault(PfErr.P | PfErr.I | u, GVA)
    assert prober.read(GVA) == int.from_bytes(CODE.ljust(8, b"\0"), "little")


def test_an_access_across_pages_faults_at_the_second(prober: Prober, page_fault: PageFault, u: int) -> None:
    """An access whose second page is not mapped reports the first byte that has no translation.

    Intel SDM volume 3, 6.15, #PF: CR2 has "the linear address that generated the exception".
    """
    prober.page(GVA, MARK)
    assert prober.read(GVA + PAGE_SIZE - 3) == page_fault(u, GVA + PAGE_SIZE)


def test_a_write_across_pages_is_all_or_nothing(prober: Prober, page_fault: PageFault, u: int) -> None:
    """A write whose second page may not be written faults and leaves the first page as it was.

    Intel SDM volume 3, 6.5: a fault leaves the state as before the instruction began.
    """
    prober.page(GVA, bytes(PAGE_SIZE))
    prober.page(GVA + PAGE_SIZE, MARK, writable=False)
    fault = page_fault(PfErr.P | PfErr.W | u, GVA + PAGE_SIZE)
    assert prober.write(GVA + PAGE_SIZE - 4, (1 << 64) - 1) == fault
    assert prober.read(GVA + PAGE_SIZE - 8) == 0
    assert prober.read(GVA + PAGE_SIZE) == MARK


@pytest.mark.requires("cpuid:smep")
def test_smep_keeps_ring_0_from_running_user_pages(make_prober: MakeProber, page_fault: PageFault) -> None:
    """With CR4.SMEP ring 0 does not run user pages: P and I; reads go on, and ring 3 runs them.

    Intel SDM volume 3, 4.6.1 and 4.7.
    """
    prober = make_prober()
    prober.page(GVA, CODE)
    assert prober.fetch(GVA, cr4=CR4.SMEP) == page_fault(PfErr.P | PfErr.I, GVA)
    assert prober.read(GVA, cr4=CR4.SMEP) == int.from_bytes(CODE.ljust(8, b"\0"), "little")
    assert prober.fetch(GVA) == prober.fetch(GVA, ring=3) == MARK


@pytest.mark.requires("cpuid:smap")
def test_smap_keeps_ring_0_from_user_data(make_prober: MakeProber, page_fault: PageFault) -> None:
    """With CR4.SMAP and EFLAGS.AC clear ring 0 neither reads nor writes user pages.

    Intel SDM volume 3, 4.6.1.
    """
    prober = make_prober()
    prober.page(GVA, MARK)
    prober.page(GVA + PAGE_SIZE, MARK, user=False)
    assert prober.read(GVA, cr4=CR4.SMAP) == page_fault(PfErr.P, GVA)
    assert prober.write(GVA, 1, cr4=CR4.SMAP) == page_fault(PfErr.P | PfErr.W, GVA)
    assert prober.read(GVA + PAGE_SIZE, cr4=CR4.SMAP) == MARK
    assert prober.read(GVA) == MARK


@pytest.mark.requires("cpuid:pku")
@pytest.mark.usefixtures("open_tables")
def test_protection_keys_close_user_pages(make_prober: MakeProber, page_fault: PageFault) -> None:
    """With CR4.PKE a page's key selects bits of PKRU, which forbid accesses or writes: a fault with PK.

    Intel SDM volume 3, 4.6.2 (protection keys) and 4.7.
    """
    prober = make_prober()
    prober.page(GVA, MARK)
    prober.vm.pages.protect(GVA, PAGE_SIZE, protection_key=5)
    access_disable, write_disable = 1 << 10, 1 << 11
    on = int(CR4.PKE)
    closed = PfErr.P | PfErr.PK
    assert prober.read(GVA, cr4=on) == MARK
    assert prober.read(GVA, cr4=on, pkru=access_disable) == page_fault(closed, GVA)
    assert prober.write(GVA, 1, cr4=on, pkru=access_disable) == page_fault(closed | PfErr.W, GVA)
    assert prober.read(GVA, cr4=on, pkru=write_disable) == MARK
    assert prober.write(GVA, 1, cr4=on, pkru=write_disable) == page_fault(closed | PfErr.W, GVA)
    assert prober.write(GVA, 2, cr4=on, pkru=0xFFFF_F3FC) is None
