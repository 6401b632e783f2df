# SPDX-License-Identifier: Apache-2.0
"""A level-triggered interrupt whose IOAPIC entry changes between its delivery and its EOI."""

from __future__ import annotations

import pytest

from kvmpy import GuestVm, MakeVm

pytestmark = [pytest.mark.requires("KVM_CAP_IRQCHIP"), pytest.mark.protections("none", "cbit")]

PIN, VECTOR = 20, 0x51
LEVEL, MASKED = 1 << 15, 1 << 16
SECOND_CPU = 1 << 56

GUEST = """
#include <kvmpy/guest.h>

static void handler(struct exception_frame *frame)
{
	GUEST_SYNC('h');
	apic_eoi();
}

void guest_main(void)
{
	guest_exception_install(0x51, handler);
	apic_enable();
	for (;;) {
		GUEST_SYNC('i');
		irq_window();
	}
}
"""
IDLE, HANDLING = (ord("i"),), (ord("h"),)

# What the entry is made while its interrupt is in service, and which vCPU then takes the next one.
CHANGES = {
    "as it was": (0, 0),
    "to another vCPU": (SECOND_CPU, 1),
    "masked": (MASKED, 0),
    "masked for another vCPU": (MASKED | SECOND_CPU, 1),
}


def program(vm: GuestVm, bits: int) -> None:
    """Write the pin's entry, but for what is the IOAPIC's own."""
    state = vm.irq.get_ioapic()
    kept = state.redirtbl[PIN].bits & 1 << 14
    state.redirtbl[PIN].bits = bits | kept
    vm.irq.set_ioapic(state)


def remote_irr(vm: GuestVm) -> bool:
    """Tell whether the IOAPIC waits for an EOI."""
    return bool(vm.irq.get_ioapic().redirtbl[PIN].bits & 1 << 14)


def take(vm: GuestVm, vcpu: int) -> None:
    """Run a vCPU until it stands in its handler."""
    for _ in range(4):
        if vm.vcpus[vcpu].sync().args == HANDLING:
            return
    pytest.fail(f"vCPU {vcpu} did not take the interrupt at {VECTOR:#x}")


@pytest.mark.parametrize("change", CHANGES.values(), ids=[name.replace(" ", "-") for name in CHANGES])
def test_entry_changes(make_vm: MakeVm, change: tuple[int, int]) -> None:
    """The EOI of the interrupt ends it, whatever the entry is by then, and the line can interrupt again.

    82093AA data sheet, 3.2.4 (remote IRR is reset by the EOI message); AMD APM volume 2, 16.6.
    """
    bits, vcpu = change
    vm = make_vm.start(GUEST, vcpus=2, irqchip="full")
    for each in vm.vcpus:
        assert each.sync().args == IDLE
    program(vm, VECTOR | LEVEL)
    vm.irq.line(PIN, 1)
    take(vm, 0)
    assert remote_irr(vm), "the interrupt is in service, and remote IRR is clear"
    program(vm, VECTOR | LEVEL | bits)
    vm.irq.line(PIN, 0)
    assert vm.vcpus[0].sync().args == IDLE
    assert not remote_irr(vm), "remote IRR is set after the EOI: the IOAPIC did not get it"
    program(vm, VECTOR | LEVEL | bits & ~MASKED)
    vm.irq.line(PIN, 1)
    take(vm, vcpu)
    vm.irq.line(PIN, 0)
    assert vm.vcpus[vcpu].sync().args == IDLE
    assert not remote_irr(vm), "remote IRR is set after the second EOI"
