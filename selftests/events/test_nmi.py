# SPDX-License-Identifier: Apache-2.0
"""Non-maskable interrupts: queued, pending, masked."""

from __future__ import annotations

import pytest

from kvmpy import KVM_VCPUEVENT_VALID_NMI_PENDING, MakeVm, Vector
from selftests.events.conftest import EventGuestMaker

pytestmark = [
    pytest.mark.requires("KVM_CAP_USER_NMI", "KVM_CAP_VCPU_EVENTS"),
    pytest.mark.usefixtures("open_registers"),
]
NMI = Vector.NMI


def test_queued(event_guest: EventGuestMaker) -> None:
    """KVM_NMI makes one NMI pending, which the guest takes at once although its interrupts are off.

    Documentation/virt/kvm/api.rst, 4.64 KVM_NMI.
    """
    guest = event_guest(interrupts=False)
    where = guest.rip
    guest.vcpu.events.nmi()
    assert guest.vcpu.events.get().nmi.pending == 1
    guest.go_on()
    assert guest.counts() == {NMI: 1}
    assert guest.seen(NMI).rip == where
    assert guest.vcpu.events.get().nmi.pending == 0


def test_two_are_kept(event_guest: EventGuestMaker) -> None:
    """Two NMIs can be pending, and KVM_GET_VCPU_EVENTS tells how many: written back, both are taken.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS (nmi.pending); arch/x86/kvm/x86.c, process_nmi().
    """
    guest = event_guest(interrupts=False)
    for _ in range(2):
        guest.vcpu.events.nmi()
    events = guest.vcpu.events.get()
    assert events.nmi.pending == 2, f"two NMIs were sent, KVM_GET_VCPU_EVENTS tells of {events.nmi.pending}"
    taken = guest.vcpu.events.get()
    taken.nmi.pending = 0
    guest.vcpu.events.set(taken)
    guest.vcpu.events.set(events)
    assert guest.vcpu.events.get().nmi.pending == 2


def test_pending_by_events(event_guest: EventGuestMaker) -> None:
    """nmi.pending of KVM_SET_VCPU_EVENTS makes an NMI pending like KVM_NMI.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS, KVM_VCPUEVENT_VALID_NMI_PENDING.
    """
    guest = event_guest()
    events = guest.vcpu.events.get()
    events.nmi.pending = 1
    assert events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING
    guest.vcpu.events.set(events)
    guest.go_on()
    assert guest.counts() == {NMI: 1}


def test_taken_back(event_guest: EventGuestMaker) -> None:
    """A pending NMI that KVM_SET_VCPU_EVENTS clears is never delivered.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS, KVM_VCPUEVENT_VALID_NMI_PENDING.
    """
    guest = event_guest()
    guest.vcpu.events.nmi()
    events = guest.vcpu.events.get()
    events.nmi.pending = 0
    guest.vcpu.events.set(events)
    guest.go_on()
    assert guest.counts() == {}


def test_masked(event_guest: EventGuestMaker) -> None:
    """With nmi.masked an NMI stays pending until the guest executes IRET.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS; Intel SDM volume 3, 6.7.1 Handling Multiple
    NMIs.
    """
    # A KVM that loses sight of the IRET may still be right once, when the host is interrupted in time.
    for _ in range(3):
        guest = event_guest(with_iret=True)
        events = guest.vcpu.events.get()
        events.nmi.masked = 1
        guest.vcpu.events.set(events)
        guest.vcpu.events.nmi()
        guest.go_on()
        assert guest.counts() == {}
        events = guest.vcpu.events.get()
        assert (events.nmi.masked, events.nmi.pending) == (1, 1)
        guest.go_on()
        assert guest.counts() == {Vector.UD: 1, NMI: 1}
        events = guest.vcpu.events.get()
        assert (events.nmi.masked, events.nmi.pending) == (0, 0)


HANDLER = """
#include <kvmpy/guest.h>

static volatile u64 nmis;

static void handler(struct exception_frame *frame)
{
	nmis++;
	GUEST_SYNC(0x1000 + nmis);
}

void guest_main(void)
{
	guest_exception_install(NMI_VECTOR, handler);
	GUEST_SYNC(0);
	GUEST_SYNC(nmis);
}
"""


def test_in_the_handler(make_vm: MakeVm) -> None:
    """NMIs are masked while the guest handles one; of those that come meanwhile it gets one afterwards.

    Intel SDM volume 3, 6.7.1 Handling Multiple NMIs; Documentation/virt/kvm/api.rst, 4.31 (nmi.masked).
    """
    vcpu = make_vm.start(HANDLER).vcpus[0]
    vcpu.sync()
    vcpu.events.nmi()
    assert vcpu.sync().args == (0x1001,)
    assert vcpu.events.get().nmi.masked == 1
    for _ in range(3):
        vcpu.events.nmi()
    assert vcpu.events.get().nmi.pending == 1
    assert vcpu.sync().args == (0x1002,)
    assert vcpu.sync().args == (2,)
    assert vcpu.events.get().nmi.masked == 0
