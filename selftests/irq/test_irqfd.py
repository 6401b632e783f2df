# SPDX-License-Identifier: Apache-2.0
"""irqfd: eventfds that raise interrupts, what takes them back, and what KVM refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvmpy import Agent, EventFd, GuestVm, Kvm, MakeVm, Msi, MsiRoute, Vm, refused

pytestmark = pytest.mark.requires("KVM_CAP_IRQFD", "KVM_CAP_IRQ_ROUTING")

GSI = 30
VECTOR = 0x51
OTHER_VECTOR = 0x62
ROUTE = MsiRoute(GSI, Msi.to(0, VECTOR))

# Says how often both vectors came; the host's answer says whose next arrival to wait for, 0: nobody's.
GUEST = """
#include "interrupts.h"

#define VECTOR		0x51
#define OTHER_VECTOR	0x62

/* How often both came, OTHER_VECTOR in the upper half. */
u64 wait(u64 vector)
{
	if (vector)
		irq_wait(vector, irq_count(vector) + 1);
	else
		irq_window();
	return irq_count(VECTOR) | (u64)irq_count(OTHER_VECTOR) << 32;
}

void guest_main(void)
{
	irq_install(VECTOR);
	irq_install(OTHER_VECTOR);
	apic_enable();
	guest_agent();
}
"""


@pytest.fixture
def event() -> Iterator[EventFd]:
    with EventFd() as eventfd:
        yield eventfd


@pytest.fixture
def irq_vm(vm: Vm) -> Vm:
    """A bare VM with the full in-kernel irqchip."""
    vm.irq.create_chip()
    return vm


class Counter:
    """A VM whose guest is ready for interrupts and counts them."""

    def __init__(self, make_vm: MakeVm, *routes: MsiRoute) -> None:
        self.vm: GuestVm = make_vm(GUEST)
        self.vm.irq.set_gsi_routing(routes)
        self.agent = Agent(self.vm.vcpus[0])
        self.agent.start()

    def wait(self, vector: int = 0) -> tuple[int, ...]:
        """Let the guest wait for a vector (0: only look), and return how often both came."""
        self.agent.begin_call("wait", vector)
        counts = self.agent.value()
        return counts & 0xFFFF_FFFF, counts >> 32


def test_signal_interrupts_guest(make_vm: MakeVm, event: EventFd) -> None:
    """Every signal of an assigned eventfd injects one interrupt of its GSI, and KVM consumes the count.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD.
    """
    guest = Counter(make_vm, ROUTE)
    guest.vm.irq.irqfd(event, GSI)
    event.signal()
    assert guest.wait(VECTOR) == (1, 0)
    event.signal()
    assert guest.wait(VECTOR) == (2, 0)
    assert guest.wait() == (2, 0)
    assert event.read() == 0


def test_signal_before_assignment(make_vm: MakeVm, event: EventFd) -> None:
    """An eventfd that is signalled already when it is assigned injects its interrupt then.

    virt/kvm/eventfd.c, kvm_irqfd_assign(): a pending event is injected at once.
    """
    guest = Counter(make_vm, ROUTE)
    event.signal()
    assert guest.wait() == (0, 0)
    guest.vm.irq.irqfd(event, GSI)
    assert guest.wait(VECTOR) == (1, 0)


def test_deassign_stops_interrupts(make_vm: MakeVm, event: EventFd) -> None:
    """After KVM_IRQFD_FLAG_DEASSIGN signals stay in the eventfd, and the guest sees none.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD.
    """
    guest = Counter(make_vm, ROUTE)
    guest.vm.irq.irqfd(event, GSI)
    event.signal()
    assert guest.wait(VECTOR) == (1, 0)
    guest.vm.irq.irqfd(event, GSI, deassign=True)
    event.signal()
    assert guest.wait() == (1, 0)
    assert event.read() == 1


def test_deassign_of_other_gsi_changes_nothing(make_vm: MakeVm, event: EventFd) -> None:
    """Deassigning names both the eventfd and the GSI: with another GSI, the assigned pair stays in force.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD.
    """
    guest = Counter(make_vm, ROUTE)
    guest.vm.irq.irqfd(event, GSI)
    guest.vm.irq.irqfd(event, GSI + 1, deassign=True)
    event.signal()
    assert guest.wait(VECTOR) == (1, 0)


def test_new_routing_reaches_assigned_irqfd(make_vm: MakeVm, event: EventFd) -> None:
    """An assigned irqfd follows KVM_SET_GSI_ROUTING: its next signal raises what the GSI leads to then.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING (the table is overwritten) and 4.75 KVM_IRQFD.
    """
    guest = Counter(make_vm, ROUTE)
    guest.vm.irq.irqfd(event, GSI)
    event.signal()
    assert guest.wait(VECTOR) == (1, 0)
    guest.vm.irq.set_gsi_routing([MsiRoute(GSI, Msi.to(0, OTHER_VECTOR))])
    event.signal()
    assert guest.wait(OTHER_VECTOR) == (1, 1)


def test_gsi_without_route(make_vm: MakeVm, event: EventFd) -> None:
    """A signal for a GSI that leads nowhere is lost: it waits neither in the eventfd nor for a later route.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD; virt/kvm/irqchip.c, kvm_set_irq().
    """
    guest = Counter(make_vm, MsiRoute(GSI + 1, Msi.to(0, VECTOR)))
    guest.vm.irq.irqfd(event, GSI)
    event.signal()
    assert event.read() == 0
    # Deassigning waits for work that the signal has started.
    guest.vm.irq.irqfd(event, GSI, deassign=True)
    guest.vm.irq.set_gsi_routing([ROUTE])
    guest.vm.irq.irqfd(event, GSI)
    assert guest.wait() == (0, 0)


def test_second_assignment_is_busy(irq_vm: Vm, event: EventFd) -> None:
    """One eventfd serves one GSI of a VM: assigning it again fails with EBUSY, whatever the GSI.

    virt/kvm/eventfd.c: an eventfd that is on the VM's list is refused.
    """
    irq_vm.irq.irqfd(event, GSI)
    with refused(errno.EBUSY):
        irq_vm.irq.irqfd(event, GSI)
    with refused(errno.EBUSY):
        irq_vm.irq.irqfd(event, GSI + 1)


def test_assign_again_after_deassign(irq_vm: Vm, event: EventFd) -> None:
    """Once deassigned, an eventfd can be assigned anew, also to another GSI.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD.
    """
    irq_vm.irq.irqfd(event, GSI)
    irq_vm.irq.irqfd(event, GSI, deassign=True)
    irq_vm.irq.irqfd(event, GSI + 1)
    with refused(errno.EBUSY):
        irq_vm.irq.irqfd(event, GSI)


@pytest.mark.parametrize("flag", [1 << 2, 1 << 31])
def test_unknown_flag(irq_vm: Vm, event: EventFd, flag: int) -> None:
    """Flags other than DEASSIGN and RESAMPLE are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD.
    """
    with refused(errno.EINVAL):
        irq_vm.irq.irqfd(event, GSI, flags=flag)


def test_closed_descriptor(irq_vm: Vm) -> None:
    """A number that is no open file descriptor is refused with EBADF, in assignment and deassignment.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD.
    """
    with EventFd() as gone:
        number = gone.fd
    with refused(errno.EBADF):
        irq_vm.irq.irqfd(number, GSI)
    with refused(errno.EBADF):
        irq_vm.irq.irqfd(number, GSI, deassign=True)


def test_descriptor_that_is_no_eventfd(irq_vm: Vm) -> None:
    """A file descriptor that is no eventfd is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD: "the file descriptor to use as the eventfd".
    """
    number = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        with refused(errno.EINVAL):
            irq_vm.irq.irqfd(number, GSI)
    finally:
        os.close(number)


def test_needs_in_kernel_irqchip(vm: Vm, event: EventFd) -> None:
    """Without an in-kernel interrupt controller there is nothing to inject into: EINVAL.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD; arch/x86/kvm/irq.c, kvm_arch_irqfd_allowed().
    """
    with refused(errno.EINVAL):
        vm.irq.irqfd(event, GSI)


@pytest.mark.requires("KVM_CAP_IRQFD_RESAMPLE", "KVM_CAP_SPLIT_IRQCHIP")
def test_resample_needs_full_irqchip(kvm: Kvm, event: EventFd) -> None:
    """Resampling needs KVM's own IOAPIC: with a split irqchip it is refused with EINVAL.

    arch/x86/kvm/irq.c, kvm_arch_irqfd_allowed().
    """
    with kvm.create_vm() as vm, EventFd() as resample:
        vm.irq.create_split_chip()
        with refused(errno.EINVAL):
            vm.irq.irqfd(event, GSI, resample=resample)
        vm.irq.irqfd(event, GSI)
