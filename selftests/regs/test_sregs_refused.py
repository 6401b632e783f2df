# SPDX-License-Identifier: Apache-2.0
"""System registers that make no legal CPU state: KVM_SET_SREGS and KVM_SET_SREGS2 refuse them as a whole."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol, Union

import pytest

from kvmpy import (
    CR0,
    CR4,
    EFER,
    KVM_CAP_SREGS2,
    Cpuid,
    KvmError,
    Vcpu,
    kvm_sregs,
    kvm_sregs2,
    refused,
    segments,
)
from selftests.regs.control import CR4_FEATURES, EFER_FEATURES

Sregs = Union[kvm_sregs, kvm_sregs2]
Change = Callable[[Sregs], None]

APICBASE_EXTD, APICBASE_ENABLE = 1 << 10, 1 << 11


class Ioctl(Protocol):
    """Reads the system registers, lets *change* edit them, and writes them back."""

    def __call__(self, change: Change) -> None: ...


@pytest.fixture(params=["KVM_SET_SREGS", "KVM_SET_SREGS2"])
def set_changed(request: pytest.FixtureRequest, vcpu: Vcpu) -> Ioctl:
    """Both ioctls in turn: the second takes the place of the first (api.rst 4.131)."""
    if request.param == "KVM_SET_SREGS2":
        vcpu.vm.need_cap(KVM_CAP_SREGS2)

    def act(change: Change) -> None:
        if request.param == "KVM_SET_SREGS":
            sregs = vcpu.regs.get_sregs()
            change(sregs)
            vcpu.regs.set_sregs(sregs)
        else:
            sregs2 = vcpu.regs.get_sregs2()
            change(sregs2)
            vcpu.regs.set_sregs2(sregs2)

    return act


def changing(register: str, *, put: int = 0, clear: int = 0) -> Change:
    """Return a change that clears and sets bits of a register."""
    return lambda sregs: setattr(sregs, register, getattr(sregs, register) & ~int(clear) | int(put))


def refuse(vcpu: Vcpu, set_changed: Ioctl, change: Change) -> None:
    """Expect EINVAL, and that nothing changed."""
    before = vcpu.regs.get_sregs()
    with refused(errno.EINVAL):
        set_changed(change)
    assert vcpu.regs.get_sregs() == before


def hide(vcpu: Vcpu, feature: str) -> None:
    """Take a feature out of the vCPU's CPUID."""
    cpuid = Cpuid.from_struct(vcpu.cpuid.get())
    cpuid.clear_feature(feature)
    vcpu.cpuid.set(cpuid.to_struct())


@pytest.mark.parametrize(
    ("put", "clear"),
    [
        pytest.param(CR0.PG, CR0.PE, id="PG-without-PE"),
        pytest.param(CR0.NW, CR0.CD, id="NW-without-CD"),
        *(pytest.param(1 << bit, 0, id=f"bit{bit}") for bit in (32, 40, 47, 48, 62, 63)),
    ],
)
def test_cr0(vcpu: Vcpu, set_changed: Ioctl, put: int, clear: int) -> None:
    """CR0 with PG but not PE, NW but not CD, or upper bits is refused with EINVAL.

    Intel SDM volume 3, 2.5 Control Registers (CR0) and 6.15 (#GP of MOV CR0); arch/x86/kvm/regs.c,
    kvm_is_valid_cr0().
    """
    refuse(vcpu, set_changed, changing("cr0", put=put, clear=clear))


def test_long_mode_without_pae(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """EFER.LME with paging but without CR4.PAE is refused with EINVAL.

    Intel SDM volume 3, 9.8.5 Initializing IA-32e Mode; arch/x86/kvm/regs.c, kvm_is_valid_sregs().
    """
    refuse(vcpu, set_changed, changing("cr4", clear=CR4.PAE))


def test_lme_and_paging_without_lma(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """EFER.LME with paging but without EFER.LMA is refused with EINVAL.

    Intel SDM volume 3, 2.2.1 Extended Feature Enable Register; arch/x86/kvm/regs.c, kvm_is_valid_sregs().
    """
    refuse(vcpu, set_changed, changing("efer", clear=EFER.LMA))


@pytest.mark.parametrize("missing", ["LME", "PG"])
def test_lma_alone(vcpu: Vcpu, set_changed: Ioctl, missing: str) -> None:
    """EFER.LMA without EFER.LME, or without paging, is refused with EINVAL.

    Intel SDM volume 3, 2.2.1 Extended Feature Enable Register; arch/x86/kvm/regs.c, kvm_is_valid_sregs().
    """

    def change(sregs: Sregs) -> None:
        sregs.cs.l, sregs.cs.db = 0, 1
        if missing == "LME":
            sregs.efer &= ~int(EFER.LME)
        else:
            sregs.cr0 &= ~int(CR0.PG)

    refuse(vcpu, set_changed, change)


def test_64_bit_code_outside_long_mode(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """A code segment with the L bit is refused with EINVAL while EFER.LMA is clear.

    Intel SDM volume 3, 3.4.5 Segment Descriptors (L flag); arch/x86/kvm/regs.c, kvm_is_valid_sregs().
    """
    sregs = vcpu.regs.get_sregs()
    segments.protected_mode_sregs(sregs, gdt=0x2000, idt=0x3000, tss=0x4000)
    vcpu.regs.set_sregs(sregs)

    def change(sregs: Sregs) -> None:
        sregs.cs.l, sregs.cs.db = 1, 0

    refuse(vcpu, set_changed, change)


@pytest.mark.parametrize("bit", [12, 13, 14, 15, 19, 31, 63])
def test_cr4_reserved(vcpu: Vcpu, set_changed: Ioctl, bit: int) -> None:
    """Bits of CR4 that are reserved, or belong to features that the vCPU has not, are refused with EINVAL.

    Intel SDM volume 3, 2.5 Control Registers (CR4); arch/x86/kvm/regs.h, __cr4_reserved_bits().
    """
    for feature in ("la57", "vmx", "smx"):
        hide(vcpu, feature)
    refuse(vcpu, set_changed, changing("cr4", put=1 << bit))


def test_cr4_without_cpuid(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """Bits of CR4 are refused with EINVAL while the vCPU's CPUID lacks their features, whatever the host has.

    Intel SDM volume 3, 2.5 Control Registers (CR4); arch/x86/kvm/regs.h, __cr4_reserved_bits().
    """
    answers = {}
    for bit, feature in CR4_FEATURES.items():
        hide(vcpu, feature)
        try:
            set_changed(changing("cr4", put=bit))
        except KvmError as error:
            answers[feature] = error.errno
        else:
            answers[feature] = 0
    assert answers == dict.fromkeys(CR4_FEATURES.values(), errno.EINVAL)


def test_cr4_with_cpuid(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """Every bit of CR4 whose feature the vCPU's CPUID offers is taken, unless the mode forbids it.

    Intel SDM volume 3, 2.5 Control Registers (CR4).
    """
    cpuid = Cpuid.from_struct(vcpu.cpuid.get())
    offered = [bit for bit, feature in CR4_FEATURES.items() if cpuid.has(feature)]
    assert offered
    for bit in offered:
        if bit in (CR4.LA57, CR4.VMXE, CR4.SMXE):
            continue
        set_changed(changing("cr4", put=bit))
        assert vcpu.regs.get_sregs().cr4 & bit == bit


@pytest.mark.parametrize("bit", [1, 9, 16, 63])
def test_efer_reserved(vcpu: Vcpu, set_changed: Ioctl, bit: int) -> None:
    """Reserved bits of EFER are refused with EINVAL.

    AMD APM volume 2, 3.1.7; Linux 7.2, "KVM: x86: Check EFER validity on KVM_SET_SREGS*".
    """
    refuse(vcpu, set_changed, changing("efer", put=1 << bit))


@pytest.mark.parametrize("bit", EFER_FEATURES, ids=list(EFER_FEATURES.values()))
def test_efer_without_cpuid(vcpu: Vcpu, set_changed: Ioctl, bit: EFER) -> None:
    """A bit of EFER is refused with EINVAL while the vCPU's CPUID lacks its feature, whatever the host has.

    AMD APM volume 2, 3.1.7; Linux 7.2, "KVM: x86: Check EFER validity on KVM_SET_SREGS*".
    """
    sregs = vcpu.regs.get_sregs()
    sregs.efer &= ~int(bit)
    vcpu.regs.set_sregs(sregs)
    hide(vcpu, EFER_FEATURES[bit])
    refuse(vcpu, set_changed, changing("efer", put=bit))


def test_long_mode_without_cpuid(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """EFER.LME is refused with EINVAL for a vCPU whose CPUID has no long mode.

    AMD APM volume 2, 3.1.7; Linux 7.2, "KVM: x86: Check EFER validity on KVM_SET_SREGS*".
    """
    sregs = vcpu.regs.get_sregs()
    segments.protected_mode_sregs(sregs, gdt=0x2000, idt=0x3000, tss=0x4000)
    vcpu.regs.set_sregs(sregs)
    hide(vcpu, "lm")
    refuse(vcpu, set_changed, changing("efer", put=EFER.LME))


@pytest.mark.parametrize("bits", [36, 52])
def test_cr3_beyond_maxphyaddr(vcpu: Vcpu, set_changed: Ioctl, bits: int) -> None:
    """In long mode CR3 with a bit at or above the vCPU's own MAXPHYADDR is refused with EINVAL.

    Intel SDM volume 3, 4.5.2 (reserved bits of CR3); arch/x86/kvm/regs.c, kvm_is_valid_sregs().
    """
    if bits == 36:
        cpuid = Cpuid.from_struct(vcpu.cpuid.get())
        leaf = cpuid.ensure(0x8000_0008)
        leaf.eax = leaf.eax & ~0xFF_00FF | 36
        vcpu.cpuid.set(cpuid.to_struct())
    refuse(vcpu, set_changed, changing("cr3", put=1 << bits))


@pytest.mark.parametrize("bit", [0, 9, 52])
def test_apic_base_reserved(vcpu: Vcpu, set_changed: Ioctl, bit: int) -> None:
    """Reserved bits of the APIC base are refused with EINVAL.

    Intel SDM volume 3, 11.4.4 Local APIC Status and Location; arch/x86/kvm/lapic.c, kvm_apic_set_base().
    """
    refuse(vcpu, set_changed, changing("apic_base", put=1 << bit))


def test_apic_base_x2apic_alone(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """An APIC base with x2APIC mode but without the enable bit is refused with EINVAL.

    Intel SDM volume 3, 11.12.1 Detecting and Enabling x2APIC Mode ("Invalid"); arch/x86/kvm/lapic.c,
    kvm_apic_set_base().
    """
    refuse(vcpu, set_changed, changing("apic_base", put=APICBASE_EXTD, clear=APICBASE_ENABLE))


def test_apic_base_x2apic_without_cpuid(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """An APIC base with x2APIC mode is refused with EINVAL for a vCPU whose CPUID has no x2APIC.

    Intel SDM volume 3, 11.12.1 Detecting and Enabling x2APIC Mode; arch/x86/kvm/lapic.c, kvm_apic_set_base().
    """
    hide(vcpu, "x2apic")
    refuse(vcpu, set_changed, changing("apic_base", put=APICBASE_ENABLE | APICBASE_EXTD))


def test_unchanged_is_taken(vcpu: Vcpu, set_changed: Ioctl) -> None:
    """What was read may be written back, and changes nothing.

    Documentation/virt/kvm/api.rst, 4.14 KVM_SET_SREGS and 4.132 KVM_SET_SREGS2.
    """
    before = vcpu.regs.get_sregs()
    read: list[int] = []
    set_changed(lambda sregs: read.append(sregs.cr0))
    assert read == [before.cr0]
    assert vcpu.regs.get_sregs() == before
