# SPDX-License-Identifier: Apache-2.0
"""Events that L1 injects with VMRUN, and what an exit tells of an event that it interrupted."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, Event, EventType, Gpa, Gva, MmioExit, PfErr, SvmExit, Vector
from kvmpy.x86.exceptions import has_error_code
from selftests.nested.conftest import Note, Notes

pytestmark = [pytest.mark.protections("none", "cbit"), pytest.mark.requires("cpuid:svm")]

NOP = b"\x90"
CR2 = 0x1234_5678_9000
EXCEPTIONS = [
    Vector.DE, Vector.DB, Vector.BP, Vector.OF, Vector.BR, Vector.UD, Vector.NM, Vector.DF, Vector.TS,
    Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.MF, Vector.AC, Vector.MC, Vector.XM,
]  # fmt: skip


def exception(vector: Vector) -> Event:
    """Return an exception, with an error code where it has one."""
    code = {Vector.DF: 0, Vector.AC: 0}.get(vector, 0x1248)
    return Event(EventType.EXCEPTION, vector, code if has_error_code(vector) else None)


EVENTS = [
    *(exception(vector) for vector in EXCEPTIONS),
    *(Event(EventType.INTR, vector) for vector in (0x20, 0x31, 0x80, 0xFF)),
    Event(EventType.NMI, 2),
    Event(EventType.NMI, 0x77),
    *(Event(EventType.SOFT, vector) for vector in (3, 0x30, 0x80)),
]


def test_delivery(notes: Notes) -> None:
    """Each event reaches L2's handler once, before its first instruction, with its error code; CR2 stays.

    AMD APM volume 2, 15.20 Event Injection: whatever RFLAGS.IF says; an NMI's vector is 2.
    """
    l2, wrong = notes.l2, []
    for event in EVENTS:
        l2.reset()
        l2.load(NOP)
        l2.vmcb["cr2"] = CR2
        l2.vmcb.inject(event)
        got = l2.resume()
        vector = 2 if event.type == EventType.NMI else event.vector
        expected = {vector: Note(1, event.error_code or 0, int(l2.code), CR2, 1)}
        if (seen := notes.take()) != expected or got.code != SvmExit.VMMCALL or l2.offset != 1:
            wrong.append(f"{event}: {got}, {l2.offset} bytes on, {seen}")
        if l2.vmcb.injected or l2.vmcb.interrupted:
            wrong.append(f"{event}: left {l2.vmcb.injected} to inject, {l2.vmcb.interrupted} interrupted")
    assert not wrong, "\n".join(wrong)


def test_intercepts_do_not_apply(notes: Notes) -> None:
    """An injected exception is delivered, though L1 intercepts its vector.

    AMD APM volume 2, 15.20: "injected events are not subject to intercept checks".
    """
    l2, wrong = notes.l2, []
    for event in EVENTS[: len(EXCEPTIONS)]:
        l2.reset()
        l2.load(NOP)
        l2.intercept(SvmExit.EXCP_BASE + event.vector)
        l2.vmcb.inject(event)
        got = l2.resume()
        if got.code != SvmExit.VMMCALL or list(notes.take()) != [event.vector]:
            wrong.append(f"{event}: {got}")
    assert not wrong, "\n".join(wrong)


# A contributory exception that meets a page fault of its delivery is followed by it; a page fault is not.
INTERRUPTED = [
    Event(EventType.INTR, 0x31),
    Event(EventType.SOFT, 0x80),
    Event(EventType.EXCEPTION, Vector.UD),
    Event(EventType.EXCEPTION, Vector.DE),
    Event(EventType.EXCEPTION, Vector.GP, 0x50),
    Event(EventType.EXCEPTION, Vector.PF, 0x2),
]


@pytest.mark.parametrize("event", INTERRUPTED, ids=str)
def test_interrupted(notes: Notes, event: Event) -> None:
    """A fault of the delivery that exits tells of the event in EXITINTINFO, and L1 can inject it again.

    AMD APM volume 2, 15.7.2 Intercepts During IDT Interrupt Delivery.
    """
    l2 = notes.l2
    stack = l2.vm.alloc(PAGE_SIZE)
    l2.reset()
    l2.load(NOP)
    own = l2.vmcb["rsp"]
    l2.vmcb["rsp"] = int(stack) + PAGE_SIZE - 64
    l2.vmcb.inject(event)
    raw = l2.pa(stack)
    if l2.npt is not None:
        l2.npt.unmap(type(stack)(raw), PAGE_SIZE)
        code, address = int(SvmExit.NPF), raw
    else:
        l2.vm.pages.unmap(stack, PAGE_SIZE)
        l2.intercept(SvmExit.EXCP_BASE + Vector.PF)
        code, address = SvmExit.EXCP_BASE + Vector.PF, int(stack)
    got = l2.resume()
    assert got.code == code, str(got)
    assert got.info2 & ~0xFFF == address
    assert got.info1 & PfErr.W
    assert l2.vmcb.interrupted == event
    assert (l2.vmcb.injected, l2.offset, notes.take()) == (None, 0, {})
    l2.vmcb["rsp"] = own
    l2.vmcb.inject(event)
    assert l2.resume().code == SvmExit.VMMCALL
    seen = notes.take()
    assert {vector: note.times for vector, note in seen.items()} == {event.vector: 1}
    assert seen[event.vector].error_code == (event.error_code or 0)
    assert l2.vmcb.interrupted is None


def test_exception_during_delivery(notes: Notes) -> None:
    """An exception's own intercept during a delivery tells of the event, too: #NP of a gate that is absent.

    AMD APM volume 2, 15.7.2; the error code names the gate: vector * 8, IDT, external event.
    """
    l2, wrong = notes.l2, []
    idt = l2.vmcb["idtr.base"]
    gate = type(l2.code)(idt + 16 * 0x91)
    present = l2.vm.read(gate, 16)
    for event, external in ((Event(EventType.INTR, 0x91), 1), (Event(EventType.SOFT, 0x91), 0)):
        l2.reset()
        l2.load(NOP)
        l2.intercept(SvmExit.EXCP_BASE + Vector.NP)
        l2.vmcb.inject(event)
        l2.vm.write(gate, present[:5] + bytes([present[5] & 0x7F]) + present[6:])
        got = l2.resume()
        l2.vm.write(gate, present)
        if got.code != SvmExit.EXCP_BASE + Vector.NP or got.info1 != 0x91 * 8 | 2 | external:
            wrong.append(f"{event}: {got} ({got.info1:#x})")
        if l2.vmcb.interrupted != event:
            wrong.append(f"{event}: EXITINTINFO {l2.vmcb.interrupted}")
    assert not wrong, "\n".join(wrong)


def test_triple_fault_of_a_delivery(notes: Notes) -> None:
    """An event that L2 cannot take, nor the faults that follow, is a shutdown.

    AMD APM volume 2, 15.14.3 Shutdown Intercept.
    """
    l2 = notes.l2
    for event in INTERRUPTED:
        l2.reset()
        l2.load(NOP)
        l2.vmcb["idtr.limit"] = 0
        l2.vmcb.inject(event)
        got = l2.resume()
        assert got.code == SvmExit.SHUTDOWN, f"{event}: {got}"
    assert notes.take() == {}
    l2.reset()
    assert l2.run(NOP).code == SvmExit.VMMCALL


@pytest.mark.parametrize(
    "event",
    [Event(EventType.INTR, 0x31), Event(EventType.EXCEPTION, Vector.UD), Event(EventType.NMI, 2)],
    ids=str,
)
def test_device_in_the_handler(notes: Notes, event: Event) -> None:
    """A handler of an injected event may read a device: the delivery is over by then.

    AMD APM volume 2, 15.7.2: EXITINTINFO says so by its valid bit.
    """
    l2, where, hole = notes.l2, Gva(0x7600_0000_0000), Gpa(0x1_2345_6000)
    l2.vm.map(where, hole, PAGE_SIZE, page_size=PAGE_SIZE, private=False)
    if l2.npt is not None:
        shared = None if l2.vm.encryption is None else False
        l2.npt.map(Gva(int(hole)), hole, PAGE_SIZE, user=True, private=shared)
    l2.vm.symbol("device").u64 = int(where)
    # The first times there are other exits between delivery and device, for tables that KVM has not seen yet.
    for _ in range(3):
        l2.load(NOP)
        l2.vmcb.inject(event)
        l2.begin()
        got = l2.vcpu.expect(MmioExit)
        assert (got.phys_addr, got.size, got.is_write) == (hole, 8, False)
        got.respond(0x5566)
        assert l2.end().code == SvmExit.VMMCALL
        assert notes.take()[event.vector].error_code == 0x5566
