# SPDX-License-Identifier: Apache-2.0
"""kvm.ignore_msrs: an MSR that KVM does not know reads 0, and a write to it is swallowed."""

from __future__ import annotations

import pytest

from kvmpy import Msr, Vcpu, Vm
from selftests.msr.conftest import MsrGuestMaker

pytestmark = pytest.mark.requires("param:kvm.ignore_msrs=Y")

# Of no CPU that KVM knows.
NOTHING = 0xDEAD_0000
GP0 = (13, 0)


def test_an_unknown_msr_in_the_guest(msr_guest: MsrGuestMaker) -> None:
    """RDMSR gives 0, WRMSR has no effect, and neither faults.

    Documentation/admin-guide/kernel-parameters.txt, kvm.ignore_msrs.
    """
    guest = msr_guest()
    guest.write(NOTHING, 0x1234).done()
    assert guest.read(NOTHING).value() == 0


def test_a_known_msr_still_refuses_what_it_cannot_hold(msr_guest: MsrGuestMaker) -> None:
    """A reserved bit of EFER is #GP: the MSR is known, only the value is not.

    arch/x86/kvm/x86.c, kvm_do_msr_access() ignores what is unsupported alone.
    """
    assert msr_guest().write(Msr.MSR_EFER, 1 << 63).fault() == GP0


def test_an_unknown_msr_from_the_host(vm: Vm) -> None:
    """KVM_GET_MSRS reads 0, whatever KVM_SET_MSRS wrote.

    arch/x86/kvm/x86.c, kvm_do_msr_access().
    """
    vcpu: Vcpu = vm.create_vcpu()
    vcpu.msrs.set_many({NOTHING: 5})
    assert vcpu.msrs.get_many([NOTHING]) == {NOTHING: 0}
