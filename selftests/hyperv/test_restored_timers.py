# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's synthetic timers as user space sets them: it says what is there, and starts nothing by itself."""

from __future__ import annotations

import itertools

import pytest

from kvmpy import Agent, Msr
from kvmpy.x86.hyperv import HvStimer

from .conftest import MakeHyperV

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV_SYNIC2", "KVM_CAP_SYS_HYPERV_CPUID"),
    pytest.mark.protections("none", "cbit"),
]

ENABLE, PERIODIC = int(HvStimer.HV_STIMER_ENABLE), int(HvStimer.HV_STIMER_PERIODIC)
AUTO, SINT = int(HvStimer.HV_STIMER_AUTOENABLE), 3 << 16
FAR = 1 << 50
CONFIG, COUNT = Msr.HV_X64_MSR_STIMER0_CONFIG, Msr.HV_X64_MSR_STIMER0_COUNT
CONFIGURATIONS = [SINT | flags for flags in (0, AUTO, PERIODIC, AUTO | PERIODIC, ENABLE, ENABLE | AUTO)]


@pytest.mark.parametrize("timer", range(4))
@pytest.mark.parametrize("config_first", [True, False], ids=["config-first", "count-first"])
def test_as_it_was_saved(make_hyperv: MakeHyperV, timer: int, config_first: bool) -> None:
    """Both registers of a timer are afterwards what user space wrote, in either order, and the guest sees it.

    TLFS, synthetic timers: AutoEnable is for the guest's write of a count; Documentation/virt/kvm/api.rst,
    4.19 KVM_SET_MSRS.
    """
    vm = make_hyperv(synic=True)
    agent = Agent(vm.vcpus[0])
    agent.start()
    msrs = vm.vcpus[0].msrs
    config, count = CONFIG + 2 * timer, COUNT + 2 * timer
    wrong = []
    for before, value in itertools.product((0, *CONFIGURATIONS[:2]), CONFIGURATIONS):
        msrs.set(config, before)
        msrs.set(count, 0)
        words = [(config, value), (count, FAR)]
        for msr, word in words if config_first else reversed(words):
            msrs.set(msr, word)
        got = (msrs.get(config), msrs.get(count))
        seen = (agent.rdmsr(config), agent.rdmsr(count))
        if not got == seen == (value, FAR):
            wrong.append(f"config {value:#x} over {before:#x}: user space reads {got}, the guest {seen}")
    assert not wrong, "\n".join(wrong)
