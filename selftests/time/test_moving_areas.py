# SPDX-License-Identifier: Apache-2.0
"""Areas of guest memory that KVM writes for the guest, when the guest gives them another place."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Gva, MakeVm

pytestmark = pytest.mark.protections("none")

SYSTEM_TIME, STEAL_TIME = 0x4B56_4D01, 0x4B56_4D03
ENABLED = 1
# Where the area's version is, an even number that grows with every update.
AREAS = [
    pytest.param(STEAL_TIME, 8, id="steal-time", marks=pytest.mark.requires("KVM_CAP_STEAL_TIME")),
    pytest.param(SYSTEM_TIME, 0, id="kvmclock"),
]


def version(agent: Agent, page: Gva, offset: int) -> int:
    """Return the version as the guest reads it."""
    value = agent.read(page + offset, 4)
    assert isinstance(value, int)
    return value


@pytest.mark.parametrize(("msr", "offset"), AREAS)
@pytest.mark.parametrize("distance", [64, PAGE_SIZE])
def test_another_place(make_vm: MakeVm, msr: int, offset: int, distance: int) -> None:
    """KVM writes to the area's new place, and nothing more to the old one.

    Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME and MSR_KVM_SYSTEM_TIME_NEW (the address).
    """
    vm = make_vm(AGENT)
    first = vm.alloc(2 * PAGE_SIZE)
    agent = Agent(vm.vcpus[0])
    places = [first, first + distance, first]
    for number, place in enumerate(places):
        before = version(agent, place, offset)
        other = first if place != first else first + distance
        assert agent.wrmsr(msr, int(vm.gva_to_gpa(place)) | ENABLED) is None
        left = version(agent, other, offset)
        agent.flush_tlb()
        assert version(agent, place, offset) > before, f"move {number}: KVM does not write to the new place"
        assert version(agent, other, offset) == left, f"move {number}: KVM goes on to write to the old place"
