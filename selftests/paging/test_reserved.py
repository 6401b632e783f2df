# SPDX-License-Identifier: Apache-2.0
"""Addresses that are not canonical, and bits of entries that must be zero."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, PAGE_SIZE, SIZE_2M, Agent, Cpuid, Fault, Gva, Kvm, MakeVm, PfErr, Vector
from kvmpy.x86.entry import PAGE_SIZE_BIT, PRESENT
from selftests.paging.conftest import PageFault, Prober

pytestmark = pytest.mark.usefixtures("open_tables")

GVA = Gva(0x6000_0000_0000)
MARK = 0x4D41_524B
CODE = b"\xb8" + MARK.to_bytes(4, "little") + b"\xc3"  # mov eax, MARK; ret
TOP_BIT = 1 << 51


# A stack pointer, and a frame pointer, that are not canonical.
def narrow_addresses(kvm: Kvm) -> str | None:
    if Cpuid.from_struct(kvm.supported_cpuid).maxphyaddr <= 51:
        return None
    return "MAXPHYADDR below 52: address bits that are reserved"


@pytest.fixture
def u(ring: int) -> int:
    """The U bit of error codes for accesses of this ring."""
    return int(PfErr.U) if ring else 0


@pytest.mark.parametrize(
    "address", [0x0000_8000_0000_0000, 0xFFFF_7FFF_FFFF_FFF8, 0x4000_0000_0000_0000], ids=hex
)
def test_an_address_that_is_not_canonical(prober: Prober, address: int) -> None:
    """Data accesses at addresses that are not canonical fault with #GP(0), reads and writes alike.

    Intel SDM volume 1, 3.3.7.1 (canonical addressing) and volume 3, 6.15, #GP.
    """
    prober.page(GVA, MARK)
    for fault in (prober.read(Gva(address)), prober.write(Gva(address), 1)):
        assert not isinstance(fault, int)
        assert fault is not None
        assert (fault.vector, fault.error_code) == (Vector.GP, 0)
    assert prober.read(GVA) == MARK


def test_a_stack_that_is_not_canonical(make_vm: MakeVm) -> None:
    """Accesses through RSP and RBP at addresses that are not canonical fault with #SS(0).

    Intel SDM volume 3, 6.15, #SS: "a canonical violation" of an access that references the stack.
    """
    agent = Agent(make_vm(AGENT).vcpus[0], ring=3)
    address = 0x0000_8000_0000_1000
    assert agent.execute(b"\x48\x89\xfc\x6a\0", rdi=address) == Fault(Vector.SS, 0)  # mov %rdi, %rsp; push $0
    assert agent.execute(b"\x48\x8b\x45\0", rbp=address) == Fault(Vector.SS, 0)  # mov (%rbp), %rax


def test_a_table_entry_that_would_be_a_leaf_at_the_top(prober: Prober, page_fault: PageFault, u: int) -> None:
    """Bit 7 of a PML4 entry is reserved: setting it faults with P and RSVD, clearing it mends the address.

    Intel SDM volume 3, 4.5 (Table 4-15: bit 7 is "Reserved (must be 0)") and 4.7.
    """
    prober.page(GVA, CODE)
    prober.change_entry(GVA, 4, set_=PAGE_SIZE_BIT)
    error = PfErr.P | PfErr.RSVD | u
    assert prober.read(GVA) == page_fault(error, GVA)
    assert prober.write(GVA, 1) == page_fault(error | PfErr.W, GVA)
    assert prober.fetch(GVA) == page_fault(error | PfErr.I, GVA)
    prober.change_entry(GVA, 4, clear=PAGE_SIZE_BIT)
    prober.kernel.invlpg(GVA)
    assert prober.fetch(GVA) == MARK


@pytest.mark.parametrize("bit", [13, 20])
def test_a_large_leaf_that_is_not_aligned(prober: Prober, page_fault: PageFault, u: int, bit: int) -> None:
    """Bits 13 to 20 of an entry that maps a 2-MByte page are reserved: P and RSVD.

    Intel SDM volume 3, 4.5 (Table 4-18) and 4.7.
    """
    vm = prober.vm
    gva = vm.alloc(SIZE_2M, gva=GVA, page_size=SIZE_2M, user=True)
    prober.change_entry(gva, 2, set_=1 << bit)
    assert prober.read(gva) == page_fault(PfErr.P | PfErr.RSVD | u, gva)
    prober.change_entry(gva, 2, clear=1 << bit)
    prober.kernel.invlpg(gva)
    assert prober.read(gva) == 0


@pytest.mark.requires("kvm", narrow_addresses)
@pytest.mark.parametrize("level", [1, 2, 3, 4], ids=["PTE", "PDE", "PDPTE", "PML4E"])
def test_an_address_wider_than_maxphyaddr(prober: Prober, page_fault: PageFault, u: int, level: int) -> None:
    """Address bits from MAXPHYADDR up are reserved in entries of every level: P and RSVD.

    Intel SDM volume 3, 4.5 and 4.7.
    """
    prober.page(GVA, MARK)
    prober.change_entry(GVA, level, set_=TOP_BIT)
    assert prober.read(GVA) == page_fault(PfErr.P | PfErr.RSVD | u, GVA)


@pytest.mark.parametrize("level", [1, 2, 3, 4], ids=["PTE", "PDE", "PDPTE", "PML4E"])
def test_entries_that_are_not_present_have_no_reserved_bits(
    prober: Prober, page_fault: PageFault, u: int, level: int
) -> None:
    """With P clear all other bits are the software's: the fault has neither P nor RSVD.

    Intel SDM volume 3, 4.5: "If the P flag is 0 [...] the remaining bits are ignored".
    """
    prober.page(GVA, MARK)
    prober.change_entry(GVA, level, set_=(1 << 64) - 2, clear=PRESENT)
    assert prober.read(GVA) == page_fault(u, GVA)


def test_bits_for_software_are_ignored(prober: Prober) -> None:
    """Bits 9 to 11 and 52 to 58 of a page-table entry mean nothing to the CPU.

    Intel SDM volume 3, 4.5 (Table 4-20): "Ignored".
    """
    prober.page(GVA, MARK)
    software = 0x7 << 9 | 0x7F << 52
    prober.change_entry(GVA, 1, set_=software)
    assert prober.read(GVA) == MARK
    assert prober.write(GVA, 1) is None
    assert prober.entry(GVA, 1).value & software == software


def test_a_page_beside_a_broken_entry(prober: Prober, page_fault: PageFault, u: int) -> None:
    """An entry with reserved bits spoils its own page only.

    Intel SDM volume 3, 4.7.
    """
    prober.page(GVA, MARK)
    gva = prober.vm.alloc(SIZE_2M, gva=GVA + SIZE_2M, page_size=SIZE_2M, user=True)
    prober.change_entry(gva, 2, set_=1 << 13)
    assert prober.read(gva + PAGE_SIZE) == page_fault(PfErr.P | PfErr.RSVD | u, gva + PAGE_SIZE)
    assert prober.read(GVA) == MARK
