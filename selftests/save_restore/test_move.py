# SPDX-License-Identifier: Apache-2.0
"""Saves in the middle of an instruction or an event, and restores that are refused."""

from __future__ import annotations

import dataclasses
import errno
import struct

import pytest

from kvmpy import IoExit, MmioExit, RestoreError, VcpuSnapshot, kvm_sregs, refused

from .conftest import Mover

COUNTER = """
#include <kvmpy/guest.h>

u64 counter;

void guest_main(void)
{
	u64 local = 0;

	for (;;) {
		GUEST_SYNC(counter++, local++);
	}
}
"""


def test_an_answered_mmio_read_is_completed(mover: Mover) -> None:
    """Data given to an MMIO read before the save arrives in the guest after the restore.

    api.rst, KVM_EXIT_MMIO: the instruction is completed by the next KVM_RUN, and so it is before a save.
    """
    vm = mover.start("""
#include <kvmpy/guest.h>

#define HOLE	((void *)0x60000000UL)

void guest_main(void)
{
	for (;;)
		GUEST_SYNC(mmio_read32(HOLE));
}
""")
    seen = []
    for value in (7, 0xFEED_F00D):
        vm.vcpus[0].expect(MmioExit).respond(value)
        vm = mover.move(vm)
        seen.append(vm.vcpus[0].sync().args[0])
    assert seen == [7, 0xFEED_F00D]


PENDING = """
#include <kvmpy/guest.h>

#define VECTOR	0x41

u64 arrived[256];

static void count(struct exception_frame *frame)
{
	arrived[frame->vector]++;
	if (frame->vector >= 32)
		apic_eoi();
}

void guest_main(void)
{
	guest_exception_install(VECTOR, count);
	guest_exception_install(NMI_VECTOR, count);
	guest_exception_install(UD_VECTOR, count);
	apic_enable();
	apic_send_self(VECTOR);
	GUEST_SYNC(arrived[VECTOR]);
	irq_window();
	GUEST_SYNC(arrived[VECTOR]);
	GUEST_SYNC(arrived[NMI_VECTOR]);
	GUEST_SYNC(arrived[UD_VECTOR]);
}
"""


def test_a_pending_exception_is_delivered(mover: Mover) -> None:
    """An exception that was to be injected before the save reaches the guest after the restore.

    api.rst 4.31 KVM_GET_VCPU_EVENTS; KVM_SET_REGS drops pending exceptions, so the order matters.
    """
    vm = mover.start(PENDING)
    for _ in range(3):
        vm.vcpus[0].sync()
    vm.vcpus[0].complete_io()
    events = vm.vcpus[0].events.get()
    events.exception.injected = 1
    events.exception.nr = 6
    vm.vcpus[0].events.set(events)
    vm = mover.move(vm)
    assert vm.vcpus[0].sync().args == (1,)


def test_an_illegal_state_is_refused(mover: Mover) -> None:
    """Restoring system registers in an illegal combination fails with EINVAL.

    api.rst 4.14 KVM_SET_SREGS: CR0.PG without CR0.PE is not a state.
    """

    def without_protection(state: VcpuSnapshot) -> VcpuSnapshot:
        sregs = kvm_sregs.from_bytes(state.sregs)
        sregs.cr0 &= ~1
        return dataclasses.replace(state, sregs=sregs.to_bytes())

    vm = mover.start(COUNTER)
    vm.vcpus[0].sync()
    with refused(errno.EINVAL):
        mover.move(vm, without_protection)


@pytest.mark.requires("param:kvm.ignore_msrs=N")
def test_an_msr_that_the_new_vcpu_lacks_is_named(mover: Mover) -> None:
    """Restoring an MSR that KVM does not know is an error that names it, not a silent loss.

    api.rst 4.19 KVM_SET_MSRS: the number of MSRs set says which one was refused.
    """

    def with_unknown_msr(state: VcpuSnapshot) -> VcpuSnapshot:
        return dataclasses.replace(state, msrs=(*state.msrs, (0xDEAD_0000, 1)))

    vm = mover.start(COUNTER)
    vm.vcpus[0].sync()
    with pytest.raises(RestoreError, match="MSR 0xdead0000: saved 0x1, now absent"):
        mover.move(vm, with_unknown_msr)


def test_a_string_instruction_under_way_goes_on(mover: Mover) -> None:
    """A REP OUTS that is moved after each of its exits writes every byte once and in order.

    api.rst, KVM_EXIT_IO: after an exit the next KVM_RUN completes it, and the registers say what is left.
    """
    vm = mover.start("""
#include <kvmpy/guest.h>

u16 text[16];

void guest_main(void)
{
	for (u32 i = 0; i < 16; i++)
		text[i] = i;
	outsw(0x500, text, 16);
	GUEST_SYNC();
}
""")
    written = b""
    while isinstance(got := vm.vcpus[0].next(), IoExit):
        written += got.data
        vm = mover.move(vm)
    assert written == struct.pack("<16H", *range(16))


def test_an_access_in_parts_cannot_be_saved_in_between(mover: Mover) -> None:
    """An MMIO write across two pages exits for each of them; saving after the first one is an error.

    api.rst, KVM_EXIT_MMIO: completing the first part brings the exit of the next one.
    """
    vm = mover.start("""
#include <kvmpy/guest.h>

void guest_main(void)
{
	mmio_write64((void *)0x60000ffcUL, 0x1122334455667788);
	GUEST_SYNC(1);
}
""")
    assert vm.vcpus[0].expect(MmioExit).data == bytes.fromhex("88776655")
    with pytest.raises(RuntimeError, match=r"the instruction goes on with MmioExit.*phys_addr=536875008"):
        vm.vcpus[0].save()
    assert vm.vcpus[0].sync().args == (1,)
