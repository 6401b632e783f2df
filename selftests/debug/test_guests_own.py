# SPDX-License-Identifier: Apache-2.0
"""A debugger outside beside what the guest does itself: its exceptions, debug registers, trap flag."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_EXCEPTION_PAYLOAD,
    KVM_CAP_SET_GUEST_DEBUG2,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
    DebugExit,
    DebugPoint,
    GuestVcpu,
    GuestVm,
    Gva,
    MakeVm,
    Vcpu,
    Vector,
    Vm,
    refused,
)

pytestmark = [
    pytest.mark.requires("KVM_CAP_SET_GUEST_DEBUG"),
    pytest.mark.usefixtures("open_registers", "open_tables"),
]

DR6_ACTIVE_LOW = 0xFFFF_0FF0
DR7_GD = 1 << 13
FAR_AWAY = 0x7654_3210

GUEST = """
#include <kvmpy/guest.h>

static volatile u64 hits, hit_rip, hit_dr6;

/* The debugger in the guest: notes the hit and lets the instruction run. */
static void own_debugger(struct exception_frame *frame)
{
	hits++;
	hit_rip = frame->rip;
	hit_dr6 = read_dr6();
	write_dr6(0xffff0ff0);
	frame->rflags |= BIT(16);
	frame->rflags &= ~BIT(8);
}

static __noinline void spot(void)
{
	asm volatile(".globl spot_at, spot_behind\\n"
		     "spot_at: nop\\n"
		     "spot_behind: nop" : : : "memory");
}

/* #PF, #UD and #GP in turn: vector, error code and CR2 of each. */
void exceptions(void)
{
	struct guest_fault pf, ud, gp;

	GUEST_SYNC(0);
	pf = GUEST_TRY("movb (%0), %%al", : : "r"(0x76543210ul) : "rax");
	ud = GUEST_TRY("ud2",);
	gp = GUEST_TRY("movb (%0), %%al", : : "r"(0x8000000000000000ul) : "rax");
	GUEST_SYNC(pf.vector, pf.error_code, pf.cr2, ud.vector, gp.vector, gp.error_code);
}

void breakpoint(void)
{
	extern const char spot_at[];

	guest_exception_install(DB_VECTOR, own_debugger);
	write_dr0((uintptr_t)spot_at);
	write_dr7(0x402);
	GUEST_SYNC(0);
	spot();
	GUEST_SYNC(hits, hit_rip, hit_dr6, read_dr0(), read_dr7());
	spot();
	GUEST_SYNC(hits, hit_rip, hit_dr6);
}

void trap_flag(void)
{
	guest_exception_install(DB_VECTOR, own_debugger);
	GUEST_SYNC(0);
	asm volatile("pushfq; orq $0x100, (%%rsp); popfq\\n"
		     ".globl trapped_at, trapped_behind\\n"
		     "trapped_at: nop\\n"
		     "trapped_behind: nop" : : : "memory", "cc");
	GUEST_SYNC(hits, hit_rip, hit_dr6);
}

void injected(void)
{
	guest_exception_install(DB_VECTOR, own_debugger);
	GUEST_SYNC(0);
	GUEST_SYNC(hits);
}

static volatile u64 detected, detected_dr6;

static void detector(struct exception_frame *frame)
{
	detected++;
	detected_dr6 = read_dr6();
	write_dr6(0xffff0ff0);
}

/* The processor clears DR7.GD when it delivers the exception, so the access works the second time. */
void general_detect(void)
{
	guest_exception_install(DB_VECTOR, detector);
	GUEST_SYNC(0);
	write_dr7(0x2400);
	read_dr0();
	GUEST_SYNC(detected, detected_dr6, read_dr7());
}
"""


def start(make_vm: MakeVm, entry: str) -> tuple[GuestVm, GuestVcpu]:
    """Return a VM that stands at the first SYNC of *entry*."""
    vm = make_vm.start(GUEST, entry)
    vcpu = vm.vcpus[0]
    vcpu.sync()
    vcpu.complete_io()
    return vm, vcpu


@pytest.mark.usefixtures("debug_registers")
def test_exceptions_stay_with_the_guest(make_vm: MakeVm) -> None:
    """While a debugger watches, faults of the guest reach its handlers with their error codes and CR2.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG (only #BP and #DB are debug events).
    """
    _, vcpu = start(make_vm, "exceptions")
    vcpu.debug.set_points([DebugPoint(FAR_AWAY + 0x1000)], control=int(KVM_GUESTDBG_USE_SW_BP))
    assert vcpu.sync().args == (Vector.PF, 0, FAR_AWAY, Vector.UD, Vector.GP, 0)


@pytest.mark.usefixtures("debug_registers")
def test_own_breakpoint(make_vm: MakeVm) -> None:
    """With no debugger outside, the guest's own breakpoint gives it #DB before the instruction.

    Intel SDM volume 3, 18.3.1.1 Instruction-Breakpoint Exception Condition.
    """
    vm, vcpu = start(make_vm, "breakpoint")
    where = vm.program.address_of("spot_at")
    assert vcpu.sync().args == (1, where, DR6_ACTIVE_LOW | 1, where, 0x402)


@pytest.mark.usefixtures("debug_registers")
def test_own_breakpoint_waits(make_vm: MakeVm) -> None:
    """Breakpoints from outside take the place of the guest's, which are kept and come back afterwards.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG ("updated to the correct (supplied) values").
    """
    vm, vcpu = start(make_vm, "breakpoint")
    own = vm.program.address_of("spot_at")
    vcpu.debug.set_points([DebugPoint(vm.program.address_of("spot_behind"))])
    got = vcpu.expect(DebugExit)
    assert (got.pc, got.dr6) == (vm.program.address_of("spot_behind"), DR6_ACTIVE_LOW | 1)
    kept = vcpu.debug.get_regs()
    assert (kept.db[0], kept.dr6, kept.dr7) == (own, DR6_ACTIVE_LOW, 0x402)
    vcpu.debug.set_points([DebugPoint(FAR_AWAY)])
    assert vcpu.sync().args == (0, 0, 0, own, 0x402)
    vcpu.debug.set(0)
    assert vcpu.sync().args == (1, own, DR6_ACTIVE_LOW | 1)


def test_own_trap_flag(make_vm: MakeVm) -> None:
    """With no debugger outside, RFLAGS.TF gives the guest #DB behind one instruction, with DR6.BS.

    Intel SDM volume 3, 18.3.1.4 Single-Step Exception Condition.
    """
    vm, vcpu = start(make_vm, "trap_flag")
    assert vcpu.sync().args == (1, vm.program.address_of("trapped_behind"), DR6_ACTIVE_LOW | 1 << 14)


def test_own_general_detect(make_vm: MakeVm) -> None:
    """With no debugger outside, an access to a debug register under DR7.GD gives the guest #DB with DR6.BD.

    Intel SDM volume 3, 18.3.1.3 General-Detect Exception Condition.
    """
    _, vcpu = start(make_vm, "general_detect")
    assert vcpu.sync().args == (1, DR6_ACTIVE_LOW | 1 << 13, 0x400)


def test_general_detect_from_outside(make_vm: MakeVm) -> None:
    """With DR7.GD in the debugger's registers an access of the guest to a debug register exits with DR6.BD.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG; Intel SDM volume 3, 18.3.1.3.
    """
    vm, vcpu = start(make_vm, "general_detect")
    vcpu.debug.set(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, {7: 0x400 | DR7_GD})
    got = vcpu.expect(DebugExit)
    assert (got.exception, got.dr6) == (Vector.DB, DR6_ACTIVE_LOW | 1 << 13)
    # At the MOV to DR7, not behind it.
    assert bytes(vm.read(Gva(got.pc), 2)) == b"\x0f\x23"


def test_inject_db(make_vm: MakeVm) -> None:
    """KVM_GUESTDBG_INJECT_DB gives the guest one #DB.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_INJECT_DB.
    """
    _, vcpu = start(make_vm, "injected")
    vcpu.debug.set(KVM_GUESTDBG_INJECT_DB)
    assert vcpu.sync().args == (1,)


@pytest.mark.requires("KVM_CAP_EXCEPTION_PAYLOAD")
@pytest.mark.parametrize("control", [KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_INJECT_BP], ids=["DB", "BP"])
def test_inject_over_another(vm: Vm, control: int) -> None:
    """While an exception is pending another one is refused with EBUSY.

    arch/x86/kvm/x86.c, kvm_arch_vcpu_ioctl_set_guest_debug().
    """
    vm.enable_cap(KVM_CAP_EXCEPTION_PAYLOAD, 1)
    vcpu: Vcpu = vm.create_vcpu()
    events = vcpu.events.get()
    events.exception.pending, events.exception.nr = 1, int(Vector.UD)
    vcpu.events.set(events)
    with refused(errno.EBUSY):
        vcpu.debug.set(control)


@pytest.mark.requires("KVM_CAP_SET_GUEST_DEBUG2")
def test_capability(vm: Vm) -> None:
    """KVM_CAP_SET_GUEST_DEBUG2 names the control bits that KVM has, those of every x86 KVM among them.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG ("indicates the supported KVM_GUESTDBG_* bits").
    """
    always = (
        KVM_GUESTDBG_ENABLE
        | KVM_GUESTDBG_SINGLESTEP
        | KVM_GUESTDBG_USE_SW_BP
        | KVM_GUESTDBG_USE_HW_BP
        | KVM_GUESTDBG_INJECT_DB
        | KVM_GUESTDBG_INJECT_BP
    )
    assert vm.check_extension(KVM_CAP_SET_GUEST_DEBUG2) & always == always
