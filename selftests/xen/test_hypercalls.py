# SPDX-License-Identifier: Apache-2.0
"""Xen's hypercall page and its hypercalls, alone and beside Hyper-V's."""

from __future__ import annotations

from typing import Any

import pytest

from kvmpy import (
    AGENT,
    KVM_XEN_ATTR_TYPE_LONG_MODE,
    KVM_XEN_ATTR_TYPE_XEN_VERSION,
    PAGE_SIZE,
    Agent,
    Anonymous,
    Cpuid,
    Fault,
    Kvm,
    MakeVm,
    Msr,
    Vector,
    XenHypercallExit,
    kvm_cpuid2,
)
from kvmpy.x86.hyperv import HvStatus
from selftests.conftest import hypercall_instruction

from .conftest import FLAGS, MSR, get, put

pytestmark = [pytest.mark.requires("KVM_CAP_XEN_HVM"), pytest.mark.protections("none", "cbit")]

ARGUMENTS: dict[str, Any] = {
    "rdi": 0x1111 << 32 | 1,
    "rsi": 2,
    "rdx": 3,
    "r10": 4,
    "r8": 5,
    "r9": (1 << 64) - 6,
}
PARAMS = tuple(ARGUMENTS.values())
STRIDE = 32


def test_page(make_vm: MakeVm, kvm: Kvm) -> None:
    """The page has 128 entries of 32 bytes, each the hypercall of its number; it exits with six arguments.

    Documentation/virt/kvm/api.rst, 4.28 KVM_XEN_HVM_CONFIG and KVM_EXIT_XEN.
    """
    vm = make_vm(AGENT)
    page = vm.alloc(PAGE_SIZE, nx=False, private=False)
    vm.xen.config(FLAGS, MSR)
    agent = Agent(vm.vcpus[0])
    assert agent.wrmsr(MSR, int(vm.gva_to_gpa(page))) is None
    entries = [
        (b"\xb8" + number.to_bytes(4, "little") + hypercall_instruction(kvm) + b"\xc3").ljust(STRIDE, b"\xcc")
        for number in range(PAGE_SIZE // STRIDE)
    ]
    assert vm.read(page, PAGE_SIZE) == b"".join(entries)
    # The write has told KVM that the guest is a 64-bit one.
    assert get(vm, KVM_XEN_ATTR_TYPE_LONG_MODE) == 1
    answers = {}
    for number in range(PAGE_SIZE // STRIDE):
        # Those that KVM may answer itself.
        if number in (15, 17, 24, 29, 32):
            continue
        agent.begin(b"", where=page + STRIDE * number, **ARGUMENTS)
        exit_ = vm.vcpus[0].expect(XenHypercallExit)
        assert exit_ == XenHypercallExit(longmode=True, cpl=0, input=number, params=PARAMS)
        exit_.respond(-number)
        answers[number] = agent.value()
    assert answers == {number: -number % (1 << 64) for number in answers}


def test_instruction(make_vm: MakeVm, kvm: Kvm) -> None:
    """The instruction itself is a hypercall, too; all 64 bits of number and arguments arrive, from any ring.

    api.rst, KVM_EXIT_XEN_HCALL: cpl is the ring that the hypercall comes from.
    """
    vm = make_vm(AGENT)
    vm.xen.config(FLAGS, MSR)
    agents = {ring: Agent(vm.vcpus[0], ring=ring) for ring in (0, 3)}
    for ring, agent in agents.items():
        for number in (0x7FFF_FFFF, 0xBABE << 32, 0x8000_0001):
            agent.begin(hypercall_instruction(kvm), rax=number, rbx=7, rbp=8, rcx=9, **ARGUMENTS)
            exit_ = vm.vcpus[0].expect(XenHypercallExit)
            assert exit_ == XenHypercallExit(longmode=True, cpl=ring, input=number, params=PARAMS)
            exit_.respond(0xFEED_0000 + ring)
            assert agent.value() == 0xFEED_0000 + ring


def test_arguments_are_kept(make_vm: MakeVm, kvm: Kvm) -> None:
    """A hypercall changes RAX alone.

    Xen's 64-bit convention clobbers nothing that KVM would have to.
    """
    vm = make_vm(AGENT)
    vm.xen.config(FLAGS, MSR)
    agent = Agent(vm.vcpus[0])
    agent.begin(hypercall_instruction(kvm), rax=40, rbx=7, **ARGUMENTS)
    vm.vcpus[0].expect(XenHypercallExit).respond(1)
    result = agent.end()
    assert {name: getattr(result, name) for name in ARGUMENTS} == ARGUMENTS


def test_bad_pages(make_vm: MakeVm) -> None:
    """There is one page of KVM's own, in the guest's memory: #GP for others; the host's write makes none.

    api.rst, 4.28: the guest's write of the MSR writes the page.
    """
    vm = make_vm(AGENT)
    page = vm.alloc(PAGE_SIZE, private=False)
    vm.xen.config(FLAGS, MSR)
    agent = Agent(vm.vcpus[0])
    agent.start()
    gpa = int(vm.gva_to_gpa(page))
    for bad in (gpa | 1, gpa | 4095, 1 << 38):
        assert (hex(bad), agent.wrmsr(MSR, bad)) == (hex(bad), Fault(Vector.GP, 0))
    vm.vcpus[0].msrs.takes(MSR, gpa)
    assert vm.read(page, PAGE_SIZE) == bytes(PAGE_SIZE), "the host's write of the MSR wrote the guest's page"


def test_pages_of_user_space(make_vm: MakeVm) -> None:
    """Without interception user space provides the pages: the guest gets the one that it names by number.

    api.rst, 4.28: blob_addr_64 and blob_size_64, in pages.
    """
    vm = make_vm(AGENT)
    page = vm.alloc(PAGE_SIZE, private=False)
    gpa = int(vm.gva_to_gpa(page))
    contents = [bytes([0x40 + n]) * PAGE_SIZE for n in range(4)]
    with Anonymous().map(4 * PAGE_SIZE) as blob:
        blob.view(0, 4 * PAGE_SIZE)[:] = b"".join(contents)
        # One page for 32-bit guests, three for 64-bit ones.
        vm.xen.config(0, MSR, blob=(blob.hva, 1, blob.hva + PAGE_SIZE, 3))
        agent = Agent(vm.vcpus[0])
        for number in (0, 2, 1):
            assert agent.wrmsr(MSR, gpa | number) is None
            assert vm.read(page, PAGE_SIZE) == contents[1 + number]
        for number in (3, 4095):
            assert agent.wrmsr(MSR, gpa | number) == Fault(Vector.GP, 0)
        assert vm.read(page, PAGE_SIZE) == contents[2]


def test_version(make_vm: MakeVm, kvm: Kvm) -> None:
    """KVM answers Xen's version itself once it was set, to ring 0; any other question is user space's.

    api.rst, 4.126 KVM_XEN_ATTR_TYPE_XEN_VERSION.
    """
    vm = make_vm(AGENT)
    vm.xen.config(FLAGS, MSR)
    agent, user = Agent(vm.vcpus[0]), Agent(vm.vcpus[0], ring=3)
    version_call = {"rax": 17, "rdi": 0}

    def asked(who: Agent, **registers: int) -> int:
        named: dict[str, Any] = dict(registers)
        who.begin(hypercall_instruction(kvm), **named)
        vm.vcpus[0].expect(XenHypercallExit).respond(77)
        return who.value()

    assert asked(agent, **version_call) == 77
    put(vm, KVM_XEN_ATTR_TYPE_XEN_VERSION, 0x4000D)
    assert agent.must(hypercall_instruction(kvm), **version_call).rax == 0x4000D
    assert asked(agent, rax=17, rdi=1) == 77
    assert asked(user, **version_call) == 77


@pytest.mark.requires("KVM_CAP_SYS_HYPERV_CPUID")
def test_beside_hyperv(make_vm: MakeVm, kvm: Kvm) -> None:
    """With both interfaces Hyper-V's calls have bit 31 of EAX, which its page sets; the others are Xen's.

    api.rst, 4.28; Xen tells them apart in the same way.
    """

    def both(table: kvm_cpuid2) -> kvm_cpuid2:
        cpuid = Cpuid.from_struct(table)
        cpuid.set_hypervisor(Cpuid.from_struct(kvm.get_supported_hv_cpuid()))
        return cpuid.to_struct()

    vm = make_vm(AGENT, cpuid=both)
    xen_page, hyperv_page = (vm.alloc(PAGE_SIZE, nx=False, private=False) for _ in range(2))
    vm.xen.config(FLAGS, MSR)
    agent = Agent(vm.vcpus[0])
    assert agent.wrmsr(Msr.HV_X64_MSR_GUEST_OS_ID, 1) is None
    assert agent.wrmsr(Msr.HV_X64_MSR_HYPERCALL, int(vm.gva_to_gpa(hyperv_page)) | 1) is None
    assert agent.wrmsr(MSR, int(vm.gva_to_gpa(xen_page))) is None
    code = b"\x0d\x00\x00\x00\x80" + hypercall_instruction(kvm) + b"\xc3"
    assert vm.read(hyperv_page, 16) == code.ljust(16, b"\0")
    unknown = int(HvStatus.HV_STATUS_INVALID_HYPERCALL_CODE)
    for where in (hyperv_page, None):
        agent.begin(b"" if where else hypercall_instruction(kvm), where=where, rax=0x8000_0000, rcx=0xBEEF)
        assert agent.value() == unknown
    for where in (xen_page + 40 * STRIDE, None):
        agent.begin(b"" if where else hypercall_instruction(kvm), where=where, rax=40, **ARGUMENTS)
        exit_ = vm.vcpus[0].expect(XenHypercallExit)
        assert (exit_.input, exit_.params) == (40, PARAMS)
        exit_.respond(5)
        assert agent.value() == 5
