# SPDX-License-Identifier: Apache-2.0
"""Entries that lack the encryption bit, or have one too many: every mistake has an effect that shows.

Under ``cbit`` the bit is emulated by memory slots; SEV hardware walks private memory whatever the bit of a
table pointer says (AMD APM volume 2, 15.34.1), so it never shows what these tests show.
"""

from __future__ import annotations

import pytest

from kvmpy import (
    PAGE_SIZE,
    SIZE_1G,
    SIZE_2M,
    Gpa,
    GuestExceptionError,
    GuestVm,
    Gva,
    MakeVm,
    ShutdownExit,
    Vector,
)
from kvmpy.guest import layout
from selftests.paging.conftest import MakeProber, PageFault, Prober

pytestmark = pytest.mark.protections("cbit")

GVA = Gva(0x6000_0000_0000)
PRIVATE, SHARED = 0x5EC12E7, 0x0BE2

GUEST = """
#include <kvmpy/guest.h>

static volatile u64 secret = 0x5ec12e7;
GUEST_SHARED volatile u64 known = 0x0be2;

void guest_main(void)
{
	GUEST_ASSERT_EQ(secret, 0x5ec12e7);
	GUEST_SYNC();
	known++;
	GUEST_SYNC();
}
"""


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def flip(prober: Prober, level: int, gva: Gva = GVA) -> None:
    """Invert the encryption bit of the entry of *level*."""
    bit = prober.vm.encryption
    assert bit is not None
    has = prober.entry(gva, level).value & bit.mask
    prober.change_entry(gva, level, set_=bit.mask & ~has, clear=has)


def two_contents(vm: GuestVm, size: int) -> Gpa:
    """A private page of *size* at GVA, with other content in the shared memory of the same address."""
    gva = vm.alloc(size, gva=GVA, page_size=size, user=True, private=True)
    gpa = vm.gva_to_gpa(gva)
    for offset in (0, size - PAGE_SIZE):
        vm.memory.private_view(gpa + offset, 8)[:] = number(PRIVATE)
        vm.memory.shared_view(gpa + offset, 8)[:] = number(SHARED)
    return gpa


@pytest.mark.parametrize(
    ("size", "level"),
    [
        pytest.param(PAGE_SIZE, 1, id="4K"),
        pytest.param(SIZE_2M, 2, id="2M"),
        pytest.param(SIZE_1G, 3, id="1G", marks=pytest.mark.requires("cpuid:pdpe1gb")),
    ],
)
def test_a_leaf_that_lacks_the_bit(make_prober: MakeProber, ring: int, size: int, level: int) -> None:
    """A leaf of any size that lacks the bit shows other memory than the private one, from end to end.

    AMD APM volume 2, 15.34.1 and 7.10.1 (C-bit).
    """
    prober = make_prober(ring=ring, memory=max(64 << 20, 3 * size))
    gpa = two_contents(prober.vm, size)
    places = (GVA, GVA + size - PAGE_SIZE)
    assert [prober.read(place) for place in places] == [PRIVATE] * 2
    flip(prober, level)
    prober.kernel.invlpg(GVA)
    prober.kernel.invlpg(places[1])
    walk = prober.vm.pages.walk(GVA)
    assert (walk.gpa, walk.private) == (gpa, False)
    assert [prober.read(place) for place in places] == [SHARED] * 2
    assert prober.write(GVA, SHARED + 1) is None
    assert prober.vm.memory.private_view(gpa, 8) == number(PRIVATE)


def test_a_leaf_of_code_that_lacks_the_bit(prober: Prober) -> None:
    """Code whose leaf lacks the bit runs from other memory than the private one.

    Intel SDM volume 3, 4.5: an entry's physical address, bit included, selects the page; kvmpy/coco/cbit.py.
    """
    gpa = prober.page(GVA, b"\xb8" + PRIVATE.to_bytes(4, "little") + b"\xc3", private=True)
    prober.vm.memory.shared_view(gpa, 6)[:] = b"\xb8" + SHARED.to_bytes(4, "little") + b"\xc3"
    flip(prober, 1)
    assert prober.fetch(GVA) == SHARED


def test_a_shared_leaf_that_has_the_bit(prober: Prober) -> None:
    """A leaf of a shared page that has the bit keeps what the guest writes from the host.

    AMD APM volume 2, 15.34.1: shared pages are those whose C-bit is clear.
    """
    gpa = prober.page(GVA, SHARED, private=False)
    flip(prober, 1)
    assert prober.write(GVA, PRIVATE) is None
    assert prober.vm.memory.read(gpa, 8) == number(SHARED)
    assert prober.vm.memory.private_view(gpa, 8) == number(PRIVATE)


@pytest.mark.parametrize("level", [2, 3, 4], ids=["PDE", "PDPTE", "PML4E"])
def test_a_table_pointer_that_lacks_the_bit(prober: Prober, page_fault: PageFault, level: int) -> None:
    """A pointer that lacks the bit leads to another, empty table: nothing is mapped until the bit is back.

    Intel SDM volume 3, 4.5: an entry's physical address, bit included, selects the table; kvmpy/coco/cbit.py.
    """
    two_contents(prober.vm, PAGE_SIZE)
    flip(prober, level)
    assert prober.read(GVA) == page_fault(4 if prober.ring else 0, GVA)
    assert False in prober.vm.pages.walk(GVA).tables_private
    assert not prober.vm.pages.walk(GVA).present
    flip(prober, level)
    prober.kernel.invlpg(GVA)
    assert prober.read(GVA) == PRIVATE
    assert prober.vm.pages.walk(GVA).tables_private == (True,) * 4


@pytest.mark.parametrize("level", [2, 3, 4], ids=["PDE", "PDPTE", "PML4E"])
def test_a_table_pointer_that_lacks_the_bit_reads_the_table_there(prober: Prober, level: int) -> None:
    """A pointer that lacks the bit is followed into shared memory: what lies there is the table.

    Intel SDM volume 3, 4.5: an entry's physical address, bit included, selects the page; kvmpy/coco/cbit.py.
    """
    vm = prober.vm
    gpa = two_contents(vm, PAGE_SIZE)
    below, _private = vm.from_raw(prober.entry(GVA, level - 1).table)
    vm.memory.shared_view(below, PAGE_SIZE)[:] = vm.memory.private_view(below, PAGE_SIZE)
    vm.memory.private_view(below, PAGE_SIZE)[:] = b"\xcc" * PAGE_SIZE
    flip(prober, level)
    walk = vm.pages.walk(GVA)
    assert (walk.gpa, walk.private) == (gpa, True)
    assert prober.read(GVA) == PRIVATE


def test_cr3_that_lacks_the_bit(make_vm: MakeVm) -> None:
    """With CR3 in other memory nothing is mapped, not even the handlers: the guest ends with a triple fault.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_SHUTDOWN.
    """
    vm = make_vm.start(GUEST)
    bit = vm.encryption
    assert bit is not None
    vcpu = vm.vcpus[0]
    sregs = vcpu.regs.get_sregs()
    assert sregs.cr3 == int(vm.pages.cr3)
    assert sregs.cr3 & bit.mask
    sregs.cr3 &= ~bit.mask
    vcpu.regs.set_sregs(sregs)
    vcpu.expect(ShutdownExit)


def test_a_program_whose_data_lacks_the_bit(make_vm: MakeVm) -> None:
    """A leaf without the bit under a program's own data is found by the first assertion about it.

    AMD APM volume 2, 15.34.1 and 7.10.1 (C-bit).
    """
    right = make_vm.start(GUEST)
    right.vcpus[0].sync()
    wrong = make_vm(GUEST)
    page = wrong.symbol("secret").gva.align_down(PAGE_SIZE)
    assert wrong.pages.walk(page).private
    wrong.pages.protect(page, PAGE_SIZE, private=False)
    wrong.launch()
    with pytest.raises(AssertionError, match=r"guest assertion failed: secret == 0x5ec12e7\n +got 0 "):
        wrong.vcpus[0].sync()


def test_a_program_whose_descriptors_lack_the_bit(make_vm: MakeVm) -> None:
    """Without the bit under the interrupt descriptor table the first exception cannot be delivered.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_SHUTDOWN.
    """
    source = GUEST.replace("GUEST_ASSERT_EQ(secret, 0x5ec12e7)", 'asm volatile("ud2")')
    right = make_vm.start(source)
    with pytest.raises(GuestExceptionError) as caught:
        right.vcpus[0].sync()
    assert caught.value.vector == Vector.UD
    wrong = make_vm(source)
    wrong.pages.protect(Gva(layout.IDT_GVA), PAGE_SIZE, private=False)
    wrong.launch()
    wrong.vcpus[0].expect(ShutdownExit)


def test_shared_data_that_has_the_bit(make_vm: MakeVm) -> None:
    """With the bit over shared data the guest goes on, and the host never sees what it writes.

    AMD APM volume 2, 15.34.1: shared pages are those whose C-bit is clear.
    """
    vm = make_vm(GUEST)
    known = vm.symbol("known")
    page = known.gva.align_down(PAGE_SIZE)
    assert vm.pages.walk(page).private is False
    vm.memory.private_view(vm.gva_to_gpa(known.gva), 8)[:] = number(0x77)
    vm.pages.protect(page, PAGE_SIZE, private=True)
    vm.launch()
    vm.vcpus[0].sync()
    vm.vcpus[0].sync()
    assert known.u64 == 0x0BE2
    assert vm.memory.private_view(known.gpa, 8) == number(0x78)
