# SPDX-License-Identifier: Apache-2.0
"""KVM_NMI: non-maskable interrupts that user space queues."""

from __future__ import annotations

import pytest

from kvmpy import GuestVm, MakeVm
from selftests.conftest import said

pytestmark = pytest.mark.requires("KVM_CAP_USER_NMI")

# 'n', 'e': in the handler, with the depth of nesting and the number so far; 'w': a while outside is over.
GUEST = """
#include <kvmpy/guest.h>

static volatile u32 depth, count;

static void pause(void)
{
	u32 i;

	for (i = 0; i < 600; i++)
		cpu_relax();
}

static void handler(struct exception_frame *frame)
{
	depth++;
	count++;
	GUEST_SYNC('n', depth, count, read_rflags() >> 9 & 1);
	/* Long enough for hosts that look for events now and then. */
	pause();
	GUEST_SYNC('e', depth, count);
	depth--;
}

static void windows(void)
{
	cli();
	for (;;) {
		GUEST_SYNC('w', depth, count);
		pause();
	}
}

void guest_main(void)
{
	guest_exception_install(NMI_VECTOR, handler);
	windows();
}
"""


def start(make_vm: MakeVm, irqchip: str | None = "split") -> GuestVm:
    """Return a VM whose guest runs with interrupts off."""
    vm = make_vm.start(GUEST, irqchip=irqchip)
    assert said(vm) == ("w", 0, 0)
    return vm


def next_of(vm: GuestVm, word: str) -> tuple[str | int, ...]:
    """Return the first time that the guest says *word* within four words."""
    return next((index for index in (said(vm) for _ in range(4)) if index[0] == word), ("nothing",))


@pytest.mark.parametrize("irqchip", ["split", "full", None])
def test_delivered_with_interrupts_off(make_vm: MakeVm, irqchip: str | None) -> None:
    """KVM_NMI interrupts the guest though it has interrupts off, with and without a local APIC in the kernel.

    Documentation/virt/kvm/api.rst, 4.64 KVM_NMI.
    """
    vm = start(make_vm, irqchip)
    assert said(vm) == ("w", 0, 0)
    vm.vcpus[0].events.nmi()
    assert next_of(vm, "n") == ("n", 1, 1, 0)
    assert said(vm) == ("e", 1, 1)
    assert said(vm) == ("w", 0, 1)


def test_blocked_until_iret(make_vm: MakeVm) -> None:
    """An NMI that is queued while the handler runs is delivered after the handler's IRET, not inside of it.

    Intel SDM 3A, 7.7.1 (handling multiple NMIs).
    """
    vm = start(make_vm)
    vm.vcpus[0].events.nmi()
    assert next_of(vm, "n")[:3] == ("n", 1, 1)
    vm.vcpus[0].events.nmi()
    assert said(vm) == ("e", 1, 1)
    assert next_of(vm, "n")[:3] == ("n", 1, 2)
    assert said(vm) == ("e", 1, 2)
    assert said(vm) == ("w", 0, 2)


def test_events_show_it(make_vm: MakeVm) -> None:
    """KVM_GET_VCPU_EVENTS shows a queued NMI as pending, and NMIs as masked while the handler runs.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS (nmi.pending, nmi.masked).
    """
    vm = start(make_vm)
    vcpu = vm.vcpus[0]
    vcpu.complete_io()
    assert (vcpu.events.get().nmi.pending, vcpu.events.get().nmi.masked) == (0, 0)
    vcpu.events.nmi()
    assert vcpu.events.get().nmi.pending >= 1
    assert next_of(vm, "n")[:3] == ("n", 1, 1)
    assert (vcpu.events.get().nmi.pending, vcpu.events.get().nmi.masked) == (0, 1)
    assert said(vm) == ("e", 1, 1)
    assert said(vm) == ("w", 0, 1)
    assert vcpu.events.get().nmi.masked == 0


def test_masked_by_user_space(make_vm: MakeVm) -> None:
    """A vCPU whose NMIs user space masks takes none until it unmasks them.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS.
    """
    vm = start(make_vm)
    vcpu = vm.vcpus[0]
    vcpu.complete_io()
    events = vcpu.events.get()
    events.nmi.masked = 1
    vcpu.events.set(events)
    vcpu.events.nmi()
    assert said(vm) == ("w", 0, 0)
    assert said(vm) == ("w", 0, 0)
    vcpu.complete_io()
    events = vcpu.events.get()
    events.nmi.masked = 0
    vcpu.events.set(events)
    assert next_of(vm, "n")[:3] == ("n", 1, 1)
