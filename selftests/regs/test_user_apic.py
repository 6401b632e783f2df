# SPDX-License-Identifier: Apache-2.0
"""Fields of kvm_run that stand in for a local APIC when KVM has none: cr8, apic_base, if_flag."""

from __future__ import annotations

import errno

import pytest

from kvmpy import GuestVcpu, MakeVm, SetTprExit, Ucall
from kvmpy.core.vcpu import RUN_ERROR

GUEST = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_SYNC(read_cr8());
	GUEST_SYNC(read_cr8());
	write_cr8(9);
	GUEST_SYNC(rdmsr(MSR_IA32_APICBASE));
	write_cr8(2);
	GUEST_SYNC(read_cr8());
	sti();
	GUEST_SYNC(0);
	cli();
	GUEST_SYNC(0);
}
"""


@pytest.fixture
def vcpu(make_vm: MakeVm) -> GuestVcpu:
    """A vCPU without a local APIC, at its first SYNC."""
    vm = make_vm.start(GUEST, irqchip=None)
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (0,)
    return vcpu


def sync(vcpu: GuestVcpu) -> tuple[int, ...]:
    """Run to the next SYNC, past the exits that say that the guest lowered its priority."""
    while True:
        got = vcpu.next()
        if isinstance(got, Ucall):
            return got.args
        assert isinstance(got, SetTprExit)


def test_cr8(vcpu: GuestVcpu) -> None:
    """The guest's CR8 is what kvm_run.cr8 held at KVM_RUN, and what the guest writes is there at the exit.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, cr8 ("Both input and output").
    """
    vcpu.run_area.cr8 = 5
    assert sync(vcpu) == (5,)
    assert vcpu.run_area.cr8 == 5
    sync(vcpu)
    assert vcpu.run_area.cr8 == 9
    assert sync(vcpu) == (2,)
    assert vcpu.run_area.cr8 == 2


def test_cr8_reserved(vcpu: GuestVcpu) -> None:
    """KVM_RUN with reserved bits in kvm_run.cr8 fails with EINVAL; without them the guest goes on.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, cr8; Intel SDM volume 3, 11.8.6 (bits 63:4).
    """
    for bit in (4, 63):
        vcpu.run_area.cr8 = 1 << bit
        assert (vcpu.run_once(), vcpu.run_errno) == (RUN_ERROR, errno.EINVAL)
    vcpu.run_area.cr8 = 3
    assert sync(vcpu) == (3,)


def test_apic_base(vcpu: GuestVcpu) -> None:
    """kvm_run.apic_base is the guest's IA32_APIC_BASE.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, apic_base.
    """
    sync(vcpu)
    assert sync(vcpu) == (vcpu.run_area.apic_base,)
    assert vcpu.run_area.apic_base & ~0xFFF == 0xFEE0_0000


@pytest.mark.requires("trait:exits_in_place")
def test_if_flag(vcpu: GuestVcpu) -> None:
    """kvm_run.if_flag is the guest's interrupt flag at the exit.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, if_flag.
    """
    for _ in range(3):
        sync(vcpu)
    assert vcpu.run_area.if_flag == 0
    sync(vcpu)
    assert vcpu.run_area.if_flag == 1
    sync(vcpu)
    assert vcpu.run_area.if_flag == 0
