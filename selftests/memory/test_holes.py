# SPDX-License-Identifier: Apache-2.0
"""Where no slot is, every access is one of user space: KVM_EXIT_MMIO, to the byte."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, Anonymous, Gpa, Gva
from selftests.conftest import Accessor

# Behind the guest's own memory and below the APICs.
GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
PATTERN = 0x8877_6655_4433_2211


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_read_of_no_memory_is_answered_by_user_space(accessor: Accessor, size: int) -> None:
    """A read where no slot is exits with its address and size, and gets the data that user space gives.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MMIO.
    """
    accessor.map(GVA, GPA, PAGE_SIZE)
    got = accessor.exit_of(GVA + 0x18, size)
    assert (got.phys_addr, got.size, got.is_write) == (int(GPA) + 0x18, size, False)
    answer = PATTERN & (1 << 8 * size) - 1
    got.respond(answer)
    assert accessor.result() == answer


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_write_to_no_memory_goes_to_user_space(accessor: Accessor, size: int) -> None:
    """A write where no slot is exits with its address, its size and the bytes written.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MMIO.
    """
    accessor.map(GVA, GPA, PAGE_SIZE)
    got = accessor.exit_of(GVA + 0x28, size, PATTERN)
    assert (got.phys_addr, got.is_write, got.size) == (int(GPA) + 0x28, True, size)
    assert got.data == PATTERN.to_bytes(8, "little")[:size]
    assert accessor.result() == 0


def test_a_slot_ends_at_its_last_byte(accessor: Accessor) -> None:
    """The last bytes of a slot are memory, the next ones are not, and the same holds before its first byte.

    Documentation/virt/kvm/api.rst 4.35: guest_phys_addr and memory_size bound the slot.
    """
    accessor.vm.add_slot(GPA + PAGE_SIZE, PAGE_SIZE).mapping.view(0, PAGE_SIZE)[:] = b"\x5a" * PAGE_SIZE
    accessor.map(GVA, GPA, 3 * PAGE_SIZE)
    assert accessor.read(GVA + PAGE_SIZE) == 0x5A5A_5A5A_5A5A_5A5A
    assert accessor.read(GVA + 2 * PAGE_SIZE - 8) == 0x5A5A_5A5A_5A5A_5A5A
    for offset in (PAGE_SIZE - 8, 2 * PAGE_SIZE):
        got = accessor.exit_of(GVA + offset)
        assert got.phys_addr == int(GPA) + offset
        got.respond(0)
        assert accessor.result() == 0


@pytest.mark.requires("trait:kvm_emulates")
def test_a_write_across_the_end_of_a_slot_is_divided(accessor: Accessor) -> None:
    """Of a write that ends behind its slot, memory gets the first bytes and user space the rest.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MMIO: what goes to user space "could not be satisfied by kvm".
    """
    slot = accessor.vm.add_slot(GPA, PAGE_SIZE)
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    got = accessor.exit_of(GVA + PAGE_SIZE - 3, 8, PATTERN)
    data = PATTERN.to_bytes(8, "little")
    assert (got.phys_addr, got.is_write, got.data) == (int(GPA) + PAGE_SIZE, True, data[3:])
    assert accessor.result() == 0
    assert bytes(slot.mapping.view(PAGE_SIZE - 4, 4)) == b"\0" + data[:3]


@pytest.mark.requires("trait:kvm_emulates")
def test_a_read_across_the_end_of_a_slot_is_divided(accessor: Accessor) -> None:
    """Of a read that ends behind its slot, memory gives the first bytes and user space the rest.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MMIO: what goes to user space "could not be satisfied by kvm".
    """
    slot = accessor.vm.add_slot(GPA, PAGE_SIZE)
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    data = PATTERN.to_bytes(8, "little")
    slot.mapping.view(PAGE_SIZE - 3, 3)[:] = data[:3]
    got = accessor.exit_of(GVA + PAGE_SIZE - 3, 8)
    assert (got.phys_addr, got.is_write, got.size) == (int(GPA) + PAGE_SIZE, False, 5)
    got.respond(data[3:])
    assert accessor.result() == PATTERN


def test_an_access_across_two_slots_reaches_both(accessor: Accessor) -> None:
    """Slots that touch are one piece of memory to the guest, whatever host memory is behind each.

    Documentation/virt/kvm/api.rst 4.35.
    """
    vm = accessor.vm
    high = vm.add_slot(GPA + PAGE_SIZE, PAGE_SIZE, backing=Anonymous(huge="never"))
    low = vm.add_slot(GPA, PAGE_SIZE, backing=Anonymous(huge="never"))
    accessor.map(GVA, GPA, 2 * PAGE_SIZE)
    accessor.write(GVA + PAGE_SIZE - 5, PATTERN)
    data = PATTERN.to_bytes(8, "little")
    assert bytes(low.mapping.view(PAGE_SIZE - 5, 5)) == data[:5]
    assert bytes(high.mapping.view(0, 4)) == data[5:] + b"\0"
    assert accessor.read(GVA + PAGE_SIZE - 5) == PATTERN
