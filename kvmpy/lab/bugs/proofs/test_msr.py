# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of model-specific registers."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, Agent, Vcpu, ioctls, kvm_msr_entry, kvm_msrs

pytestmark = pytest.mark.protections("none")

ASYNC_PF_EN, STEAL_TIME = 0x4B56_4D02, 0x4B56_4D03
HWCR, TW_CFG, MC0_CTL = 0xC001_0015, 0xC001_1023, 0x400
MCG_CTL_P, MCST_WR_EN = 1 << 8, 1 << 18
NO_MEMORY, BY_INTERRUPT = 1 << 45, 1 << 3
VERSION = 8
VM_HSAVE_PA = 0xC001_0117


def taken(vcpu: Vcpu, index: int, value: int) -> bool:
    return vcpu.ioctl(ioctls.KVM_SET_MSRS, kvm_msrs.of([kvm_msr_entry(index=index, data=value)])) == 1


@pytest.mark.bug(40)
def test_machine_check_bank(agent: Agent) -> None:
    agent.vcpu.events.setup_mce(MCG_CTL_P | 4)
    fault = agent.wrmsr(MC0_CTL, 2)
    assert fault is not None
    assert fault.vector == 13


@pytest.mark.bug(42)
def test_refused_async_pf(agent: Agent) -> None:
    agent.start()
    assert not taken(agent.vcpu, ASYNC_PF_EN, NO_MEMORY | BY_INTERRUPT | 1)
    assert agent.vcpu.msrs.get(ASYNC_PF_EN) == 0


@pytest.mark.bug(43)
def test_steal_time_moves(agent: Agent) -> None:
    pages = [agent.vm.alloc(PAGE_SIZE) for _ in range(2)]
    for page in pages:
        assert agent.wrmsr(STEAL_TIME, int(agent.vm.gva_to_gpa(page)) | 1) is None
        version = agent.read(page + VERSION, 4)
        assert isinstance(version, int)
        assert version > 0


@pytest.mark.bug(44)
def test_tw_cfg(agent: Agent) -> None:
    assert agent.rdmsr(TW_CFG) == 0
    assert agent.wrmsr(TW_CFG, 0) is None


@pytest.mark.bug(45)
def test_hwcr(agent: Agent) -> None:
    assert agent.wrmsr(HWCR, MCST_WR_EN) is None
    assert agent.wrmsr(HWCR, 0) is None
    assert agent.rdmsr(HWCR) == 0


@pytest.mark.bug(46)
def test_host_save_area(agent: Agent) -> None:
    assert agent.wrmsr(VM_HSAVE_PA, 0x1008) is not None
