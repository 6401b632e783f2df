# SPDX-License-Identifier: Apache-2.0
"""Aids for guests that write their task priority all the time: a report of each access, and a page for it."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    PAGE_SIZE,
    GuestVcpu,
    Kvm,
    MakeVm,
    Vm,
    apic,
    ioctls,
    kvm_tpr_access_ctl,
    kvm_vapic_addr,
    refused,
)
from kvmpy.core.exits import TprAccessExit

pytestmark = pytest.mark.requires("KVM_CAP_VAPIC", "KVM_CAP_SPLIT_IRQCHIP")

GUEST = """
#include <kvmpy/guest.h>

u32 page[1024] GUEST_SHARED __aligned(4096);

void accesses(void)
{
	apic_enable();
	GUEST_SYNC(0);
	xapic_write(APIC_TASKPRI, 0x30);
	GUEST_SYNC(xapic_read(APIC_TASKPRI));
	/* Another register is reported to nobody. */
	GUEST_SYNC(xapic_read(APIC_SPIV) & 0xff);
	GUEST_DONE();
}

/* What the page holds at an exit is the task priority from then on. */
void priorities(void)
{
	apic_enable();
	GUEST_SYNC(0);
	for (u32 tpr = 0; tpr < 256; tpr += 0x10) {
		WRITE_ONCE(page[0], tpr);
		GUEST_SYNC(tpr);
		GUEST_ASSERT_EQ(xapic_read(APIC_TASKPRI), tpr);
	}
	GUEST_SYNC(0x100);
	WRITE_ONCE(page[0], 0x40);
	GUEST_SYNC(0x100);
	GUEST_ASSERT_EQ(xapic_read(APIC_TASKPRI), 0xf0);
	GUEST_DONE();
}
"""


VCPUS = 3


def report(vcpu: GuestVcpu, on: bool) -> None:
    """Switch the reports on or off."""
    vcpu.ioctl(ioctls.KVM_TPR_ACCESS_REPORTING, kvm_tpr_access_ctl(enabled=int(on)))


@pytest.mark.usefixtures("open_registers")
@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_accesses_are_reported(make_vm: MakeVm, on: bool) -> None:
    """While reports are on, each access to the TPR exits with its RIP and direction, once it is done.

    They are off for a new vCPU, and can be taken back.  Documentation/virt/kvm/api.rst, 5 The kvm_run
    structure, KVM_EXIT_TPR_ACCESS; arch/x86/kvm/lapic.c, __report_tpr_access().
    """
    vm = make_vm.start(GUEST, "accesses", vcpus=VCPUS)
    exits: list[bool] = []
    rips: list[int] = []

    def see(got: object) -> bool:
        assert isinstance(got, TprAccessExit)
        exits.append(got.is_write)
        rips.append(got.rip)
        return True

    values: list[int] = []
    for vcpu in vm.vcpus:
        vcpu.sync()
        report(vcpu, True)
        if not on:
            report(vcpu, False)
        vcpu.run_to_done(on_exit=see, on_sync=lambda call: values.append(call.args[0]))
    assert values == [0x30, 0xFF] * VCPUS
    assert exits == ([True, False] * VCPUS if on else [])
    code = vm.program.symbol("accesses")
    assert all(0 < rip - int(code.gva) < code.size for rip in rips)


@pytest.mark.parametrize("flags", [1, 1 << 31])
def test_flags_of_reports(vm: Vm, flags: int) -> None:
    """Flags, of which there are none, are refused with EINVAL.

    arch/x86/kvm/x86.c, kvm_arch_vcpu_ioctl(), KVM_TPR_ACCESS_REPORTING.
    """
    vm.irq.create_split_chip()
    with refused(errno.EINVAL):
        vm.create_vcpu().ioctl(ioctls.KVM_TPR_ACCESS_REPORTING, kvm_tpr_access_ctl(enabled=1, flags=flags))


@pytest.mark.usefixtures("open_registers")
def test_page_follows_the_task_priority(make_vm: MakeVm) -> None:
    """With KVM_SET_VAPIC_ADDR the byte that the guest has in that page at an exit is its task priority.

    Without the page it is no more.  arch/x86/kvm/lapic.c, kvm_lapic_sync_from_vapic(); commit b93463aa59d6
    ("KVM: Accelerated apic support").
    """
    vm = make_vm.start(GUEST, "priorities")
    vcpu = vm.vcpus[0]
    vcpu.sync()
    page = vm.symbol("page")
    vcpu.ioctl(ioctls.KVM_SET_VAPIC_ADDR, kvm_vapic_addr(vapic_addr=int(page.gpa)))
    seen = []
    for call in vcpu.syncs():
        if call.args[0] == 0x100:
            vcpu.ioctl(ioctls.KVM_SET_VAPIC_ADDR, kvm_vapic_addr(vapic_addr=0))
        else:
            seen.append((call.args[0], vcpu.lapic.get_reg(apic.TPR)))
    assert seen == [(tpr, tpr) for tpr in range(0, 256, 0x10)]
    assert not any(page.view("I")[1:])


def test_page_outside_memory(make_vm: MakeVm) -> None:
    """An address outside of guest memory, or a word across its end, is refused with EINVAL.

    arch/x86/kvm/lapic.c, kvm_lapic_set_vapic_addr().
    """
    vm = make_vm(GUEST)
    end = vm.memory.segments()[-1].end_gfn * PAGE_SIZE
    for address in (end, end - 2, 1 << 45):
        with refused(errno.EINVAL):
            vm.vcpus[0].ioctl(ioctls.KVM_SET_VAPIC_ADDR, kvm_vapic_addr(vapic_addr=address))
    vm.vcpus[0].ioctl(ioctls.KVM_SET_VAPIC_ADDR, kvm_vapic_addr(vapic_addr=end - 4))


def test_page_without_a_local_apic(kvm: Kvm) -> None:
    """Without a local APIC in the kernel there is no such page: EINVAL.

    arch/x86/kvm/x86.c, kvm_arch_vcpu_ioctl(), KVM_SET_VAPIC_ADDR.
    """
    with kvm.create_vm() as vm, refused(errno.EINVAL):
        vm.create_vcpu().ioctl(ioctls.KVM_SET_VAPIC_ADDR, kvm_vapic_addr(vapic_addr=0))
