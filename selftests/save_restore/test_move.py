# SPDX-License-Identifier: Apache-2.0
"""A vCPU saved in mid-run and restored in a new VM: the guest goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import errno
import struct

import pytest

from kvmpy.core.errors import KvmError
from kvmpy.core.exits import IoExit, MmioExit
from kvmpy.core.irq import Msi
from kvmpy.core.vcpu import VcpuTimeoutError
from kvmpy.core.vcpu_save import RestoreError, VcpuSnapshot
from kvmpy.uapi.constants import KVM_MP_STATE_HALTED
from kvmpy.uapi.structs import kvm_sregs

from .conftest import Mover

pytestmark = pytest.mark.protections("all")

# Words of the XSAVE area.
XMM3 = (160 + 3 * 16) // 4
XSTATE_BV = 512 // 4

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


def test_the_guest_goes_on_where_it_stopped(mover: Mover) -> None:
    """A guest that is moved to a new VM again and again loses no step, in memory or in registers.

    api.rst, section 4: the state that KVM_GET_* returns is what KVM_SET_* takes.
    """
    vm = mover.start(COUNTER)
    seen = []
    for _ in range(10):
        seen.append(vm.vcpus[0].sync().args)
        vm = mover.move(vm)
    assert seen == [(n, n) for n in range(10)]


def test_what_was_restored_is_what_was_saved(mover: Mover) -> None:
    """The complete state that is read back from the new vCPU equals the saved one.

    api.rst, section 4: KVM_GET_* after KVM_SET_*.
    """
    vm = mover.start(COUNTER)
    vm.vcpus[0].sync()
    before = vm.vcpus[0].save()
    assert mover.move(vm).vcpus[0].save().differences(before) == []


def test_an_answered_in_is_completed(mover: Mover) -> None:
    """Data given to a port read before the save arrives in the guest after the restore.

    api.rst, KVM_EXIT_IO: the instruction is completed by the next KVM_RUN, and so it is before a save.
    """
    vm = mover.start("""
#include <kvmpy/guest.h>

void guest_main(void)
{
	for (;;)
		GUEST_SYNC(inl(0x500));
}
""")
    seen = []
    for value in (0x1111_1111, 0xFEED_F00D):
        vm.vcpus[0].expect(IoExit).respond(value)
        vm = mover.move(vm)
        seen.append(vm.vcpus[0].sync().args[0])
    assert seen == [0x1111_1111, 0xFEED_F00D]


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


def test_msrs_go_with_the_guest(mover: Mover) -> None:
    """MSRs that the guest wrote hold the same values after the move.

    api.rst 4.3 KVM_GET_MSR_INDEX_LIST names the MSRs that make up the state.
    """
    vm = mover.start("""
#include <kvmpy/guest.h>

#define MSR_SYSENTER_ESP	0x175
#define MSR_LSTAR		0xc0000082
#define MSR_KERNEL_GS_BASE	0xc0000102

void guest_main(void)
{
	wrmsr(MSR_SYSENTER_ESP, 0x1234000);
	wrmsr(MSR_LSTAR, 0x5678000);
	wrmsr(MSR_KERNEL_GS_BASE, 0x9abc000);
	GUEST_SYNC();
	GUEST_SYNC(rdmsr(MSR_SYSENTER_ESP), rdmsr(MSR_LSTAR), rdmsr(MSR_KERNEL_GS_BASE));
}
""")
    vm.vcpus[0].sync()
    vm = mover.move(vm)
    assert vm.vcpus[0].sync().args == (0x123_4000, 0x567_8000, 0x9AB_C000)


def test_control_and_debug_registers_go_with_the_guest(mover: Mover) -> None:
    """CR8 and the debug registers hold what the guest put there.

    api.rst 4.13 KVM_GET_SREGS, 4.33 KVM_GET_DEBUGREGS.
    """
    vm = mover.start("""
#include <kvmpy/guest.h>

void guest_main(void)
{
	write_cr8(5);
	write_dr0(0x1000);
	write_dr3(0x4000);
	GUEST_SYNC();
	GUEST_SYNC(read_cr8(), read_dr0(), read_dr3());
}
""")
    vm.vcpus[0].sync()
    vm = mover.move(vm)
    assert vm.vcpus[0].sync().args == (5, 0x1000, 0x4000)


def test_vector_registers_go_with_the_guest(mover: Mover) -> None:
    """The contents of the SSE registers survive the move.

    api.rst 4.42 KVM_GET_XSAVE.
    """
    vm = mover.start(COUNTER)
    vm.vcpus[0].sync()
    area = vm.vcpus[0].get_xsave2()
    area.region[XMM3 : XMM3 + 4] = [1, 22, 333, 4444]
    area.region[XSTATE_BV] |= 2
    vm.vcpus[0].set_xsave(area)
    vm = mover.move(vm)
    vm.vcpus[0].sync()
    assert list(vm.vcpus[0].get_xsave2().region[XMM3 : XMM3 + 4]) == [1, 22, 333, 4444]


def test_time_does_not_go_back(mover: Mover) -> None:
    """The time-stamp counter that the guest reads grows across a move.

    api.rst 4.3: MSR_IA32_TSC is part of the state.
    """
    vm = mover.start("""
#include <kvmpy/guest.h>

void guest_main(void)
{
	for (;;)
		GUEST_SYNC(rdtsc());
}
""")
    seen = []
    for _ in range(4):
        seen.append(vm.vcpus[0].sync().args[0])
        vm = mover.move(vm)
    assert seen == sorted(set(seen))


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
	sti_hlt();
	GUEST_SYNC(arrived[VECTOR]);
}
"""


def test_an_interrupt_that_waits_is_delivered_once(mover: Mover) -> None:
    """An interrupt that is pending in the local APIC is delivered in the new VM, exactly once.

    api.rst 4.57 KVM_GET_LAPIC: the request register is part of the state.
    """
    vm = mover.start(PENDING)
    assert vm.vcpus[0].sync().args == (0,)
    vm = mover.move(vm)
    assert vm.vcpus[0].sync().args == (1,)


def test_a_pending_nmi_is_delivered(mover: Mover) -> None:
    """An NMI that was queued before the save reaches the guest after the restore.

    api.rst 4.31 KVM_GET_VCPU_EVENTS.
    """
    vm = mover.start(PENDING)
    vm.vcpus[0].sync()
    vm.vcpus[0].sync()
    vm.vcpus[0].nmi()
    vm = mover.move(vm)
    assert vm.vcpus[0].sync().args == (1,)


def test_a_pending_exception_is_delivered(mover: Mover) -> None:
    """An exception that was to be injected before the save reaches the guest after the restore.

    api.rst 4.31 KVM_GET_VCPU_EVENTS; KVM_SET_REGS drops pending exceptions, so the order matters.
    """
    vm = mover.start(PENDING)
    for _ in range(3):
        vm.vcpus[0].sync()
    vm.vcpus[0].complete_io()
    events = vm.vcpus[0].get_vcpu_events()
    events.exception.injected = 1
    events.exception.nr = 6
    vm.vcpus[0].set_vcpu_events(events)
    vm = mover.move(vm)
    assert vm.vcpus[0].sync().args == (1,)


def test_a_halted_vcpu_sleeps_on_and_wakes(mover: Mover) -> None:
    """A vCPU that was saved in HLT is halted in the new VM, until an interrupt comes.

    api.rst 4.38 KVM_GET_MP_STATE.
    """
    vm = mover.start(PENDING)
    for _ in range(4):
        vm.vcpus[0].sync()
    with pytest.raises(VcpuTimeoutError):
        vm.vcpus[0].run(timeout=0.2)
    assert vm.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED
    vm = mover.move(vm)
    assert vm.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED
    vm.signal_msi(Msi.to(0, 0x41))
    assert vm.vcpus[0].sync().args == (2,)


def test_two_vcpus_keep_their_own_states(mover: Mover) -> None:
    """Each vCPU of a VM goes on with its own registers.

    api.rst, section 4: the state is that of one vCPU.
    """
    vm = mover.start(
        """
#include <kvmpy/guest.h>

void guest_main(void)
{
	u64 mine = 100 * guest_cpu_index();

	for (;;)
		GUEST_SYNC(guest_cpu_index(), mine++);
}
""",
        vcpus=2,
    )
    seen: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(3):
        for vcpu in vm.vcpus:
            index, value = vcpu.sync().args
            seen[index].append(value)
        vm = mover.move(vm)
    assert seen == {0: [0, 1, 2], 1: [100, 101, 102]}


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
    with pytest.raises(KvmError) as caught:
        mover.move(vm, without_protection)
    assert caught.value.errno == errno.EINVAL


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
