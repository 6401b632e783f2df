# SPDX-License-Identifier: Apache-2.0
"""GSI routing: which line leads to which controller or message, and which tables KVM refuses."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_IRQ_ROUTING,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    IrqchipRoute,
    Kvm,
    Msi,
    MsiRoute,
    RedirectionEntry,
    Vm,
    default_routes,
    ioctls,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_IRQ_ROUTING", "KVM_CAP_IRQ_INJECT_STATUS")

VECTOR = 0x51


@pytest.fixture
def irq_vm(vm: Vm) -> Vm:
    """A bare VM with the full in-kernel irqchip and one vCPU, all pins of the IOAPIC unmasked."""
    vm.irq.create_chip()
    vm.create_vcpu()
    state = vm.irq.get_ioapic()
    for pin in range(24):
        state.redirtbl[pin].bits = RedirectionEntry(vector=VECTOR, level=True).bits
    vm.irq.set_ioapic(state)
    return vm


def lines(vm: Vm, gsi: int) -> tuple[bool, bool, bool]:
    """Raise *gsi*, tell which of master PIC, slave PIC and IOAPIC have an input raised then, and lower it."""
    # A PIC keeps an edge in its request register: forget those of earlier calls.
    for slave in (False, True):
        state = vm.irq.get_pic(slave=slave)
        state.irr = 0
        vm.irq.set_pic(state, slave=slave)
    vm.irq.line(gsi, 1)
    # The slave's output is the master's input 2.
    value = (
        bool(vm.irq.get_pic().irr & ~4),
        bool(vm.irq.get_pic(slave=True).irr),
        bool(vm.irq.get_ioapic().irr),
    )
    vm.irq.line(gsi, 0)
    return value


@pytest.mark.parametrize(
    ("gsi", "where"),
    [
        (5, (True, False, True)),
        (12, (False, True, True)),
        (20, (False, False, True)),
        (24, (False, False, False)),
    ],
)
def test_default_routing(irq_vm: Vm, gsi: int, where: tuple[bool, bool, bool]) -> None:
    """KVM_CREATE_IRQCHIP leads GSI 0 to 15 to a PIC and the IOAPIC, 16 to 23 to the IOAPIC, others nowhere.

    Documentation/virt/kvm/api.rst, 4.24 KVM_CREATE_IRQCHIP.
    """
    assert lines(irq_vm, gsi) == where


def test_table_is_replaced(irq_vm: Vm) -> None:
    """A new table replaces the old one as a whole: what it does not name leads nowhere.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING: "overwriting any previously set entries".
    """
    irq_vm.irq.set_gsi_routing([IrqchipRoute(40, KVM_IRQCHIP_PIC_MASTER, 5)])
    assert lines(irq_vm, 40) == (True, False, False)
    irq_vm.irq.set_gsi_routing([IrqchipRoute(41, KVM_IRQCHIP_IOAPIC, 5)])
    assert irq_vm.irq.line_status(40, 1) < 0
    assert irq_vm.irq.line_status(5, 1) < 0
    assert irq_vm.irq.line_status(41, 1) >= 0
    assert irq_vm.irq.get_ioapic().irr == 1 << 5


def test_empty_table(irq_vm: Vm) -> None:
    """A table without entries is legal, and no GSI leads anywhere then.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING.
    """
    irq_vm.irq.set_gsi_routing([])
    for gsi in (0, 5, 12, 20):
        assert irq_vm.irq.line_status(gsi, 1) < 0


def test_default_table_can_be_set_again(irq_vm: Vm) -> None:
    """The table that KVM_CREATE_IRQCHIP makes is one that user space can write itself.

    Documentation/virt/kvm/api.rst, 4.24 KVM_CREATE_IRQCHIP and 4.52 KVM_SET_GSI_ROUTING.
    """
    irq_vm.irq.set_gsi_routing([])
    irq_vm.irq.set_gsi_routing(default_routes())
    assert lines(irq_vm, 5) == (True, False, True)
    assert lines(irq_vm, 12) == (False, True, True)
    assert lines(irq_vm, 20) == (False, False, True)


def test_two_gsis_share_pin(irq_vm: Vm) -> None:
    """Several GSIs may lead to one pin.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING; virt/kvm/irqchip.c, setup_routing_entry().
    """
    irq_vm.irq.set_gsi_routing([IrqchipRoute(gsi, KVM_IRQCHIP_IOAPIC, 9) for gsi in (50, 60)])
    assert irq_vm.irq.line_status(60, 1) >= 0
    assert irq_vm.irq.get_ioapic().irr == 1 << 9
    irq_vm.irq.line(60, 0)
    assert irq_vm.irq.line_status(50, 1) >= 0
    assert irq_vm.irq.get_ioapic().irr == 1 << 9


def test_highest_gsi(irq_vm: Vm) -> None:
    """The highest GSI is KVM_CAP_IRQ_ROUTING - 1; the next one is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING; the capability's value is the number of routes.
    """
    limit = irq_vm.check_extension(KVM_CAP_IRQ_ROUTING)
    irq_vm.irq.set_gsi_routing([IrqchipRoute(limit - 1, KVM_IRQCHIP_IOAPIC, 9)])
    assert irq_vm.irq.line_status(limit - 1, 1) >= 0
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((IrqchipRoute(limit, KVM_IRQCHIP_IOAPIC, 9),))


def test_too_many_entries(irq_vm: Vm) -> None:
    """A table with more entries than KVM_CAP_IRQ_ROUTING says is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING.
    """
    limit = irq_vm.check_extension(KVM_CAP_IRQ_ROUTING)
    arg = kvm_irq_routing.with_entries(limit + 1)
    for number, entry in enumerate(arg.entries_list()):
        entry.gsi = number % limit
        entry.type = KVM_IRQ_ROUTING_MSI
    result, number = irq_vm.ioctl_raw(ioctls.KVM_SET_GSI_ROUTING, arg)
    assert (result, number) == (-1, errno.EINVAL)


def test_refused_table_changes_nothing(irq_vm: Vm) -> None:
    """When one entry of a table is refused, the table before it stays in force.

    virt/kvm/irqchip.c, kvm_set_irq_routing(): the new table takes over only when it is complete.
    """
    bad = IrqchipRoute(7, KVM_IRQCHIP_IOAPIC, 24)
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((IrqchipRoute(6, KVM_IRQCHIP_IOAPIC, 1), bad))
    assert lines(irq_vm, 6) == (True, False, True)
    assert lines(irq_vm, 20) == (False, False, True)


@pytest.mark.parametrize(
    ("chip", "pin"),
    [(KVM_IRQCHIP_PIC_MASTER, 8), (KVM_IRQCHIP_PIC_SLAVE, 8), (KVM_IRQCHIP_IOAPIC, 24), (3, 0)],
)
def test_no_such_pin(irq_vm: Vm, chip: int, pin: int) -> None:
    """Pins that a controller does not have, and unknown controllers, are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING.
    """
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((IrqchipRoute(5, chip, pin),))


def test_one_route_per_controller(irq_vm: Vm) -> None:
    """A GSI leads to a controller once: two pins of one are refused with EINVAL, one of each is legal.

    virt/kvm/irqchip.c, setup_routing_entry().
    """
    twice = (IrqchipRoute(5, KVM_IRQCHIP_IOAPIC, 1), IrqchipRoute(5, KVM_IRQCHIP_IOAPIC, 2))
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((*twice,))
    chips = (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC)
    irq_vm.irq.set_gsi_routing([IrqchipRoute(5, chip, 3) for chip in chips])
    assert lines(irq_vm, 5) == (True, True, True)


def test_message_excludes_others(irq_vm: Vm) -> None:
    """A GSI that sends a message does nothing else: a second message or a pin for it is refused with EINVAL.

    virt/kvm/irqchip.c, setup_routing_entry(): only one-to-one mapping outside of interrupt controllers.
    """
    message = MsiRoute(5, Msi.to(0, VECTOR))
    pin = IrqchipRoute(5, KVM_IRQCHIP_IOAPIC, 1)
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((message, message))
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((message, pin))
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((pin, message))


def test_flags_must_be_zero(irq_vm: Vm) -> None:
    """The table's flags, and those of an entry for a controller, must be zero: EINVAL.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING.
    """
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((), flags=1)
    entry = IrqchipRoute(5, KVM_IRQCHIP_IOAPIC, 1).entry()
    entry.flags = 1
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((entry,))
    message = MsiRoute(5, Msi.to(0, VECTOR)).entry()
    message.flags = 2
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((message,))


@pytest.mark.parametrize("kind", [0, 3, 99])
def test_unknown_type(irq_vm: Vm, kind: int) -> None:
    """Entry types that x86 does not have are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING.
    """
    with refused(errno.EINVAL):
        irq_vm.irq.set_gsi_routing((kvm_irq_routing_entry(gsi=5, type=kind),))


def test_needs_irqchip(vm: Vm) -> None:
    """Without an in-kernel interrupt controller there is no routing: EINVAL.

    arch/x86/kvm/irq.c, kvm_arch_can_set_irq_routing().
    """
    with refused(errno.EINVAL):
        vm.irq.set_gsi_routing((MsiRoute(5, Msi.to(0, VECTOR)),))


@pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")
def test_split_irqchip_takes_messages_only(kvm: Kvm) -> None:
    """With a split irqchip only messages can be routed: an entry for a controller is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 7.5 KVM_CAP_SPLIT_IRQCHIP.
    """
    with kvm.create_vm() as vm:
        vm.irq.create_split_chip()
        vm.irq.set_gsi_routing([MsiRoute(5, Msi.to(0, VECTOR))])
        with refused(errno.EINVAL):
            vm.irq.set_gsi_routing((IrqchipRoute(5, KVM_IRQCHIP_IOAPIC, 5),))
