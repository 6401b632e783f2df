# SPDX-License-Identifier: Apache-2.0
"""KVM_IRQ_LINE and the IOAPIC behind it: edges, levels, masks, destinations."""

from __future__ import annotations

import errno

import pytest

from kvmpy import GuestVcpu, GuestVm, MakeVm, RedirectionEntry, Vm, apic, refused
from selftests.conftest import said

pytestmark = pytest.mark.requires("KVM_CAP_IRQCHIP", "KVM_CAP_IRQ_INJECT_STATUS")

# The PICs have no such input.
PIN = 20
VECTOR = 0x51
DELIVER_NMI = 4

# 'h': in the handler, before the EOI. 'i': interrupts were possible for a while; the counts.
GUEST = """
#include "interrupts.h"

#define VECTOR	0x51

static volatile u32 nmis;

static void handler(struct exception_frame *frame)
{
	interrupts[guest_cpu_index()][frame->vector]++;
	GUEST_SYNC('h');
	apic_eoi();
}

static void nmi_handler(struct exception_frame *frame)
{
	nmis++;
}

void guest_main(void)
{
	guest_exception_install(VECTOR, handler);
	guest_exception_install(NMI_VECTOR, nmi_handler);
	apic_enable();
	/* The logical id that a test in logical mode asks for. */
	apic_write(APIC_LDR, 1u << (24 + guest_cpu_index()));
	for (;;) {
		GUEST_SYNC('i', irq_count(VECTOR), nmis);
		irq_window();
	}
}
"""


def start(make_vm: MakeVm, vcpus: int = 1, **fields: int) -> GuestVm:
    """Return a VM whose guest is ready, the pin programmed with *fields*."""
    vm = make_vm.start(GUEST, vcpus=vcpus, irqchip="full")
    for vcpu in vm.vcpus:
        assert said(vcpu) == ("i", 0, 0)
    program(vm, **fields)
    return vm


def program(vm: Vm, **fields: int) -> None:
    """Write the pin's redirection entry."""
    state = vm.irq.get_ioapic()
    state.redirtbl[PIN].bits = RedirectionEntry(vector=VECTOR, **fields).bits  # type: ignore[arg-type]
    vm.irq.set_ioapic(state)


def handled(vcpu: GuestVcpu) -> bool:
    """Return whether the handler runs within three windows: where ring 0 is emulated, one may not do."""
    return any(said(vcpu)[0] == "h" for _ in range(3))


def test_edge(make_vm: MakeVm) -> None:
    """An edge-triggered pin interrupts once for each rising edge, however long the line stays high.

    Documentation/virt/kvm/api.rst, 4.25 KVM_IRQ_LINE: edges need the level set to 1 and back to 0.
    """
    vm = start(make_vm)
    vcpu = vm.vcpus[0]
    for edge in (1, 2):
        vm.irq.line(PIN, 1)
        assert said(vcpu) == ("h",)
        assert said(vcpu) == ("i", edge, 0)
        assert said(vcpu) == ("i", edge, 0)
        vm.irq.line(PIN, 0)


def test_level_repeats(make_vm: MakeVm) -> None:
    """A level-triggered pin interrupts again after each EOI while the line is high.

    Documentation/virt/kvm/api.rst, 4.25 KVM_IRQ_LINE; 82093AA data sheet, 3.2.4 (trigger mode, remote IRR).
    """
    vm = start(make_vm, level=True)
    vm.irq.line(PIN, 1)
    for _ in range(3):
        assert handled(vm.vcpus[0])


def test_level_lowered_in_handler(make_vm: MakeVm) -> None:
    """A line that is lowered before the EOI does not interrupt again.

    82093AA data sheet, 3.2.4 (remote IRR is held until the EOI).
    """
    vm = start(make_vm, level=True)
    vcpu = vm.vcpus[0]
    vm.irq.line(PIN, 1)
    assert handled(vcpu)
    vm.irq.line(PIN, 0)
    assert said(vcpu) == ("i", 1, 0)
    assert said(vcpu) == ("i", 1, 0)


def pin_and_apic(vm: GuestVm) -> tuple[bool, bool, bool]:
    """Return the pin's remote IRR, and the vector's bits in TMR and ISR of the first vCPU's APIC."""
    entry = RedirectionEntry.from_bits(vm.irq.get_ioapic().redirtbl[PIN].bits)
    tmr, isr = (vm.vcpus[0].lapic.get_reg(base + 16 * (VECTOR // 32)) for base in (apic.TMR, apic.ISR))
    return entry.remote_irr, *(bool(word >> VECTOR % 32 & 1) for word in (tmr, isr))  # type: ignore[return-value]


def test_trigger_mode(make_vm: MakeVm) -> None:
    """A level-triggered interrupt sets remote IRR and the vector's TMR bit, an edge clears the bit again.

    AMD APM volume 2, 16.6.3 (the TMR is written when the interrupt is accepted); 82093AA data sheet, 3.2.4:
    remote IRR is cleared by the EOI.
    """
    vm = start(make_vm, level=True)
    vm.irq.line(PIN, 1)
    assert handled(vm.vcpus[0])
    assert pin_and_apic(vm) == (True, True, True)
    vm.irq.line(PIN, 0)
    assert pin_and_apic(vm) == (True, True, True)
    assert said(vm) == ("i", 1, 0)
    assert pin_and_apic(vm) == (False, True, False)
    program(vm)
    assert pin_and_apic(vm) == (False, True, False)
    vm.irq.line(PIN, 1)
    assert handled(vm.vcpus[0])
    assert pin_and_apic(vm) == (False, False, True)
    vm.irq.line(PIN, 0)
    assert said(vm) == ("i", 2, 0)


def test_level_is_sent_again_at_the_eoi(make_vm: MakeVm) -> None:
    """While a level-triggered interrupt is in service another edge of its line is no second interrupt; a line
    that is high at the EOI is sent again, with remote IRR set anew.

    82093AA data sheet, 3.2.4: remote IRR.
    """
    vm = start(make_vm, level=True)
    vm.irq.line(PIN, 1)
    assert handled(vm.vcpus[0])
    for _ in range(3):
        vm.irq.line(PIN, 0)
        vm.irq.line(PIN, 1)
    assert pin_and_apic(vm)[0]
    assert handled(vm.vcpus[0])
    assert pin_and_apic(vm) == (True, True, True)
    vm.irq.line(PIN, 0)
    assert said(vm) == ("i", 2, 0)
    assert said(vm) == ("i", 2, 0)
    assert pin_and_apic(vm) == (False, True, False)


def test_an_edge_while_in_service(make_vm: MakeVm) -> None:
    """Edges that come while their vector is in service are one more interrupt, however many there were.

    AMD APM volume 2, 16.6.3: one interrupt of a vector may wait in the IRR while another is in service.
    """
    vm = start(make_vm)
    for level in (1, 0):
        vm.irq.line(PIN, level)
    assert handled(vm.vcpus[0])
    for _ in range(3):
        vm.irq.line(PIN, 1)
        vm.irq.line(PIN, 0)
    assert handled(vm.vcpus[0])
    assert said(vm) == ("i", 2, 0)
    assert said(vm) == ("i", 2, 0)


def test_state_while_in_service(make_vm: MakeVm) -> None:
    """An IOAPIC and a local APIC that are read and written while a level is in service lose nothing of it.

    Documentation/virt/kvm/api.rst, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_GET_LAPIC, KVM_SET_LAPIC.
    """
    vm = start(make_vm, level=True)
    vm.irq.line(PIN, 1)
    assert handled(vm.vcpus[0])
    vm.irq.set_ioapic(vm.irq.get_ioapic())
    lapic = vm.vcpus[0].lapic
    lapic.set(lapic.get())
    assert pin_and_apic(vm) == (True, True, True)
    # The EOI reaches the IOAPIC: the level that is still there comes again.
    assert handled(vm.vcpus[0])
    vm.irq.line(PIN, 0)
    assert said(vm) == ("i", 2, 0)
    assert pin_and_apic(vm) == (False, True, False)


def test_a_masked_pin_touches_no_apic(make_vm: MakeVm) -> None:
    """A level at a masked pin sets neither remote IRR nor TMR.

    82093AA data sheet, 3.2.4 (interrupt mask).
    """
    vm = start(make_vm, level=True, masked=True)
    vm.irq.line(PIN, 1)
    assert said(vm) == ("i", 0, 0)
    assert pin_and_apic(vm) == (False, False, False)


def test_polarity_is_ignored(make_vm: MakeVm) -> None:
    """Level 1 means active whatever polarity the guest programmed.

    Documentation/virt/kvm/api.rst, 4.25 KVM_IRQ_LINE: KVM_CAP_X86_IOAPIC_POLARITY_IGNORED.
    """
    vm = start(make_vm, active_low=True)
    assert said(vm) == ("i", 0, 0)
    vm.irq.line(PIN, 1)
    assert said(vm) == ("h",)


def test_masked_level_is_delivered_when_unmasked(make_vm: MakeVm) -> None:
    """A masked pin does not interrupt; a line that is still high when the pin is unmasked does.

    82093AA data sheet, 3.2.4 (interrupt mask).
    """
    vm = start(make_vm, level=True, masked=True)
    assert vm.irq.line_status(PIN, 1) < 0
    assert said(vm) == ("i", 0, 0)
    program(vm, level=True)
    assert said(vm) == ("h",)


def test_destination(make_vm: MakeVm) -> None:
    """The entry's destination decides which vCPU is interrupted, by APIC id or by logical id.

    82093AA data sheet, 3.2.4 (destination mode and field).
    """
    vm = start(make_vm, 3, dest_id=1)
    for fields, target in (({"dest_id": 1}, 1), ({"dest_id": 0b100, "logical": 1}, 2)):
        program(vm, **fields)
        vm.irq.pulse(PIN)
        assert said(vm.vcpus[target]) == ("h",)
        for vcpu in vm.vcpus:
            assert said(vcpu) == ("i", int(vcpu.index in (1, target)), 0)


def test_nmi(make_vm: MakeVm) -> None:
    """A pin with NMI delivery raises an NMI, whatever vector the entry has.

    82093AA data sheet, 3.2.4 (delivery mode).
    """
    vm = start(make_vm, delivery_mode=DELIVER_NMI)
    vm.irq.pulse(PIN)
    assert said(vm) == ("i", 0, 1)


def test_status_of_delivery(make_vm: MakeVm) -> None:
    """KVM_IRQ_LINE_STATUS is above 0 for delivery, 0 for an edge that merges, and below 0 for a masked pin.

    arch/x86/kvm/ioapic.c, ioapic_set_irq(); virt/kvm/irqchip.c, kvm_set_irq().
    """
    vm = start(make_vm)
    assert vm.irq.line_status(PIN, 1) == 1
    assert vm.irq.line_status(PIN, 1) == 0
    vm.irq.line(PIN, 0)
    program(vm, masked=True)
    assert vm.irq.line_status(PIN, 1) < 0


def test_line_without_route(vm: Vm) -> None:
    """A GSI that leads nowhere is accepted, and its status is below 0.

    virt/kvm/irqchip.c, kvm_set_irq(): "interrupt was ignored".
    """
    vm.irq.create_chip()
    assert vm.irq.line_status(1000, 1) < 0
    vm.irq.line(1000, 1)


@pytest.mark.parametrize("call", ["line", "line_status"])
def test_needs_irqchip(vm: Vm, call: str) -> None:
    """Without an in-kernel interrupt controller KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS fail with ENXIO.

    Documentation/virt/kvm/api.rst, 4.25 KVM_IRQ_LINE: an interrupt controller model is required.
    """
    with refused(errno.ENXIO):
        getattr(vm.irq, call)(PIN, 1)
