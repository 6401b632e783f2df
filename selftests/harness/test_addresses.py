# SPDX-License-Identifier: Apache-2.0
"""The VM's own conversions between kinds of addresses."""

from __future__ import annotations

import ctypes

import pytest

from kvmpy import PAGE_SIZE, Gpa, GuestSymbolError, Gva, MakeVm, PrivateMemoryError, RawGpa

GUEST = """
#include <kvmpy/guest.h>

u64 open_word GUEST_SHARED = 0x1122334455667788;
u64 image_word = 0x99aabbccddeeff00;

void guest_main(void)
{
	GUEST_SYNC(open_word, image_word);
}
"""


def word_at(hva: int) -> int:
    return ctypes.c_uint64.from_address(hva).value


def test_gpa_to_hva(make_vm: MakeVm) -> None:
    """vm.gpa_to_hva() gives the host address of the memory that the guest sees at that page."""
    vm = make_vm(GUEST)
    for name, value in (("open_word", 0x1122334455667788), ("image_word", 0x99AABBCCDDEEFF00)):
        gpa = vm.gva_to_gpa(vm.symbol(name).gva)
        assert word_at(vm.gpa_to_hva(gpa)) == value
    vm.launch()
    assert vm.vcpus[0].sync().args == (0x1122334455667788, 0x99AABBCCDDEEFF00)


def test_a_gpa_never_carries_the_bit(make_vm: MakeVm) -> None:
    """vm.gpa_to_hva() refuses a Gpa with the encryption bit by the bit's name, and a RawGpa by its type."""
    vm = make_vm(GUEST)
    gpa = vm.gva_to_gpa(vm.symbol("image_word").gva)
    if vm.encryption is not None:
        with pytest.raises(
            ValueError, match=f"bit {vm.encryption.bit} set, which is the {vm.encryption.name}"
        ):
            vm.gpa_to_hva(Gpa(int(gpa) | vm.encryption.mask))
    with pytest.raises(TypeError, match="RawGpa"):
        vm.gpa_to_hva(vm.to_raw(gpa))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int"):
        vm.gpa_to_hva(int(gpa))  # type: ignore[arg-type]


def test_raw_addresses(make_vm: MakeVm) -> None:
    """vm.to_raw() adds the bit that the page has now, or the one asked for; vm.from_raw() takes it off and
    says which.
    """
    vm = make_vm(GUEST)
    mask = 0 if vm.encryption is None else vm.encryption.mask
    private = vm.gva_to_gpa(vm.symbol("image_word").gva)
    shared = vm.gva_to_gpa(vm.symbol("open_word").gva)
    assert int(vm.to_raw(private)) == int(private) | mask
    assert int(vm.to_raw(shared)) == int(shared)
    assert int(vm.to_raw(shared, private=True)) == int(shared) | mask
    for gpa in (private, shared):
        assert vm.from_raw(vm.to_raw(gpa)) == (gpa, vm.memory.is_private(gpa) and mask != 0)
    assert vm.from_raw(RawGpa(int(vm.pages.cr3)))[1] == (mask != 0)


def test_addresses_outside_memory(make_vm: MakeVm) -> None:
    """Addresses that no memory backs are refused with the ranges that there are, unmapped ones with the
    entry that ends the walk.
    """
    vm = make_vm(GUEST)
    with pytest.raises(ValueError, match=r"outside guest memory \(0x0\.\.0x3ffffff\)"):
        vm.gpa_to_hva(Gpa(64 << 20))
    with pytest.raises(ValueError, match="not mapped"):
        vm.gva_to_gpa(Gva(0x7F00_0000_0000))
    with pytest.raises(ValueError, match="not mapped"):
        vm.read(Gva(0x7F00_0000_0000), 8)


def test_symbols_by_name(make_vm: MakeVm) -> None:
    """Globals are read and written as typed numbers, bytes and views; a name that does not exist brings the
    closest ones.
    """
    vm = make_vm(GUEST)
    word = vm.symbol("open_word")
    assert word.bytes == (0x1122334455667788).to_bytes(8, "little")
    assert (word.u8, word.u16, word.u32, word.u64) == (0x88, 0x7788, 0x55667788, 0x1122334455667788)
    assert word.i8 == -0x78
    word.i64 = -2
    assert word.u64 == (1 << 64) - 2
    word.view("I")[1] = 7
    assert word.u64 == 7 << 32 | 0xFFFFFFFE
    with pytest.raises(GuestSymbolError, match="open_word"):
        vm.symbol("open_wrod")
    vm.launch()
    assert vm.vcpus[0].sync().args[0] == 7 << 32 | 0xFFFFFFFE


@pytest.mark.protections("none")
def test_what_the_protection_hides(make_vm: MakeVm) -> None:
    """After launch a private page is refused with its address and the reason, and a shared one is not."""
    vm = make_vm(GUEST, protection="cbit", strict_private=True)
    gpa = vm.gva_to_gpa(vm.symbol("image_word").gva)
    vm.launch()
    with pytest.raises(PrivateMemoryError, match=f"gpa {gpa}, 0x8 bytes is private"):
        _ = vm.symbol("image_word").u64
    with pytest.raises(PrivateMemoryError):
        vm.symbol("image_word").u64 = 1
    with pytest.raises(PrivateMemoryError):
        vm.gpa_to_hva(gpa)
    assert vm.symbol("open_word").u64 == 0x1122334455667788
    assert len(vm.view(vm.symbol("open_word").gva, PAGE_SIZE // 2)) == PAGE_SIZE // 2
    assert vm.vcpus[0].sync().args[1] == 0x99AABBCCDDEEFF00


def test_misspelt_keywords(make_vm: MakeVm) -> None:
    """A keyword that make_vm or add_memory does not have is a TypeError that names it."""
    with pytest.raises(TypeError, match="'vpcus' is not one of the keywords vcpus, "):
        make_vm(GUEST, vpcus=2)  # type: ignore[call-arg]
    vm = make_vm(GUEST)
    with pytest.raises(TypeError, match="'flag' is not one of the keywords backing, slot, flags"):
        vm.add_memory(Gpa(1 << 32), 4096, flag=1)  # type: ignore[call-arg]
