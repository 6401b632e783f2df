# SPDX-License-Identifier: Apache-2.0
"""Model-specific registers that systems read and write on AMD processors whatever they run on."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, Agent, MakeVm

pytestmark = [pytest.mark.protections("none", "cbit"), pytest.mark.requires("cpuid:svm")]

# Of the BIOS and kernel developer's guides: what a system does with them has no meaning in a guest.
WITHOUT_MEANING = {
    "SYSCFG": 0xC001_0010,
    "NB_CFG": 0xC001_001F,
    "INT_PENDING_MSG": 0xC001_0055,
    "MMIO_CONF_BASE": 0xC001_0058,
    "TSEG_ADDR": 0xC001_0112,
    "TSEG_MASK": 0xC001_0113,
    "DC_CFG": 0xC001_1022,
    "TW_CFG": 0xC001_1023,
    "BU_CFG2": 0xC001_102A,
}
# What guests write to them: back what they have read.
WRITABLE = ("NB_CFG", "DC_CFG", "TW_CFG", "BU_CFG2")


def test_read_as_zero(make_vm: MakeVm) -> None:
    """Each is 0 for a guest, and none of them a #GP, by which a system would die that knows its processor.

    arch/x86/kvm/x86.c, kvm_get_msr_common(); "Processor Programming Reference" of each family.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    got = {name: agent.rdmsr(msr) for name, msr in WITHOUT_MEANING.items()}
    assert got == dict.fromkeys(WITHOUT_MEANING, 0)


def test_written_back(make_vm: MakeVm) -> None:
    """A guest writes back what it has read, with bits of workarounds set, and is let alone."""
    agent = Agent(make_vm(AGENT).vcpus[0])
    faults = {
        (name, hex(value)): fault
        for name in WRITABLE
        for value in (0, 1 << 3, 1 << 46)
        if (fault := agent.wrmsr(WITHOUT_MEANING[name], value)) is not None
    }
    assert not faults
    assert {name: agent.rdmsr(WITHOUT_MEANING[name]) for name in WRITABLE} == dict.fromkeys(WRITABLE, 0)
