# SPDX-License-Identifier: Apache-2.0
"""What of a VM is private: the policies "data" and "all", plain slots, and memory that is allocated later."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    SIZE_1G,
    Gpa,
    GuestVm,
    Gva,
    IoExit,
    MakeVm,
    MmioExit,
    refused,
)
from kvmpy.guest import layout
from kvmpy.x86.paging_errors import TableAccessError

FD_BACKED = {"private_is_fd_backed": True}
# Where policy "data" is offered the host can map memory after launch.
WITH_TABLES = {**FD_BACKED, "host_sees_tables": True}
PLAIN = Gpa(8 * SIZE_1G)
NOWHERE = Gpa(9 * SIZE_1G)
GVA = Gva(0x70_0000_0000)

GUEST = """
#include <kvmpy/guest.h>

u64 data = 1;
const u64 constant = 2;
u64 shown GUEST_SHARED = 3;

void guest_main(void)
{
	GUEST_SYNC(data, constant, shown);
}
"""

# Instructions that KVM carries out in its emulator, on hardware that does not help it.
EMULATED = """
#include <kvmpy/guest.h>

void guest_main(u64 mmio)
{
	wrmsr(0x174, 0x10);
	GUEST_ASSERT_EQ(rdmsr(0x174), 0x10);
	GUEST_ASSERT_NE(cpuid(0, 0).eax, 0);
	GUEST_SYNC(mmio_read32((void *)mmio));
}
"""

STRING_IO = """
#include <kvmpy/guest.h>

u8 private_text[64];
u8 shared_text[64] GUEST_SHARED;

static void put(const u8 *text)
{
	u64 count = 8;

	asm volatile("rep outsb" : "+S"(text), "+c"(count) : "d"(0x10) : "memory");
}

void guest_main(void)
{
	memset(private_text, 'p', sizeof(private_text));
	memset(shared_text, 's', sizeof(shared_text));
	put(shared_text);
	GUEST_SYNC();
	put(private_text);
}
"""

TOUCH = """
#include <kvmpy/guest.h>

u64 target GUEST_SHARED;

void guest_main(void)
{
	for (;;) {
		u64 found = 0;

		GUEST_SYNC();
		for (u64 i = 0; i < 512; i++)
			found |= ((volatile u64 *)target)[i];
		memset((void *)target, 0x77, 4096);
		GUEST_SYNC(found);
	}
}
"""


def private_parts(vm: GuestVm) -> set[str]:
    """Which parts of a VM are private."""
    places = {
        "code": vm.program.symbol("guest_main").gva,
        "data": vm.symbol("data").gva,
        "shown": vm.symbol("shown").gva,
        "descriptors": Gva(layout.GDT_GVA),
        "percpu": vm.vcpus[0].percpu,
        "stack": vm.vcpus[0].stack_top - 8,
        "ucalls": Gva(layout.UCALL_BASE),
    }
    window = {name for name, gva in places.items() if vm.memory.is_private(vm.gva_to_gpa(gva))}
    if vm.memory.is_private(vm.pages.root):
        window.add("tables")
    return window


@pytest.mark.parametrize(
    ("policy", "private"),
    [
        ("data", {"data", "percpu", "stack"}),
        ("all", {"code", "data", "descriptors", "percpu", "stack", "tables"}),
    ],
)
@pytest.mark.protections("all", has_private_memory=True)
def test_what_is_private(make_vm: MakeVm, protection: str, policy: str, private: set[str]) -> None:
    """With policy "data" the CPU's own structures and code are shared, with "all" they are private; both run.

    The promise of make_vm(private=...) (docs/protections.md).
    """
    if policy not in make_vm.traits.policies:
        pytest.skip(f"protection {protection} has no policy {policy}")
    vm = make_vm(GUEST, private=policy)
    assert vm.policy == policy
    assert private_parts(vm) == private
    vm.launch()
    assert [call.args for call in vm.vcpus[0].syncs()] == [(1, 2, 3)]
    assert vm.private.compare() == []


def test_default_policy_is_the_first(make_vm: MakeVm) -> None:
    """Without a word about it a VM has its protection's first policy.

    The promise of make_vm(private=...) (docs/protections.md).
    """
    vm = make_vm(GUEST)
    assert vm.policy == (*make_vm.traits.policies, None)[0]
    assert bool(private_parts(vm)) == make_vm.traits.has_private_memory


def test_policy_that_is_not_offered(make_vm: MakeVm, protection: str) -> None:
    """A policy that a protection does not have is refused with those that it has, and no VM is left.

    The promise of make_vm(private=...) (docs/protections.md).
    """
    offered = make_vm.traits.policies
    with pytest.raises(ValueError, match=f"protection {protection} offers") as caught:
        make_vm(GUEST, private="most")
    assert all(repr(policy) in str(caught.value) for policy in offered)


def test_emulated_instructions(make_vm: MakeVm) -> None:
    """Under the default policy the instructions that KVM emulates work: MSRs, CPUID, MMIO.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MMIO.
    """
    vm = make_vm(EMULATED)
    vm.map(GVA, NOWHERE, PAGE_SIZE, private=False)
    vm.vcpus[0].set_entry("guest_main", int(GVA))
    vm.launch()
    got = vm.vcpus[0].expect(MmioExit)
    assert (got.phys_addr, got.size) == (NOWHERE, 4)
    got.respond((0xFEED).to_bytes(4, "little"))
    assert vm.vcpus[0].sync().args[0] == 0xFEED


@pytest.mark.protections("all", emulator_reads_private=False, kvm_emulates=True)
def test_emulator_reads_the_shared_view(make_vm: MakeVm) -> None:
    """KVM's instruction emulator takes operands from the shared view, also of a private page.

    virt/kvm/kvm_main.c, kvm_read_guest_page: it copies from the slot's userspace_addr.
    """
    vm = make_vm(STRING_IO)
    hidden = vm.symbol("private_text").gpa
    shown = vm.symbol("shared_text").gpa
    assert (vm.memory.is_private(hidden), vm.memory.is_private(shown)) == (True, False)
    vm.launch()
    vm.memory.shared_view(hidden, 64)[:] = b"h" * 64
    vcpu = vm.vcpus[0]
    assert written(vm) == b"ssssssss"
    vcpu.sync()
    assert written(vm) == b"hhhhhhhh"


def written(vm: GuestVm) -> bytes:
    """What the guest writes to its port, in as many exits as KVM makes of it."""
    text = b""
    while len(text) < 8:
        text += vm.vcpus[0].expect(IoExit).data
    return text


@pytest.mark.protections("all", **WITH_TABLES)
def test_memory_allocated_after_launch(make_vm: MakeVm) -> None:
    """What is allocated after launch is private for KVM, too, and zero.

    Documentation/virt/kvm/api.rst 4.141, KVM_SET_MEMORY_ATTRIBUTES.
    """
    vm = make_vm.start(TOUCH)
    vcpu = vm.vcpus[0]
    gva = vm.alloc(PAGE_SIZE)
    gpa = vm.gva_to_gpa(gva)
    vm.memory.shared_view(gpa, PAGE_SIZE)[:] = b"\x55" * PAGE_SIZE
    vm.symbol("target").u64 = int(gva)
    vcpu.sync()
    assert vcpu.sync().args[0] == 0
    assert vm.memory.is_private(gpa)
    assert vm.private.compare() == []
    assert bytes(vm.memory.shared_view(gpa, PAGE_SIZE)) == b"\x55" * PAGE_SIZE


@pytest.mark.parametrize("private", [True, False], ids=["private", "shared"])
@pytest.mark.protections("all", **WITH_TABLES)
def test_memory_used_again_is_zero(make_vm: MakeVm, private: bool) -> None:
    """Pages that were given back come as zeroes when they are allocated again, private or shared.

    The promise of PageAllocator.alloc() (kvmpy/core/memory.py).
    """
    vm = make_vm.start(TOUCH, memory=4 << 20)
    vcpu = vm.vcpus[0]
    first = vm.alloc(PAGE_SIZE, private=True)
    gpa = vm.gva_to_gpa(first)
    vm.symbol("target").u64 = int(first)
    vcpu.sync()
    vcpu.sync()
    vm.allocator.free(gpa)
    again = vm.allocator.alloc(1, private=private)
    while again != gpa:
        again = vm.allocator.alloc(1, private=private)
    vcpu.sync()
    assert vcpu.sync().args[0] == 0
    assert vm.private.compare(gpa, PAGE_SIZE) == []


@pytest.mark.protections("all", **WITH_TABLES)
def test_code_allocated_with_policy_data_is_shared(make_vm: MakeVm) -> None:
    """With policy "data" executable memory is shared: KVM's emulator may have to read it.

    The promise of make_vm(private=...) (docs/protections.md).
    """
    vm = make_vm(GUEST, private="data")
    assert not vm.memory.is_private(vm.gva_to_gpa(vm.alloc(PAGE_SIZE, nx=False)))
    assert vm.memory.is_private(vm.gva_to_gpa(vm.alloc(PAGE_SIZE, nx=False, private=True)))


@pytest.mark.protections("all", **FD_BACKED)
def test_private_tables_cannot_be_edited_after_launch(make_vm: MakeVm) -> None:
    """With policy "all" the host can no longer map anything: the tables are out of its reach.

    The promise of make_vm(private=...) (docs/protections.md).
    """
    vm = make_vm.start(GUEST, private="all")
    with pytest.raises(TableAccessError, match=vm.protection.name):
        vm.alloc(PAGE_SIZE)
    assert vm.private.compare() == []
    vm.vcpus[0].sync()


@pytest.mark.parametrize("flag", [KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY], ids=["dirty log", "read-only"])
@pytest.mark.protections("all", **FD_BACKED, readonly_slots=True)
def test_plain_slot_takes_every_flag(make_vm: MakeVm, flag: int) -> None:
    """A slot with a guest_memfd refuses dirty logging and read-only memory, a plain one of the same VM has
    both.

    Documentation/virt/kvm/api.rst 4.140; virt/kvm/kvm_main.c, check_memory_region_flags.
    """
    vm = make_vm(GUEST)
    with refused(errno.EINVAL):
        vm.add_memory(PLAIN, 2 * PAGE_SIZE, flags=flag)
    assert vm.add_memory(PLAIN, 2 * PAGE_SIZE, flags=flag, private=False).flags == flag


@pytest.mark.protections("all", has_private_memory=True)
def test_plain_slot_holds_shared_pages_only(make_vm: MakeVm) -> None:
    """Pages of a plain slot cannot be made private, and none is handed out as private memory.

    The promise of add_memory(private=False) (kvmpy/guest/vm.py).
    """
    vm = make_vm(GUEST, memory=4 << 20)
    vm.add_memory(PLAIN, 4 << 20, private=False)
    with pytest.raises(ValueError, match="shared pages only"):
        vm.memory.set_private(PLAIN + PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(MemoryError):
        vm.allocator.alloc(900, private=True)
    assert vm.allocator.alloc(900, private=False) >= PLAIN
