# SPDX-License-Identifier: Apache-2.0
"""Nested state: what KVM_SET_NESTED_STATE refuses, and guests saved and restored in the middle of L2."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kvmpy import (
    CR0,
    EFER,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_CAP_EXCEPTION_PAYLOAD,
    KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT,
    L1,
    L2,
    Event,
    EventType,
    GuestVm,
    MakeVm,
    Msr,
    SvmExit,
    SvmNestedState,
    Vector,
    Vmcb,
    ioctls,
    kvm_nested_state,
    refused,
)
from kvmpy.x86.vmcb import VMCB_SIZE, IntCtl, MiscCtl
from kvmpy.x86.vmsa import SegmentAttribute
from selftests.conftest import Move
from selftests.nested.conftest import Notes

pytestmark = [
    pytest.mark.protections("none", "cbit"),
    pytest.mark.requires("cpuid:svm", "KVM_CAP_NESTED_STATE"),
]

NOP, OUT = b"\x90", b"\xe6\x42"


class InL2:
    """An L2 that stands behind an OUT."""

    def __init__(self, l2: L2) -> None:
        l2.reset()
        l2.load(OUT + NOP)
        l2.begin()
        l2.vcpu.next()
        l2.vcpu.complete_io()
        self.l2 = l2
        self.nested = l2.vcpu.nested

    def state(self) -> SvmNestedState:
        """Return the state as it is."""
        return SvmNestedState.of(self.nested.get())


@pytest.fixture
def inside(l2: L2) -> InL2:
    return InL2(l2)


def test_what_is_told(inside: InL2) -> None:
    """In L2 the state has the VMCB's address, the control area that VMRUN read, and L1's own registers.

    Documentation/virt/kvm/api.rst, 4.113 KVM_GET_NESTED_STATE.
    """
    l2, state = inside.l2, inside.state()
    assert (state.guest_mode, state.run_pending, state.gif) == (True, False, True)
    assert state.vmcb_pa == l2.pa(l2.vmcb_gva)
    assert state.vmcb is not None
    for name in ("intercept_4", "asid", "iopm_base_pa", "msrpm_base_pa", "misc_ctl", "nested_cr3"):
        assert state.vmcb[name] == l2.vmcb[name], name
    where = l2.vm.program.function(state.vmcb["rip"])
    assert where is not None
    assert where[0] == "guest_l2_enter"
    assert int(l2.vcpu.regs.get().rip) == int(l2.code) + 2
    assert l2.end().code == SvmExit.VMMCALL
    outside = inside.state()
    assert (outside.guest_mode, outside.vmcb) == (False, None)


Change = Callable[[SvmNestedState, Vmcb, L2], None]


def _fields(**values: int) -> Change:
    def change(_: SvmNestedState, vmcb: Vmcb, __: L2) -> None:
        for name, value in values.items():
            vmcb[name.replace("__", ".")] = value

    return change


def _bits(**values: int) -> Change:
    def change(_: SvmNestedState, vmcb: Vmcb, __: L2) -> None:
        for name, value in values.items():
            vmcb[name.replace("__", ".")] ^= int(value)

    return change


def _state(**values: int) -> Change:
    def change(state: SvmNestedState, _: Vmcb, __: L2) -> None:
        for name, value in values.items():
            setattr(state, name, value)

    return change


REFUSED: dict[str, Change] = {
    "VMCB not aligned": _state(vmcb_pa=0x1008),
    "VMCB beyond the width": _state(vmcb_pa=1 << 52),
    "VMRUN not intercepted": _bits(intercept_4=1),
    "ASID 0": _fields(asid=0),
    "MSRPM beyond the width": _fields(msrpm_base_pa=1 << 52),
    "IOPM beyond the width": _fields(iopm_base_pa=1 << 52),
    "nested CR3 beyond the width": _fields(misc_ctl=int(MiscCtl.NP), nested_cr3=1 << 51),
    "event of no type": _fields(event_inj=Event(1).word),
    "event of no exception": _fields(event_inj=Event(EventType.EXCEPTION, 2).word),
    "L1 without paging": _bits(cr0=CR0.PG),
    "L1 without protection": _bits(cr0=CR0.PE),
    "L1 with NW alone": _bits(cr0=CR0.NW),
    "L1 with upper bits of CR0": _bits(cr0=1 << 32),
    "L1 in virtual-8086 mode": _bits(rflags=1 << 17),
    "L1 without SVME": _bits(efer=EFER.SVME),
    "L1 with reserved bits of EFER": _bits(efer=1 << 63),
    "L1 with reserved bits of CR4": _bits(cr4=1 << 63),
    "L1 with reserved bits of CR3": _bits(cr3=1 << 51),
    "L1 with upper bits of DR6": _bits(dr6=1 << 32),
    "L1 with upper bits of DR7": _bits(dr7=1 << 32),
    "L1 with a 64-bit and 32-bit CS": _fields(
        cs__attrib=int(SegmentAttribute.L | SegmentAttribute.DB | SegmentAttribute.P | SegmentAttribute.CODE)
    ),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=[name.replace(" ", "-") for name in REFUSED])
def test_refused(inside: InL2, change: Change) -> None:
    """An illegal field is refused with EINVAL, and nothing has changed: L2 goes on where it was.

    Documentation/virt/kvm/api.rst, 4.114 KVM_SET_NESTED_STATE; arch/x86/kvm/svm/nested.c,
    svm_set_nested_state().
    """
    l2 = inside.l2
    before, regs = inside.nested.get().to_bytes(), l2.vcpu.regs.get()
    state = inside.state()
    assert state.vmcb is not None
    change(state, state.vmcb, l2)
    with refused(errno.EINVAL):
        inside.nested.set(state.to_struct())
    assert inside.nested.get().to_bytes() == before
    assert l2.vcpu.regs.get() == regs
    got = l2.end()
    assert (got.code, l2.offset) == (SvmExit.VMMCALL, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("format", 0, id="format-of-VMX"),
        pytest.param("format", 2, id="format-of-nothing"),
        *(pytest.param("flags", 1 | 1 << bit, id=f"flag-{bit}") for bit in (2, 3, 7, 9, 15)),
        pytest.param("size", kvm_nested_state.SIZE, id="without-its-VMCB"),
        pytest.param("size", kvm_nested_state.SIZE + VMCB_SIZE - 1, id="short"),
        pytest.param("size", kvm_nested_state.SIZE - 1, id="less-than-a-header"),
    ],
)
def test_header_refused(inside: InL2, field: str, value: int) -> None:
    """A header that says what cannot be is refused with EINVAL, and nothing has changed.

    Documentation/virt/kvm/api.rst, 4.114 KVM_SET_NESTED_STATE.
    """
    before = inside.nested.get().to_bytes()
    bad = inside.state().to_struct()
    setattr(bad, field, value)
    with refused(errno.EINVAL):
        inside.nested.set(bad)
    assert inside.nested.get().to_bytes() == before
    assert inside.l2.end().code == SvmExit.VMMCALL


def test_without_svme(make_vm: MakeVm) -> None:
    """Without EFER.SVME only the state of no nested guest is taken, with GIF set or clear.

    arch/x86/kvm/svm/nested.c, svm_set_nested_state().
    """
    l2 = L2(make_vm(L1).vcpus[0])
    l2.agent.start()
    nested = l2.vcpu.nested
    for flags, taken in ((0, True), (1 << 8, True), (1, False), (2, False), (1 | 1 << 8, False)):
        state = SvmNestedState(vmcb_pa=0x1000, vmcb=Vmcb(bytearray(VMCB_SIZE))).to_struct()
        state.flags = flags
        if taken:
            nested.set(state)
            assert nested.get().flags == flags
        else:
            with refused(errno.EINVAL, about=f"flags {flags:#x}"):
                nested.set(state)


def test_left_by_the_host(inside: InL2) -> None:
    """A state without guest mode takes the vCPU out of L2, which has no exit then.

    arch/x86/kvm/svm/nested.c, svm_leave_nested().
    """
    inside.nested.set(SvmNestedState().to_struct())
    assert not inside.state().guest_mode


def test_size_asked_for(inside: InL2) -> None:
    """KVM_GET_NESTED_STATE with too little room fails with E2BIG, and tells how much it needs.

    Documentation/virt/kvm/api.rst, 4.113 KVM_GET_NESTED_STATE.
    """
    state, result = _with_room(inside, kvm_nested_state.SIZE)
    assert result == (-1, errno.E2BIG)
    assert state.size == kvm_nested_state.SIZE + VMCB_SIZE


@pytest.mark.parametrize("room", [kvm_nested_state.SIZE, kvm_nested_state.SIZE + 64])
def test_no_more_than_there_is_room(inside: InL2, room: int) -> None:
    """KVM_GET_NESTED_STATE writes nothing behind the size that it was given.

    Documentation/virt/kvm/api.rst, 4.113: "the total state size exceeds the value of 'size'".
    """
    state, _ = _with_room(inside, room)
    behind = state.to_bytes()[room:]
    changed = [at for at, byte in enumerate(behind) if byte != FILL]
    assert not changed, f"{len(changed)} bytes written from {room + changed[0]:#x} on, the size was {room:#x}"


FILL = 0xAA


def _with_room(inside: InL2, room: int) -> tuple[kvm_nested_state, tuple[int, int]]:
    """Ask for the state, with a size that is smaller than the memory there is."""
    state = kvm_nested_state.from_bytes(bytes([FILL]) * (kvm_nested_state.SIZE + VMCB_SIZE))
    state.size = room
    return state, inside.l2.vcpu.ioctl_raw(ioctls.KVM_GET_NESTED_STATE, state)


STAGES = """
#include <kvmpy/guest.h>

static u64 shared_count;

static void l2_main(void)
{
	u64 mine = 100;

	GUEST_SYNC(1, shared_count++, mine++);
	wrmsr(0xc0000102, 0x1234567000);
	vmmcall();
	GUEST_SYNC(3, shared_count++, mine++);
	struct guest_fault fault = GUEST_TRY("ud2");
	GUEST_SYNC(4, fault.vector, rdmsr(0xc0000102));
	sti();
	GUEST_SYNC(5, read_rflags() >> 9 & 1, mine++);
	vmmcall();
}

void guest_main(void)
{
	struct guest_l2 *l2 = guest_l2();

	GUEST_SYNC(0, shared_count++, 0);
	l2_reset(l2, l2_main);
	vmcb_intercept(l2->vmcb, SVM_EXIT_EXCP_BASE + NMI_VECTOR, false);
	GUEST_ASSERT_EQ(l2_run(l2), SVM_EXIT_VMMCALL);
	GUEST_SYNC(2, shared_count++, l2->vmcb->cpl);
	l2->vmcb->rip += 3;
	GUEST_ASSERT_EQ(l2_run(l2), SVM_EXIT_VMMCALL);
	clgi();
	GUEST_SYNC(6, shared_count++, read_cr3() == l2->vmcb->cr3);
	stgi();
	GUEST_DONE();
}
"""
SEEN = [(0, 0, 0), (1, 1, 100), (2, 2, 0), (3, 3, 101), (4, 6, 0x12_3456_7000), (5, 1, 102), (6, 4, 1)]


def _stages(make_vm: MakeVm, npt: bool) -> GuestVm:
    vm = make_vm(STAGES)
    L2(vm.vcpus[0], npt=npt)
    vm.launch()
    return vm


def test_every_stage_moves(make_vm: MakeVm, npt: bool, move: Move) -> None:
    """A guest that is moved to a new VM at every SYNC, in L1 and in L2, goes on as if nothing had happened.

    Documentation/virt/kvm/api.rst, 4.113 and 4.114.
    """
    vm = _stages(make_vm, npt)
    seen, modes = [], []
    for _ in SEEN:
        seen.append(vm.vcpus[0].sync().args)
        vm.vcpus[0].complete_io()
        modes.append(vm.vcpus[0].nested.get().flags)
        vm = move(vm)
    assert seen == SEEN
    gif = 1 << 8
    assert modes == [gif, gif | 1, gif, gif | 1, gif | 1, gif | 1, 0]
    vm.vcpus[0].run_to_done()


def test_every_stage_restores(make_vm: MakeVm, npt: bool) -> None:
    """What was saved in L1 or in L2 is what a vCPU holds after the restore, and it goes on.

    Documentation/virt/kvm/api.rst, 4.113 and 4.114.
    """
    vm = _stages(make_vm, npt)
    vcpu = vm.vcpus[0]
    for expected in SEEN:
        assert vcpu.sync().args == expected
        saved = vcpu.save()
        vcpu.restore(saved)
        again = vcpu.save()
        assert not saved.differences(again), saved.differences(again)


@pytest.mark.parametrize(
    "event",
    [
        Event(EventType.EXCEPTION, Vector.UD),
        Event(EventType.EXCEPTION, Vector.GP, 0x50),
        Event(EventType.NMI, 2),
    ],
    ids=str,
)
def test_pending_events_move(notes: Notes, event: Event) -> None:
    """An event that is pending for L2 is restored with it, and exits where L1 intercepts it.

    Documentation/virt/kvm/api.rst, 4.31 and 4.114.
    """
    l2 = notes.l2
    l2.reset()
    l2.load(OUT + NOP)
    if event.type == EventType.NMI:
        l2.intercept(SvmExit.NMI)
    else:
        l2.intercept(SvmExit.EXCP_BASE + event.vector)
    l2.begin()
    l2.vcpu.next()
    l2.vcpu.complete_io()
    if event.type == EventType.NMI:
        l2.vcpu.events.nmi()
        expected = int(SvmExit.NMI)
    else:
        l2.vm.enable_cap(KVM_CAP_EXCEPTION_PAYLOAD, 1)
        events = l2.vcpu.events.get()
        events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD
        events.exception.pending, events.exception.nr = 1, event.vector
        events.exception.has_error_code = int(event.error_code is not None)
        events.exception.error_code = event.error_code or 0
        l2.vcpu.events.set(events)
        expected = SvmExit.EXCP_BASE + event.vector
    saved = l2.vcpu.save()
    l2.vcpu.nested.set(SvmNestedState().to_struct())
    l2.vcpu.restore(saved)
    got = l2.end()
    assert (got.code, l2.offset) == (expected, 2), str(got)
    if event.error_code is not None:
        assert got.info1 == event.error_code


def test_virtual_interrupt_moves(l2: L2) -> None:
    """V_IRQ and V_TPR of a running L2 are part of its state.

    AMD APM volume 2, 15.21.4.
    """
    l2.reset()
    l2.load(OUT + NOP)
    l2.vmcb["int_ctl"] = IntCtl.V_IRQ | IntCtl.V_INTR_MASKING | 5 << 16 | 3
    l2.vmcb["int_vector"] = 0x61
    l2.begin()
    l2.vcpu.next()
    saved = l2.vcpu.save()
    l2.vcpu.nested.set(SvmNestedState().to_struct())
    l2.vcpu.restore(saved)
    assert l2.end().code == SvmExit.VMMCALL
    assert l2.vmcb["int_ctl"] & (IntCtl.V_IRQ | 0xFF | 0xF_0000) == IntCtl.V_IRQ | 5 << 16 | 3


def test_page_attributes_move(l2: L2) -> None:
    """L2's own PAT is in the header, and is checked there, where L2 has one.

    KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT; arch/x86/kvm/svm/nested.c, svm_set_nested_state().
    """
    if l2.npt is None:
        pytest.skip("L2 has a PAT of its own only with nested paging")
    l2.agent.start()
    l2.vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT)
    l2.reset()
    mine, theirs = 0x0606_0606_0606_0606, l2.agent.rdmsr(Msr.MSR_IA32_CR_PAT)
    l2.load(OUT + b"\x0f\x32", rcx=Msr.MSR_IA32_CR_PAT)
    l2.vmcb["g_pat"] = mine
    l2.begin()
    l2.vcpu.next()
    l2.vcpu.complete_io()
    state = SvmNestedState.of(l2.vcpu.nested.get())
    assert state.gpat == mine
    for bad in (2, 0x0303_0303_0303_0303):
        state.gpat = bad
        with refused(errno.EINVAL):
            l2.vcpu.nested.set(state.to_struct())
    saved = l2.vcpu.save()
    l2.vcpu.restore(saved)
    assert l2.end().code == SvmExit.VMMCALL
    assert l2.register("rax") | l2.register("rdx") << 32 == mine == l2.vmcb["g_pat"]
    assert l2.agent.rdmsr(Msr.MSR_IA32_CR_PAT) == theirs


def test_shared_page_attributes(l2: L2) -> None:
    """Unless the quirk is disabled L2's PAT is L1's, and what L2 writes L1 reads.

    KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT.
    """
    l2.reset()
    value = 0x0007_0406_0007_0006
    code = b"\x0f\x30\x0f\x32"
    got = l2.run(code, rcx=Msr.MSR_IA32_CR_PAT, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    assert got.code == SvmExit.VMMCALL
    assert l2.register("rax") | l2.register("rdx") << 32 == value
    assert l2.agent.rdmsr(Msr.MSR_IA32_CR_PAT) == value
