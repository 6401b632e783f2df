# SPDX-License-Identifier: Apache-2.0
"""Xen's runstate: what time a vCPU spends in which state, set and told, and its area in guest memory."""

from __future__ import annotations

import errno
import struct
from dataclasses import astuple, dataclass, replace

import pytest

from kvmpy import (
    KVM_XEN_ATTR_TYPE_LONG_MODE,
    KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG,
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST,
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT,
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA,
    PAGE_SIZE,
    Gva,
    kvm_clock_data,
    kvm_xen_vcpu_attr,
    refused,
)
from kvmpy.x86.xen import XEN_RUNSTATE_UPDATE, XenRunState

from .conftest import INVALID, MakeXen, XenGuest, get, put

pytestmark = [pytest.mark.requires("KVM_CAP_XEN_HVM"), pytest.mark.protections("none", "cbit")]

SECOND = 1_000_000_000
RUNNING, RUNNABLE, BLOCKED, OFFLINE = XenRunState
CURRENT, DATA = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA
ADJUST, ADDRESS = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR


@dataclass(frozen=True)
class RunState:
    """A state, when it was entered, and the time in each state so far, in ns."""

    state: int
    entry: int
    running: int = 0
    runnable: int = 0
    blocked: int = 0
    offline: int = 0

    @property
    def total(self) -> int:
        """The time in all states."""
        return self.running + self.runnable + self.blocked + self.offline


def write(xen: XenGuest, kind: int, value: RunState) -> None:
    """Set, or adjust, the runstate."""
    attr = kvm_xen_vcpu_attr(type=kind)
    state = attr.u.runstate
    state.state, state.state_entry_time = value.state, value.entry
    state.time_running, state.time_runnable = value.running, value.runnable
    state.time_blocked, state.time_offline = value.blocked, value.offline
    xen.vcpu.xen.set_attr(attr)


def read(xen: XenGuest) -> RunState:
    """Return the runstate."""
    state = xen.vcpu.xen.get_attr(DATA).u.runstate
    times = (state.time_running, state.time_runnable, state.time_blocked, state.time_offline)
    return RunState(state.state, state.state_entry_time, *times)


def in_memory(xen: XenGuest, where: Gva, *, long_mode: bool = True) -> RunState:
    """Return what stands in the guest's area."""
    form = "<I4x5Q" if long_mode else "<I5Q"
    return RunState(*struct.unpack(form, xen.vm.read(where, struct.calcsize(form))))


@pytest.fixture
def xen(make_xen: MakeXen) -> XenGuest:
    """A guest whose clock stands at 1000 s, so that there is a past to set."""
    guest = make_xen()
    guest.vm.clock.set(kvm_clock_data(clock=1000 * SECOND))
    return guest


GIVEN = RunState(BLOCKED, 100 * SECOND, 50 * SECOND, 30 * SECOND, 15 * SECOND, 5 * SECOND)


def test_data(xen: XenGuest) -> None:
    """The data is read as it was set, and in each of the four states.

    Documentation/virt/kvm/api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA.
    """
    for state in XenRunState:
        value = replace(GIVEN, state=state)
        write(xen, DATA, value)
        assert read(xen) == value
        assert xen.vcpu.xen.get_attr(CURRENT).u.runstate.state == state


def test_refused(xen: XenGuest) -> None:
    """Times that do not add up, or lie ahead, and a state that there is not: EINVAL, and nothing changes.

    api.rst, 4.128: state_entry_time is the sum of the times, and not after the guest's time.
    """
    write(xen, DATA, GIVEN)
    bad = {
        "a ns too little": replace(GIVEN, running=GIVEN.running - 1),
        "a ns too much": replace(GIVEN, offline=GIVEN.offline + 1),
        "the future": RunState(RUNNING, 2000 * SECOND, running=2000 * SECOND),
        "no such state": replace(GIVEN, state=4),
    }
    for name, value in bad.items():
        with refused(errno.EINVAL, about=name):
            write(xen, DATA, value)
        assert read(xen) == GIVEN
    with refused(errno.EINVAL):
        write(xen, CURRENT, RunState(4, 0))
    adjustments = {
        "does not add up": RunState(INVALID, 10, running=9),
        "the future": RunState(INVALID, 1000 * SECOND, running=1000 * SECOND),
        "no such state": RunState(4, 0),
    }
    for name, value in adjustments.items():
        with refused(errno.EINVAL, about=f"adjustment: {name}"):
            write(xen, ADJUST, value)
        assert read(xen) == GIVEN


def test_adjust(xen: XenGuest) -> None:
    """An adjustment is added to each time and to the time of entry; the state stays where it is not given.

    api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST.
    """
    write(xen, DATA, GIVEN)
    write(xen, ADJUST, RunState(INVALID, 10 * SECOND, 4 * SECOND, 3 * SECOND, 2 * SECOND, 1 * SECOND))
    expected = RunState(BLOCKED, 110 * SECOND, 54 * SECOND, 33 * SECOND, 17 * SECOND, 6 * SECOND)
    assert read(xen) == expected
    # Times may go down as well, by two's complement.
    down = tuple((1 << 64) - n * SECOND for n in (10, 4, 3, 2, 1))
    write(xen, ADJUST, RunState(INVALID, *down))
    assert read(xen) == GIVEN


def test_current(xen: XenGuest) -> None:
    """A change of state charges the time since the last one to the state that ends.

    api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT.
    """
    names = {RUNNABLE: "runnable", BLOCKED: "blocked", OFFLINE: "offline"}
    for state, name in names.items():
        before = replace(GIVEN, state=state)
        write(xen, DATA, before)
        write(xen, CURRENT, RunState(RUNNABLE, 0))
        after = read(xen)
        assert after.state == RUNNABLE
        assert after.entry >= 1000 * SECOND
        charged = getattr(before, name) + after.entry - before.entry
        assert after == replace(before, state=RUNNABLE, entry=after.entry, **{name: charged})


def test_adds_up(xen: XenGuest) -> None:
    """However a vCPU spends its time, the times add up to that of its entry, and none goes down.

    Xen, public/vcpu.h: vcpu_runstate_info.
    """
    area = xen.vm.alloc(PAGE_SIZE, private=False)
    put(xen.vcpu, ADDRESS, xen.gpa(area))
    write(xen, DATA, replace(GIVEN, state=RUNNING))
    last = read(xen)
    for _ in range(5):
        xen.do("xen_spin", int(xen.infos) + 32, 1_000_000)
        xen.do("xen_poll", 5, 0, 1, 20_000_000)
        state = read(xen)
        assert state.total == state.entry
        assert all(new >= old for new, old in zip(astuple(state)[1:], astuple(last)[1:], strict=True))
        assert state.running > last.running
        assert in_memory(xen, area) == state
        last = state


@pytest.mark.parametrize("long_mode", [True, False], ids=["64-bit", "32-bit"])
def test_area_anywhere(xen: XenGuest, long_mode: bool) -> None:
    """The area may lie anywhere, also across two pages: KVM writes it whole, and not a byte beside it.

    api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR.
    """
    put(xen.vm, KVM_XEN_ATTR_TYPE_LONG_MODE, int(long_mode))
    pages = xen.vm.alloc(2 * PAGE_SIZE, private=False)
    size = 48 if long_mode else 44
    wrong = {}
    for before in (*range(size + 2), PAGE_SIZE):
        where = pages + PAGE_SIZE - before
        xen.vm.write(pages, b"\xa5" * 2 * PAGE_SIZE)
        write(xen, DATA, GIVEN)
        put(xen.vcpu, ADDRESS, xen.gpa(pages) + PAGE_SIZE - before)
        content = bytearray(xen.vm.read(pages, 2 * PAGE_SIZE))
        at = PAGE_SIZE - before
        form = "<I4x5Q" if long_mode else "<I5Q"
        area = bytearray(content[at : at + size])
        # What is between the state and the time of entry is padding.
        if long_mode:
            area[4:8] = bytes(4)
        content[at : at + size] = b"\xa5" * size
        expected = struct.pack(form, *astuple(GIVEN))
        if bytes(area) != expected or content != b"\xa5" * 2 * PAGE_SIZE:
            wrong[before] = bytes(area).hex()
        assert get(xen.vcpu, ADDRESS) == xen.gpa(where)
        put(xen.vcpu, ADDRESS, INVALID)
        with refused(errno.ENOENT):
            get(xen.vcpu, ADDRESS)
    assert not wrong


@pytest.mark.parametrize("flag", [0, 1], ids=["without", "with"])
@pytest.mark.parametrize("before", [PAGE_SIZE, 12, 16], ids=["in a page", "across", "at the word's end"])
def test_update_flag(xen: XenGuest, flag: int, before: int) -> None:
    """After an update the top bit of the time of entry is clear, whatever stood there.

    api.rst, 4.126 KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG: it is set only while KVM writes.
    """
    put(xen.vm, KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG, flag)
    pages = xen.vm.alloc(2 * PAGE_SIZE, private=False)
    where = pages + PAGE_SIZE - before
    xen.vm.write(where + 8, XEN_RUNSTATE_UPDATE.to_bytes(8, "little"))
    write(xen, DATA, GIVEN)
    put(xen.vcpu, ADDRESS, xen.gpa(pages) + PAGE_SIZE - before)
    assert in_memory(xen, where) == GIVEN
    xen.do("xen_spin", int(xen.infos) + 32, 1_000_000)
    state = in_memory(xen, where)
    assert state == read(xen)
    assert not state.entry & XEN_RUNSTATE_UPDATE
