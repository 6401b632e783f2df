# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of nested SVM: what KVM_SET_NESTED_STATE takes is what VMRUN takes."""

from __future__ import annotations

import errno
import struct

import pytest

from kvmpy import PAGE_SIZE, Agent, kvm_nested_state, refused

pytestmark = pytest.mark.protections("none")

EFER_SVME = 1 << 12
GUEST_MODE, GIF = 1, 1 << 8
SVM_FORMAT = 1
STATE_SIZE, HEADER = 128, 0x400
# Offsets in a VMCB: AMD APM, volume 2, appendix B.
INTERCEPT_3, ASID, EVENT_INJECTION, NESTED_CONTROL, NESTED_CR3 = 0x10, 0x58, 0xA8, 0x90, 0xB0
CS, EFER, CR4, CR3, CR0, DR7, DR6, RFLAGS, PAT = 0x410, 0x4D0, 0x548, 0x550, 0x558, 0x560, 0x568, 0x570, 0x668
LONG, DEFAULT_32 = 1 << 9, 1 << 10


def state(agent: Agent, **changes: int) -> kvm_nested_state:
    """Return the state of a vCPU in a nested guest, with some fields of its VMCB changed."""
    vcpu = agent.vcpu
    page = agent.vm.alloc(PAGE_SIZE)
    agent.start()
    sregs = vcpu.regs.get_sregs()
    sregs.efer |= EFER_SVME
    vcpu.regs.set_sregs(sregs)
    attributes = LONG | 0x9B
    fields = {
        INTERCEPT_3: 1, ASID: 1, EFER: sregs.efer, CR4: sregs.cr4, CR3: sregs.cr3, CR0: sregs.cr0,
        DR7: 0x400, DR6: 0xFFFF_0FF0, RFLAGS: 2, PAT: 0x0007_0406_0007_0406, CS: 8 | attributes << 16,
    }  # fmt: skip
    fields |= {globals()[name]: value for name, value in changes.items()}
    vmcb = bytearray(PAGE_SIZE)
    for offset, value in fields.items():
        struct.pack_into("<Q", vmcb, offset, value)
    raw = bytearray(STATE_SIZE)
    struct.pack_into("<HHI", raw, 0, GUEST_MODE | GIF, SVM_FORMAT, STATE_SIZE + PAGE_SIZE)
    struct.pack_into("<Q", raw, 8, int(agent.vm.gva_to_gpa(page)))
    return kvm_nested_state.from_bytes(bytes(raw + vmcb))


def check(agent: Agent, **changes: int) -> None:
    bad = state(agent, **changes)
    with refused(errno.EINVAL):
        agent.vcpu.nested.set(bad)
    agent.vcpu.nested.set(state(agent))


@pytest.mark.bug(170)
def test_nested_cr3(agent: Agent) -> None:
    check(agent, NESTED_CONTROL=1, NESTED_CR3=1 << 60)


@pytest.mark.bug(171)
def test_injection(agent: Agent) -> None:
    check(agent, EVENT_INJECTION=1 << 31 | 1 << 8)


@pytest.mark.bug(172)
def test_code_segment(agent: Agent) -> None:
    check(agent, CS=8 | (LONG | DEFAULT_32 | 0x9B) << 16)


@pytest.mark.bug(173)
def test_invlpga(agent: Agent) -> None:
    assert agent.execute(b"\x0f\x01\xdf") is not None
    assert not hasattr(agent.execute(b"\x0f\x01\xdf"), "rbx")
