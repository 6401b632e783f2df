# SPDX-License-Identifier: Apache-2.0
"""Reserved fields and padding of what KVM returns: zero, not what some memory held."""

from __future__ import annotations

from typing import Any

import pytest

from kvmpy import AGENT, Agent, MakeVm, ioctls
from kvmpy.uapi import structs
from kvmpy.uapi.struct_base import Struct

pytestmark = pytest.mark.protections("none")

# Each ioctl that reads a vCPU's, or with "vm" a VM's, state and the fields of it that have no meaning.
READ = {
    "KVM_GET_DEBUGREGS": ("kvm_debugregs", ["reserved"]),
    "KVM_GET_VCPU_EVENTS": ("kvm_vcpu_events", ["reserved"]),
    "KVM_GET_XCRS": ("kvm_xcrs", ["padding"]),
    "KVM_GET_FPU": ("kvm_fpu", ["pad1", "pad2"]),
    "KVM_GET_SREGS": (
        "kvm_sregs",
        ["cs.padding", "ss.padding", "tr.padding", "ldt.padding", "gdt.padding", "idt.padding"],
    ),
    "KVM_GET_SREGS2": ("kvm_sregs2", ["cs.padding", "tr.padding", "gdt.padding", "idt.padding"]),
}
OF_THE_VM = {
    "KVM_GET_CLOCK": ("kvm_clock_data", ["pad0", "pad"]),
    "KVM_GET_PIT2": ("kvm_pit_state2", ["reserved"]),
}


def leftovers(value: Struct, fields: list[str]) -> dict[str, Any]:
    """Return the fields of *value* that are not zero."""
    found = {}
    for path in fields:
        part: Any = value
        for name in path.split("."):
            part = getattr(part, name)
        words = [int(part)] if isinstance(part, int) else [int(word) for word in part]
        if any(words):
            found[path] = words
    return found


@pytest.mark.parametrize("name", READ)
def test_of_a_vcpu(make_vm: MakeVm, name: str) -> None:
    """What the caller's buffer held is gone, and the fields that mean nothing are 0, before a run and after.

    Documentation/virt/kvm/api.rst: struct definitions ("reserved", "padding").
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    kind, fields = READ[name]
    for when in ("before it ran", "after it ran"):
        value = getattr(structs, kind).from_bytes(b"\xaa" * getattr(structs, kind).SIZE)
        agent.vcpu.ioctl(getattr(ioctls, name), value)
        found = leftovers(value, fields)
        assert not found, f"{name} {when} returns {found}"
        agent.start()


@pytest.mark.parametrize("name", OF_THE_VM)
@pytest.mark.requires("KVM_CAP_PIT2")
def test_of_a_vm(make_vm: MakeVm, name: str) -> None:
    """The same of what belongs to the VM."""
    vm = make_vm(AGENT, irqchip="full")
    vm.pit.create2()
    kind, fields = OF_THE_VM[name]
    value = getattr(structs, kind).from_bytes(b"\xaa" * getattr(structs, kind).SIZE)
    vm.ioctl(getattr(ioctls, name), value)
    found = leftovers(value, fields)
    assert not found, f"{name} returns {found}"
