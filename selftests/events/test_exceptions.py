# SPDX-License-Identifier: Apache-2.0
"""Exceptions that user space injects, as the guest takes them."""

from __future__ import annotations

import pytest

from kvmpy import KVM_CAP_EXCEPTION_PAYLOAD, Gva, Kvm, Missing, Vector
from kvmpy.guest import layout
from kvmpy.testing import host
from selftests.events.conftest import EventGuest, EventGuestMaker

pytestmark = [pytest.mark.requires("KVM_CAP_VCPU_EVENTS"), pytest.mark.usefixtures("open_registers")]
payload = pytest.mark.requires("KVM_CAP_EXCEPTION_PAYLOAD")

CR2 = 0x0000_1234_5678_9ABC
DR6_ACTIVE_LOW = 0xFFFF_0FF0


def inject(guest: EventGuest, vector: int, error_code: int | None = None) -> None:
    """Let the guest take an exception at its next run."""
    events = guest.vcpu.events.get()
    events.exception.injected, events.exception.nr = 1, int(vector)
    events.exception.has_error_code = int(error_code is not None)
    events.exception.error_code = error_code or 0
    guest.vcpu.events.set(events)


def pend(guest: EventGuest, vector: int, value: int | None, error_code: int | None = None) -> None:
    """Make an exception pending, with *value* as its payload unless it is None."""
    events = guest.vcpu.events.get()
    events.exception.pending, events.exception.nr = 1, int(vector)
    events.exception.has_error_code = int(error_code is not None)
    events.exception.error_code = error_code or 0
    events.exception_has_payload, events.exception_payload = int(value is not None), value or 0
    guest.vcpu.events.set(events)


@pytest.mark.parametrize("vector", [Vector.DE, Vector.BR, Vector.UD, Vector.NM, Vector.MF, Vector.XM])
def test_without_error_code(event_guest: EventGuestMaker, vector: Vector) -> None:
    """An injected exception without error code reaches the guest's handler once, where the guest stood.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS.
    """
    guest = event_guest()
    where = guest.rip
    inject(guest, vector)
    assert guest.go_on() == 1
    assert guest.counts() == {vector: 1}
    assert guest.seen(vector)[:3] == (1, 0, where)
    guest.go_on()
    assert guest.counts() == {vector: 1}


@pytest.mark.parametrize("vector", [Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.AC])
@pytest.mark.parametrize("error_code", [0, 0x8])
def test_with_error_code(event_guest: EventGuestMaker, vector: Vector, error_code: int) -> None:
    """An injected exception with an error code puts that code on the stack of the guest's handler.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS (has_error_code, error_code).
    """
    guest = event_guest()
    where = guest.rip
    inject(guest, vector, error_code)
    guest.go_on()
    assert guest.counts() == {vector: 1}
    assert guest.seen(vector)[:3] == (1, error_code, where)


def test_page_fault_by_hand(event_guest: EventGuestMaker) -> None:
    """An injected page fault comes with its error code and the CR2 that KVM_SET_SREGS set.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS and 4.14 KVM_SET_SREGS.
    """
    guest = event_guest()
    sregs = guest.vcpu.regs.get_sregs()
    sregs.cr2 = CR2
    guest.vcpu.regs.set_sregs(sregs)
    inject(guest, Vector.PF, 0x6)
    guest.go_on()
    seen = guest.seen(Vector.PF)
    assert (seen.times, seen.error_code, seen.cr2) == (1, 0x6, CR2)


def knows_vc(_kvm: Kvm) -> Missing | None:
    """Intel CPUs refuse an entry with an error code for a vector that has none with them."""
    if not host.cpu_flag("vmx"):
        return None
    how = "an AMD CPU: see KVM_SET_VCPU_EVENTS in Documentation/virt/kvm/x86/errata.rst"
    return Missing("#VC with an error code", how, ("vc-injection",))


@pytest.mark.requires.with_args(knows_vc)
@pytest.mark.parametrize("error_code", [0x72, 0x7B, 0x400])
def test_vmm_communication(event_guest: EventGuestMaker, error_code: int) -> None:
    """#VC can be injected into any guest, with an exit code of SVM as its error code.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS; AMD APM volume 2, 15.35.5 #VC Exception.
    """
    guest = event_guest()
    where = guest.rip
    inject(guest, Vector.VC, error_code)
    guest.go_on()
    assert guest.counts() == {Vector.VC: 1}
    assert guest.seen(Vector.VC)[:3] == (1, error_code, where)


@payload
def test_page_fault_with_payload(event_guest: EventGuestMaker) -> None:
    """A pending page fault's payload is in CR2 when the guest's handler runs.

    Documentation/virt/kvm/api.rst, 7.17 KVM_CAP_EXCEPTION_PAYLOAD ("to put the faulting address").
    """
    guest = event_guest(cap=KVM_CAP_EXCEPTION_PAYLOAD)
    where = guest.rip
    pend(guest, Vector.PF, CR2, error_code=0x2)
    guest.go_on()
    seen = guest.seen(Vector.PF)
    assert (seen.times, seen.error_code, seen.rip, seen.cr2) == (1, 0x2, where, CR2)


@payload
def test_page_fault_without_payload(event_guest: EventGuestMaker) -> None:
    """A pending page fault without a payload leaves CR2 as it is.

    Documentation/virt/kvm/api.rst, 7.17 KVM_CAP_EXCEPTION_PAYLOAD (exception_has_payload).
    """
    guest = event_guest(cap=KVM_CAP_EXCEPTION_PAYLOAD)
    sregs = guest.vcpu.regs.get_sregs()
    sregs.cr2 = CR2
    guest.vcpu.regs.set_sregs(sregs)
    pend(guest, Vector.PF, None, error_code=0)
    guest.go_on()
    assert guest.seen(Vector.PF).cr2 == CR2


@payload
@pytest.mark.parametrize("bits", [0x4000, 0x2, 0x400F])
def test_debug_exception_with_payload(event_guest: EventGuestMaker, bits: int) -> None:
    """A pending #DB's payload is in DR6 when the guest's handler runs, beside the bits that read as one.

    Documentation/virt/kvm/api.rst, 7.17 KVM_CAP_EXCEPTION_PAYLOAD ("the new DR6 bits").
    """
    guest = event_guest(cap=KVM_CAP_EXCEPTION_PAYLOAD)
    pend(guest, Vector.DB, bits)
    guest.go_on()
    seen = guest.seen(Vector.DB)
    assert (seen.times, seen.dr6) == (1, DR6_ACTIVE_LOW | bits)


@pytest.mark.usefixtures("open_tables")
def test_double_fault(event_guest: EventGuestMaker) -> None:
    """An injected page fault whose gate is not present ends in #DF with error code 0.

    Intel SDM volume 3, 6.15, Interrupt 8 (page fault, then contributory exception); AMD APM volume 2, 8.2.9.
    """
    guest = event_guest()
    gate = Gva(layout.IDT_GVA) + 16 * Vector.PF
    raw = bytearray(guest.vm.read(gate, 16))
    raw[5] &= ~0x80
    guest.vm.write(gate, raw)
    inject(guest, Vector.PF, 0)
    guest.go_on()
    assert guest.counts() == {Vector.DF: 1}
    assert guest.seen(Vector.DF).error_code == 0
