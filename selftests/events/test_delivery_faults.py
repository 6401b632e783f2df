# SPDX-License-Identifier: Apache-2.0
"""Exceptions of ring 3 whose delivery finds nothing mapped: not the IDT, GDT, TSS nor the stack of ring 0."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Fault, Gpa, Gva, MakeVm, MmioExit, Vector

MMIO_GPA, MMIO = Gpa(0xD000_0000), Gva(0x7000_0000)
SCRATCH_GPA = Gpa(0xE000_0000)
NOWHERE = 0x5000_0000

# Code behind a read of MMIO, and what becomes of it.
EXCEPTIONS = {
    "divide-error": (b"\x31\xd2\xf7\xf2", Fault(Vector.DE, 0)),
    "breakpoint": (b"\xcc", Fault(Vector.BP, 0)),
    "invalid-opcode": (b"\x0f\x0b", Fault(Vector.UD, 0)),
    "privileged": (b"\xf4", Fault(Vector.GP, 0)),
    "closed-gate": (b"\xcd\x40", Fault(Vector.GP, 0x40 << 3 | 2)),
    "bad-selector": (b"\xb8\x10\x00\x00\x00\x8e\xd8", Fault(Vector.GP, 0x10)),
    "page-fault": (b"\x8b\x04\x25\x00\x00\x00\x50", Fault(Vector.PF, 4, NOWHERE)),
}


@pytest.mark.requires("trait:kvm_emulates")
@pytest.mark.parametrize("name", EXCEPTIONS)
def test_delivery_goes_on(make_vm: MakeVm, name: str) -> None:
    """An exception is delivered once, with its error code and RIP, though its delivery faults at every step.

    The guest is in user space's hands when KVM drops all that it has mapped; the next instruction raises the
    exception.  AMD APM volume 2, 15.7.2 (EXITINTINFO); Documentation/virt/kvm/api.rst 4.35.
    """
    code, expected = EXCEPTIONS[name]
    vm = make_vm(AGENT)
    vm.map(MMIO, MMIO_GPA, PAGE_SIZE, page_size=PAGE_SIZE, user=True, private=False)
    agent = Agent(vm.vcpus[0], ring=3)
    for turn in range(4):
        agent.begin(b"\x8b\x0f" + code, rdi=MMIO, rax=7)  # mov (%rdi), %ecx
        got = vm.vcpus[0].expect(MmioExit)
        # Deleting a slot drops every mapping of the VM (KVM_X86_QUIRK_SLOT_ZAP_ALL).
        vm.add_memory(SCRATCH_GPA, PAGE_SIZE).delete()
        got.respond(turn.to_bytes(4, "little"))
        end = agent.end()
        assert end == expected
        assert isinstance(end, Fault)
        room = vm.read(Gva(end.rip - (name == "breakpoint")), 2)
        assert room[0] == code[-2 if name in ("divide-error", "bad-selector") else 0]
        assert agent.must(b"\x48\xff\xc0", rax=turn).rax == turn + 1
