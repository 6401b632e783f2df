# SPDX-License-Identifier: Apache-2.0
"""HvCallSendSyntheticClusterIpi and its form with sparse sets: who is interrupted."""

from __future__ import annotations

import struct

import pytest

from kvmpy import PAGE_SIZE, Agent, Msr
from kvmpy.x86.hyperv import HvCall, HvStatus, HvVpSet, control

from .conftest import WALKER, Call, MakeHyperV, banks, one_call

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV_SEND_IPI", "KVM_CAP_SYS_HYPERV_CPUID", "KVM_CAP_HYPERV_VP_INDEX"),
    pytest.mark.protections("none", "cbit"),
]

VECTOR = 0x51
SPARSE, ALL = int(HvVpSet.HV_GENERIC_SET_SPARSE_4K), int(HvVpSet.HV_GENERIC_SET_ALL)
SEND, SEND_EX = HvCall.HVCALL_SEND_IPI, HvCall.HVCALL_SEND_IPI_EX


@pytest.mark.parametrize(
    "indices", [(0, 1, 2), (0, 70, 1), (130, 2, 64)], ids=lambda i: "-".join(map(str, i))
)
def test_who_gets_it(make_hyperv: MakeHyperV, indices: tuple[int, ...]) -> None:
    """Each form interrupts exactly the virtual processors that it names by VP index, the sender included.

    TLFS, HvCallSendSyntheticClusterIpi; the VP index may differ from the order of the vCPUs: api.rst, 8.12
    KVM_CAP_HYPERV_VP_INDEX.
    """
    vm = make_hyperv(WALKER, vcpus=3)
    for vcpu, index in zip(vm.vcpus, indices, strict=True):
        vcpu.msrs.set(Msr.HV_X64_MSR_VP_INDEX, index)
    room = vm.alloc(PAGE_SIZE, private=False)
    gpa = int(vm.gva_to_gpa(room))
    agents = [Agent(vcpu) for vcpu in vm.vcpus]
    agents[0].start()
    for agent in agents:
        agent.call("hv_install", VECTOR, 1)

    sets = [tuple(i for n, i in enumerate(indices) if chosen >> n & 1) for chosen in range(1, 8)]
    # There are no such vCPUs; the last bank is beyond what KVM can have.
    strangers = (*indices[:1], 63, 128, 4095)
    table: dict[str, tuple[Call, bytes, tuple[int, ...]]] = {}
    for chosen in (*sets, strangers):
        mask, words = banks(chosen)
        low = sum(1 << index for index in chosen if index < 64)
        reached = tuple(index for index in chosen if index in indices)
        in_low = tuple(index for index in reached if index < 64)
        table[f"fast {chosen}"] = (Call(control(SEND, fast=True), VECTOR, low), b"", in_low)
        table[f"slow {chosen}"] = (Call(control(SEND), gpa), struct.pack("<2Q", VECTOR, low), in_low)
        word = control(SEND_EX, variable=len(words))
        given = struct.pack(f"<3Q{len(words)}Q", VECTOR, SPARSE, mask, *words)
        table[f"ex slow {chosen}"] = (Call(word, gpa), given, reached)
        word = control(SEND_EX, fast=True, variable=len(words))
        xmm = (mask, *words)
        table[f"ex fast {chosen}"] = (Call(word, VECTOR, SPARSE, xmm), b"", reached)
    table["all, slow"] = (Call(control(SEND_EX), gpa), struct.pack("<3Q", VECTOR, ALL, 0), indices)
    table["all, fast"] = (Call(control(SEND_EX, fast=True), VECTOR, ALL, (0,)), b"", indices)
    # With "all", banks are there but mean nothing.
    word = control(SEND_EX, fast=True, variable=1)
    table["all, with a bank"] = (Call(word, VECTOR, ALL, (1, 0)), b"", indices)
    table["nobody, fast"] = (Call(control(SEND, fast=True), VECTOR, 0), b"", ())
    table["nobody, ex"] = (Call(control(SEND_EX, fast=True), VECTOR, SPARSE, (0,)), b"", ())

    counts = [0, 0, 0]
    wrong = {}
    for name, (call, content, reached) in table.items():
        if content:
            vm.write(room, content)
        status = one_call(agents[0], call)
        expected = [count + int(index in reached) for count, index in zip(counts, indices, strict=True)]
        for agent in agents:
            agent.begin_call("hv_counted", VECTOR)
        counts = [agent.value() for agent in agents]
        if status or counts != expected:
            wrong[name] = (status, counts, expected)
    assert not wrong


def test_refused_ipi_interrupts_nobody(make_hyperv: MakeHyperV) -> None:
    """A call that fails has interrupted nobody.

    TLFS, HvCallSendSyntheticClusterIpi: vectors below 16 are refused.
    """
    vm = make_hyperv(WALKER, vcpus=2)
    agents = [Agent(vcpu) for vcpu in vm.vcpus]
    for word, vector in ((control(SEND, fast=True, variable=1), VECTOR), (control(SEND, fast=True), 15)):
        assert one_call(agents[0], Call(word, vector, 3)) == HvStatus.HV_STATUS_INVALID_HYPERCALL_INPUT
    agents[1].start()
    for vcpu in vm.vcpus:
        assert [vcpu.lapic.get_reg(0x200 + 0x10 * word) for word in range(8)] == [0] * 8
