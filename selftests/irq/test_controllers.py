# SPDX-License-Identifier: Apache-2.0
"""Creating the in-kernel interrupt controllers, and reading and writing their state."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_IRQ_ROUTING,
    Kvm,
    RedirectionEntry,
    Vm,
    kvm_ioapic_state,
    kvm_irqchip,
    kvm_pic_state,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_IRQCHIP")

CHIPS = (0, 1, 2)


def test_second_irqchip(vm: Vm) -> None:
    """A VM has one interrupt controller model: a second KVM_CREATE_IRQCHIP fails with EEXIST.

    Documentation/virt/kvm/api.rst, 4.24 KVM_CREATE_IRQCHIP.
    """
    vm.irq.create_chip()
    with refused(errno.EEXIST):
        vm.irq.create_chip()


def test_irqchip_after_vcpu(vm: Vm) -> None:
    """Once a vCPU exists KVM_CREATE_IRQCHIP fails with EINVAL: local APICs come with the vCPUs.

    Documentation/virt/kvm/api.rst, 4.24 KVM_CREATE_IRQCHIP: "sets up future vcpus to have a local APIC".
    """
    vm.create_vcpu()
    with refused(errno.EINVAL):
        vm.irq.create_chip()


@pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")
def test_split_excludes_full(kvm: Kvm) -> None:
    """Split and full irqchip exclude each other: the second one fails with EEXIST, in either order.

    Documentation/virt/kvm/api.rst, 7.5 KVM_CAP_SPLIT_IRQCHIP.
    """
    with kvm.create_vm() as vm:
        vm.irq.create_chip()
        with refused(errno.EEXIST):
            vm.irq.create_split_chip()
    with kvm.create_vm() as vm:
        vm.irq.create_split_chip()
        with refused(errno.EEXIST):
            vm.irq.create_chip()
        with refused(errno.EEXIST):
            vm.irq.create_split_chip()


@pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")
def test_split_after_vcpu(vm: Vm) -> None:
    """Once a vCPU exists the split irqchip cannot be enabled.

    Documentation/virt/kvm/api.rst, 7.5 KVM_CAP_SPLIT_IRQCHIP: "Fails if VCPU has already been created".
    """
    vm.create_vcpu()
    with refused(errno.EEXIST):
        vm.irq.create_split_chip()


@pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")
def test_split_with_too_many_pins(vm: Vm) -> None:
    """More reserved pins than there are routes are refused with EINVAL, as many are not.

    Documentation/virt/kvm/api.rst, 7.5 KVM_CAP_SPLIT_IRQCHIP: args[0] is a number of routes.
    """
    limit = vm.check_extension(KVM_CAP_IRQ_ROUTING)
    with refused(errno.EINVAL):
        vm.irq.create_split_chip(limit + 1)
    vm.irq.create_split_chip(limit)


@pytest.mark.parametrize(
    "split", [pytest.param(True, marks=pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")), False]
)
@pytest.mark.parametrize("chip", CHIPS)
def test_no_controllers(vm: Vm, chip: int, split: bool) -> None:
    """Without PICs and IOAPIC in the kernel their state can be neither read nor written: ENXIO.

    Documentation/virt/kvm/api.rst, 4.26 KVM_GET_IRQCHIP and 4.27 KVM_SET_IRQCHIP.
    """
    if split:
        vm.irq.create_split_chip()
    with refused(errno.ENXIO):
        vm.irq.get_chip(chip)
    with refused(errno.ENXIO):
        vm.irq.set_chip(kvm_irqchip(chip_id=chip))


def test_unknown_controller(vm: Vm) -> None:
    """Controllers other than the two PICs and the IOAPIC are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.26 KVM_GET_IRQCHIP: chip_id 0, 1 or 2.
    """
    vm.irq.create_chip()
    with refused(errno.EINVAL):
        vm.irq.get_chip(3)
    with refused(errno.EINVAL):
        vm.irq.set_chip(kvm_irqchip(chip_id=3))


def test_ioapic_after_creation(vm: Vm) -> None:
    """A new IOAPIC has its registers at 0xfec00000, all 24 pins masked, and no line raised.

    82093AA data sheet, 3.0 and 3.2.4 (reset value of the mask bit).
    """
    vm.irq.create_chip()
    state = vm.irq.get_ioapic()
    assert state.base_address == 0xFEC0_0000
    assert [entry.bits for entry in state.redirtbl] == [RedirectionEntry(masked=True).bits] * 24
    assert state.irr == 0


def test_ioapic_state_is_kept(vm: Vm) -> None:
    """What KVM_SET_IRQCHIP writes to the IOAPIC KVM_GET_IRQCHIP reads back.

    Documentation/virt/kvm/api.rst, 4.27 KVM_SET_IRQCHIP.
    """
    vm.irq.create_chip()
    state = kvm_ioapic_state(base_address=0xFEC0_0000, ioregsel=0x12, id=5)
    for pin in range(24):
        entry = RedirectionEntry(vector=0x20 + pin, level=bool(pin & 1), masked=True, dest_id=pin)
        state.redirtbl[pin].bits = entry.bits
    vm.irq.set_ioapic(state)
    assert vm.irq.get_ioapic() == state


def test_ioapic_fields_match_bits(vm: Vm) -> None:
    """The bit fields of kvm_ioapic_state name the bits that the data sheet gives the redirection table.

    Documentation/virt/kvm/api.rst, 4.26 KVM_GET_IRQCHIP; 82093AA data sheet, 3.2.4.
    """
    vm.irq.create_chip()
    state = vm.irq.get_ioapic()
    fields = state.redirtbl[3].fields
    fields.vector, fields.delivery_mode, fields.dest_mode, fields.dest_id = 0x77, 1, 1, 0x42
    fields.polarity, fields.trig_mode, fields.mask = 1, 1, 1
    vm.irq.set_ioapic(state)
    expected = RedirectionEntry(
        vector=0x77, delivery_mode=1, logical=True, active_low=True, level=True, masked=True, dest_id=0x42
    )
    assert RedirectionEntry.from_bits(vm.irq.get_ioapic().redirtbl[3].bits) == expected


@pytest.mark.parametrize("slave", [False, True])
def test_pic_state_is_kept(vm: Vm, slave: bool) -> None:
    """What KVM_SET_IRQCHIP writes to a PIC KVM_GET_IRQCHIP reads back, and the other PIC keeps its state.

    Documentation/virt/kvm/api.rst, 4.27 KVM_SET_IRQCHIP.
    """
    vm.irq.create_chip()
    before = vm.irq.get_pic(slave=not slave)
    state = kvm_pic_state(imr=0xA5, irq_base=0x30, elcr=0x0C, elcr_mask=0xF8, init4=1, last_irr=0x40)
    vm.irq.set_pic(state, slave=slave)
    assert vm.irq.get_pic(slave=slave) == state
    assert vm.irq.get_pic(slave=not slave) == before


def test_unmasked_level_line_after_restore(vm: Vm) -> None:
    """Writing an IOAPIC state whose request bit is set delivers that interrupt to the local APIC.

    Documentation/virt/kvm/api.rst, 4.27 KVM_SET_IRQCHIP; arch/x86/kvm/ioapic.c, kvm_set_ioapic().
    """
    vm.irq.create_chip()
    vcpu = vm.create_vcpu()
    vcpu.lapic.set_reg(0xF0, 0x1FF)
    state = vm.irq.get_ioapic()
    state.redirtbl[20].bits = RedirectionEntry(vector=0x51, level=True).bits
    state.irr = 1 << 20
    vm.irq.set_ioapic(state)
    assert vcpu.lapic.get_reg(0x200 + 0x10 * (0x51 // 32)) == 1 << 0x51 % 32
    assert RedirectionEntry.from_bits(vm.irq.get_ioapic().redirtbl[20].bits).remote_irr
