# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's hypercall page: where it is, what is in it, and who may call."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, Agent, Fault, GuestVm, Gva, Kvm, Msr, Registers, Vector
from kvmpy.x86.hyperv import HvCall, HvStatus, control
from selftests.conftest import hypercall_instruction

from .conftest import MakeHyperV

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV", "KVM_CAP_SYS_HYPERV_CPUID"),
    pytest.mark.protections("none", "cbit"),
]

PAGE_MSR, OS_ID = Msr.HV_X64_MSR_HYPERCALL, Msr.HV_X64_MSR_GUEST_OS_ID
UNKNOWN = control(0xBEEF)
SHORT_OF_ARGUMENTS = HvStatus.HV_STATUS_INVALID_HYPERCALL_CODE
FILL = b"\xcc" * PAGE_SIZE
RET = b"\xc3"


def code_page(vm: GuestVm) -> Gva:
    """Return a shared page of INT3s that the guest may execute."""
    page = vm.alloc(PAGE_SIZE, nx=False, private=False)
    vm.write(page, FILL)
    return page


def call_at(agent: Agent, where: Gva, word: int = UNKNOWN) -> int:
    """Call what lies at an address, as a hypercall page is used; return the result."""
    agent.begin(b"", where=where, rcx=word)
    return agent.value()


def test_contents(make_hyperv: MakeHyperV, kvm: Kvm) -> None:
    """KVM writes the instruction of hypercalls and a return, which works; the rest of the page stays.

    TLFS, establishing the hypercall interface.
    """
    vm = make_hyperv(os_id=0)
    page = code_page(vm)
    agent = Agent(vm.vcpus[0])
    gpa = int(vm.gva_to_gpa(page))
    assert agent.wrmsr(OS_ID, 1) is None
    assert agent.wrmsr(PAGE_MSR, gpa | 1) is None
    assert agent.rdmsr(PAGE_MSR) == gpa | 1
    code = hypercall_instruction(kvm) + RET
    assert vm.read(page, PAGE_SIZE) == code + FILL[len(code) :]
    assert call_at(agent, page) == SHORT_OF_ARGUMENTS


def test_identity_first(make_hyperv: MakeHyperV) -> None:
    """Without the guest's identity the page cannot be enabled: the write is ignored.

    TLFS, establishing the hypercall interface: without an identity the MSR is ignored.
    """
    vm = make_hyperv(os_id=0)
    page = code_page(vm)
    agent = Agent(vm.vcpus[0])
    assert agent.wrmsr(PAGE_MSR, int(vm.gva_to_gpa(page)) | 1) is None
    assert agent.rdmsr(PAGE_MSR) == 0
    assert vm.read(page, PAGE_SIZE) == FILL


def test_moved(make_hyperv: MakeHyperV, kvm: Kvm) -> None:
    """The page can be moved and disabled; a write that disables it writes no page.

    TLFS, establishing the hypercall interface.
    """
    vm = make_hyperv()
    first, second, third = (code_page(vm) for _ in range(3))
    agent = Agent(vm.vcpus[0])
    code = hypercall_instruction(kvm) + RET
    for page in (first, second):
        assert agent.wrmsr(PAGE_MSR, int(vm.gva_to_gpa(page)) | 1) is None
        assert vm.read(page, len(code)) == code
        assert call_at(agent, page) == SHORT_OF_ARGUMENTS
    disabled = int(vm.gva_to_gpa(third))
    assert agent.wrmsr(PAGE_MSR, disabled) is None
    assert agent.rdmsr(PAGE_MSR) == disabled
    assert vm.read(third, PAGE_SIZE) == FILL


def test_identity_taken_back(make_hyperv: MakeHyperV) -> None:
    """When the guest clears its identity the page is disabled, and a hypercall is one of KVM's own.

    TLFS, establishing the hypercall interface: clearing HV_X64_MSR_GUEST_OS_ID disables the page.
    """
    vm = make_hyperv()
    page = code_page(vm)
    agent = Agent(vm.vcpus[0])
    gpa = int(vm.gva_to_gpa(page))
    assert agent.wrmsr(PAGE_MSR, gpa | 1) is None
    assert agent.wrmsr(OS_ID, 0) is None
    assert agent.rdmsr(PAGE_MSR) == gpa
    # KVM_ENOSYS of include/uapi/linux/kvm_para.h.
    assert agent.hypercall(0xBEEF) == -1000
    assert agent.wrmsr(OS_ID, 1) is None
    assert agent.rdmsr(PAGE_MSR) == gpa
    assert call_at(agent, page) == SHORT_OF_ARGUMENTS


@pytest.mark.parametrize("gpa", [1 << 38, ((1 << 52) - 1) & ~0xFFF], ids=["hole", "top"])
def test_no_memory(make_hyperv: MakeHyperV, gpa: int) -> None:
    """A page where there is no memory raises #GP, and the MSR keeps its value.

    TLFS, establishing the hypercall interface: the page must be within the guest's memory.
    """
    vm = make_hyperv()
    page = code_page(vm)
    agent = Agent(vm.vcpus[0])
    there = int(vm.gva_to_gpa(page)) | 1
    assert agent.wrmsr(PAGE_MSR, there) is None
    assert agent.wrmsr(PAGE_MSR, gpa | 1) == Fault(Vector.GP, 0)
    assert agent.rdmsr(PAGE_MSR) == there
    assert call_at(agent, page) == SHORT_OF_ARGUMENTS


def test_ring3(make_hyperv: MakeHyperV, kvm: Kvm) -> None:
    """A hypercall from ring 3 raises #UD and does nothing.

    TLFS, establishing the hypercall interface: callers must be in ring 0.
    """
    vm = make_hyperv()
    user = Agent(vm.vcpus[0], ring=3)
    send = control(HvCall.HVCALL_SEND_IPI, fast=True)
    result = user.execute(hypercall_instruction(kvm), rcx=send, rdx=0x51, r8=1)
    assert result == Fault(Vector.UD, 0)
    assert vm.vcpus[0].lapic.get_reg(0x200 + 0x10 * (0x51 >> 5)) == 0
    kernel = Agent(vm.vcpus[0])
    assert kernel.must(hypercall_instruction(kvm), rcx=send, rdx=0x51, r8=1).rax == 0
    assert vm.vcpus[0].lapic.get_reg(0x200 + 0x10 * (0x51 >> 5)) == 1 << (0x51 & 31)


def test_registers(make_hyperv: MakeHyperV, kvm: Kvm) -> None:
    """A hypercall changes RAX alone, whatever its status.

    TLFS, hypercall outputs: RAX has the result; KVM keeps the registers that it only reads.
    """
    vm = make_hyperv()
    agent = Agent(vm.vcpus[0])
    given = {name: 0x1111_0000 + n for n, name in enumerate(("rbx", "rsi", "rdi", "rbp", "r9", "r10", "r11"))}
    given |= {"rcx": UNKNOWN, "rdx": 0x2222, "r8": 0x3333, "r12": 12, "r13": 13, "r14": 14, "r15": 15}
    result = agent.must(hypercall_instruction(kvm), rax=0xFFFF_FFFF_FFFF_FFFF, **given)
    assert isinstance(result, Registers)
    assert {name: getattr(result, name) for name in given} == given
    assert result.rax == SHORT_OF_ARGUMENTS
