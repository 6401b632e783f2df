# SPDX-License-Identifier: Apache-2.0
"""Nested page tables: what L2 may do with a page, what a nested page fault tells, accessed and dirty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvmpy import (
    L1,
    L2,
    PAGE_SIZE,
    SIZE_2M,
    Cpuid,
    Gpa,
    Gva,
    IoExit,
    MakeVm,
    MmioExit,
    PageTables,
    PfErr,
    SvmExit,
    VmExit,
)
from kvmpy.x86.entry import ACCESSED, ADDRESS_MASK, DIRTY, WRITABLE

pytestmark = [
    pytest.mark.protections("none", "cbit"),
    pytest.mark.requires("cpuid:svm", "cpuid:npt"),
]

READ, WRITE = b"\x48\x8b\x07", b"\x48\x89\x07"  # mov (%rdi), %rax and back
CALL = b"\xff\xd7"  # call *%rdi
RET = b"\xc3"
# Away from L1's other mappings: no table on the way is in use for anything else.
WHERE = Gva(0x7000_0000_0000)
HOLE = Gpa(0x1_2345_6000)
FINAL = int(PfErr.GUEST_FINAL | PfErr.U)
WALK = int(PfErr.GUEST_PAGE | PfErr.U)
ACCESSES = {"read": (READ, 0), "write": (WRITE, int(PfErr.W)), "fetch": (CALL, int(PfErr.I))}


class Guest(L2):
    """An L2 with a page of its own at WHERE, in the middle of a 2 MiB page of nested tables."""

    def __init__(self, make_vm: MakeVm) -> None:
        vm = make_vm(L1, memory=64 << 20)
        super().__init__(vm.vcpus[0], npt=True)
        vm.alloc(PAGE_SIZE, gva=WHERE, nx=False)
        vm.write(WHERE, RET + b"\x11" * 7)
        self.raw = Gva(self.pa(WHERE))
        self.window: Gva | None = None
        self.reset()

    @property
    def tables(self) -> PageTables:
        """The nested tables."""
        assert self.npt is not None
        return self.npt

    def entry(self, where: Gva) -> memoryview:
        """Return the nested leaf entry of a physical address of L2, as a word that can be written."""
        step = self.tables.walk(where).steps[-1]
        gpa, _ = self.vm.from_raw(step.table)
        return self.vm.memory.view(gpa, PAGE_SIZE).cast("Q")[step.index : step.index + 1]

    def let_l1_write(self, where: Gva, entry: int) -> None:
        """Let L1 itself write a nested leaf entry: KVM notices the guest's own writes only."""
        step = self.tables.walk(where).steps[-1]
        gpa, private = self.vm.from_raw(step.table)
        if self.window is None:
            self.window = Gva(0x7100_0000_0000)
            private_view = None if self.vm.encryption is None else private
            self.vm.map(self.window, gpa, PAGE_SIZE, page_size=PAGE_SIZE, private=private_view)
        assert self.agent.write(self.window + 8 * step.index, entry) is None

    def access(self, name: str, offset: int = 0) -> VmExit:
        """Let L2 access its page once."""
        self.reset()
        return self.attempt(ACCESSES[name][0], int(WHERE) + offset)


@pytest.fixture
def guest(make_vm: MakeVm) -> Guest:
    return Guest(make_vm)


@dataclass
class Rights:
    """What a nested leaf allows, and which accesses fault with which bits beside the access's own."""

    change: Callable[[Guest], object]
    faults: dict[str, int]


def _protect(**flags: bool) -> Callable[[Guest], object]:
    return lambda guest: guest.tables.protect(guest.raw, PAGE_SIZE, **flags)


P = int(PfErr.P)
RSVD = int(PfErr.P | PfErr.RSVD)
EVERY = ("read", "write", "fetch")
RIGHTS = {
    "all": Rights(_protect(), {}),
    "read-only": Rights(_protect(writable=False), {"write": P}),
    "not executable": Rights(_protect(nx=True), {"fetch": P}),
    "read-only and not executable": Rights(_protect(writable=False, nx=True), {"write": P, "fetch": P}),
    # Every access of a guest is a user's, whatever its own privilege.
    "supervisor": Rights(_protect(user=False), dict.fromkeys(EVERY, P)),
    "not present": Rights(lambda guest: guest.tables.unmap(guest.raw, PAGE_SIZE), dict.fromkeys(EVERY, 0)),
}


@pytest.mark.parametrize("rights", RIGHTS.values(), ids=[name.replace(" ", "-") for name in RIGHTS])
def test_permissions(guest: Guest, rights: Rights) -> None:
    """An access that a nested entry forbids exits with its error code and its address; others work.

    AMD APM volume 2, 15.25.6 Nested versus Guest Page Faults, Fault Ordering.
    """
    rights.change(guest)
    wrong = []
    for name, (_, own) in ACCESSES.items():
        # The fetch is of the page's first byte, where RET is.
        offset = 0 if name == "fetch" else 0x128
        got = guest.access(name, offset)
        expected = VmExit(SvmExit.VMMCALL, 0, 0)
        if name in rights.faults:
            info = FINAL | own | rights.faults[name]
            expected = VmExit(SvmExit.NPF, info, int(guest.raw) + offset)
        if got.code != expected.code or (got.code == SvmExit.NPF and got != expected):
            wrong.append(f"{name}: {got}, expected {expected}")
    assert not wrong, "\n".join(wrong)


def test_goes_on(guest: Guest) -> None:
    """L1 mends the entry, and L2's access works then, with what the page holds.

    AMD APM volume 2, 15.25.6: the fault leaves L2 at the instruction.
    """
    guest.tables.unmap(guest.raw, PAGE_SIZE)
    assert guest.access("read").code == SvmExit.NPF
    guest.tables.map(guest.raw, guest.gpa(WHERE), PAGE_SIZE, user=True)
    assert guest.resume().code == SvmExit.VMMCALL
    assert (guest.fault, guest.value & 0xFF) == (None, RET[0])


@pytest.mark.parametrize("large", [False, True], ids=["4K", "2M"])
def test_reserved_bits(guest: Guest, large: bool) -> None:
    """Reserved bits of a nested entry fault as such: above the physical width, in a large page's low part.

    AMD APM volume 2, 15.25.6 and 5.3.
    """
    width = Cpuid.from_struct(guest.vcpu.cpuid.get()).maxphyaddr
    bits = [*range(width, 52)] + ([13, 16, 20] if large else [])
    if not large:
        guest.tables.split(guest.raw)
    entry = guest.entry(guest.raw)
    good, wrong = entry[0], []
    for bit in bits:
        entry[0] = good | 1 << bit
        # What shares the large page faults before the access: then it is only the bits that count.
        got = guest.access("read", 0x128)
        if got.code != SvmExit.NPF or got.info1 & (RSVD | PfErr.U) != RSVD | PfErr.U:
            wrong.append(f"bit {bit}: {got}")
        entry[0] = good
    assert not wrong, "\n".join(wrong)
    assert guest.access("read").code == SvmExit.VMMCALL


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_table_walks(guest: Guest, level: int) -> None:
    """A table of L2's that nested tables do not have faults as part of the walk, at the entry's address.

    AMD APM volume 2, 15.25.6: EXITINFO1 bit 33.
    """
    step = next(step for step in guest.vm.pages.walk(WHERE).steps if step.level == level)
    table = Gva(int(step.table))
    if level == 4:
        # The root has everything, L2's code too: its walk is the first to fail.
        address = int(table) + 8 * (int(guest.vm.symbol("l2_try").gva) >> 39 & 511)
    else:
        address = int(table) + 8 * step.index
    gpa, private = guest.vm.from_raw(step.table)
    guest.tables.unmap(table, PAGE_SIZE)
    got = guest.access("read")
    assert got.code == SvmExit.NPF, str(got)
    # The processor may say that it would have written the accessed flag, too.
    assert got.info1 & ~int(PfErr.W) == WALK
    assert got.info2 == address
    bit = guest.vm.encryption is not None
    guest.tables.map(table, gpa, PAGE_SIZE, user=True, private=private if bit else None)
    assert guest.resume().code == SvmExit.VMMCALL
    assert guest.fault is None


def test_accessed_and_dirty(guest: Guest) -> None:
    """A read sets the accessed flag of the nested leaf, and only a write the dirty flag.

    AMD APM volume 2, 15.25.5 and 5.4.2.
    """
    guest.tables.split(guest.raw)
    guest.tables.protect(guest.raw, PAGE_SIZE, accessed=False, dirty=False)
    entry = guest.entry(guest.raw)
    seen = []
    for name in ("read", "write"):
        assert guest.access(name).code == SvmExit.VMMCALL
        seen.append(entry[0] & (ACCESSED | DIRTY))
    assert seen == [ACCESSED, ACCESSED | DIRTY]


def test_two_addresses(guest: Guest) -> None:
    """Two physical addresses of L2 may be one page of L1: what is written by one is read by the other.

    AMD APM volume 2, 15.25 Nested Paging.
    """
    other = Gva(0x6000_0000_0000)
    vm = guest.vm
    # L2's physical address of the second mapping: behind memory, where nested tables lead to the same page.
    alias = Gpa(int(HOLE))
    vm.map(other, alias, PAGE_SIZE, page_size=PAGE_SIZE, private=False, overwrite=True)
    guest.tables.map(Gva(int(alias)), guest.gpa(WHERE), PAGE_SIZE, user=True)
    vm.write(WHERE + 8, (0x1234_5678_9ABC).to_bytes(8, "little"))
    guest.reset()
    assert guest.attempt(READ, int(other) + 8).code == SvmExit.VMMCALL
    assert guest.value == 0x1234_5678_9ABC


def test_remapped(guest: Guest) -> None:
    """After a VMRUN that flushes, L2 sees the page that nested tables lead to now, by its content.

    AMD APM volume 2, 15.16 TLB Control: each control that flushes this ASID.
    """
    vm = guest.vm
    pages = [vm.alloc(PAGE_SIZE) for _ in range(2)]
    for number, page in enumerate(pages):
        vm.write(page, bytes([0x40 + number]) * 8)
    guest.tables.split(guest.raw)
    wrong, flags = [], guest.entry(guest.raw)[0] & ~ADDRESS_MASK
    for turn, control in enumerate((1, 3, 7, 1, 3, 7)):
        guest.let_l1_write(guest.raw, guest.pa(pages[turn % 2]) | flags)
        guest.reset()
        guest.vmcb["tlb_ctl"] = control
        guest.attempt(READ, int(WHERE))
        if guest.value & 0xFF != 0x40 + turn % 2:
            wrong.append(f"turn {turn}, control {control}: {guest.value:#x}")
    assert not wrong, "\n".join(wrong)


def test_rights_taken_away(guest: Guest) -> None:
    """After a flush no right that L1 took away is left: a page that L2 has written cannot be written.

    AMD APM volume 2, 15.16 TLB Control.
    """
    guest.tables.split(guest.raw)
    entry = guest.entry(guest.raw)[0]
    for _ in range(3):
        guest.let_l1_write(guest.raw, entry)
        assert guest.access("write").code == SvmExit.VMMCALL
        guest.let_l1_write(guest.raw, entry & ~WRITABLE)
        guest.reset()
        guest.vmcb["tlb_ctl"] = 1
        got = guest.attempt(WRITE, int(WHERE))
        assert got == (SvmExit.NPF, FINAL | P | PfErr.W, int(guest.raw))


@pytest.mark.parametrize("size", [PAGE_SIZE, SIZE_2M], ids=["4K", "2M"])
def test_device_of_l1(guest: Guest, size: int) -> None:
    """Where nested tables lead to no memory of L1 is a device for L2, too; the host sees L1's address.

    Documentation/virt/kvm/api.rst, KVM_EXIT_MMIO.
    """
    address = Gva(0x5000_0000_0000)
    raw = Gpa(0x7_0000_0000)
    device = HOLE.align_down(size)
    guest.vm.map(address, raw, PAGE_SIZE, page_size=PAGE_SIZE, private=False)
    guest.reset()
    assert guest.attempt(READ, int(address) + 16) == (SvmExit.NPF, FINAL, int(raw) + 16)
    guest.tables.map(Gva(int(raw)), device, size, page_size=size, user=True, private=_shared(guest))
    guest.begin()
    exit_ = guest.vcpu.expect(MmioExit)
    assert (exit_.phys_addr, exit_.size, exit_.is_write) == (device + 16, 8, False)
    exit_.respond((0x1122_3344_5566_7788).to_bytes(8, "little"))
    assert guest.end().code == SvmExit.VMMCALL
    assert guest.value == 0x1122_3344_5566_7788


def _shared(guest: Guest) -> bool | None:
    return None if guest.vm.encryption is None else False


@pytest.mark.parametrize(
    ("name", "code", "rights", "info"),
    [
        pytest.param("OUTS", b"\x48\x89\xfe\x66\xba\x42\x00\x6e", "not present", 0, id="OUTS-absent"),
        pytest.param("INS", b"\x66\xba\x42\x00\x6c", "not present", int(PfErr.W), id="INS-absent"),
        pytest.param("INS", b"\x66\xba\x42\x00\x6c", "read-only", int(PfErr.W | PfErr.P), id="INS-read-only"),
    ],
)
def test_string_io(guest: Guest, name: str, code: bytes, rights: str, info: int) -> None:
    """A fault of INS and OUTS on nested tables is one of the final access, though KVM emulates them.

    AMD APM volume 2, 15.25.6: EXITINFO1 bit 32.
    """
    RIGHTS[rights].change(guest)
    guest.reset()
    got = guest.attempt(code, int(WHERE), on_exit=lambda exit_: isinstance(exit_, IoExit))
    assert got == (SvmExit.NPF, FINAL | info, int(guest.raw)), f"{name}: {got}"
