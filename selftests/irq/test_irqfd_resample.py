# SPDX-License-Identifier: Apache-2.0
"""irqfd with KVM_IRQFD_FLAG_RESAMPLE: level-triggered interrupts that the guest's EOI takes back."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import pytest

from kvmpy import EventFd, GuestVm, MakeVm, RedirectionEntry, Vm, refused

pytestmark = pytest.mark.requires("KVM_CAP_IRQFD", "KVM_CAP_IRQFD_RESAMPLE")

PIN = 20
VECTOR = 0x51
TIMEOUT = 5.0

# The handler stops before its EOI, so that the host can look at both sides of it.
GUEST = """
#include "interrupts.h"

#define VECTOR	0x51

static void handler(struct exception_frame *frame)
{
	GUEST_SYNC('h');
	interrupts[0][frame->vector]++;
	apic_eoi();
}

void guest_main(void)
{
	u32 n;

	guest_exception_install(VECTOR, handler);
	apic_enable();
	GUEST_SYNC('r');
	for (n = 1;; n++) {
		irq_wait(VECTOR, n);
		irq_window();
		GUEST_SYNC('d', irq_count(VECTOR));
	}
}
"""


@pytest.fixture
def events() -> Iterator[tuple[EventFd, EventFd]]:
    with EventFd() as trigger, EventFd() as resample:
        yield trigger, resample


def route_pin(vm: Vm) -> None:
    """Program the IOAPIC's pin as the guest's driver would: level-triggered, to vCPU 0."""
    state = vm.irq.get_ioapic()
    state.redirtbl[PIN].bits = RedirectionEntry(vector=VECTOR, level=True).bits
    vm.irq.set_ioapic(state)


def in_service(vm: Vm) -> bool:
    """Return whether the IOAPIC waits for the pin's EOI (remote IRR, 82093AA section 3.2.4)."""
    return RedirectionEntry.from_bits(vm.irq.get_ioapic().redirtbl[PIN].bits).remote_irr


def step(vm: GuestVm) -> tuple[str, int]:
    """Return the guest's next word and the count with it."""
    call = vm.vcpus[0].sync()
    return chr(call.args[0]), call.args[1] if len(call.args) > 1 else 0


@pytest.fixture
def assigned(make_vm: MakeVm, events: tuple[EventFd, EventFd]) -> GuestVm:
    """A VM with the irqfd, whose guest is ready."""
    trigger, resample = events
    vm = make_vm(GUEST, irqchip="full")
    vm.irq.irqfd(trigger, PIN, resample=resample)
    vm.launch()
    assert step(vm) == ("r", 0)
    route_pin(vm)
    return vm


def test_eoi_lowers_line_and_notifies(assigned: GuestVm, events: tuple[EventFd, EventFd]) -> None:
    """A signal raises the line; the guest's EOI lowers it and signals the resample eventfd.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD: the GSI is de-asserted and the user is notified.
    """
    trigger, resample = events
    vm = assigned
    trigger.signal()
    assert step(vm) == ("h", 0)
    assert in_service(vm)
    assert resample.read() == 0
    assert step(vm) == ("d", 1)
    assert not in_service(vm)
    assert resample.wait(TIMEOUT) == 1


def test_requeue_interrupts_again(assigned: GuestVm, events: tuple[EventFd, EventFd]) -> None:
    """A device that still wants service signals again after the resample event, and interrupts again.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD: re-queueing is the user's responsibility.
    """
    trigger, resample = events
    vm = assigned
    for round_ in (1, 2, 3):
        trigger.signal()
        assert step(vm) == ("h", 0)
        assert step(vm) == ("d", round_)
        assert resample.wait(TIMEOUT) == 1


def test_shared_line_notifies_both(make_vm: MakeVm, events: tuple[EventFd, EventFd]) -> None:
    """Two irqfds that share a level-triggered line are both notified at the EOI, whichever of them raised it.

    virt/kvm/eventfd.c: the resampler of a GSI serves all its irqfds.
    """
    trigger, resample = events
    vm = make_vm(GUEST, irqchip="full")
    with EventFd() as other_trigger, EventFd() as other_resample:
        vm.irq.irqfd(trigger, PIN, resample=resample)
        vm.irq.irqfd(other_trigger, PIN, resample=other_resample)
        vm.launch()
        assert step(vm) == ("r", 0)
        route_pin(vm)
        other_trigger.signal()
        assert step(vm) == ("h", 0)
        assert step(vm) == ("d", 1)
        assert resample.wait(TIMEOUT) == 1
        assert other_resample.wait(TIMEOUT) == 1


def test_deassign_lowers_line(vm: Vm, events: tuple[EventFd, EventFd]) -> None:
    """Deassigning, which needs no RESAMPLE flag, lowers a line that the irqfd still holds raised.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD: the flag is only necessary on assignment.
    """
    trigger, resample = events
    vm.irq.create_chip()
    state = vm.irq.get_ioapic()
    state.redirtbl[PIN].bits = RedirectionEntry(vector=VECTOR, level=True, masked=True).bits
    vm.irq.set_ioapic(state)
    vm.irq.irqfd(trigger, PIN, resample=resample)
    trigger.signal()
    # The kernel raises the line in a work item of its own.
    end = time.monotonic() + TIMEOUT
    while not vm.irq.get_ioapic().irr and time.monotonic() < end:
        os.sched_yield()
    assert vm.irq.get_ioapic().irr == 1 << PIN
    vm.irq.irqfd(trigger, PIN, deassign=True)
    assert vm.irq.get_ioapic().irr == 0
    assert resample.read() == 0


def test_resample_descriptor_is_checked(vm: Vm, events: tuple[EventFd, EventFd]) -> None:
    """A resample descriptor that is not open is refused with EBADF, and the trigger stays free.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD: "the user must pass an additional eventfd".
    """
    trigger, resample = events
    vm.irq.create_chip()
    with EventFd() as gone:
        number = gone.fd
    with refused(errno.EBADF):
        vm.irq.irqfd(trigger, PIN, resample=number)
    vm.irq.irqfd(trigger, PIN, resample=resample)
