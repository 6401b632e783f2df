# SPDX-License-Identifier: Apache-2.0
"""What proofs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy import AGENT, Agent, MakeVm

FORCED_EMULATION = Path("/sys/module/kvm/parameters/force_emulation_prefix")


@pytest.fixture
def agent(make_vm: MakeVm) -> Agent:
    """A guest that does what it is told."""
    return Agent(make_vm(AGENT).vcpus[0])


@pytest.fixture
def x2apic(agent: Agent) -> Agent:
    """A guest whose local APIC is in x2APIC mode and enabled."""
    assert agent.wrmsr(0x1B, 0xFEE00D00) is None
    assert agent.wrmsr(0x80F, 0x1FF) is None
    return agent


@pytest.fixture
def emulated() -> Iterator[bytes]:
    """The prefix behind which KVM emulates an instruction."""
    before = FORCED_EMULATION.read_text(encoding="ascii")
    FORCED_EMULATION.write_text("1", encoding="ascii")
    yield b"\x0f\x0bkvm"
    FORCED_EMULATION.write_text(before, encoding="ascii")
