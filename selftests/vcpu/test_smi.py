# SPDX-License-Identifier: Apache-2.0
"""System management interrupts, where KVM has them.

Not under an encryption bit: system management mode starts without page tables.
"""

from __future__ import annotations

import pytest

from kvmpy import KVM_RUN_X86_SMM, Gpa, GuestVm, IoExit, MakeVm

pytestmark = pytest.mark.requires("KVM_CAP_X86_SMM", "KVM_CAP_MULTI_ADDRESS_SPACE>=2")

# Reset value of SMBASE, what follows it, and the entry of the handler in it.
SMBASE, SMRAM_SIZE = Gpa(0x30000), 0x10000
ENTRY = SMBASE + 0x8000
# System management mode sees the memory of this address space only.
ADDRESS_SPACE = 1
PORT = 0x10
# mov al, 0x5a; out 0x10, al; rsm
HANDLER = bytes.fromhex("b05a e610 0faa")

GUEST = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	u64 i;

	for (i = 1;; i++)
		GUEST_SYNC(i);
}
"""

# This guest sends itself an SMI by the command register of its local APIC.
OWN_ICR = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	apic_enable();
	if (guest_cpu()->args[0])
		x2apic_enable();
	GUEST_SYNC(1);
	apic_send(apic_id(), APIC_DM_SMI | APIC_INT_ASSERT);
	GUEST_SYNC(2);
}
"""


def start(make_vm: MakeVm, program: str = GUEST, *args: int) -> GuestVm:
    """Return a VM that has a handler, and whose guest has said 1."""
    vm = make_vm(program)
    vm.vcpus[0].set_entry("guest_main", *args)
    vm.memory.write(ENTRY, HANDLER)
    # lifetime: the slot shows guest memory, which the VM keeps.
    vm.set_user_memory_region(ADDRESS_SPACE << 16, SMBASE, SMRAM_SIZE, vm.memory.hva(SMBASE))
    vm.launch()
    assert vm.vcpus[0].sync().args == (1,)
    return vm


def in_smm(vm: GuestVm) -> bool:
    """Return what kvm_run says about the mode."""
    return bool(vm.vcpus[0].run_area.flags & KVM_RUN_X86_SMM)


@pytest.mark.protections("none")
def test_smi(make_vm: MakeVm) -> None:
    """KVM_SMI runs the handler at SMBASE + 0x8000, and its RSM brings the guest back to where it was.

    Documentation/virt/kvm/api.rst, 4.96 KVM_SMI and struct kvm_run (flags); Intel SDM 3C, 32.3.
    """
    vm = start(make_vm)
    vcpu = vm.vcpus[0]
    assert not in_smm(vm)
    vcpu.events.smi()
    got = vcpu.expect(IoExit)
    assert (got.port, got.value) == (PORT, 0x5A)
    assert in_smm(vm)
    assert vcpu.sync().args == (2,)
    assert not in_smm(vm)


@pytest.mark.protections("none")
@pytest.mark.parametrize("x2apic", [False, True], ids=["xapic", "x2apic"])
def test_smi_of_the_own_command_register(make_vm: MakeVm, x2apic: bool) -> None:
    """An SMI that a guest sends to its own APIC id runs the handler before it goes on.

    AMD APM volume 2, 16.5 (delivery mode SMI); upstream's x86/smm_test.
    """
    vm = start(make_vm, OWN_ICR, int(x2apic))
    vcpu = vm.vcpus[0]
    got = vcpu.expect(IoExit)
    assert (got.port, got.value) == (PORT, 0x5A)
    assert in_smm(vm)
    assert vcpu.sync().args == (2,)
    assert not in_smm(vm)


@pytest.mark.protections("none")
def test_events_show_mode(make_vm: MakeVm) -> None:
    """KVM_GET_VCPU_EVENTS shows a queued SMI as pending, and the mode while the handler runs.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS (smi.pending, smi.smm).
    """
    vcpu = start(make_vm).vcpus[0]
    vcpu.complete_io()
    vcpu.events.smi()
    assert (vcpu.events.get().smi.pending, vcpu.events.get().smi.smm) == (1, 0)
    vcpu.expect(IoExit)
    assert (vcpu.events.get().smi.pending, vcpu.events.get().smi.smm) == (0, 1)
    assert vcpu.sync().args == (2,)
    assert vcpu.events.get().smi.smm == 0


@pytest.mark.protections("none")
def test_second_smi_waits(make_vm: MakeVm) -> None:
    """An SMI that comes while the handler runs is taken after its RSM.

    Intel SDM 3C, 32.3.1: SMIs are masked in system management mode, one is kept pending.
    """
    vcpu = start(make_vm).vcpus[0]
    vcpu.events.smi()
    assert vcpu.expect(IoExit).value == 0x5A
    vcpu.events.smi()
    assert vcpu.expect(IoExit).value == 0x5A
    assert vcpu.sync().args == (2,)
