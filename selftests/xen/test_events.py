# SPDX-License-Identifier: Apache-2.0
"""Xen's 2-level event channels: every way to send one, masks, pending bits, and the upcall."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmpy import (
    KVM_XEN_ATTR_TYPE_EVTCHN,
    KVM_XEN_ATTR_TYPE_SHARED_INFO,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
    PAGE_SIZE,
    EventFd,
    XenEvtchnRoute,
    XenHypercallExit,
    kvm_xen_hvm_attr,
    refused,
)
from kvmpy.x86.xen import XenCall, XenEvtchnType, XenLayout
from selftests.conftest import Beside, turns

from .conftest import INVALID, MakeXen, XenGuest, put

pytestmark = [pytest.mark.requires("KVM_CAP_XEN_HVM"), pytest.mark.protections("none", "cbit")]

IPI, INTERDOMAIN = int(XenEvtchnType.XEN_EVTCHNSTAT_IPI), int(XenEvtchnType.XEN_EVTCHNSTAT_INTERDOMAIN)
PENDING, MASK = int(XenLayout.XEN_SHINFO_EVTCHN_PENDING), int(XenLayout.XEN_SHINFO_EVTCHN_MASK)
PORTS = (1, 2, 63, 64, 1023, 1024, 4095)
GSI = 32


def outbound(xen: XenGuest, send: int, kind: int, *, port: int = 0, vcpu: int = 0, fd: int = -1) -> None:
    """Let the guest's sends to a port be an event of the guest, or an eventfd."""
    attr = kvm_xen_hvm_attr(type=KVM_XEN_ATTR_TYPE_EVTCHN)
    event = attr.u.evtchn
    event.send_port, event.type = send, kind
    if fd >= 0:
        event.deliver.eventfd.fd = fd
    else:
        event.deliver.port.port, event.deliver.port.vcpu = port, vcpu
        event.deliver.port.priority = 0xFFFF_FFFF
    xen.vm.xen.set_attr(attr)


def by_ioctl(xen: XenGuest, port: int) -> None:
    xen.vm.xen.evtchn_send(port, 0)


def by_line(xen: XenGuest, port: int) -> None:
    xen.vm.irq.set_gsi_routing([XenEvtchnRoute(GSI, port, 0)])
    assert xen.vm.irq.line_status(GSI, 1) == 1


def by_ipi(xen: XenGuest, port: int) -> None:
    outbound(xen, port, IPI, port=port)
    assert xen.do("xen_send", port) == 0


def by_another_port(xen: XenGuest, port: int) -> None:
    outbound(xen, port ^ 1 or 2, INTERDOMAIN, port=port)
    assert xen.do("xen_send", port ^ 1 or 2) == 0


WAYS: dict[str, Callable[[XenGuest, int], None]] = {
    "ioctl": by_ioctl, "line": by_line, "ipi": by_ipi, "interdomain": by_another_port,
}  # fmt: skip


@pytest.mark.parametrize("by_apic", [True, False], ids=["vcpu-vector", "vm-vector"])
@pytest.mark.parametrize("way", WAYS)
def test_delivered(make_xen: MakeXen, way: str, by_apic: bool) -> None:
    """An event is one upcall, on the vector of vCPU or VM, and the guest finds its port, and no other.

    Documentation/virt/kvm/api.rst, 4.126 KVM_XEN_ATTR_TYPE_EVTCHN, 4.135 KVM_XEN_HVM_EVTCHN_SEND, 4.52
    kvm_irq_routing_xen_evtchn; the vectors: KVM_XEN_ATTR_TYPE_UPCALL_VECTOR of both.
    """
    xen = make_xen(by_apic=by_apic)
    expected = {}
    for count, port in enumerate(PORTS, 1):
        WAYS[way](xen, port)
        assert xen.do("xen_upcalls") == count
        expected[port] = 1
        assert xen.events() == expected
    assert (xen.bits(PENDING), xen.bits(MASK)) == (set(), set())


@pytest.mark.requires("KVM_CAP_IRQFD")
def test_by_irqfd(make_xen: MakeXen) -> None:
    """An irqfd whose GSI is an event channel wakes the halted guest with that event.

    api.rst, 4.52 KVM_IRQ_ROUTING_XEN_EVTCHN.
    """
    xen = make_xen()
    xen.vm.irq.set_gsi_routing([XenEvtchnRoute(GSI + n, port, 0) for n, port in enumerate(PORTS)])
    for n, port in enumerate(PORTS):
        with EventFd() as fd:
            xen.vm.irq.irqfd(fd, GSI + n)
            fd.signal()
            assert xen.do("xen_await", n + 1) == n + 1
            assert xen.events().get(port) == 1
            xen.vm.irq.irqfd(fd, GSI + n, deassign=True)


@pytest.mark.parametrize("long_mode", [True, False], ids=["64-bit", "32-bit"])
def test_bits(make_xen: MakeXen, long_mode: bool) -> None:
    """An event sets its pending bit, its word's bit in the vcpu_info and the upcall flag, and nothing else.

    Xen, public/xen.h: shared_info and vcpu_info of both layouts.
    """
    xen = make_xen(long_mode=long_mode)
    vm = xen.vm
    per_word = 64 if long_mode else 32
    selector = XenLayout.XEN_VCPU_PENDING_SEL if long_mode else XenLayout.XEN_COMPAT_VCPU_PENDING_SEL
    wrong = {}
    for port in PORTS if long_mode else (1, 31, 32, 1023):
        vm.write(xen.shared, bytes(PAGE_SIZE))
        # Of a vcpu_info, what is not time.
        vm.write(xen.infos, bytes(32))
        vm.xen.evtchn_send(port, 0)
        shared = bytearray(PAGE_SIZE)
        shared[2048 + port // 8] = 1 << port % 8
        info = bytearray(32)
        info[XenLayout.XEN_VCPU_UPCALL_PENDING] = 1
        info[selector + port // per_word // 8] = 1 << port // per_word % 8
        if vm.read(xen.shared, PAGE_SIZE) != bytes(shared) or vm.read(xen.infos, 32) != bytes(info):
            wrong[port] = vm.read(xen.infos, 32)
    assert not wrong


@pytest.mark.parametrize("long_mode", [True, False], ids=["64-bit", "32-bit"])
def test_masked(make_xen: MakeXen, long_mode: bool) -> None:
    """A masked event becomes pending without an upcall, and its neighbours are not masked.

    Xen, public/event_channel.h.
    """
    xen = make_xen(long_mode=long_mode)
    vm = xen.vm
    mask = MASK if long_mode else int(XenLayout.XEN_COMPAT_EVTCHN_MASK)
    bits = (1 << 33 | 1 << 70).to_bytes(16, "little")
    vm.write(xen.shared + mask, bits)
    for port in (33, 70):
        vm.xen.evtchn_send(port, 0)
        vm.irq.set_gsi_routing([XenEvtchnRoute(GSI, port + 200, 0), XenEvtchnRoute(GSI + 1, port, 0)])
    assert xen.bits(PENDING, 128) == {33, 70}
    assert vm.read(xen.infos, 32) == bytes(32)
    assert vm.read(xen.shared + mask, 16) == bits
    # It is pending already: merged, as the line tells.
    assert vm.irq.line_status(GSI + 1, 1) == 0
    vm.xen.evtchn_send(34, 0)
    assert vm.read(xen.infos, 1) == b"\x01"
    assert xen.bits(PENDING, 128) == {33, 34, 70}


def test_second_is_merged(make_xen: MakeXen) -> None:
    """While a word's bit is set, further events of that word bring no further upcall; none is lost.

    Xen, public/event_channel.h.
    """
    xen = make_xen()
    for port in (65, 66, 65, 127):
        xen.vm.xen.evtchn_send(port, 0)
    assert xen.do("xen_upcalls") == 1
    assert xen.events() == {65: 1, 66: 1, 127: 1}


def test_other_vcpus(make_xen: MakeXen) -> None:
    """An event for a vCPU is in that one's vcpu_info, by every way that names a vCPU.

    api.rst, 4.135: the vCPU's id.
    """
    xen = make_xen(vcpus=3)
    vm = xen.vm
    vm.irq.set_gsi_routing([XenEvtchnRoute(GSI + n, 10 + n, n) for n in range(3)])

    def pending() -> list[int]:
        return [vm.read(xen.infos + 64 * n, 1)[0] for n in range(3)]

    vm.xen.evtchn_send(5, 2)
    assert pending() == [0, 0, 1]
    vm.irq.line_status(GSI + 1, 1)
    assert pending() == [0, 1, 1]
    outbound(xen, 7, INTERDOMAIN, port=70, vcpu=0)
    assert xen.do("xen_send", 7) == 0
    assert xen.do("xen_upcalls") == 1
    assert xen.events() == {70: 1}
    assert pending() == [0, 1, 1]


def test_eventfd(make_xen: MakeXen) -> None:
    """A port that leads to an eventfd signals that; an unknown one is user space's hypercall.

    api.rst, 4.126 KVM_XEN_ATTR_TYPE_EVTCHN: deliver.eventfd.
    """
    xen = make_xen()
    with EventFd() as first, EventFd() as second:
        outbound(xen, 8, INTERDOMAIN, fd=first.fd)
        outbound(xen, 9, INTERDOMAIN, fd=second.fd)
        assert [xen.do("xen_send", port) for port in (8, 9, 9)] == [0, 0, 0]
        assert (first.read(), second.read()) == (1, 2)
        xen.agent.begin_call("xen_send", 10)
        exit_ = xen.vcpu.expect(XenHypercallExit)
        assert (exit_.input, exit_.params[0]) == (
            XenCall.XEN_HYPERCALL_EVENT_CHANNEL_OP,
            XenCall.XEN_EVTCHNOP_SEND,
        )
        exit_.respond(-2)
        assert xen.agent.value() == (1 << 64) - 2
        assert (first.read(), second.read()) == (0, 0)
    assert xen.bits(PENDING) == set()


@pytest.mark.parametrize("way", WAYS)
def test_the_apic_is_enabled_later(make_xen: MakeXen, way: str) -> None:
    """An event that came while the local APIC was disabled by software is one upcall once it is enabled.

    api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR: the vector is sent to the local APIC, which takes
    none while it is disabled (AMD APM volume 2, 16.3.2); the event is level-triggered by its pending flag.
    """
    xen = make_xen()
    for count, port in enumerate(PORTS, 1):
        xen.do("xen_apic", 0)
        WAYS[way](xen, port)
        assert xen.do("xen_upcalls") == count - 1, "an upcall by an APIC that is disabled"
        xen.do("xen_apic", 1)
        assert xen.do("xen_upcalls") == count, "no upcall after the APIC was enabled"
        assert xen.events().get(port) == 1


def test_vcpu_info_comes_later(make_xen: MakeXen) -> None:
    """An event for a vCPU without a vcpu_info is there, with its upcall, once that has one.

    api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO.
    """
    xen = make_xen()
    put(xen.vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INVALID)
    xen.vm.xen.evtchn_send(99, 0)
    assert xen.do("xen_upcalls") == 0
    assert xen.bits(PENDING) == {99}
    put(xen.vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, xen.gpa(xen.infos))
    assert xen.do("xen_await", 1) == 1
    assert xen.events() == {99: 1}


def test_shared_info_is_gone(make_xen: MakeXen) -> None:
    """Without a shared info page there are no events, and back again they go on.

    api.rst, 4.126 KVM_XEN_ATTR_TYPE_SHARED_INFO: KVM_XEN_INVALID_GFN takes it away.
    """
    xen = make_xen()
    gfn = xen.gpa(xen.shared) // PAGE_SIZE
    put(xen.vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, INVALID)
    with refused(22, 14):
        xen.vm.xen.evtchn_send(5, 0)
    put(xen.vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, gfn)
    xen.vm.xen.evtchn_send(6, 0)
    assert xen.do("xen_upcalls") == 1
    assert xen.events() == {6: 1}


def test_page_moves_under_load(make_xen: MakeXen, load_seconds: float) -> None:
    """While the shared info page moves to and fro, every event is pending in one of its two places.

    api.rst, 4.126 KVM_XEN_ATTR_TYPE_SHARED_INFO: it may be set again at any time.
    """
    xen = make_xen()
    vm = xen.vm
    second = vm.alloc(PAGE_SIZE, private=False)
    gfns = [xen.gpa(page) // PAGE_SIZE for page in (xen.shared, second)]
    sent: set[int] = set()
    outbound(xen, 4000, INTERDOMAIN, port=4001)
    with Beside(lambda count: put(vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, gfns[count % 2])) as mover:
        for turn in turns(load_seconds):
            port = 1 + turn % 3900
            vm.xen.evtchn_send(port, 0)
            sent.add(port)
            assert xen.do("xen_send", 4000) == 0
    assert mover.count > 0

    def pending(page: object) -> set[int]:
        value = int.from_bytes(vm.read(page, 512), "little")  # type: ignore[arg-type]
        return {bit for bit in range(4096) if value >> bit & 1}

    there = pending(xen.shared + PENDING) | pending(second + PENDING)
    assert there == sent | {4001}
