# SPDX-License-Identifier: Apache-2.0
"""Read-only slots: memory to reads, KVM_EXIT_MMIO to writes."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    Agent,
    Gpa,
    GuestVm,
    Gva,
    MakeVm,
    MemorySlot,
    MmioExit,
    Registers,
)
from selftests.conftest import Accessor

pytestmark = pytest.mark.requires("KVM_CAP_READONLY_MEM", "trait:readonly_slots")

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
OLD = 0x0101_0101_0101_0101
NEW = 0x8877_6655_4433_2211

# mov eax, 0x600d; ret
CODE = b"\xb8\x0d\x60\x00\x00\xc3"


def read_only_page(vm: GuestVm) -> MemorySlot:
    slot = vm.add_slot(GPA, PAGE_SIZE, flags=KVM_MEM_READONLY)
    slot.mapping.view(0, PAGE_SIZE)[:] = b"\1" * PAGE_SIZE
    return slot


def test_reads_are_memory_reads(accessor: Accessor) -> None:
    """Reads of a read-only slot find its memory and do not exit.

    Documentation/virt/kvm/api.rst 4.35: only "writes to this memory will be posted to userspace".
    """
    read_only_page(accessor.vm)
    accessor.map(GVA, GPA, PAGE_SIZE)
    assert accessor.read(GVA + 0x10) == OLD
    exits = accessor.vcpu.exits
    assert accessor.read(GVA + 0x20) == OLD
    assert accessor.read(GVA + PAGE_SIZE - 2, 2) == OLD & 0xFFFF
    assert accessor.vcpu.exits == exits + 2  # the two SYNCs


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_writes_are_posted_to_user_space(accessor: Accessor, size: int) -> None:
    """Writes to a read-only slot "will be posted to userspace as KVM_EXIT_MMIO exits"; memory stays as it is.

    Documentation/virt/kvm/api.rst 4.35.
    """
    slot = read_only_page(accessor.vm)
    accessor.map(GVA, GPA, PAGE_SIZE)
    got = accessor.exit_of(GVA + 0x20, size, NEW)
    assert (got.phys_addr, got.is_write) == (int(GPA) + 0x20, True)
    assert got.data == NEW.to_bytes(8, "little")[:size]
    accessor.result()
    assert accessor.read(GVA + 0x20) == OLD
    assert bytes(slot.mapping.view(0, PAGE_SIZE)) == b"\1" * PAGE_SIZE


def test_every_write_is_posted(accessor: Accessor) -> None:
    """A page that was read and written before is still read-only: no write is lost or let through.

    Documentation/virt/kvm/api.rst 4.35.
    """
    read_only_page(accessor.vm)
    accessor.map(GVA, GPA, PAGE_SIZE)
    for value in range(5):
        assert accessor.read(GVA) == OLD
        assert accessor.exit_of(GVA, 8, value).value == value
        accessor.result()
    assert accessor.read(GVA) == OLD


def test_the_host_still_writes_the_memory(accessor: Accessor) -> None:
    """KVM_MEM_READONLY binds the guest alone: what user space writes to the memory, the guest reads.

    Documentation/virt/kvm/api.rst 4.35: "Changes in the backing [...] are automatically reflected".
    """
    slot = read_only_page(accessor.vm)
    accessor.map(GVA, GPA, PAGE_SIZE)
    assert accessor.read(GVA) == OLD
    slot.mapping.view(0, 8)[:] = NEW.to_bytes(8, "little")
    assert accessor.read(GVA) == NEW


def test_a_writable_slot_of_the_same_memory_is_not_affected(accessor: Accessor) -> None:
    """Read-only is the slot, not the memory: through a second slot the guest writes what it reads here.

    Documentation/virt/kvm/x86/mmu.rst: "two gpas may alias to the same hva".
    """
    slot = read_only_page(accessor.vm)
    accessor.vm.add_alias(int(GPA) + PAGE_SIZE, PAGE_SIZE, slot.mapping)
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    assert accessor.read(GVA) == OLD
    accessor.write(GVA + PAGE_SIZE, NEW)
    assert accessor.read(GVA) == NEW
    assert accessor.exit_of(GVA, 8, 0).is_write


def test_code_runs_from_it(make_vm: MakeVm) -> None:
    """Instruction fetches from a read-only slot are reads: its code runs without an exit.

    Documentation/virt/kvm/api.rst 4.35.
    """
    vm = make_vm(AGENT)
    slot = vm.add_slot(GPA, PAGE_SIZE, flags=KVM_MEM_READONLY)
    slot.mapping.view(0, len(CODE))[:] = CODE
    vm.map(GVA, GPA, PAGE_SIZE, private=False)
    assert Agent(vm.vcpus[0]).call(GVA) == 0x600D


@pytest.mark.requires("trait:kvm_emulates")
def test_a_string_write_is_posted_element_by_element(make_vm: MakeVm) -> None:
    """A REP string write to a read-only slot exits once for each element, in ascending order.

    Documentation/virt/kvm/api.rst 4.35 and 5, KVM_EXIT_MMIO: up to 8 bytes an exit.
    """
    vm = make_vm(AGENT)
    agent = Agent(vm.vcpus[0])
    slot = read_only_page(vm)
    vm.map(GVA, GPA, PAGE_SIZE, private=False)
    agent.begin(b"\xf3\x48\xab", rdi=int(GVA) + 0x40, rax=NEW, rcx=3)  # rep stosq
    for number in range(3):
        got = vm.vcpus[0].expect(MmioExit)
        assert (got.phys_addr, got.is_write) == (int(GPA) + 0x40 + 8 * number, True)
        assert got.value == NEW
    end = agent.end()
    assert isinstance(end, Registers)
    assert (end.rdi, end.rcx) == (GVA + 0x40 + 24, 0)
    assert bytes(slot.mapping.view(0, PAGE_SIZE)) == b"\1" * PAGE_SIZE
