# SPDX-License-Identifier: Apache-2.0
"""immediate_exit: finishing the instruction of an exit without running the next one."""

from __future__ import annotations

import errno

import pytest

from kvmpy import PAGE_SIZE, Gpa, GuestVcpu, GuestVm, Gva, IoExit, MakeVm, MmioExit
from kvmpy.core.vcpu import RUN_EINTR

pytestmark = [pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT"), pytest.mark.usefixtures("open_registers")]

MMIO_GPA = Gpa(0xD000_0000)
MMIO = Gva(0x7000_0000)

# Each function ends the exiting instruction at a label of its own, and then says that it went on.
GUEST = """
#include <kvmpy/guest.h>

GUEST_SHARED u64 went_on;

__noinline void pio_out(void)
{
	asm volatile("outl %%eax, %%dx\\n"
		     ".globl pio_out_end\\n"
		     "pio_out_end: movq $1, %0" : "=m"(went_on) : "a"(0x11223344), "d"(0x600));
	GUEST_SYNC(went_on);
}

__noinline void pio_in(void)
{
	u64 rax = ~0ull;

	asm volatile("inl %%dx, %%eax\\n"
		     ".globl pio_in_end\\n"
		     "pio_in_end: movq $1, %0" : "=m"(went_on), "+a"(rax) : "d"(0x600));
	GUEST_SYNC(went_on);
}

__noinline void mmio_write(u64 address)
{
	asm volatile("movl %1, (%2)\\n"
		     ".globl mmio_write_end\\n"
		     "mmio_write_end: movq $1, %0"
		     : "=m"(went_on) : "r"(0x11223344), "r"(address) : "memory");
	GUEST_SYNC(went_on);
}

__noinline void mmio_read(u64 address)
{
	u64 rax = ~0ull;

	asm volatile("movl (%2), %%eax\\n"
		     ".globl mmio_read_end\\n"
		     "mmio_read_end: movq $1, %0"
		     : "=m"(went_on), "+a"(rax) : "r"(address) : "memory");
	GUEST_SYNC(went_on);
}

void mmio_read_twice(u64 address)
{
	u64 rcx = 2, to = (uintptr_t)&went_on;

	asm volatile("rep movsl" : "+S"(address), "+D"(to), "+c"(rcx) : : "memory");
	GUEST_SYNC(went_on);
}
"""


def prepare(make_vm: MakeVm, entry: str, *args: int) -> tuple[GuestVm, GuestVcpu]:
    """Return a VM with a page of MMIO, whose guest starts in *entry*."""
    vm = make_vm(GUEST)
    vm.map(MMIO, MMIO_GPA, PAGE_SIZE, private=False)
    vcpu = vm.vcpus[0]
    vcpu.set_entry(entry, *args)
    vm.launch()
    return vm, vcpu


def run_immediate(vcpu: GuestVcpu) -> tuple[int, int]:
    """Issue KVM_RUN with immediate_exit set; return how it ended and its errno."""
    vcpu.run_area.immediate_exit = 1
    try:
        return vcpu.run_once(), vcpu.run_errno
    finally:
        vcpu.run_area.immediate_exit = 0


@pytest.mark.parametrize("entry", ["pio_out", "mmio_write"])
def test_write_completes(make_vm: MakeVm, entry: str) -> None:
    """KVM_RUN with immediate_exit ends with EINTR, with the write behind it and nothing after the write done.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, immediate_exit and the note on KVM_EXIT_IO
    and KVM_EXIT_MMIO.
    """
    vm, vcpu = prepare(make_vm, entry, int(MMIO))
    assert isinstance(vcpu.next(), (IoExit, MmioExit))
    assert run_immediate(vcpu) == (RUN_EINTR, errno.EINTR)
    assert vcpu.regs.get().rip == vm.program.address_of(f"{entry}_end")
    assert vm.symbol("went_on").u64 == 0
    assert vcpu.sync().args == (1,)


@pytest.mark.parametrize("entry", ["pio_in", "mmio_read"])
def test_read_completes(make_vm: MakeVm, entry: str) -> None:
    """KVM_RUN with immediate_exit puts the answer of user space into the register and stops behind the read.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, immediate_exit and the note on KVM_EXIT_IO
    and KVM_EXIT_MMIO.
    """
    vm, vcpu = prepare(make_vm, entry, int(MMIO))
    got = vcpu.next()
    assert isinstance(got, (IoExit, MmioExit))
    got.respond(0xA1B2_C3D4)
    assert run_immediate(vcpu) == (RUN_EINTR, errno.EINTR)
    regs = vcpu.regs.get()
    assert (regs.rax, regs.rip) == (0xA1B2_C3D4, vm.program.address_of(f"{entry}_end"))
    assert vm.symbol("went_on").u64 == 0
    assert vcpu.sync().args == (1,)


@pytest.mark.requires("trait:kvm_emulates")
def test_completion_comes_to_the_next_exit(make_vm: MakeVm) -> None:
    """An instruction with a further access exits for it even though immediate_exit is set.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure ("first finish incomplete operations").
    """
    _, vcpu = prepare(make_vm, "mmio_read_twice", int(MMIO) + 0x40)
    vcpu.expect(MmioExit).respond(0x1111_1111)
    vcpu.run_area.immediate_exit = 1
    second = vcpu.run(timeout=5)
    vcpu.run_area.immediate_exit = 0
    assert isinstance(second, MmioExit)
    assert (second.phys_addr, second.is_write, second.size) == (MMIO_GPA + 0x44, False, 4)
    second.respond(0x2222_2222)
    assert vcpu.sync().args == (0x2222_2222_1111_1111,)


def test_nothing_runs(make_vm: MakeVm) -> None:
    """With nothing to finish, KVM_RUN with immediate_exit ends with EINTR before the first guest instruction.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, immediate_exit.
    """
    vm, vcpu = prepare(make_vm, "pio_out")
    before = vcpu.regs.get()
    for _ in range(3):
        assert run_immediate(vcpu) == (RUN_EINTR, errno.EINTR)
    assert vcpu.regs.get() == before
    assert vm.symbol("went_on").u64 == 0
    assert vcpu.expect(IoExit).value == 0x1122_3344
