# SPDX-License-Identifier: Apache-2.0
"""ioeventfd: what KVM refuses, and with which errno."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvmpy import EventFd, Vm, refused

pytestmark = pytest.mark.requires("KVM_CAP_IOEVENTFD")

PORT = 0x510


@pytest.fixture
def event() -> Iterator[EventFd]:
    with EventFd() as eventfd:
        yield eventfd


def test_same_twice(vm: Vm, event: EventFd) -> None:
    """A second ioeventfd for one address, size and value is refused with EEXIST, also with another eventfd.

    virt/kvm/eventfd.c: one write must not have two takers.
    """
    vm.io.ioeventfd(event, PORT, 4, pio=True, datamatch=1)
    with EventFd() as other:
        with refused(errno.EEXIST):
            vm.io.ioeventfd(other, PORT, 4, pio=True, datamatch=1)
        vm.io.ioeventfd(other, PORT, 4, pio=True, datamatch=2)


def test_wildcard_collides_with_value(vm: Vm, event: EventFd) -> None:
    """An ioeventfd without DATAMATCH collides with one that has it at the same address and size: EEXIST.

    virt/kvm/eventfd.c, ioeventfd_check_collision().
    """
    vm.io.ioeventfd(event, PORT, 4, pio=True, datamatch=1)
    with refused(errno.EEXIST):
        vm.io.ioeventfd(event, PORT, 4, pio=True)
    vm.io.ioeventfd(event, PORT + 8, 4, pio=True)
    with refused(errno.EEXIST):
        vm.io.ioeventfd(event, PORT + 8, 4, pio=True, datamatch=1)


@pytest.mark.requires("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_any_length_collides_with_every_size(vm: Vm, event: EventFd) -> None:
    """An ioeventfd of length 0 collides with every other at its address: EEXIST; two sizes do not collide.

    virt/kvm/eventfd.c, ioeventfd_check_collision().
    """
    vm.io.ioeventfd(event, PORT, 0, pio=True)
    with refused(errno.EEXIST):
        vm.io.ioeventfd(event, PORT, 2, pio=True)
    vm.io.ioeventfd(event, PORT + 8, 1, pio=True)
    vm.io.ioeventfd(event, PORT + 8, 2, pio=True)
    with refused(errno.EEXIST):
        vm.io.ioeventfd(event, PORT + 8, 0, pio=True)


@pytest.mark.parametrize("size", [3, 5, 16])
def test_illegal_size(vm: Vm, event: EventFd, size: int) -> None:
    """Sizes other than 0, 1, 2, 4 and 8 are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    with refused(errno.EINVAL):
        vm.io.ioeventfd(event, PORT, size, pio=True)


def test_unknown_flag(vm: Vm, event: EventFd) -> None:
    """Unknown flags are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    with refused(errno.EINVAL):
        vm.io.ioeventfd(event, PORT, 4, flags=1 << 5)


def test_range_wraps(vm: Vm, event: EventFd) -> None:
    """An address range that wraps around the end of the address space is refused with EINVAL.

    virt/kvm/eventfd.c, kvm_assign_ioeventfd().
    """
    with refused(errno.EINVAL):
        vm.io.ioeventfd(event, (1 << 64) - 4, 8)


@pytest.mark.requires("KVM_CAP_IOEVENTFD_ANY_LENGTH")
def test_datamatch_without_length(vm: Vm, event: EventFd) -> None:
    """DATAMATCH needs a size: with length 0 it is refused with EINVAL.

    virt/kvm/eventfd.c, kvm_assign_ioeventfd().
    """
    with refused(errno.EINVAL):
        vm.io.ioeventfd(event, PORT, 0, pio=True, datamatch=1)


def test_deassign_must_match(vm: Vm, event: EventFd) -> None:
    """Deassigning fails with ENOENT unless address, size, value, bus and eventfd are as assigned.

    virt/kvm/eventfd.c, kvm_deassign_ioeventfd_idx().
    """
    vm.io.ioeventfd(event, PORT, 4, pio=True, datamatch=1)
    with EventFd() as other, refused(errno.ENOENT):
        vm.io.ioeventfd(other, PORT, 4, pio=True, datamatch=1, deassign=True)
    with refused(errno.ENOENT):
        vm.io.ioeventfd(event, PORT + 1, 4, pio=True, datamatch=1, deassign=True)
    with refused(errno.ENOENT):
        vm.io.ioeventfd(event, PORT, 2, pio=True, datamatch=1, deassign=True)
    with refused(errno.ENOENT):
        vm.io.ioeventfd(event, PORT, 4, pio=True, datamatch=2, deassign=True)
    with refused(errno.ENOENT):
        vm.io.ioeventfd(event, PORT, 4, pio=True, deassign=True)
    with refused(errno.ENOENT):
        vm.io.ioeventfd(event, PORT, 4, datamatch=1, deassign=True)
    vm.io.ioeventfd(event, PORT, 4, pio=True, datamatch=1, deassign=True)
    with refused(errno.ENOENT):
        vm.io.ioeventfd(event, PORT, 4, pio=True, datamatch=1, deassign=True)


def test_closed_descriptor(vm: Vm) -> None:
    """A number that is no open file descriptor is refused with EBADF.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    with EventFd() as gone:
        number = gone.fd
    with refused(errno.EBADF):
        vm.io.ioeventfd(number, PORT, 4, pio=True)


def test_descriptor_that_is_no_eventfd(vm: Vm) -> None:
    """A file descriptor that is no eventfd is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.59 KVM_IOEVENTFD.
    """
    number = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        with refused(errno.EINVAL):
            vm.io.ioeventfd(number, PORT, 4, pio=True)
    finally:
        os.close(number)
