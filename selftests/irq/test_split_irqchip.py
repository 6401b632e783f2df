# SPDX-License-Identifier: Apache-2.0
"""Split irqchip: the IOAPIC is in user space, and KVM tells it about the guest's EOIs."""

from __future__ import annotations

import errno

import pytest

from kvmpy import Exit, GuestVm, IoapicEoiExit, MakeVm, Msi, MsiRoute, Ucall, refused

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")

GSI = 5
VECTOR = 0x51
EXTINT_VECTOR = 0x71

# 'h': in the handler before the EOI; 'e': behind it; 'i': a window for interrupts is over.
GUEST = """
#include "interrupts.h"

static void handler(struct exception_frame *frame)
{
	interrupts[0][frame->vector]++;
	GUEST_SYNC('h', frame->vector);
	apic_eoi();
	GUEST_SYNC('e', frame->vector);
}

/* What the user-space PIC sends needs no EOI here. */
static void extint(struct exception_frame *frame)
{
	GUEST_SYNC('x', frame->vector);
}

void guest_main(void)
{
	guest_exception_install(0x51, handler);
	guest_exception_install(0x71, extint);
	guest_exception_install(0x72, extint);
	apic_enable();
	apic_write(APIC_LVT0, 0x700);
	for (;;) {
		GUEST_SYNC('i');
		irq_window();
	}
}
"""


def start(make_vm: MakeVm, *routes: MsiRoute) -> GuestVm:
    """Return a VM with a split irqchip and *routes*, whose guest is ready."""
    vm = make_vm(GUEST, irqchip="split")
    vm.irq.set_gsi_routing(routes)
    vm.launch()
    assert word(vm) == "i"
    return vm


def step(vm: GuestVm) -> Ucall | Exit:
    """Return what comes next."""
    return vm.vcpus[0].next()


def word(vm: GuestVm) -> str:
    """Return the guest's next word; an exit's name when there is one."""
    got = step(vm)
    return chr(got.args[0]) if isinstance(got, Ucall) else type(got).__name__


def words(vm: GuestVm) -> list[str]:
    """Return the guest's words until the window after the next is over."""
    results: list[str] = []
    while results.count("i") < 2:
        results.append(word(vm))
    return results


def test_eoi_exit(make_vm: MakeVm) -> None:
    """The EOI of a level-triggered interrupt of a reserved route ends KVM_RUN with KVM_EXIT_IOAPIC_EOI.

    Documentation/virt/kvm/api.rst, 7.5 KVM_CAP_SPLIT_IRQCHIP and KVM_EXIT_IOAPIC_EOI.
    """
    vm = start(make_vm, MsiRoute(GSI, Msi.to(0, VECTOR, level=True)))
    vm.irq.line(GSI, 1)
    # A KVM whose APIC ends an interrupt with its delivery may exit before the handler's first word.
    came = [step(vm) for _ in range(3)]
    exits = [got for got in came if isinstance(got, IoapicEoiExit)]
    assert [got.vector for got in exits] == [VECTOR]
    assert [chr(got.args[0]) for got in came if isinstance(got, Ucall)] == ["h", "e"]


def test_eoi_is_told_once(make_vm: MakeVm) -> None:
    """Every level-triggered interrupt leads to one such exit, after which user space may raise it again.

    Documentation/virt/kvm/api.rst, KVM_EXIT_IOAPIC_EOI: "retrigger the interrupt if it is still asserted".
    """
    vm = start(make_vm, MsiRoute(GSI, Msi.to(0, VECTOR, level=True)))
    for _ in range(3):
        vm.irq.line(GSI, 1)
        assert sorted(words(vm)) == ["IoapicEoiExit", "e", "h", "i", "i"]


@pytest.mark.parametrize(
    ("gsi", "level"), [(GSI, False), (24, True)], ids=["edge", "beyond-the-reserved-pins"]
)
def test_eoi_without_an_exit(make_vm: MakeVm, gsi: int, level: bool) -> None:
    """The EOI of an edge-triggered interrupt, and of a GSI beyond the first args[0], does not end KVM_RUN.

    Documentation/virt/kvm/api.rst, KVM_EXIT_IOAPIC_EOI: "a level-triggered IOAPIC interrupt"; 7.5
    KVM_CAP_SPLIT_IRQCHIP: "the first args[0] MSI routes are reserved" for the user-space IOAPIC.
    """
    vm = start(make_vm, MsiRoute(gsi, Msi.to(0, VECTOR, level=level)))
    vm.irq.line(gsi, 1)
    assert sorted(words(vm)) == ["e", "h", "i", "i"]


def test_external_interrupt(make_vm: MakeVm) -> None:
    """KVM_INTERRUPT hands in what the user-space PIC says, and LINT0 in ExtINT mode takes it.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT.
    """
    vm = start(make_vm)
    vm.vcpus[0].events.interrupt(EXTINT_VECTOR)
    assert words(vm) == ["x", "i", "i"]


def test_second_external_interrupt(make_vm: MakeVm) -> None:
    """While one external interrupt waits a second one is refused with EEXIST; afterwards it is taken.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT: -EEXIST if an interrupt is already enqueued.
    """
    vm = start(make_vm)
    vcpu = vm.vcpus[0]
    vcpu.events.interrupt(EXTINT_VECTOR)
    with refused(errno.EEXIST):
        vcpu.events.interrupt(EXTINT_VECTOR + 1)
    assert words(vm) == ["x", "i", "i"]
    vcpu.events.interrupt(EXTINT_VECTOR + 1)
    assert words(vm) == ["x", "i", "i"]


def test_masked_lint0_keeps_external_interrupt_out(make_vm: MakeVm) -> None:
    """An external interrupt waits while the guest has LINT0 masked.

    Intel SDM 3A, 12.5.1 (local vector table); Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT.
    """
    vm = start(make_vm)
    vcpu = vm.vcpus[0]
    vcpu.lapic.set_reg(0x350, 0x10700)
    vcpu.events.interrupt(EXTINT_VECTOR)
    assert words(vm) == ["i", "i"]
    vcpu.lapic.set_reg(0x350, 0x700)
    assert words(vm) == ["x", "i", "i"]
