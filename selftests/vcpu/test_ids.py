# SPDX-License-Identifier: Apache-2.0
"""vCPU ids and numbers: limits, the ids that KVM takes, and which vCPU is the boot processor."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_MAX_VCPU_ID,
    KVM_CAP_MAX_VCPUS,
    KVM_CAP_NR_VCPUS,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
    Agent,
    Kvm,
    MakeVm,
    Msr,
    Vm,
    refused,
)
from kvmpy.guest.layout import MAX_VCPUS

BSP = 1 << 8
# What a test process has open besides.
SPARE_FDS = 64

GUEST = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_SYNC(guest_cpu_index(), guest_cpu()->apic_id);
}
"""


@pytest.fixture
def room_for_vcpus(kvm: Kvm) -> Iterator[int]:
    """Allow as many file descriptors as the most vCPUs need, and return that number of vCPUs."""
    most = kvm.check_extension(KVM_CAP_MAX_VCPUS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Python's mmap keeps a duplicate of the descriptor.
    wanted = 2 * most + SPARE_FDS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} file descriptors for {most} vCPUs: the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_limits_are_ordered(kvm: Kvm) -> None:
    """The recommended number of vCPUs is at most the greatest one, which is at most the number of ids.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU (three capabilities).
    """
    recommended = kvm.check_extension(KVM_CAP_NR_VCPUS)
    most = kvm.check_extension(KVM_CAP_MAX_VCPUS)
    ids = kvm.check_extension(KVM_CAP_MAX_VCPU_ID)
    assert 1 <= recommended <= most <= ids


def test_greatest_number(vm: Vm, room_for_vcpus: int) -> None:
    """KVM_CAP_MAX_VCPUS vCPUs can be created, and not one more: EINVAL.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU: "No more than max_vcpus may be added".
    """
    for vcpu_id in range(room_for_vcpus):
        vm.create_vcpu(vcpu_id)
    with refused(errno.EINVAL):
        vm.create_vcpu(room_for_vcpus)


@pytest.mark.deadline(60)
def test_as_many_run(make_vm: MakeVm, room_for_vcpus: int) -> None:
    """Each of the greatest number of vCPUs runs guest code of its own.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU and 4.10 KVM_RUN.
    """
    number = min(room_for_vcpus, MAX_VCPUS)
    vm = make_vm.start(GUEST, vcpus=number, memory=128 << 20)
    assert [vcpu.sync().args for vcpu in vm.vcpus] == [(index, index) for index in range(number)]


@pytest.mark.requires("KVM_CAP_MAX_VCPU_ID>=1024")
def test_sparse_ids(make_vm: MakeVm) -> None:
    """Ids need be neither dense nor in order.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU: an integer in the range [0, max_vcpu_id).
    """
    ids = [700, 3, 0, 255]
    vm = make_vm.start(GUEST, vcpu_ids=ids)
    assert [vcpu.sync().args for vcpu in vm.vcpus] == list(enumerate(ids))


def test_greatest_number_at_the_highest_ids(vm: Vm, room_for_vcpus: int) -> None:
    """KVM_CAP_MAX_VCPUS vCPUs can have the highest ids as well as the lowest.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU (three capabilities).
    """
    ids = vm.check_extension(KVM_CAP_MAX_VCPU_ID)
    for vcpu_id in range(ids - room_for_vcpus, ids):
        vm.create_vcpu(vcpu_id)
    with refused(errno.EINVAL):
        vm.create_vcpu(ids)


def test_highest_id(vm: Vm) -> None:
    """The highest id is KVM_CAP_MAX_VCPU_ID - 1; ids from there on are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU.
    """
    ids = vm.check_extension(KVM_CAP_MAX_VCPU_ID)
    for bad in (ids, 1 << 31, 1 << 32):
        with refused(errno.EINVAL):
            vm.create_vcpu(bad)
    vm.create_vcpu(ids - 1)


def test_same_id_twice(vm: Vm) -> None:
    """An id that a vCPU of the VM has is refused with EEXIST, also once its file descriptor is closed.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU: vCPUs are added, never removed.
    """
    vcpu = vm.create_vcpu(5)
    with refused(errno.EEXIST):
        vm.create_vcpu(5)
    vcpu.close()
    with refused(errno.EEXIST):
        vm.create_vcpu(5)
    vm.create_vcpu(6)


def test_ids_belong_to_vm(kvm: Kvm) -> None:
    """Two VMs may have vCPUs with the same id.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU.
    """
    with kvm.create_vm() as one, kvm.create_vm() as other:
        one.create_vcpu(1)
        other.create_vcpu(1)


@pytest.mark.requires("KVM_CAP_MAX_VCPU_ID>=8")
def test_limited_ids(kvm: Kvm) -> None:
    """Enabling KVM_CAP_MAX_VCPU_ID limits a VM's ids, once: those from the limit on are EINVAL.

    Documentation/virt/kvm/api.rst, 7.32 KVM_CAP_MAX_VCPU_ID.
    """
    with kvm.create_vm() as vm:
        ids = vm.check_extension(KVM_CAP_MAX_VCPU_ID)
        with refused(errno.EINVAL):
            vm.enable_cap(KVM_CAP_MAX_VCPU_ID, ids + 1)
        vm.enable_cap(KVM_CAP_MAX_VCPU_ID, 4)
        with refused(errno.EINVAL):
            vm.enable_cap(KVM_CAP_MAX_VCPU_ID, 5)
        with refused(errno.EINVAL):
            vm.create_vcpu(4)
        vm.create_vcpu(3)


def test_id_limit_after_vcpu(vm: Vm) -> None:
    """Once a vCPU exists the limit of ids is fixed: EINVAL.

    Documentation/virt/kvm/api.rst, 7.32 KVM_CAP_MAX_VCPU_ID: "or until a vCPU is created".
    """
    vm.create_vcpu(0)
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_MAX_VCPU_ID, 4)


@pytest.mark.requires("KVM_CAP_SET_BOOT_CPU_ID", "KVM_CAP_MP_STATE")
@pytest.mark.parametrize("boot", [0, 2])
def test_boot_processor(vm: Vm, boot: int) -> None:
    """The vCPU with the boot id, 0 by default, is runnable and has the BSP flag; others wait for INIT.

    Documentation/virt/kvm/api.rst, 4.41 KVM_SET_BOOT_CPU_ID.
    """
    if boot:
        vm.setup.set_boot_cpu_id(boot)
    vm.irq.create_chip()
    for vcpu_id in range(3):
        vcpu = vm.create_vcpu(vcpu_id)
        first = vcpu_id == boot
        assert vcpu.get_mp_state() == (KVM_MP_STATE_RUNNABLE if first else KVM_MP_STATE_UNINITIALIZED)
        assert bool(vcpu.regs.get_sregs().apic_base & BSP) == first


@pytest.mark.requires("KVM_CAP_SET_BOOT_CPU_ID")
def test_boot_ids_that_cannot_be(vm: Vm) -> None:
    """A boot id above the highest id is EINVAL, as is one that is only by its lower half: nothing is cut off.

    Documentation/virt/kvm/api.rst, 4.41 KVM_SET_BOOT_CPU_ID; arch/x86/kvm/x86.c, kvm_arch_vm_ioctl().
    """
    ids = vm.check_extension(KVM_CAP_MAX_VCPU_ID)
    for bad in (ids + 1, 1 << 32, (1 << 32) + 1, 1 << 63):
        with refused(errno.EINVAL):
            vm.setup.set_boot_cpu_id(bad)
    vm.irq.create_split_chip()
    assert vm.create_vcpu(0).regs.get_sregs().apic_base & BSP


@pytest.mark.requires("KVM_CAP_SET_BOOT_CPU_ID")
def test_boot_id_behind_the_last(vm: Vm) -> None:
    """KVM_CAP_MAX_VCPU_ID itself, which no vCPU can have, is EINVAL as a boot id.

    Documentation/virt/kvm/api.rst, 4.41 KVM_SET_BOOT_CPU_ID and 4.7 KVM_CREATE_VCPU ([0, max_vcpu_id)).
    """
    with refused(errno.EINVAL):
        vm.setup.set_boot_cpu_id(vm.check_extension(KVM_CAP_MAX_VCPU_ID))


@pytest.mark.requires("KVM_CAP_SET_BOOT_CPU_ID", "KVM_CAP_MAX_VCPU_ID>=8")
@pytest.mark.parametrize("limit", [4, 5])
def test_id_limit_without_the_boot_id(vm: Vm, limit: int) -> None:
    """A limit of ids that leaves no room for the boot processor is refused with EINVAL, a greater one taken.

    Documentation/virt/kvm/api.rst, 7.32 KVM_CAP_MAX_VCPU_ID; arch/x86/kvm/x86.c, kvm_vm_ioctl_enable_cap().
    """
    vm.setup.set_boot_cpu_id(5)
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_MAX_VCPU_ID, limit)
    vm.enable_cap(KVM_CAP_MAX_VCPU_ID, 6)
    vm.create_vcpu(5)


@pytest.mark.requires("KVM_CAP_SET_BOOT_CPU_ID")
def test_boot_processor_after_vcpu(vm: Vm) -> None:
    """Once a vCPU exists the boot processor is fixed: EBUSY.

    Documentation/virt/kvm/api.rst, 4.41 KVM_SET_BOOT_CPU_ID.
    """
    vm.create_vcpu(0)
    with refused(errno.EBUSY):
        vm.setup.set_boot_cpu_id(0)


@pytest.mark.requires("KVM_CAP_SET_BOOT_CPU_ID")
def test_boot_processor_as_guest_sees_it(make_vm: MakeVm) -> None:
    """The guest finds the BSP flag in IA32_APIC_BASE of the vCPU with the boot id, and of no other.

    Documentation/virt/kvm/api.rst, 4.41 KVM_SET_BOOT_CPU_ID; Intel SDM 3A, 12.4.4.
    """
    vm = make_vm(AGENT, vcpus=3, before_vcpus=lambda vm: vm.setup.set_boot_cpu_id(1))
    bases = [Agent(vcpu).rdmsr(Msr.MSR_IA32_APICBASE) for vcpu in vm.vcpus]
    assert [isinstance(base, int) and base >> 8 & 1 for base in bases] == [0, 1, 0]
