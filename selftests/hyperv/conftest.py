# SPDX-License-Identifier: Apache-2.0
"""Guests that see Hyper-V's CPUID leaves, and tables of their MSR accesses and hypercalls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pytest

from kvmpy import (
    KVM_CAP_HYPERV_ENFORCE_CPUID,
    KVM_CAP_HYPERV_SYNIC2,
    Agent,
    Cpuid,
    GuestVm,
    Kvm,
    MakeVm,
    Msr,
    kvm_cpuid2,
)
from kvmpy.x86.hyperv import HvLeaf

WALKER = """
#include "hyperv.h"

void guest_main(void)
{
	apic_enable();
	guest_agent();
}
"""
FAULT = 1 << 63
"""In the place of a hypercall's result: it raised the exception in bits 7:0."""

_ROWS = 96
_XMM_WORDS = 12


def leaves(kvm: Kvm, features: Iterable[str] | None = None) -> Cpuid:
    """Return the Hyper-V leaves that KVM supports, of the features only these (None: all)."""
    cpuid = Cpuid.from_struct(kvm.get_supported_hv_cpuid())
    if features is not None:
        for function in (
            HvLeaf.HYPERV_CPUID_FEATURES,
            HvLeaf.HYPERV_CPUID_ENLIGHTMENT_INFO,
            HvLeaf.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES,
        ):
            entry = cpuid.ensure(function)
            entry.eax = entry.ebx = entry.ecx = entry.edx = 0
        for feature in features:
            cpuid.set_feature(feature)
    return cpuid


MakeHyperV = Callable[..., GuestVm]


@pytest.fixture
def make_hyperv(make_vm: MakeVm, kvm: Kvm) -> MakeHyperV:
    """Make VMs whose vCPUs see Hyper-V; *edit* may change their CPUID.

    *synic*: the capability that switches it on, or True for KVM_CAP_HYPERV_SYNIC2.  With *os_id* the guest
    has told who it is, so that it may make hypercalls.
    """

    def make(
        program: str = WALKER,
        *,
        features: Iterable[str] | None = None,
        enforce: bool = False,
        synic: int | bool = False,
        os_id: int = 1,
        edit: Callable[[Cpuid], object] | None = None,
        vcpus: int = 1,
        irqchip: str | None = "split",
    ) -> GuestVm:
        def cpuid(table: kvm_cpuid2) -> kvm_cpuid2:
            edited = Cpuid.from_struct(table)
            edited.set_hypervisor(leaves(kvm, features))
            if edit is not None:
                edit(edited)
            return edited.to_struct()

        vm = make_vm(program, vcpus=vcpus, cpuid=cpuid, irqchip=irqchip)
        for vcpu in vm.vcpus:
            if enforce:
                vcpu.enable_cap(KVM_CAP_HYPERV_ENFORCE_CPUID, 1)
            if synic:
                vcpu.enable_cap(KVM_CAP_HYPERV_SYNIC2 if synic is True else synic)
        if os_id:
            vm.vcpus[0].msrs.set(Msr.HV_X64_MSR_GUEST_OS_ID, os_id)
        return vm

    return make


@dataclass(frozen=True)
class Access:
    """An RDMSR, or with *value* a WRMSR."""

    msr: int
    value: int | None = None


def accesses(vm: GuestVm, rows: Mapping[str, Access]) -> dict[str, int | str]:
    """Let the guest do the accesses in order; return by name what was read, 0 for a write, or the fault."""
    assert len(rows) < _ROWS
    table = vm.symbol("hv_accesses")
    for index, row in enumerate(rows.values()):
        table[index].set(msr=row.msr, write=int(row.value is not None), value=row.value or 0)
    table[len(rows)].set(msr=0)
    if not vm.launched:
        vm.vcpus[0].set_entry("hv_walk_msrs")
        vm.launch()
    assert vm.vcpus[0].sync().args == (ord("m"),)
    answers: dict[str, int | str] = {}
    for index, name in enumerate(rows):
        row = table[index].value
        answers[name] = f"#{row.vector}" if row.faulted else row.got
    return answers


def banks(indices: tuple[int, ...]) -> tuple[int, list[int]]:
    """Return the mask of banks, and the banks, of a sparse set of VP indices."""
    numbers = sorted({index // 64 for index in indices})
    words = [sum(1 << index % 64 for index in indices if index // 64 == number) for number in numbers]
    return sum(1 << number for number in numbers), words


@dataclass(frozen=True)
class Call:
    """A hypercall: control word, the two parameters, and what XMM0 to XMM5 hold in 8-byte words."""

    control: int
    input: int = 0
    output: int = 0
    xmm: tuple[int, ...] | None = None


def ask(vm: GuestVm, index: int, row: Call) -> None:
    """Write a call into the guest's table."""
    words = list(row.xmm or ())
    words += [0] * (_XMM_WORDS - len(words))
    vm.symbol("hv_requests")[index].set(
        control=row.control,
        input=row.input,
        output=row.output,
        with_xmm=int(row.xmm is not None),
        xmm={"words": words},
    )


def one_call(agent: Agent, row: Call) -> int:
    """Let a vCPU whose program takes orders make a call; return the result."""
    ask(agent.vm, 0, row)
    agent.begin_call("hv_one_call")
    agent.value()
    return int(agent.vm.symbol("hv_requests")[0].value.result)


def calls(vm: GuestVm, rows: Mapping[str, Call]) -> dict[str, int]:
    """Let the guest make the calls in order; return the results by name."""
    assert len(rows) < _ROWS
    for index, row in enumerate(rows.values()):
        ask(vm, index, row)
    ask(vm, len(rows), Call(0))
    if not vm.launched:
        vm.vcpus[0].set_entry("hv_walk_calls")
        vm.launch()
    assert vm.vcpus[0].sync().args == (ord("c"),)
    table = vm.symbol("hv_requests")
    return {name: int(table[index].value.result) for index, name in enumerate(rows)}
