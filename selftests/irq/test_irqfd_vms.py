# SPDX-License-Identifier: Apache-2.0
"""One eventfd and the irqfds of several VMs or GSIs."""

from __future__ import annotations

import errno

import pytest

from kvmpy import EventFd, Kvm, Vm, refused

pytestmark = pytest.mark.requires("KVM_CAP_IRQFD")

GSI = 30


def test_eventfd_of_another_vm(two_vms: tuple[Vm, Vm]) -> None:
    """An eventfd that interrupts one VM cannot be assigned in another: EBUSY, until the first gives it up.

    virt/kvm/eventfd.c, kvm_irqfd_register(): one irqfd is the eventfd's priority waiter.
    """
    one, other = two_vms
    with EventFd() as event:
        one.irq.irqfd(event, GSI)
        with refused(errno.EBUSY):
            other.irq.irqfd(event, GSI)
        one.irq.irqfd(event, GSI, deassign=True)
        other.irq.irqfd(event, GSI)


def test_eventfd_of_closed_vm(kvm: Kvm) -> None:
    """A VM that is closed gives its eventfds up: another may have them.

    virt/kvm/eventfd.c, kvm_irqfd_release().
    """
    with EventFd() as event, kvm.create_vm() as other:
        other.irq.create_chip()
        with kvm.create_vm() as one:
            one.irq.create_chip()
            one.irq.irqfd(event, GSI)
            with refused(errno.EBUSY):
                other.irq.irqfd(event, GSI)
        other.irq.irqfd(event, GSI)


def test_deassign_what_was_never_assigned(two_vms: tuple[Vm, Vm]) -> None:
    """Deassigning an eventfd that was not assigned, or in another VM, succeeds and changes nothing.

    virt/kvm/eventfd.c, kvm_irqfd_deassign(): only the descriptor itself must be good.
    """
    one, other = two_vms
    with EventFd() as event, EventFd() as unused:
        one.irq.irqfd(unused, GSI, deassign=True)
        one.irq.irqfd(event, GSI)
        other.irq.irqfd(event, GSI, deassign=True)
        one.irq.irqfd(event, GSI + 1, deassign=True)
        with refused(errno.EBUSY):
            one.irq.irqfd(event, GSI)


def test_two_eventfds_share_a_gsi(two_vms: tuple[Vm, Vm]) -> None:
    """Several eventfds may be assigned to one GSI, and each is given up by itself.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD.
    """
    one, _ = two_vms
    with EventFd() as first, EventFd() as second:
        one.irq.irqfd(first, GSI)
        one.irq.irqfd(second, GSI)
        one.irq.irqfd(first, GSI, deassign=True)
        one.irq.irqfd(first, GSI)
        with refused(errno.EBUSY):
            one.irq.irqfd(second, GSI)
