# SPDX-License-Identifier: Apache-2.0
"""SNP guests that convert 2 MiB at once: page state changes, PVALIDATE of both sizes, mismatches.

AMD APM volume 3, PVALIDATE; volume 2, 15.36.3 (page sizes of the RMP); GHCB specification, 4.1.6 (page state
change).  A guest_memfd of 4 KiB pages gives RMP entries of 4 KiB, whatever size the guest asks for: it must
cope with FAIL_SIZEMISMATCH, and validate page by page.  So does every launch; test_large_folios.py has what
folios of 2 MiB change.
"""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    PAGE_SIZE,
    SIZE_2M,
    Gpa,
    GuestTimeoutError,
    GuestVm,
    Gva,
    HypercallExit,
    MakeVm,
    MemoryFaultExit,
)
from kvmpy.coco.sev_platform import large_guest_memfd

pytestmark = pytest.mark.protections("all", must_validate=True)

PAGES = SIZE_2M // PAGE_SIZE
OK, FAIL_INPUT, FAIL_SIZEMISMATCH = 0, 1, 6
PRIVATE_2M, SHARED_2M = 1 << 4 | 1, 1

GUEST = """
#include <kvmpy/guest.h>

#define SIZE	0x200000ul

static inline u64 change(void *page, u32 operation, bool huge)
{
	struct psc_entry entry = {
		.gfn = guest_translate(page, NULL) >> 12,
		.operation = operation,
		.pagesize = huge,
	};

	return psc_call(&entry, 1);
}

static inline void set_leaf(void *page, int level, bool private)
{
	volatile u64 *entry = guest_table_entry(page, level);
	u64 mask = guest_cpu()->encryption_mask;

	*entry = private ? *entry | mask : *entry & ~mask;
	invlpg(page);
}

/* How many 4 KiB pages PVALIDATE took, and how many of them it changed. */
struct counts {
	u64 taken, changed;
};

static inline struct counts each(u8 *page, bool validate)
{
	struct counts counts = { 0 };

	for (u64 at = 0; at < SIZE; at += 4096) {
		struct pvalidate_result result = pvalidate(page + at, false, validate);

		counts.taken += !result.code;
		counts.changed += !result.code && !result.unchanged;
	}
	return counts;
}

static inline u64 fault_of(u8 *page)
{
	struct guest_fault fault;
	u8 value;

	fault = GUEST_TRY("movb %1, %0", : "=q"(value) : "m"(*page));
	return fault.faulted ? (u64)fault.vector << 32 | fault.error_code : 0;
}
"""

SIZES = (
    GUEST
    + """
void guest_main(u8 *page)
{
	struct pvalidate_result again = pvalidate(page, true, true);

	GUEST_SYNC(again.code, pvalidate(page, true, false).code);
	GUEST_SYNC(pvalidate(page + 4096, true, true).code, pvalidate(page + SIZE / 2, true, false).code);
	GUEST_SYNC(each(page, true).taken, each(page, true).changed);
}
"""
)

CONVERT = (
    GUEST
    + """
void guest_main(u8 *page)
{
	struct counts counts = each(page, false);

	GUEST_SYNC(counts.taken, counts.changed);
	GUEST_SYNC(change(page, PSC_SHARED, true));
	set_leaf(page, 2, false);
	for (u64 at = 0; at < SIZE; at += 4096)
		*(volatile u64 *)(page + at) = 0x1000 + at;
	GUEST_SYNC();
	for (u64 at = 0; at < SIZE; at += 4096)
		GUEST_ASSERT_EQ(*(volatile u64 *)(page + at), 0x2000 + at);
	GUEST_SYNC(change(page, PSC_PRIVATE, true));
	set_leaf(page, 2, true);
	GUEST_SYNC(fault_of(page), fault_of(page + SIZE / 2), fault_of(page + SIZE - 1));
	GUEST_SYNC(pvalidate(page, true, true).code);
	counts = each(page, true);
	GUEST_SYNC(counts.taken, counts.changed);
	for (u64 at = 0; at < SIZE; at += 4096)
		*(volatile u64 *)(page + at) = at;
	for (u64 at = 0; at < SIZE; at += 4096)
		GUEST_ASSERT_EQ(*(volatile u64 *)(page + at), at);
	GUEST_SYNC(each(page, true).changed);
}
"""
)

HOLE = (
    GUEST
    + """
void guest_main(u8 *page, u64 hole)
{
	u8 *out = page + hole;

	page[hole - 1] = 0x11;
	page[hole + 4096] = 0x22;
	GUEST_SYNC(pvalidate(out, false, false).code, change(out, PSC_SHARED, false));
	GUEST_SYNC(fault_of(page + hole - 1), fault_of(page + hole + 4096), page[hole - 1], page[hole + 4096]);
	/* The large leaf says private, the host has it shared. */
	GUEST_SYNC(fault_of(out));
	GUEST_SYNC(pvalidate(out, false, true).code, fault_of(out));
}
"""
)

SHARED_PAGE = (
    GUEST
    + """
void guest_main(u8 *page, u64 huge, u64 private)
{
	struct pvalidate_result result;

	set_leaf(page, 2, private);
	result = pvalidate(page, huge, true);
	GUEST_SYNC(result.code, result.unchanged);
}
"""
)


def with_large_page(make_vm: MakeVm, source: str, *args: int, private: bool = True) -> tuple[GuestVm, Gpa]:
    """Make a VM with a 2 MiB leaf, whose address is the first argument of guest_main()."""
    vm = make_vm(source)
    gva: Gva = vm.alloc(SIZE_2M, page_size=SIZE_2M, private=private)
    gpa = vm.gva_to_gpa(gva)
    assert int(gpa) % SIZE_2M == 0
    vm.vcpus[0].set_entry("guest_main", int(gva), *args)
    vm.launch()
    return vm, gpa


def test_sizes_of_pvalidate(make_vm: MakeVm) -> None:
    """2 MiB of 4 KiB entries are FAIL_SIZEMISMATCH, also validated ones; unaligned ones are FAIL_INPUT.

    Nothing is changed by either: all 4 KiB pages are validated as before.  AMD APM volume 3, PVALIDATE.
    """
    vm, _ = with_large_page(make_vm, SIZES)
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (FAIL_SIZEMISMATCH, FAIL_SIZEMISMATCH)
    assert vcpu.sync().args == (FAIL_INPUT, FAIL_INPUT)
    assert vcpu.sync().args == (PAGES, 0)
    vcpu.run_to_done()


def test_there_and_back(make_vm: MakeVm) -> None:
    """2 MiB become shared and private again with one entry each; until validation each page is #VC 0x404.

    GHCB specification, 4.1.6; AMD APM volume 2, 15.36.6 and volume 3, PVALIDATE.
    """
    vm, gpa = with_large_page(make_vm, CONVERT)
    vcpu = vm.vcpus[0]
    asked: list[tuple[int, ...]] = []

    def convert(_vcpu: object, call: HypercallExit) -> bool:
        asked.append(call.args[:3])
        change = vm.memory.set_private if call.args[2] & 1 << 4 else vm.memory.set_shared
        change(Gpa(call.args[0]), call.args[1] * PAGE_SIZE)
        call.respond(0)
        return True

    vm.on_hypercall = convert
    assert vcpu.sync().args == (PAGES, PAGES)
    assert vcpu.sync().args == (0,)
    vcpu.sync()
    assert not any(vm.memory.is_private(gpa + offset) for offset in range(0, SIZE_2M, PAGE_SIZE))
    for offset in range(0, SIZE_2M, PAGE_SIZE):
        view = vm.memory.shared_view(gpa + offset, 8)
        assert int.from_bytes(view, "little") == 0x1000 + offset
        view[:] = (0x2000 + offset).to_bytes(8, "little")
    assert vcpu.sync().args == (0,)
    assert all(vm.memory.is_private(gpa + offset) for offset in range(0, SIZE_2M, PAGE_SIZE))
    assert vcpu.sync().args == (29 << 32 | 0x404,) * 3
    assert vcpu.sync().args == (FAIL_SIZEMISMATCH,)
    assert vcpu.sync().args == (PAGES, PAGES)
    assert vcpu.sync().args == (0,)
    vcpu.run_to_done()
    assert asked == [(int(gpa), PAGES, SHARED_2M), (int(gpa), PAGES, PRIVATE_2M)]


def test_a_hole_in_a_large_page(make_vm: MakeVm) -> None:
    """A 4 KiB page that leaves a 2 MiB leaf takes none of its neighbours along.

    The leaf still calls it private: a memory fault with PRIVATE, and #VC 0x404 when the host gives in.
    AMD APM volume 2, 15.36.3 and 15.36.6; Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT.
    """
    hole = 77 * PAGE_SIZE
    vm, gpa = with_large_page(make_vm, HOLE, hole)
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (OK, 0)
    assert not vm.memory.is_private(gpa + hole)
    assert vcpu.sync().args == (0, 0, 0x11, 0x22)
    got = vcpu.expect(MemoryFaultExit)
    assert (got.errno, got.gpa, got.size, got.flags) == (
        errno.EFAULT,
        int(gpa) + hole,
        PAGE_SIZE,
        KVM_MEMORY_EXIT_FLAG_PRIVATE,
    )
    vm.memory.set_private(gpa + hole, PAGE_SIZE)
    assert vcpu.sync().args == (29 << 32 | 0x404,)
    assert vcpu.sync().args == (OK, 0)
    vcpu.run_to_done()


@pytest.mark.parametrize("huge", [False, True], ids=["4K", "2M"])
def test_pvalidate_of_a_shared_page(make_vm: MakeVm, huge: bool) -> None:
    """PVALIDATE of a page that the host has not made private is a nested fault: a memory fault with PRIVATE.

    Once it is private, the instruction goes on.  The guest has mapped it with the encryption bit before.
    AMD APM volume 3, PVALIDATE: the page must be assigned to the guest.
    """
    vm, gpa = with_large_page(make_vm, SHARED_PAGE, huge, True, private=False)
    vcpu = vm.vcpus[0]
    got = vcpu.expect(MemoryFaultExit)
    assert (got.errno, got.gpa, got.size, got.flags) == (
        errno.EFAULT,
        int(gpa),
        PAGE_SIZE,
        KVM_MEMORY_EXIT_FLAG_PRIVATE,
    )
    vm.memory.set_private(gpa, SIZE_2M)
    assert vcpu.sync().args == ((FAIL_SIZEMISMATCH if huge and not large_guest_memfd() else OK), 0)
    vcpu.run_to_done()


@pytest.mark.parametrize("huge", [False, True], ids=["4K", "2M"])
def test_pvalidate_of_a_page_mapped_as_shared(make_vm: MakeVm, huge: bool) -> None:
    """PVALIDATE without the encryption bit meets an RMP fault that KVM cannot resolve, for ever.

    The guest harms itself alone: its vCPU can be stopped.  sev_handle_rmp_fault() in Linux warns of a fault
    of a page that is not private, and the instruction is repeated.
    """
    vm, _ = with_large_page(make_vm, SHARED_PAGE, huge, False, private=False)
    with pytest.raises(GuestTimeoutError):
        vm.vcpus[0].sync(timeout=1)
