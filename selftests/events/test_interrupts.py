# SPDX-License-Identifier: Apache-2.0
"""External interrupts that user space injects, with and without a local APIC in the kernel."""

from __future__ import annotations

import errno

import pytest

from kvmpy import KVM_CAP_SPLIT_IRQCHIP, IrqWindowOpenExit, Vm, refused
from selftests.events.conftest import EventGuestMaker

registers = pytest.mark.usefixtures("open_registers")
VECTOR = 0x45


@registers
@pytest.mark.parametrize("irqchip", [None, "split"], ids=["no-irqchip", "split"])
def test_interrupt(event_guest: EventGuestMaker, irqchip: str | None) -> None:
    """KVM_INTERRUPT delivers its vector to a guest that has interrupts on.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT ("useful if the in-kernel PIC is not used").
    """
    guest = event_guest(irqchip=irqchip, interrupts=True)
    where = guest.rip
    guest.vcpu.events.interrupt(VECTOR)
    guest.go_on()
    assert guest.counts() == {VECTOR: 1}
    assert guest.seen(VECTOR)[:3] == (1, 0, where)


@registers
def test_interrupt_waits(event_guest: EventGuestMaker) -> None:
    """With a local APIC in the kernel an interrupt of KVM_INTERRUPT waits until the guest has interrupts on.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT ("Queues a hardware interrupt vector").
    """
    guest = event_guest(interrupts=False)
    guest.vcpu.events.interrupt(VECTOR)
    guest.go_on()
    assert guest.counts() == {}
    guest.allow_interrupts(True)
    guest.go_on()
    assert guest.counts() == {VECTOR: 1}


@registers
def test_by_events(event_guest: EventGuestMaker) -> None:
    """interrupt.injected of KVM_SET_VCPU_EVENTS delivers the vector in interrupt.nr.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS.
    """
    guest = event_guest(interrupts=True)
    events = guest.vcpu.events.get()
    events.interrupt.injected, events.interrupt.nr = 1, VECTOR
    guest.vcpu.events.set(events)
    guest.go_on()
    assert guest.counts() == {VECTOR: 1}
    assert guest.vcpu.events.get().interrupt.injected == 0


@registers
def test_window(event_guest: EventGuestMaker) -> None:
    """request_interrupt_window ends KVM_RUN as soon as the guest can take an interrupt, and not before.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, request_interrupt_window.
    """
    guest = event_guest(irqchip=None, interrupts=False)
    run = guest.vcpu.run_area
    run.request_interrupt_window = 1
    guest.go_on()
    assert (run.ready_for_interrupt_injection, run.if_flag) == (0, 0)
    guest.allow_interrupts(True)
    guest.vcpu.expect(IrqWindowOpenExit)
    assert (run.ready_for_interrupt_injection, run.if_flag) == (1, 1)
    run.request_interrupt_window = 0
    guest.vcpu.events.interrupt(VECTOR)
    guest.go_on()
    assert guest.counts() == {VECTOR: 1}


@registers
def test_no_window_unless_asked(event_guest: EventGuestMaker) -> None:
    """Without request_interrupt_window a guest that switches its interrupts on does not exit.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, request_interrupt_window.
    """
    guest = event_guest(irqchip=None, interrupts=False)
    guest.allow_interrupts(True)
    assert [guest.go_on() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("vector", [256, 0xFFFF_FFFF])
@pytest.mark.parametrize("split", [False, True], ids=["no-irqchip", "split"])
def test_bad_vector(vm: Vm, split: bool, vector: int) -> None:
    """A vector above 255 is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT.
    """
    if split:
        vm.need_cap(KVM_CAP_SPLIT_IRQCHIP)
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    vcpu = vm.create_vcpu()
    with refused(errno.EINVAL):
        vcpu.events.interrupt(vector)


def test_pic_in_the_kernel(vm: Vm) -> None:
    """With the PIC in the kernel KVM_INTERRUPT is refused with ENXIO.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT.
    """
    vm.irq.create_chip()
    vcpu = vm.create_vcpu()
    with refused(errno.ENXIO):
        vcpu.events.interrupt(VECTOR)


@pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")
def test_second_interrupt(vm: Vm) -> None:
    """With a split irqchip a second interrupt is refused with EEXIST while the first one waits.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT ("if an interrupt is already enqueued").
    """
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
    vcpu = vm.create_vcpu()
    vcpu.events.interrupt(VECTOR)
    with refused(errno.EEXIST):
        vcpu.events.interrupt(VECTOR + 1)
