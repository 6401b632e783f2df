# SPDX-License-Identifier: Apache-2.0
"""The CPUID ioctls themselves: room, limits, what is refused."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_TSC_DEADLINE_TIMER,
    Cpuid,
    Kvm,
    Vcpu,
    Vm,
    ioctls,
    kvm_cpuid,
    kvm_cpuid2,
    kvm_cpuid_entry,
    kvm_cpuid_entry2,
    refused,
)
from selftests.cpuid.conftest import CpuidGuestMaker

MAX_ENTRIES = 256
SYSTEM_LISTS = [
    "KVM_GET_SUPPORTED_CPUID",
    pytest.param("KVM_GET_EMULATED_CPUID", marks=pytest.mark.requires("KVM_CAP_EXT_EMUL_CPUID")),
]


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    """The vCPU of a bare VM."""
    return vm.create_vcpu()


def entries(count: int) -> list[kvm_cpuid_entry2]:
    """Return *count* entries that mean nothing to KVM."""
    return [kvm_cpuid_entry2(function=0x5000_0000 + number, eax=number) for number in range(count)]


@pytest.mark.parametrize("op", SYSTEM_LISTS)
def test_list_too_short(kvm: Kvm, op: str) -> None:
    """A list with no room, or with room for one entry less than there are, fails with E2BIG.

    Documentation/virt/kvm/api.rst, 4.46 KVM_GET_SUPPORTED_CPUID and 4.88 KVM_GET_EMULATED_CPUID.
    """
    ioctl = ioctls.IOCTLS[op]
    full = kvm_cpuid2.with_entries(MAX_ENTRIES)
    kvm.ioctl(ioctl, full)
    assert full.nent > 1
    for room in (0, 1, full.nent - 1):
        assert kvm.ioctl_raw(ioctl, kvm_cpuid2.with_entries(room)) == (-1, errno.E2BIG)


@pytest.mark.parametrize("op", SYSTEM_LISTS)
def test_list_fits(kvm: Kvm, op: str) -> None:
    """With room for exactly its entries the list is returned whole.

    Documentation/virt/kvm/api.rst, 4.46 and 4.88 ("If the number is just right").
    """
    ioctl = ioctls.IOCTLS[op]
    full = kvm_cpuid2.with_entries(MAX_ENTRIES)
    kvm.ioctl(ioctl, full)
    exact = kvm_cpuid2.with_entries(full.nent)
    kvm.ioctl(ioctl, exact)
    assert exact.entries_list() == full.entries_list()


@pytest.mark.parametrize("op", SYSTEM_LISTS)
def test_list_with_room_to_spare(kvm: Kvm, op: str) -> None:
    """With more room than needed nent comes back as the number of entries, each of which is there once.

    Documentation/virt/kvm/api.rst, 4.46 and 4.88 ("the 'nent' field is adjusted").
    """
    table = kvm_cpuid2.with_entries(MAX_ENTRIES)
    kvm.ioctl(ioctls.IOCTLS[op], table)
    assert 0 < table.nent < MAX_ENTRIES
    places = [(entry.function, entry.index) for entry in table.entries_list()]
    assert len(set(places)) == len(places) == table.nent


@pytest.mark.requires("KVM_CAP_EXT_EMUL_CPUID")
def test_emulated_list_wants_zeros(kvm: Kvm) -> None:
    """KVM_GET_EMULATED_CPUID refuses a list whose entries have something in their padding with EINVAL.

    arch/x86/kvm/cpuid.c, sanity_check_entries().
    """
    table = kvm_cpuid2.with_entries(16)
    table.entries[5].padding[2] = 1
    assert kvm.ioctl_raw(ioctls.KVM_GET_EMULATED_CPUID, table) == (-1, errno.EINVAL)


def test_get_what_was_set(vcpu: Vcpu) -> None:
    """KVM_GET_CPUID2 returns the entries of KVM_SET_CPUID2 in their order.

    Documentation/virt/kvm/api.rst, 4.20 KVM_SET_CPUID ("Userspace can get a copy ... through
    KVM_GET_CPUID2").
    """
    table = kvm_cpuid2.of(
        [
            *entries(3),
            kvm_cpuid_entry2(function=0x5000_0100, index=3, flags=1, ebx=2, ecx=3, edx=4),
            kvm_cpuid_entry2(function=0x5000_0100, index=1, flags=1, ebx=5, ecx=6, edx=7),
        ]
    )
    vcpu.cpuid.set(table)
    assert vcpu.cpuid.get().entries_list() == table.entries_list()


def test_supported_table_is_kept(vcpu: Vcpu) -> None:
    """Of the table that KVM supports only what follows the vCPU's state is not kept as it was set.

    OSXSAVE (leaf 1), OSPKE (leaf 7), the size of the XSAVE area (leaf 0xD).  Documentation/virt/kvm/api.rst,
    4.20 KVM_SET_CPUID; arch/x86/kvm/cpuid.c, kvm_update_cpuid_runtime().
    """
    runtime = {(1, 0): (0, 0, 1 << 27, 0), (7, 0): (0, 0, 1 << 4, 0)}
    runtime |= dict.fromkeys([(0xD, 0), (0xD, 1)], (0, 0xFFFF_FFFF, 0, 0))
    given = Cpuid.from_struct(vcpu.vm.kvm.supported_cpuid)
    vcpu.cpuid.set(given.to_struct())
    changed = {}
    for before, after in zip(given.entries, Cpuid.from_struct(vcpu.cpuid.get()).entries, strict=True):
        place = before.function, before.index
        assert (after.function, after.index, after.flags) == (*place, before.flags)
        words = zip(before.registers, after.registers, runtime.get(place, (0, 0, 0, 0)), strict=True)
        bits = [(old ^ new) & ~mask for old, new, mask in words]
        if any(bits):
            changed[place] = [hex(word) for word in bits]
    assert changed == {}


def test_new_vcpu_has_none(vcpu: Vcpu) -> None:
    """A new vCPU has no CPUID entries until they are set.

    Documentation/virt/kvm/api.rst, 4.20 KVM_SET_CPUID.
    """
    assert vcpu.cpuid.get().nent == 0


def test_get_too_short(vcpu: Vcpu) -> None:
    """KVM_GET_CPUID2 with less room than entries fails with E2BIG and leaves the number of entries alone.

    arch/x86/kvm/cpuid.c, kvm_vcpu_ioctl_get_cpuid2(); compare api.rst, 4.46 KVM_GET_SUPPORTED_CPUID.
    """
    vcpu.cpuid.set(entries(5))
    short = kvm_cpuid2.with_entries(4)
    assert vcpu.ioctl_raw(ioctls.KVM_GET_CPUID2, short) == (-1, errno.E2BIG)
    assert short.nent == 4
    exact = kvm_cpuid2.with_entries(5)
    vcpu.ioctl(ioctls.KVM_GET_CPUID2, exact)
    assert exact.nent == 5


def test_too_many(vcpu: Vcpu) -> None:
    """256 entries are taken, 257 are refused with E2BIG.

    arch/x86/kvm/cpuid.c, kvm_vcpu_ioctl_set_cpuid2(); KVM_MAX_CPUID_ENTRIES.
    """
    vcpu.cpuid.set(entries(MAX_ENTRIES))
    with refused(errno.E2BIG):
        vcpu.cpuid.set(entries(MAX_ENTRIES + 1))


@pytest.mark.parametrize("bits", [47, 49, 56, 58, 64])
def test_bad_address_width(vcpu: Vcpu, bits: int) -> None:
    """A linear address width other than 48 and 57 bits is refused with EINVAL.

    arch/x86/kvm/cpuid.c, kvm_check_cpuid().
    """
    with refused(errno.EINVAL):
        vcpu.cpuid.set([kvm_cpuid_entry2(function=0x8000_0008, eax=bits << 8 | 40)])


def test_older_form(vcpu: Vcpu) -> None:
    """KVM_SET_CPUID sets entries that answer for every index.

    Documentation/virt/kvm/api.rst, 4.20 KVM_SET_CPUID.
    """
    given = [
        kvm_cpuid_entry(function=0x5000_0000, eax=1, ebx=2, ecx=3, edx=4),
        kvm_cpuid_entry(function=0x5000_0001, eax=5, ebx=6, ecx=7, edx=8),
    ]
    vcpu.ioctl(ioctls.KVM_SET_CPUID, kvm_cpuid.of(given))
    assert vcpu.cpuid.get().entries_list() == [
        kvm_cpuid_entry2(function=0x5000_0000, eax=1, ebx=2, ecx=3, edx=4),
        kvm_cpuid_entry2(function=0x5000_0001, eax=5, ebx=6, ecx=7, edx=8),
    ]


def test_older_form_too_many(vcpu: Vcpu) -> None:
    """KVM_SET_CPUID refuses 257 entries with E2BIG.

    arch/x86/kvm/cpuid.c, kvm_vcpu_ioctl_set_cpuid().
    """
    many = [kvm_cpuid_entry(function=0x5000_0000 + number) for number in range(MAX_ENTRIES + 1)]
    assert vcpu.ioctl_raw(ioctls.KVM_SET_CPUID, kvm_cpuid.of(many)) == (-1, errno.E2BIG)


@pytest.mark.usefixtures("open_registers")
def test_changed_after_run(cpuid_guest: CpuidGuestMaker) -> None:
    """Once the vCPU has run, KVM_SET_CPUID2 refuses a table that differs in any way with EINVAL.

    Documentation/virt/kvm/api.rst, 4.20 KVM_SET_CPUID ("after KVM_RUN"); commit c6617c61e8fe ("KVM: x86:
    Partially
    allow KVM_SET_CPUID{,2} after KVM_RUN").
    """
    guest = cpuid_guest()
    before = guest.vcpu.cpuid.get()

    def flip(cpuid: Cpuid) -> None:
        cpuid.ensure(0x8000_0006).ecx ^= 1

    def shorten(cpuid: Cpuid) -> None:
        del cpuid.entries[-1]

    def swap(cpuid: Cpuid) -> None:
        cpuid.entries[0], cpuid.entries[1] = cpuid.entries[1], cpuid.entries[0]

    for change in (flip, shorten, swap):
        cpuid = Cpuid.from_struct(before)
        change(cpuid)
        with refused(errno.EINVAL):
            guest.vcpu.cpuid.set(cpuid.to_struct())
    assert guest.vcpu.cpuid.get() == before


@pytest.mark.usefixtures("open_registers")
def test_same_after_run(cpuid_guest: CpuidGuestMaker) -> None:
    """Once the vCPU has run, KVM_SET_CPUID2 still takes the table that KVM_GET_CPUID2 returns.

    Commit c6617c61e8fe ("KVM: x86: Partially allow KVM_SET_CPUID{,2} after KVM_RUN").
    """
    guest = cpuid_guest()
    table = guest.vcpu.cpuid.get()
    guest.vcpu.cpuid.set(table)
    assert guest.vcpu.cpuid.get() == table
    assert guest.cpuid(0)[0] == table.entries_list()[0].eax


def test_tsc_deadline_agrees(kvm: Kvm) -> None:
    """KVM_GET_SUPPORTED_CPUID shows the TSC deadline timer only where KVM_CAP_TSC_DEADLINE_TIMER is offered.

    Documentation/virt/kvm/api.rst, 4.46 KVM_GET_SUPPORTED_CPUID ("TSC deadline timer support is also
    reported").
    """
    shown = Cpuid.from_struct(kvm.supported_cpuid).has("tsc_deadline_timer")
    assert kvm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER) >= shown


def test_x2apic_is_emulated(kvm: Kvm) -> None:
    """KVM_GET_SUPPORTED_CPUID shows x2APIC whatever the host's CPU has, as KVM emulates it.

    Documentation/virt/kvm/api.rst, 4.46 KVM_GET_SUPPORTED_CPUID ("Some features (for example, x2apic)").
    """
    assert Cpuid.from_struct(kvm.supported_cpuid).has("x2apic")
