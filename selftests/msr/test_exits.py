# SPDX-License-Identifier: Apache-2.0
"""MSR accesses that user space handles (KVM_CAP_X86_USER_SPACE_MSR)."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_MSR_EXIT_REASON_VALID_MASK,
    Gva,
    Msr,
    RdmsrExit,
    Vector,
    Vm,
    WrmsrExit,
    refused,
)
from selftests.msr.conftest import MsrGuestMaker

# No CPU has this one, and KVM knows nothing of it; with ignore_msrs KVM would make it up.
UNKNOWN_MSR = 0x2000_0000
EFER_RESERVED = 1 << 1
GP0 = (Vector.GP, 0)
RDMSR = b"\x0f\x32"

pytestmark = pytest.mark.requires("KVM_CAP_X86_USER_SPACE_MSR", "param:kvm.ignore_msrs=N")


def test_unknown_without_capability(msr_guest: MsrGuestMaker) -> None:
    """While the capability is off, RDMSR and WRMSR of an MSR that KVM does not know get #GP(0).

    Documentation/virt/kvm/api.rst, 7.21 KVM_CAP_X86_USER_SPACE_MSR ("By default, KVM injects #GP").
    """
    guest = msr_guest()
    assert guest.read(UNKNOWN_MSR).fault() == GP0
    assert guest.write(UNKNOWN_MSR, 1).fault() == GP0


@pytest.mark.parametrize("answer", [0, 0x1234_5678_9ABC_DEF0, (1 << 64) - 1])
def test_unknown_read(msr_guest: MsrGuestMaker, answer: int) -> None:
    """RDMSR of an unknown MSR exits with its index, and returns all 64 bits that user space answers.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_X86_RDMSR.
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_UNKNOWN)
    got = guest.read(UNKNOWN_MSR).exit()
    assert isinstance(got, RdmsrExit)
    assert (got.index, got.msr_reason) == (UNKNOWN_MSR, KVM_MSR_EXIT_REASON_UNKNOWN)
    got.respond(answer)
    assert guest.value() == answer


@pytest.mark.parametrize("data", [0, 0x1234_5678_9ABC_DEF0, (1 << 64) - 1])
def test_unknown_write(msr_guest: MsrGuestMaker, data: int) -> None:
    """WRMSR to an unknown MSR exits with its index and all 64 bits of its data, and then succeeds.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_X86_WRMSR.
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_UNKNOWN)
    got = guest.write(UNKNOWN_MSR, data).exit()
    assert isinstance(got, WrmsrExit)
    assert (got.index, got.data, got.msr_reason) == (UNKNOWN_MSR, data, KVM_MSR_EXIT_REASON_UNKNOWN)
    got.respond()
    guest.done()


def test_error_becomes_gp(msr_guest: MsrGuestMaker) -> None:
    """With 1 in the error field of a read's or a write's exit the guest gets #GP(0).

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR
    (error).
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.read(UNKNOWN_MSR).exit().respond(fault=True)
    assert guest.fault() == GP0
    guest.write(UNKNOWN_MSR, 1).exit().respond(fault=True)
    assert guest.fault() == GP0


def test_error_starts_as_zero(msr_guest: MsrGuestMaker) -> None:
    """Each exit starts with a clear error field, also after one that user space refused.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure (error is written by user space only to refuse).
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.write(UNKNOWN_MSR, 1).exit().respond(fault=True)
    assert guest.fault() == GP0
    guest.write(UNKNOWN_MSR, 2).exit()
    assert guest.vcpu.run_area.msr.error == 0
    guest.done()


# Where registers are the guest's own, so is EFER: no exit.
@pytest.mark.requires("trait:can_read_registers")
def test_invalid_write(msr_guest: MsrGuestMaker) -> None:
    """A write of reserved bits to a known MSR exits with the reason INVAL and the value that the guest wrote.

    Documentation/virt/kvm/api.rst, 7.21 KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_INVAL.
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_INVAL)
    efer = guest.read(Msr.MSR_EFER).value()
    got = guest.write(Msr.MSR_EFER, efer | EFER_RESERVED).exit()
    assert isinstance(got, WrmsrExit)
    assert (got.index, got.data, got.msr_reason) == (
        Msr.MSR_EFER,
        efer | EFER_RESERVED,
        KVM_MSR_EXIT_REASON_INVAL,
    )
    got.respond()
    guest.done()
    assert guest.read(Msr.MSR_EFER).value() == efer


@pytest.mark.requires("trait:can_read_registers")
def test_only_the_reasons_asked_for(msr_guest: MsrGuestMaker) -> None:
    """Accesses whose reason was not asked for get #GP as without the capability.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure ("only receive MSR exits when a particular
    reason").
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_UNKNOWN)
    assert guest.write(Msr.MSR_EFER, EFER_RESERVED).fault() == GP0
    guest.vm.msrs.enable_user_space(KVM_MSR_EXIT_REASON_INVAL)
    assert guest.read(UNKNOWN_MSR).fault() == GP0
    guest.write(Msr.MSR_EFER, EFER_RESERVED).exit().respond(fault=True)
    assert guest.fault() == GP0


def test_switched_off_again(msr_guest: MsrGuestMaker) -> None:
    """Enabling the capability with an empty mask ends the exits.

    Documentation/virt/kvm/api.rst, 7.21 KVM_CAP_X86_USER_SPACE_MSR (args[0] contains the mask).
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.read(UNKNOWN_MSR).exit().respond(7)
    assert guest.value() == 7
    guest.vm.msrs.enable_user_space(0)
    assert guest.read(UNKNOWN_MSR).fault() == GP0


def test_known_msrs_stay_with_kvm(msr_guest: MsrGuestMaker) -> None:
    """Accesses that KVM can do itself do not exit, whatever reasons are asked for.

    Documentation/virt/kvm/api.rst, 7.21 KVM_CAP_X86_USER_SPACE_MSR ("would trigger a #GP").
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_VALID_MASK)
    value = 0x0023_0010_0000_0000
    guest.write(Msr.MSR_STAR, value).done()
    assert guest.read(Msr.MSR_STAR).value() == value


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT", "trait:host_sees_tables")
def test_immediate_exit_completes(msr_guest: MsrGuestMaker) -> None:
    """KVM_RUN with immediate_exit puts user space's answer into EDX:EAX and RIP behind the RDMSR.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, the note that names KVM_EXIT_X86_RDMSR.
    """
    guest = msr_guest(KVM_MSR_EXIT_REASON_UNKNOWN)
    guest.read(UNKNOWN_MSR).exit().respond(0x1111_2222_3333_4444)
    guest.vcpu.complete_io()
    regs = guest.vcpu.regs.get()
    assert (regs.rax, regs.rdx, regs.rcx) == (0x3333_4444, 0x1111_2222, UNKNOWN_MSR)
    assert guest.vm.read(Gva(regs.rip - len(RDMSR)), len(RDMSR)) == RDMSR
    assert guest.value() == 0x1111_2222_3333_4444


@pytest.mark.parametrize("bit", [3, 31, 63])
def test_unknown_reason(vm: Vm, bit: int) -> None:
    """Reasons that KVM does not know are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 7.21 KVM_CAP_X86_USER_SPACE_MSR ("The valid mask flags").
    """
    with refused(errno.EINVAL):
        vm.msrs.enable_user_space(KVM_MSR_EXIT_REASON_FILTER | 1 << bit)
