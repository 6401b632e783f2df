# SPDX-License-Identifier: Apache-2.0
"""Xen's time: vcpu_info and time info against kvmclock, the wall clock, one-shot timers, and SCHEDOP_poll."""

from __future__ import annotations

import struct
import time

import pytest

from kvmpy import (
    KVM_CLOCK_TSC_STABLE,
    KVM_XEN_ATTR_TYPE_LONG_MODE,
    KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE,
    KVM_XEN_VCPU_ATTR_TYPE_TIMER,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
    PAGE_SIZE,
    VcpuThread,
    XenHypercallExit,
    kvm_clock_data,
    kvm_xen_vcpu_attr,
)
from kvmpy.x86.xen import XenCall, XenLayout

from .conftest import FLAGS, MSR, MakeXen, XenGuest, put

pytestmark = [pytest.mark.requires("KVM_CAP_XEN_HVM"), pytest.mark.protections("none", "cbit")]

SECOND = 1_000_000_000
MILLISECOND = SECOND // 1000
TIMER_PORT = 77
INVALID_ARGUMENT = (1 << 64) - 22


def arm(xen: XenGuest, port: int, expires: int = 0) -> None:
    """Set the event of the vCPU's timer, and when it expires."""
    attr = kvm_xen_vcpu_attr(type=KVM_XEN_VCPU_ATTR_TYPE_TIMER)
    attr.u.timer.port, attr.u.timer.priority, attr.u.timer.expires_ns = port, 0xFFFF_FFFF, expires
    xen.vcpu.xen.set_attr(attr)


def expires(xen: XenGuest) -> int:
    """Return when the vCPU's timer expires, 0 where it does not run."""
    return int(xen.vcpu.xen.get_attr(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns)


def clock(xen: XenGuest) -> int:
    """Return the address of the clock in the vcpu_info, which is set up."""
    return int(xen.infos) + XenLayout.XEN_VCPU_TIME


def now(xen: XenGuest) -> int:
    """Return the time that the guest computes from its vcpu_info."""
    return xen.do("xen_time", clock(xen))


@pytest.mark.parametrize("place", ["vcpu_info", "time info"])
def test_system_time(make_xen: MakeXen, place: str) -> None:
    """The time that a guest computes is kvmclock's, also after KVM_SET_CLOCK; it goes on.

    Documentation/virt/kvm/api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO and VCPU_TIME_INFO.
    """
    xen = make_xen()
    where = clock(xen)
    if place == "time info":
        page = xen.vm.alloc(PAGE_SIZE, private=False)
        put(xen.vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, xen.gpa(page) + 256)
        where = int(page) + 256
    last = 0
    for value in (None, 1234 * SECOND, 5 * SECOND):
        if value is not None:
            xen.vm.clock.set(kvm_clock_data(clock=value))
            last = value
        before = xen.vm.clock.get()
        got = xen.do("xen_time", where)
        after = xen.vm.clock.get()
        stable = before.flags & after.flags & KVM_CLOCK_TSC_STABLE
        slack = 0 if stable else SECOND // 100
        assert before.clock - slack <= got <= after.clock + slack
        again = xen.do("xen_time", where)
        assert last <= got < again


def test_stable_flag(make_xen: MakeXen) -> None:
    """With KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE the guest never finds the stable flag.

    api.rst, 4.28 KVM_XEN_HVM_CONFIG.
    """
    xen = make_xen()
    xen.vm.xen.config(FLAGS | int(KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE), MSR)
    now(xen)
    flags = xen.vm.read(xen.infos + XenLayout.XEN_VCPU_TIME + 29, 1)[0]
    assert not flags & 1


@pytest.mark.parametrize("long_mode", [True, False], ids=["64-bit", "32-bit"])
def test_wall_clock(make_xen: MakeXen, long_mode: bool) -> None:
    """The wall clock and the guest's time add up to the host's; it lies where the guest's layout has it.

    Xen, public/xen.h: wc_version, wc_sec, wc_nsec, and the upper half of the seconds.
    """
    xen = make_xen(long_mode=long_mode)
    xen.agent.start()
    if long_mode:
        where, high = XenLayout.XEN_SHINFO_WALLCLOCK, XenLayout.XEN_SHINFO_WALLCLOCK + 12
    else:
        where, high = XenLayout.XEN_COMPAT_WALLCLOCK, XenLayout.XEN_COMPAT_WALLCLOCK + 0x24
    version, seconds, nanoseconds = struct.unpack("<3I", xen.vm.read(xen.shared + where, 12))
    upper = struct.unpack("<I", xen.vm.read(xen.shared + high, 4))[0]
    assert version % 2 == 0
    assert version > 0
    assert nanoseconds < SECOND
    wall = (upper << 32 | seconds) * SECOND + nanoseconds
    before = time.time_ns()
    total = wall + now(xen)
    after = time.time_ns()
    assert before - SECOND // 10 <= total <= after + SECOND // 10
    # The other layout's place comes with the other layout.
    other = XenLayout.XEN_COMPAT_WALLCLOCK if long_mode else XenLayout.XEN_SHINFO_WALLCLOCK
    assert xen.vm.read(xen.shared + other, 12) == bytes(12)
    put(xen.vm, KVM_XEN_ATTR_TYPE_LONG_MODE, int(not long_mode))
    assert struct.unpack("<I", xen.vm.read(xen.shared + other, 4))[0] % 2 == 0
    assert xen.vm.read(xen.shared + other, 12) != bytes(12)


@pytest.mark.parametrize("way", ["attribute", "set_timer_op", "set_singleshot_timer"])
@pytest.mark.parametrize("past", [False, True], ids=["future", "past"])
def test_timer(make_xen: MakeXen, way: str, past: bool) -> None:
    """A timer is one event, once its time has come: at once where that is over, and not before.

    api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_TIMER; Xen, set_timer_op and VCPUOP_set_singleshot_timer.
    """
    xen = make_xen()
    arm(xen, TIMER_PORT)
    xen.vm.clock.set(kvm_clock_data(clock=100 * SECOND))
    when = 1 * SECOND if past else now(xen) + 5 * MILLISECOND
    if way == "attribute":
        arm(xen, TIMER_PORT, when)
    elif way == "set_timer_op":
        assert xen.do("xen_set_timer", when) == 0
    else:
        assert xen.do("xen_set_singleshot", 0, when) == 0
    if past:
        assert xen.do("xen_upcalls") == 1
    else:
        assert xen.do("xen_await", 1) == 1
    after = now(xen)
    # Two clocks of one host: where the TSC is not stable they differ a little.
    slack = 0 if xen.vm.clock.get().flags & KVM_CLOCK_TSC_STABLE else 10 * MILLISECOND
    assert after >= when - slack
    assert expires(xen) == 0
    assert xen.events() == {TIMER_PORT: 1}


@pytest.mark.parametrize("way", ["set_timer_op", "stop_singleshot_timer", "attribute"])
def test_timer_stopped(make_xen: MakeXen, way: str) -> None:
    """A timer that was stopped brings no event; until then it tells when it expires.

    Xen, set_timer_op with 0 and VCPUOP_stop_singleshot_timer.
    """
    xen = make_xen()
    arm(xen, TIMER_PORT)
    when = now(xen) + 20 * MILLISECOND
    # In time to be stopped however slow the host is: far ahead at first.
    assert xen.do("xen_set_timer", when + 3600 * SECOND) == 0
    assert expires(xen) == when + 3600 * SECOND
    if way == "set_timer_op":
        assert xen.do("xen_set_timer", 0) == 0
    elif way == "attribute":
        arm(xen, TIMER_PORT)
    else:
        assert xen.do("xen_stop_singleshot", 0) == 0
    assert expires(xen) == 0
    xen.do("xen_spin", clock(xen), 2 * MILLISECOND)
    assert (xen.do("xen_upcalls"), xen.bits(XenLayout.XEN_SHINFO_EVTCHN_PENDING)) == (0, set())


def test_timer_of_another(make_xen: MakeXen) -> None:
    """A vCPU sets its own timer alone, which it names by Xen's id: EINVAL for another one.

    Xen, VCPUOP_set_singleshot_timer; api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID.
    """
    xen = make_xen()
    put(xen.vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, 42)
    arm(xen, TIMER_PORT)
    calls = [xen.do(f"xen_{name}", *args) for name, args in (
        ("set_singleshot", (0, 1)), ("stop_singleshot", (0,)), ("set_singleshot", (42, 1 << 62)),
        ("stop_singleshot", (42,)),
    )]  # fmt: skip
    assert calls == [INVALID_ARGUMENT, INVALID_ARGUMENT, 0, 0]
    assert xen.do("xen_upcalls") == 0


def test_without_a_timer(make_xen: MakeXen) -> None:
    """Without a port for it, a vCPU's timer is user space's.

    api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_TIMER: port 0 switches it off.
    """
    xen = make_xen()
    for function, arguments, number in (
        ("xen_set_timer", (5,), XenCall.XEN_HYPERCALL_SET_TIMER_OP),
        ("xen_set_singleshot", (0, 5), XenCall.XEN_HYPERCALL_VCPU_OP),
    ):
        xen.agent.begin_call(function, *arguments)
        exit_ = xen.vcpu.expect(XenHypercallExit)
        assert exit_.input == number
        exit_.respond(3)
        assert xen.agent.value() == 3


def test_timeouts_of_linux(make_xen: MakeXen) -> None:
    """A timeout that Linux' overflows make, negative or beyond 13 days, is 100 ms for set_timer_op.

    Xen's workaround for Linux in do_set_timer_op(), which KVM has; not of the other hypercall.
    """
    xen = make_xen()
    arm(xen, TIMER_PORT)
    for when in ((1 << 64) - 1, 1 << 63, (1 << 51) + now(xen)):
        before = now(xen)
        assert xen.do("xen_set_timer", when) == 0
        due = expires(xen)
        after = now(xen)
        slack = 10 * MILLISECOND
        assert before + 100 * MILLISECOND - slack <= due <= after + 100 * MILLISECOND + slack
    far = (1 << 51) + now(xen)
    assert xen.do("xen_set_singleshot", 0, far) == 0
    assert expires(xen) == far


def test_poll_pending(make_xen: MakeXen) -> None:
    """A poll for a port that is pending returns at once, masked or not, and leaves it pending.

    Xen, SCHEDOP_poll.
    """
    xen = make_xen()
    xen.vm.write(xen.shared + XenLayout.XEN_SHINFO_EVTCHN_MASK, b"\xff" * 512)
    xen.vm.xen.evtchn_send(300, 0)
    assert xen.do("xen_poll", 300, 0, 1, 0) == 0
    assert xen.do("xen_poll", 5, 300, 2, 0) == 0
    assert xen.bits(XenLayout.XEN_SHINFO_EVTCHN_PENDING) == {300}


def test_poll_refused(make_xen: MakeXen) -> None:
    """A poll of a port beyond the layout, or of more than 128, fails with EINVAL.

    Xen, SCHEDOP_poll.
    """
    xen = make_xen()
    answers = [
        xen.do("xen_poll", 4096, 0, 1, 1),
        xen.do("xen_poll", 5, 4096, 2, 1),
        xen.do("xen_poll", 5, 6, 129, 1),
    ]
    assert answers == [INVALID_ARGUMENT] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_poll_times_out(make_xen: MakeXen, count: int) -> None:
    """A poll ends at its timeout where none of its ports becomes pending.

    Xen, SCHEDOP_poll; KVM takes the timeout as a duration.
    """
    xen = make_xen()
    before = now(xen)
    assert xen.do("xen_poll", 5, 6, count, 30 * MILLISECOND) == 0
    assert now(xen) - before >= 10 * MILLISECOND
    assert xen.bits(XenLayout.XEN_SHINFO_EVTCHN_PENDING) == set()


@pytest.mark.parametrize("ports", [(5,), (6, 5)], ids=["one", "two"])
def test_poll_is_woken(make_xen: MakeXen, ports: tuple[int, ...]) -> None:
    """A poll without a timeout ends when one of its ports becomes pending, though that is masked.

    Xen, SCHEDOP_poll.
    """
    xen = make_xen()
    xen.vm.write(xen.shared + XenLayout.XEN_SHINFO_EVTCHN_MASK, b"\xff" * 512)
    xen.agent.begin_call("xen_poll", *ports, *([0] if len(ports) == 1 else []), len(ports), 0)
    with VcpuThread(xen.agent.value, vcpu=xen.vcpu) as poller:
        # Whether it comes before the poll or wakes it, the poll ends.
        xen.vm.xen.evtchn_send(5, 0)
        assert poller.join(20) == 0
    assert xen.bits(XenLayout.XEN_SHINFO_EVTCHN_PENDING) == {5}
    assert xen.do("xen_upcalls") == 0
