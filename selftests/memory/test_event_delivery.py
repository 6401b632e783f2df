# SPDX-License-Identifier: Apache-2.0
"""An exception whose delivery needs memory that is not there."""

from __future__ import annotations

from kvmpy import KVM_INTERNAL_ERROR_DELIVERY_EV, PAGE_SIZE, Gpa, Gva, InternalErrorExit, MakeVm, Vector

TABLE = 0x7000_0000

GUEST = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) table = { 0xfff, 0x70000000 };

	GUEST_SYNC();
	asm volatile("lidt %0; ud2" : : "m"(table) : "memory");
}
"""


def test_interrupt_table_in_no_memory(make_vm: MakeVm) -> None:
    """An IDT at addresses without a slot cannot be read by user space: an internal error ends the delivery.

    arch/x86/kvm/x86.c, kvm_prepare_event_vectoring_exit(): the data hold the address that was needed.
    """
    vm = make_vm(GUEST)
    vm.map(Gva(TABLE), Gpa(TABLE), PAGE_SIZE, page_size=PAGE_SIZE, private=False)
    vm.launch()
    vcpu = vm.vcpus[0]
    vcpu.sync()
    got = vcpu.expect(InternalErrorExit)
    assert got.suberror == KVM_INTERNAL_ERROR_DELIVERY_EV
    assert TABLE + 16 * Vector.UD in got.data
