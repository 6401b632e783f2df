# SPDX-License-Identifier: Apache-2.0
"""KVM_TRANSLATE: guest-virtual addresses by the vCPU's page tables."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, PAGE_SIZE, SIZE_2M, Agent, GuestVm, Gva, MakeVm

# The highest 4 KiB below the hole that addresses of 48 bits leave, and the lowest address in the hole.
LAST_LOW, NON_CANONICAL = 0x0000_7FFF_FFFF_F000, 0x0000_8000_0000_0000


@pytest.fixture
def vm(make_vm: MakeVm) -> GuestVm:
    """A VM that ran once."""
    vm = make_vm(AGENT)
    vm.alloc(SIZE_2M, gva=Gva(0x6000_0000), page_size=SIZE_2M)
    Agent(vm.vcpus[0]).start()
    return vm


pytestmark = pytest.mark.usefixtures("open_registers", "open_tables")


@pytest.mark.parametrize("offset", [0, 1, PAGE_SIZE - 1])
def test_mapped(vm: GuestVm, offset: int) -> None:
    """A mapped address is valid and translates to what its page-table entry holds, plus its offset.

    Documentation/virt/kvm/api.rst, 4.15 KVM_TRANSLATE.
    """
    page = vm.symbol("guest_agent_orders").gva.align_down(PAGE_SIZE)
    translation = vm.vcpus[0].translate(page + offset)
    assert translation.valid == 1
    assert translation.physical_address == vm.to_raw(vm.gva_to_gpa(page)) + offset


def test_huge_page(vm: GuestVm) -> None:
    """An address in a 2 MiB page translates with its offset in that page.

    Documentation/virt/kvm/api.rst, 4.15 KVM_TRANSLATE ("the vcpu's current address translation mode").
    """
    page = Gva(0x6000_0000)
    translated = vm.vcpus[0].translate(page + 0x12_3456)
    assert translated.valid == 1
    assert translated.physical_address == vm.to_raw(vm.gva_to_gpa(page)) + 0x12_3456


@pytest.mark.parametrize("gva", [0, LAST_LOW])
def test_unmapped(vm: GuestVm, gva: int) -> None:
    """An address without a mapping is not valid, and the ioctl succeeds all the same.

    Documentation/virt/kvm/api.rst, 4.15 KVM_TRANSLATE (valid).
    """
    assert vm.vcpus[0].translate(gva).valid == 0


def test_follows_the_tables(vm: GuestVm) -> None:
    """A translation is of the tables as they are now, after pages were unmapped and moved.

    Documentation/virt/kvm/api.rst, 4.15 KVM_TRANSLATE ("current").
    """
    vcpu = vm.vcpus[0]
    gva = Gva(0x6000_0000)
    before = vcpu.translate(gva).physical_address
    vm.pages.unmap(gva, SIZE_2M)
    assert vcpu.translate(gva).valid == 0
    other = vm.allocator.alloc(1)
    vm.map(gva, other, PAGE_SIZE)
    translation = vcpu.translate(gva + 8)
    assert (translation.valid, translation.physical_address) == (1, vm.to_raw(other) + 8)
    assert translation.physical_address != before + 8
