# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of Hyper-V's interfaces."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_HYPERV_SYNIC2,
    PAGE_SIZE,
    Agent,
    MakeVm,
    Vcpu,
    ioctls,
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_msr_entry,
    kvm_msrs,
)

pytestmark = pytest.mark.protections("none")

SCONTROL, STIMER0_CONFIG, STIMER0_COUNT = 0x4000_0080, 0x4000_00B0, 0x4000_00B1
AUTO_ENABLE, ENABLE = 1 << 3, 1
GUEST_OS_ID, SEND_IPI_EX, VECTOR, IRR = 0x4000_0000, 0x15, 0x51, 0x200

SPIN_WAIT, INVALID_INPUT = 8, 3


def taken(vcpu: Vcpu, index: int, value: int) -> bool:
    return vcpu.ioctl(ioctls.KVM_SET_MSRS, kvm_msrs.of([kvm_msr_entry(index=index, data=value)])) == 1


@pytest.mark.bug(80)
def test_no_synic(agent: Agent) -> None:
    assert not taken(agent.vcpu, SCONTROL, 1)
    assert not taken(agent.vcpu, STIMER0_CONFIG, AUTO_ENABLE)


@pytest.mark.bug(81)
def test_restored_timer(agent: Agent) -> None:
    agent.vcpu.enable_cap(KVM_CAP_HYPERV_SYNIC2)
    assert taken(agent.vcpu, STIMER0_CONFIG, AUTO_ENABLE | 2 << 16)
    assert taken(agent.vcpu, STIMER0_COUNT, 1_000_000)
    assert not agent.vcpu.msrs.get(STIMER0_CONFIG) & ENABLE


def as_hyperv(table: kvm_cpuid2) -> kvm_cpuid2:
    """Return a table with Hyper-V's leaves in place of KVM's."""
    kept = [entry for entry in table.entries if entry.function >> 16 != 0x4000]
    leaves = {
        0x4000_0000: (0x4000_0005, 0x7263_694D, 0x666F_736F, 0x7648_2074),
        0x4000_0001: (0x3123_7648, 0, 0, 0),
        0x4000_0003: (1 << 5 | 1 << 6, 0, 0, 0),
        0x4000_0004: (1 << 10 | 1 << 11, 0, 0, 0),
        0x4000_0005: (0, 0, 0, 0),
    }
    for function, (eax, ebx, ecx, edx) in leaves.items():
        kept.append(kvm_cpuid_entry2(function=function, eax=eax, ebx=ebx, ecx=ecx, edx=edx))
    return kvm_cpuid2.of(kept)


@pytest.mark.bug(82)
def test_ipi_to_all(make_vm: MakeVm) -> None:
    vm = make_vm(AGENT, cpuid=as_hyperv)
    page = vm.alloc(PAGE_SIZE)
    agent = Agent(vm.vcpus[0])
    assert agent.wrmsr(0x1B, 0xFEE00D00) is None
    assert agent.wrmsr(0x80F, 0x1FF) is None
    assert agent.wrmsr(GUEST_OS_ID, 1) is None
    assert agent.write(page, VECTOR) is None
    assert agent.write(page + 8, 1) is None
    gpa = int(vm.gva_to_gpa(page))
    assert agent.must(b"\x0f\x01\xd9", rcx=SEND_IPI_EX, rdx=gpa, r8=gpa + 64).rax & 0xFFFF == 0
    assert agent.vcpu.lapic.get_reg(IRR + 0x10 * (VECTOR >> 5)) & 1 << (VECTOR & 31)


def hypercall(make_vm: MakeVm, control: int, *words: int) -> int:
    """Let a guest make a hypercall, and return its status."""
    vm = make_vm(AGENT, cpuid=as_hyperv)
    page = vm.alloc(PAGE_SIZE)
    agent = Agent(vm.vcpus[0])
    assert agent.wrmsr(GUEST_OS_ID, 1) is None
    for index, word in enumerate(words):
        assert agent.write(page + 8 * index, word) is None
    gpa = int(vm.gva_to_gpa(page))
    return int(agent.must(b"\x0f\x01\xd9", rcx=control, rdx=gpa, r8=gpa + 512).rax & 0xFFFF)


@pytest.mark.bug(83)
def test_variable_header(make_vm: MakeVm) -> None:
    assert hypercall(make_vm, SPIN_WAIT | 1 << 17) == INVALID_INPUT


@pytest.mark.bug(84)
def test_banks(make_vm: MakeVm) -> None:
    assert hypercall(make_vm, SEND_IPI_EX, VECTOR, 0, 1, 1) == INVALID_INPUT
