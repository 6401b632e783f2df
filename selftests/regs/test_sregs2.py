# SPDX-License-Identifier: Apache-2.0
"""What KVM_GET_SREGS2 and KVM_SET_SREGS2 have beyond the older pair: flags and the PDPTRs."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from kvmpy import CR4, KVM_SREGS2_FLAGS_PDPTRS_VALID, PAGE_SIZE, Anonymous, Mapping, Vcpu, refused, segments

pytestmark = pytest.mark.requires("KVM_CAP_SREGS2")

PDPT_GPA = 0x1000
PRESENT = 1


@pytest.fixture
def pdpt(vcpu: Vcpu) -> Iterator[memoryview]:
    """The PDPT of a vCPU in 32-bit PAE mode: a page of guest memory at PDPT_GPA, as 64-bit words."""
    page: Mapping = Anonymous().map(PAGE_SIZE)
    words = page.view(0, PAGE_SIZE).cast("Q")
    for number in range(4):
        words[number] = (0x10 + number) << 12 | PRESENT
    vcpu.vm.set_user_memory_region(0, PDPT_GPA, PAGE_SIZE, page.hva)
    sregs = vcpu.regs.get_sregs()
    segments.protected_mode_sregs(sregs, gdt=0x2000, idt=0x3000, tss=0x4000, cr3=PDPT_GPA, cr4=int(CR4.PAE))
    vcpu.regs.set_sregs(sregs)
    yield words
    words.release()
    vcpu.vm.set_user_memory_region(0, PDPT_GPA, 0, page.hva)
    page.close()


def test_agree(vcpu: Vcpu) -> None:
    """Both ioctls show the same segments, tables and control registers.

    Documentation/virt/kvm/api.rst, 4.131 KVM_GET_SREGS2 ("replaces the KVM_GET_SREGS").
    """
    old, new = vcpu.regs.get_sregs().as_dict(), vcpu.regs.get_sregs2().as_dict()
    assert old.keys() - new.keys() == {"interrupt_bitmap"}
    assert new.keys() - old.keys() == {"flags", "pdptrs"}
    assert {name: old[name] for name in old.keys() & new.keys()} == {
        name: new[name] for name in old.keys() & new.keys()
    }


@pytest.mark.parametrize("flag", [1 << 1, 1 << 63])
def test_unknown_flag(vcpu: Vcpu, flag: int) -> None:
    """A flag other than KVM_SREGS2_FLAGS_PDPTRS_VALID is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.132 KVM_SET_SREGS2, flags values for kvm_sregs2.
    """
    sregs = vcpu.regs.get_sregs2()
    sregs.flags = flag
    with refused(errno.EINVAL):
        vcpu.regs.set_sregs2(sregs)


def test_no_pdptrs_outside_pae(vcpu: Vcpu) -> None:
    """In 64-bit mode KVM_GET_SREGS2 shows no PDPTRs, and KVM_SET_SREGS2 refuses them with EINVAL.

    Documentation/virt/kvm/api.rst, 4.131 KVM_GET_SREGS2; arch/x86/kvm/regs.c,
    kvm_vcpu_ioctl_x86_set_sregs2().
    """
    sregs = vcpu.regs.get_sregs2()
    assert sregs.flags == 0
    sregs.flags = int(KVM_SREGS2_FLAGS_PDPTRS_VALID)
    with refused(errno.EINVAL):
        vcpu.regs.set_sregs2(sregs)


def test_pdptrs_from_memory(vcpu: Vcpu, pdpt: memoryview) -> None:
    """In PAE mode KVM_GET_SREGS2 shows the PDPTRs that were loaded from memory when CR3 was set.

    Documentation/virt/kvm/api.rst, 4.131 KVM_GET_SREGS2, KVM_SREGS2_FLAGS_PDPTRS_VALID.
    """
    sregs = vcpu.regs.get_sregs2()
    assert sregs.flags == KVM_SREGS2_FLAGS_PDPTRS_VALID
    assert list(sregs.pdptrs) == list(pdpt[:4])


def test_pdptrs_from_user_space(vcpu: Vcpu, pdpt: memoryview) -> None:
    """With KVM_SREGS2_FLAGS_PDPTRS_VALID the given PDPTRs count, not what memory holds by now.

    Documentation/virt/kvm/api.rst, 4.132 KVM_SET_SREGS2, KVM_SREGS2_FLAGS_PDPTRS_VALID.
    """
    sregs = vcpu.regs.get_sregs2()
    given = [(0x20 + number) << 12 | PRESENT for number in range(4)]
    sregs.pdptrs = given
    vcpu.regs.set_sregs2(sregs)
    state = vcpu.regs.get_sregs2()
    assert state.flags == KVM_SREGS2_FLAGS_PDPTRS_VALID
    assert list(state.pdptrs) == given
    assert list(pdpt[:4]) != given


def test_pdptrs_without_flag(vcpu: Vcpu, pdpt: memoryview) -> None:
    """Without the flag KVM_SET_SREGS2 takes no notice of the given PDPTRs and loads those in memory.

    Documentation/virt/kvm/api.rst, 4.132 KVM_SET_SREGS2, KVM_SREGS2_FLAGS_PDPTRS_VALID.
    """
    sregs = vcpu.regs.get_sregs2()
    sregs.flags = 0
    sregs.pdptrs = [0x99000 | PRESENT] * 4
    pdpt[2] = 0x7000 | PRESENT
    vcpu.regs.set_sregs2(sregs)
    assert list(vcpu.regs.get_sregs2().pdptrs) == list(pdpt[:4])
