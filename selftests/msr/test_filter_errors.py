# SPDX-License-Identifier: Apache-2.0
"""Filters that KVM_X86_SET_MSR_FILTER refuses."""

from __future__ import annotations

import errno

import pytest

from kvmpy import Msr, MsrFilter, MsrRange, Vector, Vm, ioctls, kvm_msr_filter, refused
from kvmpy.core.msr_filter import READ, WRITE
from selftests.msr.conftest import MsrGuestMaker

pytestmark = pytest.mark.requires("KVM_CAP_X86_MSR_FILTER")

BASE = 0x2000_0000


def test_deny_all(vm: Vm) -> None:
    """KVM_MSR_FILTER_DEFAULT_DENY without any range is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("is invalid and causes an error").
    """
    with refused(errno.EINVAL):
        vm.msrs.set_filter(MsrFilter((), default_deny=True))


@pytest.mark.parametrize("flags", [1 << 1, 1 << 31])
def test_unknown_filter_flag(vm: Vm, flags: int) -> None:
    """A flag of the filter other than KVM_MSR_FILTER_DEFAULT_DENY is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER, flags values for struct kvm_msr_filter.
    """
    with refused(errno.EINVAL):
        vm.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, kvm_msr_filter(flags=flags))


@pytest.mark.parametrize("flags", [0, 1 << 2, READ | 1 << 31])
def test_range_flags(vm: Vm, flags: int) -> None:
    """A range with MSRs whose flags are none, or others than KVM_MSR_FILTER_READ and _WRITE, is EINVAL.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER, flags values for struct kvm_msr_filter_range;
    kvm_add_msr_filter() in arch/x86/kvm/x86.c.
    """
    with refused(errno.EINVAL):
        vm.msrs.set_filter(MsrFilter((MsrRange(BASE, 1, flags, b"\0"),)))


@pytest.mark.parametrize("nmsrs", [0x600 * 8 + 1, 0xFFFF_FFFF])
def test_range_too_wide(vm: Vm, nmsrs: int) -> None:
    """A range of more MSRs than KVM_MSR_FILTER_MAX_BITMAP_SIZE has bits is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER; KVM_MSR_FILTER_MAX_BITMAP_SIZE is 0x600
    bytes.
    """
    arg = kvm_msr_filter()
    arg.ranges[0].flags, arg.ranges[0].nmsrs, arg.ranges[0].base = READ, nmsrs, BASE
    with refused(errno.EINVAL):
        vm.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, arg)


def test_bitmap_out_of_reach(vm: Vm) -> None:
    """A bitmap that cannot be read is refused with EFAULT.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER (bitmap).
    """
    arg = kvm_msr_filter()
    arg.ranges[3].flags, arg.ranges[3].nmsrs, arg.ranges[3].base = WRITE, 64, BASE
    with refused(errno.EFAULT):
        vm.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, arg)


def test_refused_filter_changes_nothing(msr_guest: MsrGuestMaker) -> None:
    """After a filter was refused, even for its last range, the filter before it is still in force.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER ("either the previous filter or the new
    filter").
    """
    guest = msr_guest()
    guest.vm.msrs.set_filter(MsrFilter.denying([Msr.MSR_LSTAR]))
    good = MsrRange(Msr.MSR_CSTAR, 1, READ, b"\0")
    bad = MsrRange(BASE, 1, 0, b"\0")
    with refused(errno.EINVAL):
        guest.vm.msrs.set_filter(MsrFilter((good, bad)))
    assert guest.read(Msr.MSR_LSTAR).fault() == (Vector.GP, 0)
    guest.read(Msr.MSR_CSTAR).value()
