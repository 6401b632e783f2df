# SPDX-License-Identifier: Apache-2.0
"""Page walks of two levels and of PAE: error codes, accessed and dirty bits, reserved bits.

AMD APM volume 2, 5.2 and 5.6; volume 2, 8.2.15 for the error code.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvmpy import CR0, CR4, EFER, PAGE_SIZE, Cpuid, Fault, Gpa, Gva, Legacy, LegacyMode, MmioExit, Vector
from kvmpy.testing import host
from kvmpy.x86.entry import ACCESSED, DIRTY, NO_EXECUTE, PAGE_SIZE_BIT, PRESENT, USER, WRITABLE
from selftests.legacy.conftest import ON_THE_CPU, LegacyMaker

pytestmark = [pytest.mark.protections("none"), ON_THE_CPU]

GVA = Gva(0x4000_0000)
P, W, U, RSVD, ID = 1, 2, 4, 8, 0x10
AC = 1 << 18

READ = b"\xa1\x00\x00\x00\x40"  # mov 0x40000000, %eax
WRITE = b"\xa3\x00\x00\x00\x40"  # mov %eax, 0x40000000
FETCH = b"\xb8\x00\x00\x00\x40\xff\xd0"  # mov $0x40000000, %eax; call *%eax
RELOAD = b"\x0f\x20\xd8\x0f\x22\xd8"  # mov %cr3, %eax; mov %eax, %cr3
ACCESSES = {"read": (READ, 0), "write": (WRITE, W), "fetch": (FETCH, ID)}
BOTH = pytest.mark.parametrize("levels", [2, 3], ids=["2-level", "pae"])


@dataclass
class Page:
    """A page of its own at GVA, and its entries."""

    cpu: Legacy
    size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        tables, vm = self.cpu.tables, self.cpu.vm
        assert tables is not None
        self.tables = tables
        self.gpa = vm.allocator.alloc(self.size // PAGE_SIZE, align=self.size)
        vm.memory.write(self.gpa, b"\xc3")  # ret
        tables.map(GVA, self.gpa, self.size, page_size=self.size, user=True)
        self._width = tables.form.entry_size
        self._places = {
            step.level: Gpa(int(step.table)) + step.index * self._width for step in tables.walk(GVA).steps
        }
        self.clean = {level: self.entry(level) for level in self._places}

    def entry(self, level: int) -> int:
        """Return the entry of *level* (1: the PTE)."""
        return int.from_bytes(self.cpu.vm.memory.read(self._places[level], self._width), "little")

    def put(self, level: int, value: int) -> None:
        """Write the entry of *level*."""
        self.cpu.vm.memory.write(self._places[level], value.to_bytes(self._width, "little"))


def nested_paging(*parameters: str) -> bool:
    """Tell whether the CPU walks the guest's tables, not KVM: on AMD's with *parameters* ``.npt`` alone."""
    known = host.facts().parameters.items()
    return any(value == "Y" for name, value in known if name.endswith(parameters or (".npt", ".ept")))


def flush(cpu: Legacy) -> None:
    """Let the CPU drop what it has cached of the tables, which the host has changed."""
    cr3 = cpu.sregs.cr3
    cpu.sregs.cr3 = 0
    cpu.vcpu.regs.set_sregs(cpu.sregs)
    cpu.sregs.cr3 = cr3


def skip_under_shadow_paging() -> None:
    """Skip a test that changes entries which have been used: KVM's copies notice the guest's writes only."""
    if not nested_paging():
        pytest.skip("nested paging: KVM's own copies of page tables do not notice what the host writes")


@dataclass(frozen=True)
class Rights:
    """What an access is tried against."""

    upper: int
    lower: int
    wp: bool
    smep: bool
    smap: bool
    ac: bool


def expected(rights: Rights, access: str, ring: int, *, nx: bool, fetch_known: bool) -> int | None:
    """Return the error code of an access, None where it is allowed; NX is on where *fetch_known* says so."""
    user = ring == 3
    writable = rights.upper & rights.lower & WRITABLE
    open_to_users = rights.upper & rights.lower & USER
    code = ACCESSES[access][1] & (W | (ID if fetch_known else 0)) | (U if user else 0) | P
    if not rights.upper & rights.lower & PRESENT:
        return code & ~P
    if user and not open_to_users:
        return code
    if access == "write" and not writable and (user or rights.wp):
        return code
    if access == "fetch" and (nx or (not user and rights.smep and open_to_users)):
        return code
    if access != "fetch" and not user and rights.smap and open_to_users and not rights.ac:
        return code
    return None


@BOTH
@pytest.mark.parametrize("ring", [0, 3], ids=["ring0", "ring3"])
@pytest.mark.parametrize("access", ACCESSES)
def test_rights(legacy: LegacyMaker, levels: int, ring: int, access: str) -> None:
    """Present, R/W and U/S of both levels decide with CR0.WP, CR4.SMEP and CR4.SMAP, and give the error code;
    only an access that is allowed sets A, and D where it writes.
    """
    skip_under_shadow_paging()
    page = Page(legacy(LegacyMode.PROTECTED32, levels=levels, ring=ring))
    cpu = page.cpu
    if ring == 0:  # or SMEP and SMAP would forbid the rest
        page.tables.protect(Gva(0), 1 << 20, user=False)
    code, _ = ACCESSES[access]
    known = Cpuid.from_struct(cpu.vm.kvm.supported_cpuid)
    guards = (False, True) if known.has("smep" if access == "fetch" else "smap") else (False,)
    entries = [sum(bits) for bits in itertools.product((0, PRESENT), (0, WRITABLE), (0, USER))]
    cases = [
        (upper, lower, wp, guard)
        for upper, lower, wp, guard in itertools.product(entries, entries, (False, True), guards)
        if upper & PRESENT or lower == PRESENT
    ]
    wrong: dict[str, str] = {}
    for upper, lower, wp, guard in cases:
        rights = Rights(upper, lower, wp, guard and access == "fetch", guard and access != "fetch", False)
        page.put(2, page.clean[2] & ~7 | upper)
        page.put(1, page.clean[1] & ~7 | lower)
        cpu.sregs.cr0 = cpu.sregs.cr0 & ~int(CR0.WP) | (int(CR0.WP) if wp else 0)
        cpu.sregs.cr4 &= ~int(CR4.SMEP | CR4.SMAP)
        cpu.sregs.cr4 |= int(CR4.SMEP) if rights.smep else 0
        cpu.sregs.cr4 |= int(CR4.SMAP) if rights.smap else 0
        flush(cpu)
        ended = cpu.run(code)
        error = expected(rights, access, ring, nx=False, fetch_known=rights.smep)
        fault = None if error is None else Fault(Vector.PF, error, int(GVA))
        flags = page.entry(1) & (ACCESSED | DIRTY)
        marks = 0 if error is not None else ACCESSED | (DIRTY if access == "write" else 0)
        if (ended.fault, flags) != (fault, marks):
            wrong[str(rights)] = f"{ended.fault} A/D {flags:#x}, expected {fault} A/D {marks:#x}"
    assert not wrong


@pytest.mark.parametrize("ring", [0, 3], ids=["ring0", "ring3"])
@pytest.mark.parametrize("level", [1, 2])
def test_no_execute(legacy: LegacyMaker, ring: int, level: int) -> None:
    """NX of PAE forbids a fetch at either level where EFER.NXE is set, and is reserved where it is not."""
    skip_under_shadow_paging()
    page = Page(legacy(LegacyMode.PROTECTED32, levels=3, ring=ring))
    user = U if ring else 0
    page.put(level, page.clean[level] | NO_EXECUTE)
    for access, (code, bits) in ACCESSES.items():
        page.cpu.sregs.efer = int(EFER.NXE)
        flush(page.cpu)
        fault = Fault(Vector.PF, P | ID | user, int(GVA)) if access == "fetch" else None
        assert page.cpu.run(code).fault == fault, access
        page.cpu.sregs.efer = 0
        flush(page.cpu)
        error = P | RSVD | user | bits & W
        assert page.cpu.run(code).fault == Fault(Vector.PF, error, int(GVA)), access


@BOTH
def test_large_page(legacy: LegacyMaker, levels: int) -> None:
    """A leaf of the second level maps 4 MiB or 2 MiB; it gets A and D itself."""
    size = 4 << 20 if levels == 2 else 2 << 20
    page = Page(legacy(LegacyMode.PROTECTED32, levels=levels), size)
    last = b"\xa2" + (int(GVA) + size - 1).to_bytes(4, "little")  # mov %al, moffs8
    assert page.cpu.run(last, eax=0x5A).fault is None
    assert page.cpu.vm.memory.read(page.gpa + size - 1, 1) == b"\x5a"
    assert page.entry(2) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    behind = b"\xa2" + (int(GVA) + size).to_bytes(4, "little")
    assert page.cpu.run(behind).fault == Fault(Vector.PF, W, int(GVA) + size)


def test_without_pse(legacy: LegacyMaker) -> None:
    """Without CR4.PSE bit 7 of a PDE says nothing: it points to a table."""
    page = Page(legacy(LegacyMode.PROTECTED32, levels=2))
    page.put(2, page.clean[2] | PAGE_SIZE_BIT)
    page.cpu.sregs.cr4 = 0
    flush(page.cpu)
    assert page.cpu.run(WRITE, eax=0x1234).fault is None
    assert page.cpu.vm.memory.read(page.gpa, 4) == (0x1234).to_bytes(4, "little")


@pytest.mark.parametrize("bit", [13, 16, 20])
def test_reserved_bits_of_a_2m_page(legacy: LegacyMaker, bit: int) -> None:
    """Address bits below 2 MiB in a leaf of that size are reserved, but for PAT."""
    page = Page(legacy(LegacyMode.PROTECTED32, levels=3), 2 << 20)
    page.put(2, page.clean[2] | 1 << bit)
    flush(page.cpu)
    assert page.cpu.run(READ).fault == Fault(Vector.PF, P | RSVD, int(GVA))


def test_bit_21_of_a_4m_page(legacy: LegacyMaker) -> None:
    """Bit 21 of a leaf of 4 MiB is reserved."""
    page = Page(legacy(LegacyMode.PROTECTED32, levels=2), 4 << 20)
    page.put(2, page.clean[2] | 1 << 21)
    flush(page.cpu)
    assert page.cpu.run(READ).fault == Fault(Vector.PF, P | RSVD, int(GVA))


def test_pse36(legacy: LegacyMaker) -> None:
    """Bits 13 to 20 of a leaf of 4 MiB are bits 32 to 39 of its address."""
    page = Page(legacy(LegacyMode.PROTECTED32, levels=2), 4 << 20)
    page.put(2, page.clean[2] | 1 << 13)
    flush(page.cpu)
    page.cpu.begin(READ)
    got = page.cpu.vcpu.expect(MmioExit)
    assert got.phys_addr == int(page.gpa) + (1 << 32)


def load_root(page: Page, change: Callable[[list[int]], None]) -> bytes:
    """Return code that loads CR3 with a copy of the four PDPTEs to which *change* was made."""
    memory, root = page.cpu.vm.memory, page.cpu.vm.allocator.alloc()
    entries = list(struct.unpack("<4Q", memory.read(page.tables.root, 32)))
    change(entries)
    memory.write(root, struct.pack("<4Q", *entries))
    return b"\xb8" + int(root).to_bytes(4, "little") + b"\x0f\x22\xd8"  # mov $root, %eax; mov %eax, %cr3


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 63])
def test_reserved_bits_of_a_pdpte(legacy: LegacyMaker, bit: int) -> None:
    """A load of CR3 with a reserved bit in a present PDPTE is #GP(0); under nested paging the walk that uses
    it is a page fault instead.

    AMD APM volume 2, 5.2.3 and 15.25.10; KVM's side: load_pdptrs() in arch/x86/kvm/x86.c.
    """
    page = Page(legacy(LegacyMode.PROTECTED32, levels=3))

    def spoil(entries: list[int]) -> None:
        entries[1] |= 1 << bit

    fault = Fault(Vector.PF, P | RSVD, int(GVA)) if nested_paging(".npt") else Fault(Vector.GP, 0)
    ended = page.cpu.run(load_root(page, spoil) + READ)
    assert ended.fault == fault
    if not nested_paging(".npt"):
        assert ended.sregs.cr3 == page.cpu.sregs.cr3, "CR3 keeps its value"


def test_reserved_bits_of_an_absent_pdpte(legacy: LegacyMaker) -> None:
    """What is in a PDPTE that is not present does not matter."""
    page = Page(legacy(LegacyMode.PROTECTED32, levels=3))

    def spoil(entries: list[int]) -> None:
        entries[3] = (1 << 64) - 2

    assert page.cpu.run(load_root(page, spoil) + READ).fault is None


def test_pdptes_are_loaded_with_cr3(legacy: LegacyMaker) -> None:
    """A PDPTE that becomes not present counts from the next load of CR3 at the latest."""
    skip_under_shadow_paging()
    page = Page(legacy(LegacyMode.PROTECTED32, levels=3))
    assert page.cpu.run(READ).fault is None
    page.put(3, 0)
    flush(page.cpu)
    assert page.cpu.run(RELOAD + READ).fault == Fault(Vector.PF, 0, int(GVA))


@BOTH
def test_paging_switched_on_by_the_guest(legacy: LegacyMaker, levels: int) -> None:
    """MOV to CR0 switches paging on and off under code that is mapped at its own address."""
    page = Page(legacy(LegacyMode.PROTECTED32, levels=levels))
    page.cpu.vm.memory.write(page.gpa, (0xC0FFEE).to_bytes(4, "little"))
    page.cpu.sregs.cr0 &= ~int(CR0.PG)
    # mov %cr0, %ebx; bts $31, %ebx; mov %ebx, %cr0; mov 0x40000000, %eax; btr $31, %ebx; mov %ebx, %cr0
    code = b"\x0f\x20\xc3\x0f\xba\xeb\x1f\x0f\x22\xc3" + READ + b"\x0f\xba\xf3\x1f\x0f\x22\xc3"
    ended = page.cpu.run(code)
    assert ended.fault is None
    assert ended["eax"] == 0xC0FFEE
    assert not ended.sregs.cr0 & CR0.PG


def test_a_bad_pdpte_keeps_paging_off(legacy: LegacyMaker) -> None:
    """Switching PAE paging on over a reserved bit in a PDPTE is #GP(0), and CR0 keeps its value."""
    if nested_paging(".npt"):
        pytest.skip("shadow paging: under nested paging the CPU does not look at PDPTEs before a walk")
    page = Page(legacy(LegacyMode.PROTECTED32, levels=3))
    page.put(3, page.entry(3) | 2)
    page.cpu.sregs.cr0 &= ~int(CR0.PG)
    ended = page.cpu.run(b"\x0f\x20\xc3\x0f\xba\xeb\x1f\x0f\x22\xc3")
    assert ended.fault == Fault(Vector.GP, 0)
    assert not ended.sregs.cr0 & CR0.PG
