# SPDX-License-Identifier: Apache-2.0
"""Proofs of the emulator's bugs."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, KVM_MEM_LOG_DIRTY_PAGES, PAGE_SIZE, Agent, Fault, Gpa, Gva, MakeVm

pytestmark = pytest.mark.protections("none")

REGION_GPA, REGION = Gpa(0x1000_0000), Gva(0x6000_0000)
LTR = b"\x0f\x00\xd8"
NOT_CANONICAL = 0x4000_0000


@pytest.mark.bug(110)
def test_atomic(make_vm: MakeVm, emulated: bytes) -> None:
    vm = make_vm(AGENT)
    slot = vm.add_memory(REGION_GPA, 4 * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
    vm.map(REGION, REGION_GPA, 4 * PAGE_SIZE, private=False)
    agent = Agent(vm.vcpus[0])
    assert agent.write(REGION + PAGE_SIZE, 1) is None
    assert list(vm.dirty.get_log(slot.slot)) == [1]
    # lock inc dword [rdi]
    agent.must(emulated + b"\xf0\xff\x07", rdi=int(REGION + PAGE_SIZE))
    assert agent.read(REGION + PAGE_SIZE) == 2
    assert list(vm.dirty.get_log(slot.slot)) == [1]


def with_segment(agent: Agent, *, present: bool, base_high: int) -> tuple[Gva, int]:
    """Append a task's segment to the guest's table; return where it lies, and its selector."""
    vm, vcpu = agent.vm, agent.vcpu
    page = vm.alloc(PAGE_SIZE)
    agent.start()
    sregs = vcpu.regs.get_sregs()
    size = (sregs.gdt.limit + 8) & ~7
    vm.write(page, vm.read(Gva(sregs.gdt.base), size))
    low = 0x67 | (9 | present << 7) << 40
    vm.write(page + size, low.to_bytes(8, "little") + base_high.to_bytes(8, "little"))
    sregs.gdt.base, sregs.gdt.limit = int(page), size + 15
    vcpu.regs.set_sregs(sregs)
    return page + size, size


@pytest.mark.bug(111)
def test_not_present(agent: Agent, emulated: bytes) -> None:
    place, selector = with_segment(agent, present=False, base_high=0)
    fault = agent.execute(emulated + LTR, rax=selector)
    assert isinstance(fault, Fault)
    assert (fault.vector, fault.error_code) == (11, selector)
    assert agent.vm.read(place + 5, 1) == b"\x09"


@pytest.mark.bug(112)
def test_not_canonical(agent: Agent, emulated: bytes) -> None:
    _, selector = with_segment(agent, present=True, base_high=NOT_CANONICAL)
    fault = agent.execute(emulated + LTR, rax=selector)
    assert isinstance(fault, Fault)
    assert (fault.vector, fault.error_code) == (13, selector)


@pytest.mark.bug(113)
def test_cr8(agent: Agent, emulated: bytes) -> None:
    # mov cr8, rax
    assert isinstance(agent.execute(emulated + b"\x44\x0f\x22\xc0", rax=0x100), Fault)
