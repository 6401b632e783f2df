# SPDX-License-Identifier: Apache-2.0
"""An exception whose delivery needs memory that is not there."""

from __future__ import annotations

from kvmpy import (
    AGENT,
    KVM_INTERNAL_ERROR_DELIVERY_EV,
    PAGE_SIZE,
    Agent,
    Gpa,
    Gva,
    InternalErrorExit,
    MakeVm,
    Vector,
)

TABLE = 0x7000_0000


def test_interrupt_table_in_no_memory(make_vm: MakeVm) -> None:
    """An IDT at addresses without a slot cannot be read by user space: an internal error ends the delivery.

    arch/x86/kvm/x86.c, kvm_prepare_event_vectoring_exit(): the data hold the address that was needed.
    """
    vm = make_vm(AGENT)
    vm.map(Gva(TABLE), Gpa(TABLE), PAGE_SIZE, page_size=PAGE_SIZE, private=False)
    pointer = vm.alloc(PAGE_SIZE, private=False)
    vm.write(pointer, (0xFFF).to_bytes(2, "little") + TABLE.to_bytes(8, "little"))
    agent = Agent(vm.vcpus[0])
    agent.begin(b"\x0f\x01\x1f\x0f\x0b", rdi=int(pointer))  # lidt (%rdi); ud2
    got = agent.vcpu.expect(InternalErrorExit)
    assert got.suberror == KVM_INTERNAL_ERROR_DELIVERY_EV
    assert TABLE + 16 * Vector.UD in got.data
