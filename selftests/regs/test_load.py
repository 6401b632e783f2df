# SPDX-License-Identifier: Apache-2.0
"""Registers shared through kvm_run that another thread changes while KVM_RUN takes them."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    CR4,
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
    GuestVcpu,
    IoExit,
    MakeVm,
)
from kvmpy.core.vcpu import RUN_ERROR, RUN_EXIT, RUN_UCALL
from selftests.conftest import Beside, turns

REGS, SREGS, EVENTS = int(KVM_SYNC_X86_REGS), int(KVM_SYNC_X86_SREGS), int(KVM_SYNC_X86_EVENTS)

pytestmark = [
    pytest.mark.requires(f"KVM_CAP_SYNC_REGS&{REGS | SREGS | EVENTS:#x}"),
    pytest.mark.usefixtures("open_registers"),
    # Before 0d033770d43a (in v6.6) KVM took what it had not checked.
    pytest.mark.dangerous,
]

UD, NO_VECTOR = 6, 255
GUEST = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	for (;;)
		outb(0x42, 0);
}
"""


class Victim:
    """A vCPU between two exits that is brought back to where it was after each try."""

    def __init__(self, vcpu: GuestVcpu) -> None:
        self.vcpu = vcpu
        vcpu.expect(IoExit)
        vcpu.complete_io()
        self.saved = vcpu.regs.get(), vcpu.regs.get_sregs(), vcpu.events.get()

    def restore(self) -> None:
        """Put the state back that KVM gave."""
        regs, sregs, events = self.saved
        self.vcpu.regs.set_sregs(sregs)
        self.vcpu.regs.set(regs)
        self.vcpu.events.set(events)

    def attempt(self, what: int) -> None:
        """Run once with the classes *what* from kvm_run: it works, or is refused as a whole."""
        self.vcpu.regs.mark_sync_dirty(what)
        outcome = self.vcpu.run_once()
        if outcome == RUN_ERROR:
            assert self.vcpu.run_errno == errno.EINVAL
        else:
            # An exception may reach the guest, which says so.
            assert outcome in (RUN_EXIT, RUN_UCALL)
        self.vcpu.run_area.kvm_dirty_regs = 0


@pytest.fixture
def victim(make_vm: MakeVm) -> Victim:
    return Victim(make_vm.start(GUEST).vcpus[0])


@pytest.mark.parametrize("first", ["injected", "pending"])
def test_exceptions_change_while_they_are_taken(victim: Victim, load_seconds: float, first: str) -> None:
    """An exception in kvm_run that changes meanwhile is taken as it was checked: no vector that is none.

    arch/x86/kvm/x86.c, sync_regs(); Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS.
    """
    vcpu = victim.vcpu
    shared = vcpu.regs.sync.events

    def scribble(turn: int) -> None:
        setattr(shared.exception, first, turn & 1)
        shared.exception.nr = UD if turn & 2 else NO_VECTOR

    with Beside(scribble) as beside:
        for _ in turns(load_seconds):
            for _run in range(20):
                victim.attempt(EVENTS)
                got = vcpu.events.get().exception
                assert not (got.injected and got.pending)
                assert got.nr < 32 or not (got.injected or got.pending), got
                victim.restore()
    assert beside.count
    shared.exception.injected = shared.exception.pending = 0
    assert isinstance(vcpu.next(), IoExit)


def test_control_registers_change_while_they_are_taken(victim: Victim, load_seconds: float) -> None:
    """CR4 in kvm_run that changes meanwhile is taken as it was checked, or refused with the others.

    arch/x86/kvm/x86.c, sync_regs() and __set_sregs().
    """
    vcpu = victim.vcpu
    good = vcpu.regs.get_sregs()
    shared = vcpu.regs.sync.sregs
    vcpu.regs.set_sync(SREGS)
    vcpu.expect(IoExit)
    vcpu.complete_io()
    vcpu.regs.set_sync(0)
    # PAE is needed in long mode; no processor has the topmost bit.
    values = [good.cr4, good.cr4 & ~CR4.PAE, good.cr4 | 1 << 63]

    def scribble(turn: int) -> None:
        shared.cr4 = values[turn % 3]

    with Beside(scribble) as beside:
        for _ in turns(load_seconds):
            for _run in range(20):
                victim.attempt(SREGS)
                assert vcpu.regs.get_sregs().cr4 == good.cr4
                victim.restore()
    assert beside.count
    assert isinstance(vcpu.next(), IoExit)
