# SPDX-License-Identifier: Apache-2.0
"""Which accesses a filter denies the guest (KVM_X86_SET_MSR_FILTER)."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_UNKNOWN,
    Agent,
    Fault,
    MakeVm,
    Msr,
    MsrFilter,
    MsrRange,
    Vector,
)
from kvmpy.core.msr_filter import MAX_RANGES, READ, WRITE
from selftests.msr.conftest import MsrGuest, MsrGuestMaker

pytestmark = pytest.mark.requires("KVM_CAP_X86_MSR_FILTER")
# What a filter does to MSRs that KVM does not know shows in the reason of the exit: they can stand for any.
by_reason = pytest.mark.requires("KVM_CAP_X86_USER_SPACE_MSR", "param:kvm.ignore_msrs=N")

BASE = 0x2000_0000
GP0 = (Vector.GP, 0)
ALLOWED, DENIED = int(KVM_MSR_EXIT_REASON_UNKNOWN), int(KVM_MSR_EXIT_REASON_FILTER)
STAR, LSTAR, CSTAR = Msr.MSR_STAR, Msr.MSR_LSTAR, Msr.MSR_CSTAR


def read_reason(guest: MsrGuest, index: int) -> int:
    """Return why a read of an unknown MSR exits: DENIED by the filter, or ALLOWED and then not known."""
    got = guest.read(index).exit()
    got.respond()
    guest.value()
    return got.msr_reason


def write_reason(guest: MsrGuest, index: int) -> int:
    """Return the same for a write."""
    got = guest.write(index, 1).exit()
    got.respond()
    guest.done()
    return got.msr_reason


def watched(msr_guest: MsrGuestMaker, *ranges: MsrRange, default_deny: bool = False) -> MsrGuest:
    """Return a guest with a filter, whose accesses to unknown MSRs exit with the filter's decision."""
    guest = msr_guest(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)
    guest.vm.msrs.set_filter(MsrFilter(ranges, default_deny))
    return guest


def test_deny_read(msr_guest: MsrGuestMaker) -> None:
    """A 0 in a range for reads turns RDMSR into #GP(0), leaves WRMSR alone, and the MSR keeps its value.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER, KVM_MSR_FILTER_READ.
    """
    guest = msr_guest()
    guest.vm.msrs.set_filter(MsrFilter((MsrRange(LSTAR, 1, READ, b"\0"),)))
    assert guest.read(LSTAR).fault() == GP0
    guest.write(LSTAR, 0x1234_5000).done()
    guest.vm.msrs.set_filter(MsrFilter())
    assert guest.read(LSTAR).value() == 0x1234_5000


def test_deny_write(msr_guest: MsrGuestMaker) -> None:
    """A 0 in a range for writes turns WRMSR into #GP(0) that changes nothing, and leaves RDMSR alone.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER, KVM_MSR_FILTER_WRITE.
    """
    guest = msr_guest()
    guest.write(LSTAR, 0x1000).done()
    guest.vm.msrs.set_filter(MsrFilter((MsrRange(LSTAR, 1, WRITE, b"\0"),)))
    assert guest.write(LSTAR, 0x2000).fault() == GP0
    assert guest.read(LSTAR).value() == 0x1000


@by_reason
def test_bitmap(msr_guest: MsrGuestMaker) -> None:
    """Each bit of a bitmap decides for its own MSR, across bytes and 64-bit words, for both kinds of access.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER (bitmap).
    """
    bits = [number % 3 == 0 or number in (7, 8, 64) for number in range(70)]
    bitmap = sum(1 << number for number, bit in enumerate(bits) if bit).to_bytes(9, "little")
    guest = watched(msr_guest, MsrRange(BASE, len(bits), READ | WRITE, bitmap))
    expected = [ALLOWED if bit else DENIED for bit in bits]
    assert [read_reason(guest, BASE + number) for number in range(len(bits))] == expected
    assert [write_reason(guest, BASE + number) for number in range(len(bits))] == expected


@by_reason
@pytest.mark.parametrize("default_deny", [False, True])
def test_range_ends(msr_guest: MsrGuestMaker, default_deny: bool) -> None:
    """A range covers base up to, not including, base + nmsrs; its neighbours follow the default.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("covers MSRs from [base .. base+nmsrs)").
    """
    inside, outside = (ALLOWED, DENIED) if default_deny else (DENIED, ALLOWED)
    bitmap = (b"\xff" if default_deny else b"\0") * 8
    guest = watched(msr_guest, MsrRange(BASE + 0x10, 5, READ | WRITE, bitmap), default_deny=default_deny)
    places = (BASE + 0x0F, BASE + 0x10, BASE + 0x14, BASE + 0x15)
    assert [read_reason(guest, place) for place in places] == [outside, inside, inside, outside]


@by_reason
def test_kind_without_range(msr_guest: MsrGuestMaker) -> None:
    """For the kind of access that a range does not name, its MSRs follow the default.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER, flags values for struct kvm_msr_filter_range.
    """
    guest = watched(
        msr_guest,
        MsrRange(BASE, 1, READ, b"\x01"),
        MsrRange(BASE + 0x100, 1, WRITE, b"\x01"),
        default_deny=True,
    )
    assert (read_reason(guest, BASE), write_reason(guest, BASE)) == (ALLOWED, DENIED)
    assert (read_reason(guest, BASE + 0x100), write_reason(guest, BASE + 0x100)) == (DENIED, ALLOWED)


@by_reason
def test_all_ranges(msr_guest: MsrGuestMaker) -> None:
    """All 16 ranges of a filter count.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("up to 16 bitmaps").
    """
    ranges = [MsrRange(BASE + number * 0x1000, 1, READ, b"\0") for number in range(MAX_RANGES)]
    guest = watched(msr_guest, *ranges)
    assert MAX_RANGES == 16
    assert [read_reason(guest, item.base) for item in ranges] == [DENIED] * MAX_RANGES
    assert [read_reason(guest, item.base + 1) for item in ranges] == [ALLOWED] * MAX_RANGES


@by_reason
def test_widest_range(msr_guest: MsrGuestMaker) -> None:
    """A range may hold 12288 MSRs, and its last bit counts as its first does.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER; KVM_MSR_FILTER_MAX_BITMAP_SIZE is 0x600
    bytes.
    """
    count = 0x600 * 8
    bitmap = b"\xfe" + b"\xff" * (0x600 - 2) + b"\x7f"
    guest = watched(msr_guest, MsrRange(BASE, count, READ, bitmap))
    places = (BASE, BASE + 1, BASE + count - 2, BASE + count - 1)
    assert [read_reason(guest, place) for place in places] == [DENIED, ALLOWED, ALLOWED, DENIED]


def test_default_deny(msr_guest: MsrGuestMaker) -> None:
    """With KVM_MSR_FILTER_DEFAULT_DENY an MSR in no range is denied, and one with a 1 in its range works.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER, KVM_MSR_FILTER_DEFAULT_DENY.
    """
    guest = msr_guest()
    guest.vm.msrs.set_filter(MsrFilter((MsrRange(STAR, 1, READ | WRITE, b"\x01"),), default_deny=True))
    guest.write(STAR, 0x10_0000_0000).done()
    assert guest.read(STAR).value() == 0x10_0000_0000
    assert guest.read(CSTAR).fault() == GP0
    assert guest.write(CSTAR, 0x1000).fault() == GP0


@pytest.mark.parametrize("default_deny", [False, True])
def test_x2apic_is_not_filtered(msr_guest: MsrGuestMaker, default_deny: bool) -> None:
    """Neither a range over x2APIC MSRs nor denial by default keeps the guest from them.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("x2APIC MSR accesses cannot be filtered").
    """
    tpr, version = 0x808, 0x803
    guest = msr_guest()
    guest.enable_x2apic()
    nothing = MsrRange(0x800, 0x100, READ | WRITE, bytes(32))
    other = MsrRange(STAR, 1, READ, b"\x01")
    guest.vm.msrs.set_filter(MsrFilter((other, nothing), default_deny))
    guest.write(tpr, 0x50).done()
    assert guest.read(tpr).value() == 0x50
    assert guest.read(version).value() & 0xF0 == 0x10


@pytest.mark.requires("KVM_CAP_X86_USER_SPACE_MSR")
def test_user_space_handles_the_denied(msr_guest: MsrGuestMaker) -> None:
    """With exit reason FILTER user space answers the accesses that the filter denies, in KVM's place.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("userspace effectively intercepts").
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_FILTER)
    guest.write(LSTAR, 0x1000).done()
    guest.vm.msrs.set_filter(MsrFilter.denying([LSTAR]))
    got = guest.read(LSTAR).exit()
    assert (got.index, got.msr_reason) == (LSTAR, KVM_MSR_EXIT_REASON_FILTER)
    got.respond(0xAAAA_BBBB_CCCC_DDDD)
    assert guest.value() == 0xAAAA_BBBB_CCCC_DDDD
    got = guest.write(LSTAR, 0x2000).exit()
    assert (got.index, got.data, got.msr_reason) == (LSTAR, 0x2000, KVM_MSR_EXIT_REASON_FILTER)
    got.respond()
    guest.done()
    guest.write(LSTAR, 0x3000).exit().respond(fault=True)
    assert guest.fault() == GP0
    guest.vm.msrs.set_filter(MsrFilter())
    assert guest.read(LSTAR).value() == 0x1000


@by_reason
def test_replaced_as_a_whole(msr_guest: MsrGuestMaker) -> None:
    """A new filter takes the place of the old one: ranges that only the old one had no longer count.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("either the previous filter or the new
    filter").
    """
    guest = watched(msr_guest, MsrRange(BASE, 1, READ, b"\0"))
    assert (read_reason(guest, BASE), read_reason(guest, BASE + 1)) == (DENIED, ALLOWED)
    guest.vm.msrs.set_filter(MsrFilter((MsrRange(BASE + 1, 1, READ, b"\0"),)))
    assert (read_reason(guest, BASE), read_reason(guest, BASE + 1)) == (ALLOWED, DENIED)


@by_reason
def test_empty_filter_disables(msr_guest: MsrGuestMaker) -> None:
    """A filter whose ranges are all empty switches filtering off.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("an empty set of ranges (all nmsrs == 0)").
    """
    guest = watched(msr_guest, MsrRange(BASE, 1, READ, b"\0"), default_deny=True)
    assert read_reason(guest, BASE) == DENIED
    guest.vm.msrs.set_filter(MsrFilter((MsrRange(BASE, 0, READ, b"\0" * 8),)))
    assert (read_reason(guest, BASE), read_reason(guest, BASE + 1)) == (ALLOWED, ALLOWED)


@pytest.mark.usefixtures("open_registers")
def test_host_is_not_filtered(msr_guest: MsrGuestMaker) -> None:
    """A filter denies accesses of the guest; KVM_GET_MSRS and KVM_SET_MSRS go on as before.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("to deny guest MSR accesses").
    """
    guest = msr_guest()
    guest.vm.msrs.set_filter(MsrFilter.denying([LSTAR]))
    guest.vcpu.msrs.set(LSTAR, 0x7000)
    assert guest.vcpu.msrs.get(LSTAR) == 0x7000
    assert guest.read(LSTAR).fault() == GP0


def test_side_effects_are_not_filtered(make_vm: MakeVm) -> None:
    """SWAPGS exchanges the GS base with KERNEL_GS_BASE although the filter denies RDMSR and WRMSR of that.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER, warning ("side effects of instruction").
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    assert agent.wrmsr(Msr.MSR_KERNEL_GS_BASE, 0x1234_5678_9000) is None
    agent.vm.msrs.set_filter(MsrFilter.denying([Msr.MSR_KERNEL_GS_BASE]))
    assert agent.rdmsr(Msr.MSR_KERNEL_GS_BASE) == Fault(Vector.GP, 0)
    # swapgs; rdmsr; swapgs: nothing that needs GS may come between, for the per-CPU area is behind it.
    swapped = agent.must(b"\x0f\x01\xf8\x0f\x32\x0f\x01\xf8", rcx=Msr.MSR_GS_BASE)
    assert swapped.edx_eax == 0x1234_5678_9000
