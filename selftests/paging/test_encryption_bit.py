# SPDX-License-Identifier: Apache-2.0
"""The encryption bit in page tables: set and clear are different memory, for everything that the guest does.

Under ``cbit`` the bit is emulated by memory slots, so code, stack and tables obey it like data; SEV hardware
fetches and walks private memory whatever the bit says (AMD APM volume 2, 15.34.1).
"""

from __future__ import annotations

import pytest

from kvmpy import (
    PAGE_SIZE,
    SIZE_2M,
    EncryptionBit,
    Gpa,
    GuestProgram,
    GuestVm,
    Gva,
    MakeVm,
    PageTables,
    RawGpa,
)
from kvmpy.coco.cbit import EmulatedEncryptionBit
from kvmpy.core.kvm import Kvm
from kvmpy.x86.entry import ACCESSED, USER, WRITABLE
from selftests.paging.conftest import Prober
from selftests.paging.walker import Walker

pytestmark = pytest.mark.protections("cbit")

GVA = Gva(0x6000_0000_0000)
OPEN = GVA + (1 << 30)
PRIVATE, SHARED = 0x5EC12E7, 0x0BE2

STACKS = """
#include <kvmpy/guest.h>

/* Push on a stack of the host's choice, call there, and come back. */
static __noinline u64 callee(u64 value)
{
	volatile u64 here = value;

	return here + 1;
}

static u64 push_and_call(u64 top, u64 value)
{
	u64 result;

	asm volatile("movq %%rsp, %%r12\\n\\t"
		     "movq %1, %%rsp\\n\\t"
		     "pushq %2\\n\\t"
		     "movq %2, %%rdi\\n\\t"
		     "call *%3\\n\\t"
		     "movq %%r12, %%rsp"
		     : "=&a"(result) : "r"(top), "r"(value), "r"(callee)
		     : "rdi", "rsi", "rdx", "rcx", "r8", "r9", "r10", "r11", "r12", "memory", "cc");
	return result;
}

void guest_main(u64 top, u64 value)
{
	GUEST_SYNC(push_and_call(top, value));
}
"""


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def code(value: int) -> bytes:
    """A function that returns *value*: mov eax, value; ret."""
    return b"\xb8" + value.to_bytes(4, "little") + b"\xc3"


def bit_of(vm: GuestVm) -> EncryptionBit:
    assert vm.encryption is not None
    return vm.encryption


def both_views(vm: GuestVm, *, pages: int = 1, align: int = PAGE_SIZE) -> Gpa:
    """Pages mapped at GVA with the bit set and at OPEN with the bit clear, for both rings."""
    gpa = vm.allocator.alloc(pages, private=True, align=align)
    for gva, private in ((GVA, True), (OPEN, False)):
        vm.map(gva, gpa, pages * PAGE_SIZE, page_size=align, user=True, private=private)
    return gpa


def test_data(prober: Prober) -> None:
    """Through a leaf with the bit the guest reads and writes private memory, without it other memory.

    AMD APM volume 2, 15.34.1 and 7.10.1 (C-bit).
    """
    vm = prober.vm
    gpa = both_views(vm)
    vm.memory.private_view(gpa, 8)[:] = number(PRIVATE)
    vm.memory.shared_view(gpa, 8)[:] = number(SHARED)
    assert (prober.read(GVA), prober.read(OPEN)) == (PRIVATE, SHARED)
    assert prober.write(GVA, PRIVATE + 1) is None
    assert (prober.read(GVA), prober.read(OPEN)) == (PRIVATE + 1, SHARED)
    assert prober.write(OPEN, SHARED + 1) is None
    assert vm.memory.private_view(gpa, 8) == number(PRIVATE + 1)
    assert vm.memory.shared_view(gpa, 8) == number(SHARED + 1)


def test_data_of_large_pages(prober: Prober) -> None:
    """The bit of a large leaf holds for all of its pages.

    AMD APM volume 2, 15.34.1 and 7.10.1 (C-bit).
    """
    vm = prober.vm
    gpa = both_views(vm, pages=512, align=SIZE_2M)
    offsets = (0, 5 * PAGE_SIZE, SIZE_2M - 8)
    for offset in offsets:
        vm.memory.private_view(gpa + offset, 8)[:] = number(PRIVATE + offset)
        vm.memory.shared_view(gpa + offset, 8)[:] = number(SHARED + offset)
    assert [prober.read(GVA + offset) for offset in offsets] == [PRIVATE + offset for offset in offsets]
    assert [prober.read(OPEN + offset) for offset in offsets] == [SHARED + offset for offset in offsets]


def test_code(prober: Prober) -> None:
    """Code runs from private memory where the bit is set: the other code at the same address is never seen.

    Intel SDM volume 3, 4.5: an entry's physical address, bit included, selects the page; kvmpy/coco/cbit.py.
    """
    vm = prober.vm
    gpa = both_views(vm)
    vm.memory.private_view(gpa, 6)[:] = code(PRIVATE)
    vm.memory.shared_view(gpa, 6)[:] = code(SHARED)
    assert (prober.fetch(GVA), prober.fetch(OPEN)) == (PRIVATE, SHARED)


@pytest.mark.parametrize("private", [True, False], ids=["private", "shared"])
def test_stack(make_vm: MakeVm, private: bool) -> None:
    """Pushes, calls and returns use the memory that the bit of the stack's leaf names, and no other.

    Intel SDM volume 3, 4.5: an entry's physical address, bit included, selects the page; kvmpy/coco/cbit.py.
    """
    vm = make_vm(STACKS)
    gpa = both_views(vm)
    top = (GVA if private else OPEN) + PAGE_SIZE
    vm.vcpus[0].set_entry("guest_main", int(top), PRIVATE)
    vm.launch()
    assert vm.vcpus[0].sync().args == (PRIVATE + 1,)
    used = vm.memory.private_view(gpa, PAGE_SIZE) if private else vm.memory.shared_view(gpa, PAGE_SIZE)
    other = vm.memory.shared_view(gpa, PAGE_SIZE) if private else vm.memory.private_view(gpa, PAGE_SIZE)
    assert used[PAGE_SIZE - 8 :] == number(PRIVATE)
    returned_to = int.from_bytes(used[PAGE_SIZE - 16 : PAGE_SIZE - 8], "little")
    assert vm.program.function(Gva(returned_to)) is not None
    assert other == bytes(PAGE_SIZE)


def tables_of(vm: GuestVm) -> set[RawGpa]:
    """Every table of the guest's address space, as its pointer names it."""
    return {step.table for item in vm.pages.mappings() for step in vm.pages.walk(item.gva).steps}


def test_tables(prober: Prober) -> None:
    """Tables are walked in private memory where CR3 and the pointers have the bit, whatever else lies there.

    Intel SDM volume 3, 4.5: an entry's physical address, bit included, selects the table; kvmpy/coco/cbit.py.
    """
    vm = prober.vm
    gpa = both_views(vm)
    vm.memory.private_view(gpa, 8)[:] = number(PRIVATE)
    tables = tables_of(vm)
    assert len(tables) > 8
    for table in tables:
        where, private = vm.from_raw(table)
        assert private
        vm.memory.shared_view(where, PAGE_SIZE)[:] = b"\xcc" * PAGE_SIZE
    assert prober.read(GVA) == PRIVATE
    prober.kernel.flush_tlb()
    assert prober.read(GVA) == PRIVATE


def test_flags_are_set_in_the_tables_that_were_walked(prober: Prober) -> None:
    """The accessed flag goes to the private table; shared memory at the same address stays untouched.

    Intel SDM volume 3, 4.8 (accessed and dirty flags).
    """
    vm = prober.vm
    both_views(vm)
    assert prober.read(GVA) == 0
    assert prober.entry(GVA, 1).value & ACCESSED
    for table in tables_of(vm):
        assert vm.memory.shared_view(vm.from_raw(table)[0], PAGE_SIZE) == bytes(PAGE_SIZE)


def test_shared_tables(prober: Prober) -> None:
    """Tables may be shared: without the bit in CR3 and the pointers the walk stays in shared memory, and the
    leaves' own bits still tell private data from shared.

    Intel SDM volume 3, 4.5: an entry's physical address, bit included, selects the table; kvmpy/coco/cbit.py.
    """
    vm = prober.vm
    gpa = both_views(vm)
    vm.memory.private_view(gpa, 8)[:] = number(PRIVATE)
    vm.memory.shared_view(gpa, 8)[:] = number(SHARED)
    tables = PageTables(vm.memory, vm.allocator, encryption=vm.encryption, private_tables=False)
    for item in vm.pages.mappings():
        flags = {
            "writable": bool(item.entry & WRITABLE),
            "user": bool(item.entry & USER),
            "nx": bool(item.entry >> 63),
        }
        # The other way round at the two views of one page, so that it shows which tables are walked.
        private = item.private if item.gva not in (GVA, OPEN) else not item.private
        tables.map(item.gva, item.gpa, item.size, page_size=item.page_size, private=private, **flags)
    assert int(tables.cr3) & bit_of(vm).mask == 0
    assert tables.walk(GVA).tables_private == (False,) * 4
    for step in (step for item in tables.mappings() for step in tables.walk(item.gva).steps):
        vm.memory.private_view(vm.from_raw(step.table)[0], PAGE_SIZE)[:] = b"\xcc" * PAGE_SIZE
    assert (prober.read(GVA), prober.read(OPEN)) == (PRIVATE, SHARED)
    assert prober.kernel.write_cr(3, int(tables.cr3)) is None
    assert (prober.read(GVA), prober.read(OPEN)) == (SHARED, PRIVATE)


def test_conversion(prober: Prober) -> None:
    """After a page was converted and its leaf follows, the guest sees the other memory, there and back.

    AMD APM volume 2, 7.10.6: changes of the C-bit need a flush of the translation.
    """
    vm = prober.vm
    gpa = vm.allocator.alloc(1, private=True)
    vm.map(GVA, gpa, PAGE_SIZE, user=True)
    vm.memory.private_view(gpa, 8)[:] = number(PRIVATE)
    vm.memory.shared_view(gpa, 8)[:] = number(SHARED)
    assert prober.read(GVA) == PRIVATE
    for convert, expected in ((vm.memory.set_shared, SHARED), (vm.memory.set_private, PRIVATE)) * 2:
        convert(gpa, PAGE_SIZE)
        prober.edit(lambda: vm.pages.refresh_private(GVA, PAGE_SIZE), GVA)
        prober.kernel.invlpg(GVA)
        assert prober.read(GVA) == expected


def test_what_the_cpu_walked_is_what_an_independent_walk_finds(prober: Prober) -> None:
    """A second walker, which reads raw addresses only, finds in the running guest's CR3 what the guest sees.

    Intel SDM volume 3, 4.5; AMD APM volume 2, 7.10.1 (C-bit).
    """
    vm = prober.vm
    gpa = both_views(vm)
    bit = bit_of(vm)

    def read_u64(raw: int) -> int:
        where, private = vm.from_raw(RawGpa(raw))
        view = vm.memory.private_view if private else vm.memory.shared_view
        return int.from_bytes(view(where, 8), "little")

    assert prober.write(GVA, PRIVATE) is None
    assert prober.write(OPEN, SHARED) is None
    cr3 = prober.vcpu.regs.get_sregs().cr3
    assert cr3 & bit.mask
    walker = Walker(read_u64, cr3, encryption_bit=bit.bit, physical_bits=bit.bit)
    for gva, private, content in ((GVA, True, PRIVATE), (OPEN, False, SHARED)):
        entry = walker.walk(int(gva))
        assert (entry.fault, entry.physical, entry.private) == (None, int(gpa), private)
        assert entry.table_privacy == (True,) * 4
        assert (entry.accessed, entry.dirty) == (True, True)
        assert read_u64(entry.raw) == content


class SharingBit(EmulatedEncryptionBit):
    """The other polarity: the bit is set for shared pages, as Intel TDX has it."""

    def encryption_bit(self, kvm: Kvm) -> EncryptionBit:
        return EncryptionBit(super().encryption_bit(kvm).bit, set_means_private=False)


def test_the_other_polarity(make_vm: MakeVm) -> None:
    """With a bit that is set for shared pages a guest runs in memory without it, and shares memory with it.

    Intel TDX Module Base Specification, "Shared bit": the highest guest physical address bit.
    """
    with make_vm.kvm.create_vm(GuestProgram.from_c(STACKS), protection=SharingBit()) as vm:
        bit = bit_of(vm)
        gpa = both_views(vm)
        vm.vcpus[0].set_entry("guest_main", int(GVA) + PAGE_SIZE, PRIVATE)
        vm.launch()
        assert int(vm.pages.cr3) & bit.mask == 0
        assert vm.pages.walk(GVA).leaf is not None
        assert [int(vm.pages.walk(gva).raw or 0) & bit.mask for gva in (GVA, OPEN)] == [0, bit.mask]
        assert vm.vcpus[0].sync().args == (PRIVATE + 1,)
        assert vm.memory.private_view(gpa + PAGE_SIZE - 8, 8) == number(PRIVATE)
        assert vm.memory.shared_view(gpa, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert vm.slots[min(vm.slots)].gpa & bit.mask
