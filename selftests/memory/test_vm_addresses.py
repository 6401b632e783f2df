# SPDX-License-Identifier: Apache-2.0
"""Settings of a VM's memory that are older than its slots: shadow pages, and two areas that VMX needs."""

from __future__ import annotations

import ctypes
import errno

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Gva, Kvm, MakeVm, Vm, ioctls, refused

MIN_MMU_PAGES = 64


def set_identity_map(vm: Vm, address: int) -> None:
    """Issue KVM_SET_IDENTITY_MAP_ADDR."""
    word = ctypes.c_uint64(address)
    vm.ioctl(ioctls.KVM_SET_IDENTITY_MAP_ADDR, ctypes.addressof(word))


def test_version(kvm: Kvm) -> None:
    """KVM_GET_API_VERSION returns 12, and has since 2007.

    Documentation/virt/kvm/api.rst, 4.1 KVM_GET_API_VERSION.
    """
    assert kvm.ioctl(ioctls.KVM_GET_API_VERSION) == 12


@pytest.mark.requires("KVM_CAP_MMU_SHADOW_CACHE_CONTROL")
@pytest.mark.parametrize("pages", [0, 1, MIN_MMU_PAGES - 1])
def test_too_few_shadow_pages(vm: Vm, pages: int) -> None:
    """Fewer than 64 shadow pages are refused with EINVAL, and 64 are taken.

    arch/x86/kvm/x86.c, kvm_vm_ioctl_set_nr_mmu_pages(); KVM_MIN_ALLOC_MMU_PAGES.
    """
    with refused(errno.EINVAL):
        vm.ioctl(ioctls.KVM_SET_NR_MMU_PAGES, pages)
    vm.ioctl(ioctls.KVM_SET_NR_MMU_PAGES, MIN_MMU_PAGES)


@pytest.mark.requires("KVM_CAP_MMU_SHADOW_CACHE_CONTROL")
def test_few_shadow_pages_suffice(make_vm: MakeVm) -> None:
    """A guest that touches far more tables than it may have shadow pages reads what is there all the same.

    The limit changes while the guest is between two runs.  arch/x86/kvm/mmu/mmu.c,
    kvm_mmu_change_mmu_pages().
    """
    vm = make_vm(AGENT)
    gpa = vm.allocator.alloc(1, private=None)
    vm.memory.write(gpa, b"shadowed")
    agent = Agent(vm.vcpus[0])
    places = [Gva(0x6000_0000_0000 + (number << 30)) for number in range(150)]
    for place in places:
        vm.map(place, gpa, PAGE_SIZE, page_size=PAGE_SIZE)
    vm.ioctl(ioctls.KVM_SET_NR_MMU_PAGES, MIN_MMU_PAGES)
    wanted = int.from_bytes(b"shadowed", "little")
    assert [agent.read(place) for place in places] == [wanted] * len(places)
    for limit in (1000, MIN_MMU_PAGES):
        vm.ioctl(ioctls.KVM_SET_NR_MMU_PAGES, limit)
        assert [agent.read(place) for place in places[::-7]] == [wanted] * len(places[::-7])


def test_task_state_area(vm: Vm) -> None:
    """KVM_SET_TSS_ADDR takes three pages below 4 GiB, before and after a vCPU is there; more is EINVAL.

    Documentation/virt/kvm/api.rst, 4.34 KVM_SET_TSS_ADDR.
    """
    last = (1 << 32) - 3 * PAGE_SIZE
    for address in (0xFFFB_D000, last):
        vm.ioctl(ioctls.KVM_SET_TSS_ADDR, address)
    for address in (last + PAGE_SIZE, (1 << 32) - 1, 1 << 32):
        with refused(errno.EINVAL):
            vm.ioctl(ioctls.KVM_SET_TSS_ADDR, address)


@pytest.mark.requires("KVM_CAP_SET_IDENTITY_MAP_ADDR")
def test_identity_map(vm: Vm) -> None:
    """KVM_SET_IDENTITY_MAP_ADDR takes an address, or 0 for the default; with a vCPU there it is EINVAL.

    Documentation/virt/kvm/api.rst, 4.40 KVM_SET_IDENTITY_MAP_ADDR.
    """
    for address in (0xFFFB_C000, 0):
        set_identity_map(vm, address)
    with vm.create_vcpu(), refused(errno.EINVAL):
        set_identity_map(vm, 0xFFFB_C000)
