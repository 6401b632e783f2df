# SPDX-License-Identifier: Apache-2.0
"""KVM_SET_PMU_EVENT_FILTER: what it takes and what it refuses."""

from __future__ import annotations

import errno

import pytest

from kvmpy import KvmError, Vm, ioctls, kvm_pmu_event_filter, refused
from kvmpy.uapi.constants import (
    KVM_PMU_EVENT_ALLOW,
    KVM_PMU_EVENT_DENY,
    KVM_PMU_EVENT_FLAG_MASKED_EVENTS,
)

pytestmark = pytest.mark.requires("KVM_CAP_PMU_EVENT_FILTER")

MAX_EVENTS = 300
MASKED = int(KVM_PMU_EVENT_FLAG_MASKED_EVENTS)
can_mask = pytest.mark.requires("KVM_CAP_PMU_EVENT_MASKED_EVENTS")


def set_filter(vm: Vm, events: list[int], *, action: int = int(KVM_PMU_EVENT_ALLOW), flags: int = 0) -> None:
    """Set a filter with these events."""
    arg = kvm_pmu_event_filter.with_entries(len(events))
    arg.action, arg.flags = action, flags
    for index, event in enumerate(events):
        arg.events[index] = event
    vm.ioctl(ioctls.KVM_SET_PMU_EVENT_FILTER, arg)


@pytest.mark.parametrize("action", [KVM_PMU_EVENT_ALLOW, KVM_PMU_EVENT_DENY], ids=["allow", "deny"])
def test_taken(vm: Vm, action: int) -> None:
    """A filter has up to 300 events, none at all included, and the next one takes its place.

    Documentation/virt/kvm/api.rst, 4.120 KVM_SET_PMU_EVENT_FILTER.
    """
    for count in (0, 1, MAX_EVENTS, 0):
        set_filter(vm, list(range(count)), action=int(action))


def test_too_many(vm: Vm) -> None:
    """301 events are refused with E2BIG.

    Documentation/virt/kvm/api.rst, 4.120 ("-E2BIG: nevents is too large").
    """
    with refused(errno.E2BIG):
        set_filter(vm, list(range(MAX_EVENTS + 1)))


@pytest.mark.parametrize("action", [2, 1 << 31])
def test_unknown_action(vm: Vm, action: int) -> None:
    """An action that is neither of the two is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.120 (valid values for 'action').
    """
    with refused(errno.EINVAL):
        set_filter(vm, [0xC0], action=action)


@pytest.mark.parametrize("flags", [2, 1 << 31, MASKED | 2])
def test_unknown_flags(vm: Vm, flags: int) -> None:
    """A flag other than KVM_PMU_EVENT_FLAG_MASKED_EVENTS is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.120 ("flags field contains unrecognized or invalid bits").
    """
    with refused(errno.EINVAL):
        set_filter(vm, [0xC0], flags=flags)


@can_mask
@pytest.mark.parametrize("bit", [*range(36, 55)])
def test_reserved_bits_of_masked_events(vm: Vm, bit: int) -> None:
    """A masked event with a reserved bit is refused with EINVAL, and the same without the flag is taken.

    The event select is bits 0 to 7, on AMD's CPUs 32 to 35 too, the unit mask's match 8 to 15, its mask 56 to
    63, exclude 55.  Documentation/virt/kvm/api.rst, 4.120 ("-EINVAL will be returned").
    """
    for index in (0, 2):
        events = [0xC0, 0xC1, 0xC2]
        events[index] |= 1 << bit
        with refused(errno.EINVAL):
            set_filter(vm, events, flags=MASKED)
        set_filter(vm, events)


@can_mask
def test_masked_events(vm: Vm) -> None:
    """Every other bit of a masked event is taken.

    Documentation/virt/kvm/api.rst, 4.120 (encodings of masked events).
    """
    refusals = []
    for bit in [*range(16), *range(55, 64)]:
        try:
            set_filter(vm, [1 << bit], flags=MASKED)
        except KvmError as error:
            refusals.append((bit, error.errno))
    assert refusals == []
