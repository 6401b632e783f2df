# SPDX-License-Identifier: Apache-2.0
"""PIC and IOAPIC as a guest programs them, through ports and memory."""

from __future__ import annotations

import pytest

from kvmpy import Gpa, GuestVm, Gva, MakeVm, RedirectionEntry
from selftests.conftest import said

pytestmark = pytest.mark.requires("KVM_CAP_IRQCHIP")

IOAPIC_GPA = Gpa(0xFEC0_0000)
IOAPIC_GVA = Gva(0x7000_0000)

IOAPIC_GUEST = """
#include "interrupts.h"

#define IOAPIC		0x70000000ul
#define IOAPIC_ID	0
#define IOAPIC_VERSION	1
#define PIN_LOW(n)	(0x10 + 2 * (n))
#define PIN_HIGH(n)	(0x11 + 2 * (n))
#define VECTOR		0x61

static u32 ioapic_read(u8 reg)
{
	mmio_write32((void *)IOAPIC, reg);
	return mmio_read32((void *)(IOAPIC + 0x10));
}

static void ioapic_write(u8 reg, u32 value)
{
	mmio_write32((void *)IOAPIC, reg);
	mmio_write32((void *)(IOAPIC + 0x10), value);
}

void guest_main(void)
{
	irq_install(VECTOR);
	apic_enable();

	/* 24 pins: the highest entry is 23. */
	GUEST_ASSERT_EQ(ioapic_read(IOAPIC_VERSION) >> 16 & 0xff, 23u);
	ioapic_write(IOAPIC_ID, 3u << 24);
	GUEST_ASSERT_EQ(ioapic_read(IOAPIC_ID), 3u << 24);

	GUEST_ASSERT_EQ(ioapic_read(PIN_LOW(21)), 0x10000u);
	ioapic_write(PIN_HIGH(21), 0);
	ioapic_write(PIN_LOW(21), VECTOR);
	GUEST_ASSERT_EQ(ioapic_read(PIN_LOW(21)), VECTOR);

	GUEST_SYNC('r');
	irq_wait(VECTOR, 1);
	GUEST_SYNC('d');

	/* Read-only bits: delivery status and remote IRR. */
	ioapic_write(PIN_LOW(22), 0x10000 | 0x5000 | VECTOR);
	GUEST_ASSERT_EQ(ioapic_read(PIN_LOW(22)), 0x10000u | VECTOR);
}
"""

# Both PICs at 0x20 and 0x28, as every PC operating system does it.
PIC_GUEST = """
#include <kvmpy/guest.h>

#define MASTER		0x20
#define SLAVE		0xa0
#define BASE		0x40

static void handler(struct exception_frame *frame)
{
	u8 irq = frame->vector - BASE;

	outb(MASTER, 0x0b);
	GUEST_SYNC('h', irq, inb(MASTER));
	if (irq >= 8)
		outb(SLAVE, 0x20);
	outb(MASTER, 0x20);
}

static void init(u16 port, u8 base, u8 cascade)
{
	outb(port, 0x11);
	outb(port + 1, base);
	outb(port + 1, cascade);
	outb(port + 1, 0x01);
}

void guest_main(u64 masks)
{
	int i;

	for (i = 0; i < 16; i++)
		guest_exception_install(BASE + i, handler);
	apic_enable();
	/* Virtual wire mode: LINT0 takes what the PIC says. */
	apic_write(APIC_LVT0, 0x700);
	init(MASTER, BASE, 4);
	init(SLAVE, BASE + 8, 2);
	outb(MASTER + 1, masks);
	outb(SLAVE + 1, masks >> 8);
	for (;;) {
		GUEST_SYNC('i');
		irq_window();
	}
}
"""


def pic_vm(make_vm: MakeVm, masks: int = 0) -> GuestVm:
    """Return a VM whose guest has set up its PICs with *masks*."""
    vm = make_vm.start(PIC_GUEST, "guest_main", masks, irqchip="full")
    assert said(vm) == ("i",)
    return vm


def handled(vm: GuestVm) -> tuple[str | int, ...]:
    """Return what the handler says within three windows: where ring 0 is emulated, one may not do."""
    return next((index for index in (said(vm) for _ in range(3)) if index[0] == "h"), ("nothing",))


def test_ioapic_through_memory(make_vm: MakeVm) -> None:
    """The guest reaches the IOAPIC's registers at 0xfec00000, and what it writes there rules its interrupts.

    Documentation/virt/kvm/api.rst, 4.24 KVM_CREATE_IRQCHIP; 82093AA data sheet, 3.1 and 3.2.
    """
    vm = make_vm(IOAPIC_GUEST, irqchip="full")
    vm.map(IOAPIC_GVA, IOAPIC_GPA, 0x1000, private=False)
    vm.launch()
    assert said(vm) == ("r",)
    state = vm.irq.get_ioapic()
    assert RedirectionEntry.from_bits(state.redirtbl[21].bits) == RedirectionEntry(vector=0x61)
    assert state.id == 3
    vm.irq.pulse(21)
    assert said(vm) == ("d",)
    vm.vcpus[0].run_to_done()


@pytest.mark.parametrize(("irq", "in_service"), [(3, 1 << 3), (12, 1 << 2)])
def test_pic_interrupt(make_vm: MakeVm, irq: int, in_service: int) -> None:
    """A line of either PIC interrupts at the vector that the guest gave it, the slave's through input 2.

    Documentation/virt/kvm/api.rst, 4.24 KVM_CREATE_IRQCHIP (two PICs, nested); 8259A data sheet.
    """
    vm = pic_vm(make_vm)
    vm.irq.pulse(irq)
    assert said(vm) == ("h", irq, in_service)
    assert said(vm) == ("i",)
    assert said(vm) == ("i",)


def test_pic_mask(make_vm: MakeVm) -> None:
    """A line that the guest masked does not interrupt; the edge waits until it is unmasked.

    8259A data sheet (IMR: OCW1).
    """
    vm = pic_vm(make_vm, masks=1 << 3)
    vm.irq.pulse(3)
    assert said(vm) == ("i",)
    state = vm.irq.get_pic()
    assert state.imr == 1 << 3
    assert state.irr == 1 << 3
    state.imr = 0
    vm.irq.set_pic(state)
    assert said(vm) == ("h", 3, 1 << 3)


def test_pic_priority(make_vm: MakeVm) -> None:
    """Of two lines the lower number comes first, and the other one only after its EOI.

    8259A data sheet (fully nested mode).
    """
    vm = pic_vm(make_vm)
    vm.irq.pulse(5)
    vm.irq.pulse(1)
    assert handled(vm) == ("h", 1, 1 << 1)
    assert handled(vm) == ("h", 5, 1 << 5)
    assert said(vm) == ("i",)


def test_pic_state_while_in_service(make_vm: MakeVm) -> None:
    """KVM_GET_IRQCHIP shows the interrupt in service and the vector base that the guest programmed.

    Documentation/virt/kvm/api.rst, 4.26 KVM_GET_IRQCHIP.
    """
    vm = pic_vm(make_vm)
    vm.irq.pulse(5)
    assert said(vm) == ("h", 5, 1 << 5)
    state = vm.irq.get_pic()
    assert (state.irq_base, state.isr) == (0x40, 1 << 5)
    assert said(vm) == ("i",)
    assert vm.irq.get_pic().isr == 0


def test_pic_level_by_elcr(make_vm: MakeVm) -> None:
    """A line that is level-triggered by the ELCR interrupts until it is lowered.

    Documentation/virt/kvm/api.rst, 4.26 KVM_GET_IRQCHIP (elcr); 82371AB data sheet (ports 0x4d0 and 0x4d1).
    """
    vm = pic_vm(make_vm)
    state = vm.irq.get_pic()
    state.elcr = 1 << 5
    vm.irq.set_pic(state)
    vm.irq.line(5, 1)
    assert handled(vm) == ("h", 5, 1 << 5)
    assert handled(vm) == ("h", 5, 1 << 5)
    vm.irq.line(5, 0)
    assert said(vm) == ("i",)
    assert said(vm) == ("i",)
