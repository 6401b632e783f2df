# SPDX-License-Identifier: Apache-2.0
"""Guests of SEV, SEV-ES and SNP whose page tables lack the encryption bit, or have one too many.

AMD APM volume 2, 15.34.5: the bit of a leaf decides for data; walks of the guest's page tables and its
instruction fetches are private whatever it says.  15.36.9 and Documentation/virt/kvm/api.rst,
KVM_EXIT_MEMORY_FAULT: under SNP an access that the page's state does not allow is user space's to settle.
"""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    AGENT,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    PAGE_SIZE,
    SIZE_2M,
    Agent,
    Fault,
    Gpa,
    GuestVm,
    Gva,
    MakeVm,
    MemoryFaultExit,
    Vector,
)

everywhere = pytest.mark.protections("sev", "sev-es", "snp")
in_place = pytest.mark.protections("sev", "sev-es")
with_snp = pytest.mark.protections("snp")
leaves = pytest.mark.parametrize(
    ("size", "level"), [pytest.param(PAGE_SIZE, 1, id="4K"), pytest.param(SIZE_2M, 2, id="2M")]
)

GVA = Gva(0x6000_0000_0000)
PRIVATE, SHARED, NEW = 0x5EC1_2E75_EC12_E700, 0x0BE2_0BE2_0BE2_0B00, 0x1E1E_2D2D_3C3C_4B4B
RETURNS = b"\xb8" + (0x1234_5678).to_bytes(4, "little") + b"\xc3"


class Access:
    """A VM with an agent that accesses memory; the first access launches it."""

    def __init__(self, make_vm: MakeVm) -> None:
        self.vm: GuestVm = make_vm(AGENT)
        self.agent = Agent(self.vm.vcpus[0])

    @property
    def mask(self) -> int:
        """The encryption bit."""
        assert self.vm.encryption is not None
        return self.vm.encryption.mask

    def page(self, size: int = PAGE_SIZE, *, private: bool = True, nx: bool = True) -> Gpa:
        """Map a page of *size* at GVA that begins and ends with PRIVATE or SHARED."""
        self.vm.alloc(size, gva=GVA, page_size=size, private=private, nx=nx)
        gpa = self.vm.gva_to_gpa(GVA)
        for place in (gpa, gpa + size - 8):
            self.vm.memory.write(place, (PRIVATE if private else SHARED).to_bytes(8, "little"))
        return gpa

    def flip(self, level: int) -> None:
        """Invert the encryption bit of the entry of *level* (1: of the 4 KiB page) that GVA uses."""
        step = next(step for step in self.vm.pages.walk(GVA).steps if step.level == level)
        gpa, private = self.vm.from_raw(step.table)
        assert private
        place = self.vm.memory.private_view(gpa + 8 * step.index, 8)
        place[:] = (step.value ^ self.mask).to_bytes(8, "little")

    def fault(self, op: str, gva: Gva = GVA) -> tuple[int, int, int, int]:
        """Let the guest read, or write NEW; return errno, address, size and flags of the memory fault."""
        if op == "read":
            self.agent.begin_read(gva)
        else:
            self.agent.begin_write(gva, NEW)
        got = self.agent.vcpu.expect(MemoryFaultExit)
        return got.errno, got.gpa, got.size, got.flags

    def host(self, gpa: Gpa) -> int:
        """Return what the host sees there."""
        return int.from_bytes(self.vm.memory.shared_view(gpa, 8), "little")


# Entries that lead to tables, and fetches: the bit is not asked.


@everywhere
@pytest.mark.parametrize("level", [2, 3, 4], ids=["PDE", "PDPTE", "PML4E"])
def test_a_table_pointer_that_lacks_the_bit(make_vm: MakeVm, level: int) -> None:
    """A pointer to a table works without the bit, too: the table is read as private memory.

    AMD APM volume 2, 15.34.5: page-table walks of the guest are private.
    """
    access = Access(make_vm)
    access.page()
    access.flip(level)
    assert access.agent.read(GVA) == PRIVATE
    assert access.agent.write(GVA, NEW) is None
    assert access.agent.read(GVA) == NEW


@everywhere
def test_all_table_pointers_lack_the_bit(make_vm: MakeVm) -> None:
    """So does a walk of which no pointer has the bit.

    AMD APM volume 2, 15.34.5.
    """
    access = Access(make_vm)
    access.page()
    for level in (2, 3, 4):
        access.flip(level)
    assert access.agent.read(GVA) == PRIVATE


@everywhere
def test_cr3_that_lacks_the_bit(make_vm: MakeVm) -> None:
    """CR3 without the bit leads to the same private table, and reads back as it was written.

    AMD APM volume 2, 15.34.5.
    """
    access = Access(make_vm)
    access.page()
    assert access.agent.change_cr(3, clear=access.mask) is None
    assert access.agent.read_cr(3) == int(access.vm.pages.cr3) & ~access.mask
    assert access.agent.read(GVA) == PRIVATE


@everywhere
def test_code_whose_leaf_lacks_the_bit(make_vm: MakeVm) -> None:
    """Code runs from private memory though its leaf lacks the bit.

    AMD APM volume 2, 15.34.5: instruction fetches of the guest are private.
    """
    access = Access(make_vm)
    gpa = access.page(nx=False)
    access.vm.memory.write(gpa, RETURNS)
    access.flip(1)
    assert access.agent.call(GVA) == 0x1234_5678


# Leaves of data, encrypted in place.


@in_place
@leaves
def test_a_leaf_that_lacks_the_bit(make_vm: MakeVm, size: int, level: int) -> None:
    """A leaf without the bit shows ciphertext from end to end, and what the guest writes there is in clear.

    AMD APM volume 2, 15.34.5; where nothing is encrypted, the ciphertext is the plain text.
    """
    access = Access(make_vm)
    gpa = access.page(size)
    access.flip(level)
    for offset in (0, size - 8):
        seen = access.agent.read(GVA + offset)
        assert (seen == PRIVATE) is not access.vm.protection.traits.really_encrypts
        assert seen == access.host(gpa + offset)
        assert access.agent.write(GVA + offset, NEW + offset) is None
        assert access.host(gpa + offset) == NEW + offset


@in_place
def test_a_shared_leaf_that_has_the_bit(make_vm: MakeVm) -> None:
    """A leaf with the bit deciphers what the host wrote in clear, and the guest reads back what it writes.

    AMD APM volume 2, 15.34.5; where nothing is encrypted, all see the plain text.
    """
    access = Access(make_vm)
    gpa = access.page(private=False)
    access.flip(1)
    encrypted = access.vm.protection.traits.really_encrypts
    assert (access.agent.read(GVA) == SHARED) is not encrypted
    assert access.agent.write(GVA, NEW) is None
    assert access.agent.read(GVA) == NEW
    assert (access.host(gpa) == NEW) is not encrypted


# Leaves of data under SNP.


@with_snp
@leaves
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_leaf_of_snp_that_lacks_the_bit(make_vm: MakeVm, size: int, level: int, op: str) -> None:
    """A shared access to a private page is a memory fault without PRIVATE, of the 4 KiB page alone.

    Once the page is shared, the access reaches the host's memory; pages beside it still fault.
    Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT; AMD APM volume 2, 15.36.9.
    """
    access = Access(make_vm)
    gpa = access.page(size)
    access.flip(level)
    last = size - PAGE_SIZE
    for offset in sorted({0, last}):
        place = gpa + offset
        assert access.fault(op, GVA + offset) == (errno.EFAULT, int(place), PAGE_SIZE, 0)
        access.vm.memory.shared_view(place, 8)[:] = SHARED.to_bytes(8, "little")
        access.vm.memory.set_shared(place, PAGE_SIZE)
        value = access.agent.value()
        assert op == "write" or value == SHARED
        assert access.host(place) == (SHARED if op == "read" else NEW)


@with_snp
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_leaf_of_snp_that_lacks_the_bit_changes_nothing(make_vm: MakeVm, op: str) -> None:
    """However often it is tried, the private page stays private: the same fault again.

    Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT: KVM converts nothing by itself.
    """
    access = Access(make_vm)
    gpa = access.page()
    access.flip(1)
    for _ in range(3):
        assert access.fault(op) == (errno.EFAULT, int(gpa), PAGE_SIZE, 0)
    assert access.vm.memory.is_private(gpa)
    assert access.host(gpa) == 0


@with_snp
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_shared_leaf_of_snp_that_has_the_bit(make_vm: MakeVm, op: str) -> None:
    """A private access to a shared page is a memory fault with PRIVATE alone.

    When the host makes the page private, the guest has not validated it: #VC 0x404.  AMD APM volume 2,
    15.36.10; Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT.
    """
    access = Access(make_vm)
    gpa = access.page(private=False)
    access.flip(1)
    told = (errno.EFAULT, int(gpa), PAGE_SIZE, int(KVM_MEMORY_EXIT_FLAG_PRIVATE))
    assert access.fault(op) == told
    access.vm.memory.set_private(gpa, PAGE_SIZE)
    assert access.agent.end() == Fault(Vector.VC, 0x404)
    assert access.host(gpa) == SHARED
