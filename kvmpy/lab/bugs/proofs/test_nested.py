# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of nested SVM: what KVM_SET_NESTED_STATE takes is what VMRUN takes."""

from __future__ import annotations

import errno

import pytest

from kvmpy import EFER, L1, L2, PAGE_SIZE, Agent, IoExit, MakeVm, kvm_nested_state, refused
from kvmpy.x86.nested_state import SvmNestedState
from kvmpy.x86.svm_exits import SvmExit
from kvmpy.x86.vmcb import VMCB_SIZE, Event, MiscCtl, Vmcb
from kvmpy.x86.vmsa import SegmentAttribute

pytestmark = pytest.mark.protections("none")

CODE = int(
    SegmentAttribute.A | SegmentAttribute.RW | SegmentAttribute.CODE | SegmentAttribute.S
    | SegmentAttribute.P | SegmentAttribute.L
)  # fmt: skip


def state(agent: Agent, **changes: int) -> kvm_nested_state:
    """Return the state of a vCPU in a nested guest, with some fields of its VMCB changed."""
    vcpu = agent.vcpu
    page = agent.vm.alloc(PAGE_SIZE)
    agent.start()
    sregs = vcpu.regs.get_sregs()
    sregs.efer |= EFER.SVME
    vcpu.regs.set_sregs(sregs)
    vmcb = Vmcb(bytearray(VMCB_SIZE))
    vmcb.intercept(SvmExit.VMRUN)
    fields = {
        "asid": 1, "efer": sregs.efer, "cr4": sregs.cr4, "cr3": sregs.cr3, "cr0": sregs.cr0, "dr7": 0x400,
        "dr6": 0xFFFF_0FF0, "rflags": 2, "g_pat": 0x0007_0406_0007_0406, "cs.selector": 8, "cs.attrib": CODE,
    }  # fmt: skip
    for name, value in (fields | changes).items():
        vmcb[name] = value
    gpa = int(agent.vm.gva_to_gpa(page))
    return SvmNestedState(guest_mode=True, vmcb_pa=gpa, vmcb=vmcb).to_struct()


def check(agent: Agent, **changes: int) -> None:
    bad = state(agent, **changes)
    with refused(errno.EINVAL):
        agent.vcpu.nested.set(bad)
    agent.vcpu.nested.set(state(agent))


@pytest.mark.bug(170)
def test_nested_cr3(agent: Agent) -> None:
    check(agent, misc_ctl=MiscCtl.NP, nested_cr3=1 << 60)


@pytest.mark.bug(171)
def test_injection(agent: Agent) -> None:
    check(agent, event_inj=Event(1).word)


@pytest.mark.bug(172)
def test_code_segment(agent: Agent) -> None:
    check(agent, **{"cs.attrib": CODE | int(SegmentAttribute.DB)})


@pytest.mark.bug(173)
def test_invlpga(agent: Agent) -> None:
    assert agent.execute(b"\x0f\x01\xdf") is not None
    assert not hasattr(agent.execute(b"\x0f\x01\xdf"), "rbx")


@pytest.mark.bug(174)
def test_shadow(make_vm: MakeVm) -> None:
    l2 = L2(make_vm(L1).vcpus[0])
    # sti; out %al, $0x42
    l2.load(b"\xfb\xe6\x42")
    l2.begin()
    l2.vcpu.expect(IoExit)
    saved = SvmNestedState.of(l2.vcpu.nested.get()).vmcb
    assert saved is not None
    assert saved["int_state"] & 1


def failed_vmrun(make_vm: MakeVm) -> L2:
    """Return what stands behind a VMRUN whose address space identifier is wrong."""
    l2 = L2(make_vm(L1).vcpus[0])
    l2.reset()
    l2.vmcb["asid"] = 0
    l2.agent.must(b"\x0f\x01\xd8", rax=l2.pa(l2.vmcb_gva))
    return l2


@pytest.mark.bug(175)
def test_gif(make_vm: MakeVm) -> None:
    assert not SvmNestedState.of(failed_vmrun(make_vm).vcpu.nested.get()).gif


@pytest.mark.bug(176)
def test_pending(agent: Agent) -> None:
    wanted = SvmNestedState.of(state(agent))
    wanted.run_pending = True
    agent.vcpu.nested.set(wanted.to_struct())
    assert SvmNestedState.of(agent.vcpu.nested.get()).run_pending


@pytest.mark.bug(177)
def test_exit_code(make_vm: MakeVm) -> None:
    assert failed_vmrun(make_vm).vmcb["exit_code"] == (1 << 64) - 1
