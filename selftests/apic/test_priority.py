# SPDX-License-Identifier: Apache-2.0
"""Priorities: task priority, processor priority, requests and services, and their nesting."""

from __future__ import annotations

import pytest

from kvmpy import GuestVm, MakeVm, Msi, apic
from selftests.conftest import said

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")

LOW, MIDDLE, HIGH = 0x41, 0x51, 0x61

# The handler says its vector and the priorities; with nesting it lets others interrupt it before its EOI.
GUEST = """
#include <kvmpy/guest.h>

#define LOW	0x41
#define MIDDLE	0x51
#define HIGH	0x61

static bool nesting;

static void handler(struct exception_frame *frame)
{
	GUEST_SYNC('h', frame->vector, apic_read(APIC_PROCPRI), apic_test_vector(APIC_ISR, frame->vector),
		   apic_test_vector(APIC_IRR, frame->vector));
	if (nesting)
		irq_window();
	GUEST_SYNC('e', frame->vector);
	apic_eoi();
}

static void setup(u64 x2apic)
{
	guest_exception_install(LOW, handler);
	guest_exception_install(MIDDLE, handler);
	guest_exception_install(HIGH, handler);
	if (x2apic)
		x2apic_enable();
	else
		apic_enable();
}

void windows(u64 x2apic, u64 tpr)
{
	setup(x2apic);
	apic_write(APIC_TASKPRI, tpr);
	for (;;) {
		GUEST_SYNC('i', apic_read(APIC_PROCPRI));
		irq_window();
	}
}

void nested(u64 x2apic)
{
	nesting = true;
	windows(x2apic, 0);
}

/* CR8 is bits 7-4 of the task priority, both ways. */
void cr8(u64 x2apic)
{
	setup(x2apic);
	apic_write(APIC_TASKPRI, 0x50);
	GUEST_ASSERT_EQ(read_cr8(), 5ull);
	GUEST_ASSERT_EQ(apic_read(APIC_PROCPRI), 0x50u);
	write_cr8(9);
	GUEST_ASSERT_EQ(apic_read(APIC_TASKPRI), 0x90u);
	GUEST_ASSERT_EQ(apic_read(APIC_PROCPRI), 0x90u);
	GUEST_ASSERT_EQ(read_cr8(), 9ull);
	GUEST_ASSERT_EQ(write_cr8_safe(0x10).vector, GP_VECTOR);
	GUEST_ASSERT_EQ(read_cr8(), 9ull);
}

/* The lower half of the task priority counts for nothing, but it is kept. */
void subclass(u64 x2apic)
{
	setup(x2apic);
	apic_write(APIC_TASKPRI, 0x5f);
	GUEST_ASSERT_EQ(apic_read(APIC_TASKPRI), 0x5fu);
	GUEST_SYNC('s');
	GUEST_ASSERT_EQ(apic_read(APIC_TASKPRI), 0x5fu);
	GUEST_ASSERT_EQ(apic_read(APIC_PROCPRI), 0x5fu);
	GUEST_ASSERT_EQ(read_cr8(), 5ull);
}

/* Interrupts are off: what comes waits in the request register. */
void requests(u64 x2apic)
{
	setup(x2apic);
	GUEST_SYNC('r');
	GUEST_ASSERT(apic_test_vector(APIC_IRR, MIDDLE));
	GUEST_ASSERT(apic_test_vector(APIC_IRR, HIGH));
	GUEST_ASSERT(!apic_test_vector(APIC_IRR, LOW));
	GUEST_ASSERT(!apic_test_vector(APIC_TMR, MIDDLE));
	GUEST_ASSERT(apic_test_vector(APIC_TMR, HIGH));
	GUEST_ASSERT_EQ(apic_read(APIC_PROCPRI), 0u);
}
"""

MODES = pytest.mark.parametrize("x2apic", [0, 1], ids=["xapic", "x2apic"])


def story(vm: GuestVm, windows: int = 4) -> list[tuple[str, int]]:
    """Return the beginnings ('h') and ends ('e') of handlers, with their vectors, within some windows."""
    results: list[tuple[str, int]] = []
    while windows:
        call = vm.vcpus[0].sync()
        word = chr(call.args[0])
        if word == "i":
            windows -= 1
        else:
            results.append((word, call.args[1]))
    return results


@MODES
def test_requests(make_vm: MakeVm, x2apic: int) -> None:
    """While interrupts are off, requests wait in the IRR, and the TMR tells levels from edges.

    Intel SDM 3A, 12.8.4 (interrupt acceptance for fixed interrupts).
    """
    vm = make_vm.start(GUEST, "requests", x2apic)
    assert said(vm) == ("r",)
    vm.irq.signal_msi(Msi.to(0, MIDDLE))
    vm.irq.signal_msi(Msi.to(0, HIGH, level=True))
    vm.vcpus[0].run_to_done()


@MODES
def test_highest_first(make_vm: MakeVm, x2apic: int) -> None:
    """Of several requests the highest vector comes first, whatever order they arrived in.

    Intel SDM 3A, 12.8.3 (interrupt, task, and processor priority).
    """
    vm = make_vm.start(GUEST, "windows", x2apic, 0)
    assert said(vm)[0] == "i"
    for vector in (MIDDLE, LOW, HIGH):
        vm.irq.signal_msi(Msi.to(0, vector))
    assert [vector for word, vector in story(vm) if word == "h"] == [HIGH, MIDDLE, LOW]


@MODES
def test_task_priority(make_vm: MakeVm, x2apic: int) -> None:
    """Vectors whose class is not above that of the task priority wait until it is lowered.

    Intel SDM 3A, 12.8.3.1 (task and processor priorities).
    """
    vm = make_vm.start(GUEST, "windows", x2apic, 0x50)
    assert said(vm) == ("i", 0x50)
    for vector in (LOW, MIDDLE, HIGH):
        vm.irq.signal_msi(Msi.to(0, vector))
    assert story(vm) == [("h", HIGH), ("e", HIGH)]
    vm.vcpus[0].lapic.set_reg(apic.TPR, 0x40)
    assert story(vm) == [("h", MIDDLE), ("e", MIDDLE)]
    vm.vcpus[0].lapic.set_reg(apic.TPR, 0x3F)
    assert story(vm) == [("h", LOW), ("e", LOW)]


@MODES
def test_cr8(make_vm: MakeVm, x2apic: int) -> None:
    """CR8 is the class of the task priority in both directions; its reserved bits are #GP.

    Intel SDM 3A, 12.8.6 (task priority in IA-32e mode).
    """
    vm = make_vm.start(GUEST, "cr8", x2apic)
    vm.vcpus[0].run_to_done()


@MODES
def test_priority_subclass(make_vm: MakeVm, x2apic: int) -> None:
    """The task priority keeps its lower half, which CR8 does not show.

    Intel SDM 3A, 12.8.3.1 (task-priority sub-class) and 12.8.6.1.
    """
    vm = make_vm.start(GUEST, "subclass", x2apic)
    assert said(vm) == ("s",)
    vm.vcpus[0].run_to_done()


@MODES
def test_in_service_register(make_vm: MakeVm, x2apic: int) -> None:
    """While a handler runs, its vector has moved from the IRR to the ISR; the EOI takes it out.

    Intel SDM 3A, 12.8.4 and 12.8.5 (signaling interrupt servicing completion).
    """
    vm = make_vm.start(GUEST, "windows", x2apic, 0)
    assert said(vm) == ("i", 0)
    vm.irq.signal_msi(Msi.to(0, MIDDLE))
    _, vector, _, in_service, requested = said(vm)
    assert (vector, in_service, requested) == (MIDDLE, 1, 0)
    assert vm.vcpus[0].lapic.get_reg(apic.ISR + 0x10 * (MIDDLE // 32)) == 1 << MIDDLE % 32
    assert story(vm, 1) == [("e", MIDDLE)]
    assert vm.vcpus[0].lapic.get_reg(apic.ISR + 0x10 * (MIDDLE // 32)) == 0


@MODES
def test_processor_priority(make_vm: MakeVm, x2apic: int) -> None:
    """The processor priority is the class of what is in service, while that is above the task priority.

    Intel SDM 3A, 12.8.3.1: the value of the PPR.
    """
    vm = make_vm.start(GUEST, "windows", x2apic, 0x20)
    assert said(vm) == ("i", 0x20)
    vm.irq.signal_msi(Msi.to(0, MIDDLE))
    assert said(vm)[:3] == ("h", MIDDLE, 0x50)
    assert said(vm) == ("e", MIDDLE)
    assert said(vm) == ("i", 0x20)


@MODES
def test_higher_interrupts_lower(make_vm: MakeVm, x2apic: int) -> None:
    """A vector of a higher class interrupts the handler of a lower one that has switched interrupts on.

    Intel SDM 3A, 12.8.3.
    """
    vm = make_vm.start(GUEST, "nested", x2apic)
    assert said(vm)[0] == "i"
    vm.irq.signal_msi(Msi.to(0, LOW))
    assert said(vm)[:2] == ("h", LOW)
    vm.irq.signal_msi(Msi.to(0, HIGH))
    assert story(vm) == [("h", HIGH), ("e", HIGH), ("e", LOW)]


@MODES
def test_lower_waits_for_higher(make_vm: MakeVm, x2apic: int) -> None:
    """A vector of a lower or the same class waits for the EOI of a higher one.

    Intel SDM 3A, 12.8.3.
    """
    vm = make_vm.start(GUEST, "nested", x2apic)
    assert said(vm)[0] == "i"
    vm.irq.signal_msi(Msi.to(0, HIGH))
    assert said(vm)[:2] == ("h", HIGH)
    vm.irq.signal_msi(Msi.to(0, LOW))
    vm.irq.signal_msi(Msi.to(0, HIGH))
    assert story(vm) == [("e", HIGH), ("h", HIGH), ("e", HIGH), ("h", LOW), ("e", LOW)]
