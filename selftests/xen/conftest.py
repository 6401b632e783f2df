# SPDX-License-Identifier: Apache-2.0
"""Guests of Xen's interface, whose vCPUs take orders."""

from __future__ import annotations

import operator
from typing import Protocol

import pytest

from kvmpy import (
    KVM_XEN_ATTR_TYPE_LONG_MODE,
    KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG,
    KVM_XEN_ATTR_TYPE_SHARED_INFO,
    KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA,
    KVM_XEN_ATTR_TYPE_UPCALL_VECTOR,
    KVM_XEN_ATTR_TYPE_XEN_VERSION,
    KVM_XEN_HVM_CONFIG_EVTCHN_SEND,
    KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
    KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
    PAGE_SIZE,
    Agent,
    GuestVm,
    Gva,
    MakeVm,
    Vcpu,
    Vm,
    kvm_xen_hvm_attr,
    kvm_xen_vcpu_attr,
)
from kvmpy.x86.xen import XenLayout

MSR = 0x4000_0200
FLAGS = int(KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND)
INVALID = (1 << 64) - 1
VECTOR = 0x61

# Which field of the union holds an attribute that is one number.
_OF_VM = {
    KVM_XEN_ATTR_TYPE_LONG_MODE: "long_mode",
    KVM_XEN_ATTR_TYPE_SHARED_INFO: "shared_info.gfn",
    KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA: "shared_info.hva",
    KVM_XEN_ATTR_TYPE_UPCALL_VECTOR: "vector",
    KVM_XEN_ATTR_TYPE_XEN_VERSION: "xen_version",
    KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG: "runstate_update_flag",
}
_OF_VCPU = {
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO: "gpa",
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA: "hva",
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO: "gpa",
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR: "gpa",
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID: "vcpu_id",
    KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR: "vector",
}

GUEST = """
#include "xen.h"

void guest_main(void)
{
	apic_enable();
	guest_agent();
}
"""


def _put(union: object, path: str, value: int) -> None:
    *outer, last = path.split(".")
    setattr(operator.attrgetter(".".join(outer))(union) if outer else union, last, value)


def get(target: Vm | Vcpu, kind: int) -> int:
    """Return an attribute of a VM or a vCPU that is one number."""
    if isinstance(target, Vm):
        return int(operator.attrgetter(_OF_VM[kind])(target.xen.get_attr(kind).u))  # type: ignore[index]
    return int(getattr(target.xen.get_attr(kind).u, _OF_VCPU[kind]))  # type: ignore[index]


def put(target: Vm | Vcpu, kind: int, value: int) -> None:
    """Set an attribute of a VM or a vCPU that is one number."""
    if isinstance(target, Vm):
        of_vm = kvm_xen_hvm_attr(type=kind)
        _put(of_vm.u, _OF_VM[kind], value)  # type: ignore[index]
        target.xen.set_attr(of_vm)
    else:
        of_vcpu = kvm_xen_vcpu_attr(type=kind)
        _put(of_vcpu.u, _OF_VCPU[kind], value)  # type: ignore[index]
        target.xen.set_attr(of_vcpu)


class XenGuest:
    """A VM with a shared info page, and for each vCPU a vcpu_info and an agent."""

    def __init__(self, vm: GuestVm, *, long_mode: bool = True, by_apic: bool = True) -> None:
        self.vm = vm
        self.vcpu = vm.vcpus[0]
        self.shared = vm.alloc(PAGE_SIZE, private=False)
        self.infos = vm.alloc(PAGE_SIZE, private=False)
        vm.xen.config(FLAGS, MSR)
        put(vm, KVM_XEN_ATTR_TYPE_LONG_MODE, int(long_mode))
        put(vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, self.gpa(self.shared) // PAGE_SIZE)
        vm.symbol("shared_info").u64 = int(self.shared)
        vm.symbol("vcpu_info").u64 = int(self.infos)
        vm.symbol("by_apic").u64 = int(by_apic)
        for vcpu in vm.vcpus:
            info = self.gpa(self.infos) + XenLayout.XEN_SHINFO_VCPU_INFO_SIZE * vcpu.index
            put(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, info)
            if by_apic:
                put(vcpu, KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, VECTOR)
        if not by_apic:
            put(vm, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, VECTOR)
        self.agents = [Agent(vcpu) for vcpu in vm.vcpus]
        self.agent = self.agents[0]
        self.do("xen_handler", VECTOR)

    def gpa(self, gva: Gva) -> int:
        """Return the guest-physical address of memory."""
        return int(self.vm.gva_to_gpa(gva))

    def do(self, function: str, *arguments: int) -> int:
        """Call a function of the guest on the first vCPU."""
        self.agent.begin_call(function, *arguments)
        return self.agent.value()

    def events(self) -> dict[int, int]:
        """Return how often the guest's handler took each port."""
        counts = self.vm.symbol("events").view("H")
        return {port: count for port, count in enumerate(counts) if count}

    def bits(self, offset: int, size: int = 512) -> set[int]:
        """Return the bits that are set in a bitmap of the shared info page."""
        value = int.from_bytes(self.vm.read(self.shared + offset, size), "little")
        return {bit for bit in range(8 * size) if value >> bit & 1}


class MakeXen(Protocol):
    """Makes a guest; its VM has *vcpus* vCPUs."""

    def __call__(self, *, vcpus: int = 1, long_mode: bool = True, by_apic: bool = True) -> XenGuest: ...


@pytest.fixture
def make_xen(make_vm: MakeVm) -> MakeXen:
    """Make guests of Xen's interface."""

    def make(*, vcpus: int = 1, long_mode: bool = True, by_apic: bool = True) -> XenGuest:
        return XenGuest(make_vm(GUEST, vcpus=vcpus), long_mode=long_mode, by_apic=by_apic)

    return make
