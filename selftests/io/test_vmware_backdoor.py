# SPDX-License-Identifier: Apache-2.0
"""kvm.enable_vmware_backdoor: ring 3 may use VMware's port and pseudo performance counters."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, Agent, Fault, IoExit, MakeVm, Registers

PORT = 0x5658
IN_EAX_DX, RDPMC = b"\xed", b"\x0f\x33"
# The host's TSC (arch/x86/kvm/pmu.c, is_vmware_backdoor_pmc()).
HOST_TSC = 0x10000
GP = 13

opened = pytest.mark.requires("trait:kvm_emulates", "param:kvm.enable_vmware_backdoor=Y")


@opened
def test_ring_3_reads_the_port(make_vm: MakeVm) -> None:
    """IN from the backdoor's port is an exit, whatever IOPL says; from the next port it is #GP.

    arch/x86/kvm/emulate.c, emulator_io_permitted().
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.begin(IN_EAX_DX, ring=3, rdx=PORT, rax=0x564D_5868)
    got = agent.vcpu.expect(IoExit)
    assert (got.port, got.direction, got.size) == (PORT, "in", 4)
    got.respond(0x1234_5678)
    end = agent.end()
    assert isinstance(end, Registers)
    assert end.rax == 0x1234_5678
    fault = agent.execute(IN_EAX_DX, ring=3, rdx=PORT + 2)
    assert isinstance(fault, Fault)
    assert fault.vector == GP


@opened
@pytest.mark.requires("KVM_CAP_PMU_CAPABILITY")
def test_ring_3_reads_the_pseudo_counters(make_vm: MakeVm) -> None:
    """RDPMC of the host's TSC works though CR4.PCE is 0, and grows; of another counter it is #GP.

    arch/x86/kvm/pmu.c, kvm_pmu_rdpmc(), which refuses a guest without a PMU first.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    first, second = (agent.must(RDPMC, ring=3, rcx=HOST_TSC).edx_eax for _ in range(2))
    assert second > first
    fault = agent.execute(RDPMC, ring=3, rcx=HOST_TSC + 3)
    assert isinstance(fault, Fault)
    assert fault.vector == GP


@pytest.mark.requires("param:kvm.enable_vmware_backdoor=N")
@pytest.mark.parametrize("code", [IN_EAX_DX, RDPMC], ids=["in", "rdpmc"])
def test_without_the_parameter_ring_3_gets_a_fault(make_vm: MakeVm, code: bytes) -> None:
    """Both are #GP with IOPL 0 and CR4.PCE 0.

    Intel SDM volume 2, IN and RDPMC.
    """
    counter = HOST_TSC if code is RDPMC else 0
    fault = Agent(make_vm(AGENT).vcpus[0]).execute(code, ring=3, rdx=PORT, rcx=counter)
    assert isinstance(fault, Fault)
    assert fault.vector == GP
