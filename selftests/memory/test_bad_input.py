# SPDX-License-Identifier: Apache-2.0
"""What kvmpy says about memory that cannot be: an error that names the mistake, and nothing left behind."""

from __future__ import annotations

import errno

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Gpa, GuestVm, Gva, KvmError, MakeVm, RawGpa, refused
from kvmpy.x86.paging_errors import EncryptionBitError

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
MEMORY = 16 << 20


@pytest.fixture
def guest(make_vm: MakeVm) -> GuestVm:
    return make_vm(AGENT, memory=MEMORY)


def still_whole(vm: GuestVm) -> None:
    """The VM that refused something works on: memory can be added where it was refused."""
    vm.add_memory(GPA, PAGE_SIZE)
    vm.map(GVA, GPA, PAGE_SIZE)
    vm.memory.write(GPA, b"\x42" + bytes(7))
    assert Agent(vm.vcpus[0]).read(GVA) == 0x42


def test_overlapping_memory_is_refused(guest: GuestVm) -> None:
    """Memory that overlaps other memory is a ValueError with both ranges; nothing stays behind."""
    slots = dict(guest.slots)
    with pytest.raises(ValueError, match=r"0xfff000\.\.0x1001000 overlaps 0x0\.\.0x1000000"):
        guest.add_memory(Gpa(MEMORY - PAGE_SIZE), 2 * PAGE_SIZE)
    assert guest.slots == slots
    still_whole(guest)


@pytest.mark.parametrize(
    ("gpa", "size"), [(GPA + 8, PAGE_SIZE), (GPA, PAGE_SIZE + 8), (GPA, 0)], ids=["gpa", "size", "nothing"]
)
def test_unaligned_memory_is_refused(guest: GuestVm, gpa: Gpa, size: int) -> None:
    """Memory that is not made of whole pages is a ValueError; nothing stays behind."""
    slots = dict(guest.slots)
    with pytest.raises(ValueError, match=r"size 0x[0-9a-f]+ is not made of whole 4 KiB pages"):
        guest.add_memory(gpa, size)
    assert guest.slots == slots
    still_whole(guest)


def test_memory_that_kvm_refuses_leaves_nothing_behind(guest: GuestVm) -> None:
    """A slot that KVM refuses is a KvmError with a hint; the range is free afterwards."""
    slots = dict(guest.slots)
    with pytest.raises(KvmError, match=r"hint: flags known are 0x[0-9a-f]+, not 0x100000") as caught:
        guest.add_memory(GPA, PAGE_SIZE, flags=1 << 20)
    assert caught.value.errno == errno.EINVAL
    assert guest.slots == slots
    still_whole(guest)


def test_a_slot_number_in_use_is_refused(guest: GuestVm) -> None:
    """Memory for a slot number that is in use is refused (EINVAL), and the slot keeps its memory."""
    slots = dict(guest.slots)
    with refused(errno.EINVAL):
        guest.add_memory(GPA, PAGE_SIZE, slot=min(guest.slots))
    assert guest.slots == slots
    still_whole(guest)


def test_an_address_outside_memory_names_the_memory(guest: GuestVm) -> None:
    """A Gpa behind guest memory is a ValueError that lists what memory there is, for every way to use it."""
    outside = Gpa(MEMORY)
    words = r"gpa 0x1000000, 0x[0-9a-f]+ bytes, is outside guest memory \(0x0\.\.0xffffff\)"
    with pytest.raises(ValueError, match=words):
        guest.gpa_to_hva(outside)
    with pytest.raises(ValueError, match=words):
        guest.memory.view(outside, 8)
    with pytest.raises(ValueError, match=words):
        guest.memory.write(outside, b"x")
    with pytest.raises(ValueError, match="is outside guest memory"):
        guest.memory.view(outside - 8, 16)


def test_deleted_memory_is_outside(guest: GuestVm) -> None:
    """After a slot was deleted its addresses are outside guest memory."""
    slot = guest.add_memory(GPA, PAGE_SIZE)
    assert guest.gpa_to_hva(GPA) == slot.hva
    slot.delete()
    with pytest.raises(ValueError, match="is outside guest memory"):
        guest.gpa_to_hva(GPA)
    still_whole(guest)


def test_moved_memory_is_found_where_it_went(guest: GuestVm) -> None:
    """After a slot moved, its memory has its new addresses and lost the old ones."""
    slot = guest.add_memory(GPA, PAGE_SIZE, private=False)
    slot.move(GPA + 16 * PAGE_SIZE)
    assert guest.gpa_to_hva(GPA + 16 * PAGE_SIZE) == slot.hva
    with pytest.raises(ValueError, match="is outside guest memory"):
        guest.gpa_to_hva(GPA)
    still_whole(guest)


def test_an_address_of_another_kind_is_refused(guest: GuestVm) -> None:
    """A RawGpa or a plain number is no Gpa: TypeError that says which conversion helps."""
    with pytest.raises(TypeError, match=r"takes a Gpa.*RawGpa; from_raw\(\)"):
        guest.gpa_to_hva(RawGpa(0x1000))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a Gpa.* int\b"):
        guest.gpa_to_hva(0x1000)  # type: ignore[arg-type]


@pytest.mark.protections("cbit")
def test_a_gpa_with_the_encryption_bit_is_refused(guest: GuestVm) -> None:
    """A Gpa that carries the encryption bit is an error that names the bit, wherever a Gpa is taken."""
    bit = guest.encryption
    assert bit is not None
    raw = Gpa(0x1000 | bit.mask)
    name = f"bit {bit.bit}.*C-bit|C-bit.*{bit.bit}"
    with pytest.raises(ValueError, match=name):
        guest.gpa_to_hva(raw)
    with pytest.raises(ValueError, match=name):
        guest.add_memory(raw, PAGE_SIZE)
    with pytest.raises(EncryptionBitError, match=name):
        guest.map(GVA, raw, PAGE_SIZE)
    with pytest.raises(ValueError, match=name):
        guest.to_raw(raw)
    still_whole(guest)


@pytest.mark.protections("cbit")
def test_a_raw_address_is_split_into_both_parts(guest: GuestVm) -> None:
    """to_raw() and from_raw() are the way between the two kinds, for private and for shared pages."""
    bit = guest.encryption
    assert bit is not None
    guest.add_memory(GPA, 2 * PAGE_SIZE)
    guest.memory.set_private(GPA, PAGE_SIZE)
    assert guest.to_raw(GPA) == RawGpa(int(GPA) | bit.mask)
    assert guest.to_raw(GPA + PAGE_SIZE) == RawGpa(int(GPA) + PAGE_SIZE)
    assert guest.from_raw(guest.to_raw(GPA)) == (GPA, True)
    assert guest.from_raw(guest.to_raw(GPA + PAGE_SIZE)) == (GPA + PAGE_SIZE, False)


@pytest.mark.parametrize("memory", [(4 << 20) - PAGE_SIZE, MEMORY + 1, 0], ids=["small", "odd", "none"])
def test_a_size_that_no_vm_can_have_is_refused(make_vm: MakeVm, memory: int) -> None:
    """A VM's memory is whole pages, at least 4 MiB: a ValueError otherwise, and no VM stays behind."""
    with pytest.raises(ValueError, match="whole pages, and at least 4 MiB"):
        make_vm(AGENT, memory=memory)
