# SPDX-License-Identifier: Apache-2.0
"""Registers shared through kvm_run instead of by ioctl."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    CR0,
    CR4,
    KVM_CAP_SYNC_REGS,
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
    KVM_SYNC_X86_VALID_FIELDS,
    GuestVcpu,
    IoExit,
    MakeVm,
    Vm,
)
from kvmpy.core.vcpu import RUN_ERROR

REGS, SREGS, EVENTS = int(KVM_SYNC_X86_REGS), int(KVM_SYNC_X86_SREGS), int(KVM_SYNC_X86_EVENTS)
PORT = 0x42

pytestmark = [
    pytest.mark.requires(f"KVM_CAP_SYNC_REGS&{REGS | SREGS | EVENTS:#x}"),
    pytest.mark.usefixtures("open_registers"),
]

# RBX counts the exits.
GUEST = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	asm volatile("xorl %%ebx, %%ebx\\n"
		     "1: incq %%rbx\\n\\t"
		     "outb %%al, $0x42\\n\\t"
		     "jmp 1b" : : : "rbx", "memory");
}
"""


@pytest.fixture
def vcpu(make_vm: MakeVm) -> GuestVcpu:
    """A vCPU at its first exit."""
    vcpu = make_vm.start(GUEST).vcpus[0]
    vcpu.expect(IoExit)
    return vcpu


def exit_again(vcpu: GuestVcpu) -> int:
    """Run to the next exit and return RBX by ioctl."""
    assert vcpu.expect(IoExit).port == PORT
    return vcpu.regs.get().rbx


def run_errno(vcpu: GuestVcpu) -> int:
    """Expect that KVM_RUN fails, and return its errno."""
    assert vcpu.run_once() == RUN_ERROR
    return vcpu.run_errno


def test_capability(vm: Vm) -> None:
    """KVM_CAP_SYNC_REGS is the set of register classes, all of which have a bit that kvmpy knows.

    Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS.
    """
    assert vm.check_extension(KVM_CAP_SYNC_REGS) == KVM_SYNC_X86_VALID_FIELDS


def test_valid(vcpu: GuestVcpu) -> None:
    """Each class in kvm_valid_regs is filled at every exit with what its ioctl returns.

    Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS.
    """
    vcpu.regs.set_sync(REGS | SREGS | EVENTS)
    for count in (2, 3):
        assert exit_again(vcpu) == count
        assert vcpu.regs.sync.regs.rbx == count
        assert vcpu.regs.sync.regs == vcpu.regs.get()
        assert vcpu.regs.sync.sregs == vcpu.regs.get_sregs()
        assert vcpu.regs.sync.events == vcpu.events.get()


@pytest.mark.parametrize("valid", [0, REGS, SREGS, EVENTS], ids=["none", "regs", "sregs", "events"])
def test_only_valid(vcpu: GuestVcpu, valid: int) -> None:
    """Classes that are not in kvm_valid_regs are left as they are.

    Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS.
    """
    marks = (0xBAD1, 0xBAD2, 0xBAD3)
    shared = vcpu.regs.sync
    shared.regs.r15, shared.sregs.cr2, shared.events.sipi_vector = marks
    vcpu.regs.set_sync(valid)
    exit_again(vcpu)
    kept = (shared.regs.r15, shared.sregs.cr2, shared.events.sipi_vector)
    expected = tuple(
        mark if not valid & bit else 0 for mark, bit in zip(marks, (REGS, SREGS, EVENTS), strict=True)
    )
    assert kept == expected


def test_dirty_regs(vcpu: GuestVcpu) -> None:
    """General registers marked dirty are loaded before the guest runs on, and the mark is taken back.

    Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS (kvm_dirty_regs).
    """
    vcpu.regs.set_sync(REGS)
    exit_again(vcpu)
    vcpu.complete_io()
    vcpu.regs.sync.regs.rbx = 0x1000
    vcpu.regs.mark_sync_dirty(REGS)
    assert exit_again(vcpu) == 0x1001
    assert vcpu.regs.sync.regs.rbx == 0x1001
    assert vcpu.run_area.kvm_dirty_regs == 0


def test_dirty_sregs(vcpu: GuestVcpu) -> None:
    """System registers marked dirty are loaded before the guest runs on.

    Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS (kvm_dirty_regs).
    """
    vcpu.regs.set_sync(SREGS)
    exit_again(vcpu)
    vcpu.complete_io()
    vcpu.regs.sync.sregs.cr2 = 0x1234_5000
    vcpu.regs.mark_sync_dirty(SREGS)
    assert exit_again(vcpu) == 3
    assert vcpu.regs.get_sregs().cr2 == 0x1234_5000
    assert vcpu.run_area.kvm_dirty_regs == 0


def test_not_dirty(vcpu: GuestVcpu) -> None:
    """Changes to the shared registers that are not marked dirty never reach the vCPU.

    Documentation/virt/kvm/api.rst, 6.74 ("the register set values will not be copied into the vCPU").
    """
    vcpu.regs.set_sync(REGS | SREGS)
    exit_again(vcpu)
    vcpu.regs.sync.regs.rbx = 0x1000
    vcpu.regs.sync.sregs.cr2 = 0x1234_5000
    assert exit_again(vcpu) == 3
    assert (vcpu.regs.sync.regs.rbx, vcpu.regs.sync.sregs.cr2) == (3, 0)


@pytest.mark.parametrize("bit", [3, 31, 63])
@pytest.mark.parametrize("field", ["kvm_valid_regs", "kvm_dirty_regs"])
def test_unknown_bits(vcpu: GuestVcpu, field: str, bit: int) -> None:
    """KVM_RUN with an unknown bit in kvm_valid_regs or kvm_dirty_regs fails with EINVAL.

    Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS ("Unused bitfields ... must be set to zero").
    """
    setattr(vcpu.run_area, field, 1 << bit)
    assert run_errno(vcpu) == errno.EINVAL
    setattr(vcpu.run_area, field, 0)
    assert exit_again(vcpu) == 2


def test_illegal_sregs(vcpu: GuestVcpu) -> None:
    """KVM_RUN with dirty system registers that KVM_SET_SREGS would refuse fails with EINVAL.

    Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS; arch/x86/kvm/regs.c,
    kvm_run_sync_regs_from_user().
    """
    vcpu.regs.set_sync(SREGS)
    exit_again(vcpu)
    before = vcpu.regs.get_sregs()
    for change in ({"cr0": before.cr0 & ~CR0.PE}, {"cr4": before.cr4 & ~CR4.PAE}):
        sregs = before.copy()
        for name, value in change.items():
            setattr(sregs, name, int(value))
        vcpu.regs.sync.sregs = sregs
        vcpu.regs.mark_sync_dirty(SREGS)
        assert run_errno(vcpu) == errno.EINVAL
        vcpu.run_area.kvm_dirty_regs = 0
        assert vcpu.regs.get_sregs() == before
    assert exit_again(vcpu) == 3


def test_illegal_events(vcpu: GuestVcpu) -> None:
    """KVM_RUN with dirty events that KVM_SET_VCPU_EVENTS would refuse fails with EINVAL.

    Documentation/virt/kvm/api.rst, 6.74 KVM_CAP_SYNC_REGS; arch/x86/kvm/x86.c, sync_regs().
    """
    vcpu.regs.set_sync(EVENTS)
    exit_again(vcpu)
    vcpu.regs.sync.events.flags |= 1 << 31
    vcpu.regs.mark_sync_dirty(EVENTS)
    assert run_errno(vcpu) == errno.EINVAL
    vcpu.run_area.kvm_dirty_regs = 0
    assert exit_again(vcpu) == 3
