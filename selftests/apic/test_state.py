# SPDX-License-Identifier: Apache-2.0
"""KVM_GET_LAPIC and KVM_SET_LAPIC: what a new local APIC holds, in which format, and what is refused."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST,
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST,
    KVM_X86_QUIRK_LINT0_REENABLED,
    Kvm,
    MsrError,
    Vcpu,
    Vm,
    apic,
    kvm_lapic_state,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_IRQCHIP", "KVM_CAP_SPLIT_IRQCHIP")

APIC_BASE = 0x1B
BSP, EXTD, ENABLE = 1 << 8, 1 << 10, 1 << 11
FORMAT_32BIT = f"KVM_CAP_X2APIC_API&{int(KVM_X2APIC_API_USE_32BIT_IDS)}"


def make(vm: Vm, vcpu_id: int = 0, *, x2apic: bool = False, format_32bit: bool = False) -> Vcpu:
    """Return a vCPU with a local APIC in the mode asked for."""
    vm.irq.create_split_chip()
    if format_32bit:
        vm.enable_cap(KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS)
    vcpu = vm.create_vcpu(vcpu_id)
    vcpu.cpuid.set(vm.kvm.supported_cpuid)
    if x2apic:
        vcpu.msrs.set(APIC_BASE, vcpu.msrs.get(APIC_BASE) | EXTD)
    return vcpu


@pytest.mark.requires(f"KVM_CAP_DISABLE_QUIRKS2&{int(KVM_X86_QUIRK_LINT0_REENABLED):#x}")
@pytest.mark.parametrize("disable", [False, True], ids=["quirk", "no-quirk"])
def test_lint0_at_reset(vm: Vm, disable: bool) -> None:
    """LINT0 of the boot processor takes external interrupts after reset, or is masked without the quirk.

    On the others it is always masked.  Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2,
    KVM_X86_QUIRK_LINT0_REENABLED.
    """
    if disable:
        vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_LINT0_REENABLED)
    vm.irq.create_split_chip()
    entries = [vm.create_vcpu(number).lapic.get_reg(apic.LVT_LINT0) for number in (0, 1)]
    assert entries == [apic.LVT_MASKED if disable else 0x700, apic.LVT_MASKED]


def test_power_up_state(vm: Vm) -> None:
    """A new local APIC is as after power-up: software-disabled, nothing pending, its entries masked.

    Intel SDM 3A, 12.4.7.1 (local APIC state after power-up or reset).
    """
    vcpu = make(vm)
    assert vcpu.lapic.get_reg(apic.SPIV) == 0xFF
    assert vcpu.lapic.get_reg(apic.TPR) == 0
    assert vcpu.lapic.get_reg(apic.DFR) == 0xFFFF_FFFF
    assert vcpu.lapic.get_reg(apic.LDR) == 0
    for first in (apic.ISR, apic.TMR, apic.IRR):
        assert [vcpu.lapic.get_reg(first + 16 * n) for n in range(8)] == [0] * 8
    for entry in (apic.LVT_TIMER, apic.LVT_LINT1, apic.LVT_ERROR):
        assert vcpu.lapic.get_reg(entry) == apic.LVT_MASKED
    for timer in (apic.TIMER_INITIAL, apic.TIMER_CURRENT, apic.TIMER_DIVIDE):
        assert vcpu.lapic.get_reg(timer) == 0


def test_base_of_boot_processor(vm: Vm) -> None:
    """A new local APIC is enabled in xAPIC mode at 0xfee00000, and the boot processor's base says so.

    Intel SDM 3A, 12.4.4 (IA32_APIC_BASE: BSP flag, global enable).
    """
    vm.irq.create_split_chip()
    first, second = vm.create_vcpu(0), vm.create_vcpu(1)
    assert first.regs.get_sregs().apic_base == 0xFEE0_0000 | ENABLE | BSP
    assert second.regs.get_sregs().apic_base == 0xFEE0_0000 | ENABLE


def test_xapic_id(vm: Vm) -> None:
    """In xAPIC mode the id, which is the vCPU's, is in bits 31-24 of the ID register.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC; 4.7 KVM_CREATE_VCPU (the vCPU id is the APIC id).
    """
    assert make(vm, 0x2C).lapic.get_reg(apic.ID) == 0x2C << 24


def test_x2apic_id_in_old_format(vm: Vm) -> None:
    """Without KVM_X2APIC_API_USE_32BIT_IDS the id is in bits 31-24 in x2APIC mode too.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC: "always uses xAPIC format".
    """
    assert make(vm, 0x2C, x2apic=True).lapic.get_reg(apic.ID) == 0x2C << 24


@pytest.mark.requires(FORMAT_32BIT, "KVM_CAP_MAX_VCPU_ID>=1024")
def test_x2apic_id_in_new_format(vm: Vm) -> None:
    """With KVM_X2APIC_API_USE_32BIT_IDS the ID register holds all 32 bits in x2APIC mode only.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC.
    """
    vcpu = make(vm, 0x12C, x2apic=True, format_32bit=True)
    assert vcpu.lapic.get_reg(apic.ID) == 0x12C
    other = vm.create_vcpu(7)
    assert other.lapic.get_reg(apic.ID) == 7 << 24


@pytest.mark.requires(FORMAT_32BIT)
def test_x2apic_id_is_read_only(vm: Vm) -> None:
    """In x2APIC mode with 32-bit ids a state with another id than the vCPU's is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.58 KVM_SET_LAPIC; Intel SDM 3A, 12.12.5.1 (the x2APIC id is fixed).
    """
    vcpu = make(vm, 5, x2apic=True, format_32bit=True)
    vcpu.lapic.set(vcpu.lapic.get())
    with refused(errno.EINVAL):
        vcpu.lapic.set_reg(apic.ID, 6)
    assert vcpu.lapic.get_reg(apic.ID) == 5


@pytest.mark.requires(FORMAT_32BIT)
@pytest.mark.parametrize("format_32bit", [False, True], ids=["old-format", "new-format"])
def test_id_follows_the_mode(vm: Vm, format_32bit: bool) -> None:
    """The id is in xAPIC's place again when user space takes the APIC out of x2APIC mode, and back.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC (formats of the APIC_ID register).
    """
    vcpu = make(vm, 0x2C, x2apic=True, format_32bit=format_32bit)
    base = vcpu.msrs.get(APIC_BASE)
    in_x2apic = 0x2C if format_32bit else 0x2C << 24
    for _ in range(2):
        assert vcpu.lapic.get_reg(apic.ID) == in_x2apic
        vcpu.msrs.set(APIC_BASE, base & ~(EXTD | ENABLE))
        vcpu.msrs.set(APIC_BASE, base & ~EXTD)
        assert vcpu.lapic.get_reg(apic.ID) == 0x2C << 24
        vcpu.msrs.set(APIC_BASE, base)


def test_x2apic_id_write_in_the_old_format(vm: Vm) -> None:
    """In x2APIC mode and the old format the id of a state that is set has no effect: the id is the vCPU's.

    Documentation/virt/kvm/api.rst, 4.58 KVM_SET_LAPIC.
    """
    vcpu = make(vm, 5, x2apic=True)
    vcpu.lapic.set_reg(apic.ID, 6 << 24)
    assert vcpu.lapic.get_reg(apic.ID) == 5 << 24


@pytest.mark.parametrize("vcpu_id", [0, 5, 0x2C])
def test_x2apic_logical_id(vm: Vm, vcpu_id: int) -> None:
    """In x2APIC mode the logical id follows from the id: the cluster is id / 16, the bit in it id % 16.

    Intel SDM 3A, 12.12.10.2 (deriving the logical x2APIC id from the local x2APIC id).
    """
    vcpu = make(vm, vcpu_id, x2apic=True)
    assert vcpu.lapic.get_reg(apic.LDR) == vcpu_id // 16 << 16 | 1 << vcpu_id % 16


@pytest.mark.parametrize("x2apic", [False, True])
def test_state_is_kept(vm: Vm, x2apic: bool) -> None:
    """What KVM_SET_LAPIC writes KVM_GET_LAPIC reads back: priority, entries, timer, interrupts, command.

    Documentation/virt/kvm/api.rst, 4.58 KVM_SET_LAPIC.
    """
    vcpu = make(vm, 3, x2apic=x2apic)
    values = {
        apic.TPR: 0x40,
        apic.SPIV: 0x1F0,
        apic.IRR + 0x10 * 2: 1 << 5,
        apic.TMR + 0x10 * 2: 1 << 5,
        apic.ICR: 0x000C_08F0,
        apic.ICR2: 0x0300_0000,
        apic.LVT_TIMER: 0x2_0000 | 0x60,
        apic.LVT_LINT1: 0x400,
        apic.TIMER_DIVIDE: 0xB,
    }
    for register, value in values.items():
        vcpu.lapic.set_reg(register, value)
    assert {register: vcpu.lapic.get_reg(register) for register in values} == values
    before = vcpu.lapic.get()
    vcpu.lapic.set(before)
    assert vcpu.lapic.get() == before


def test_version_is_read_only(vm: Vm) -> None:
    """The version register names an integrated APIC with six entries or more, and cannot be changed.

    Intel SDM 3A, 12.4.8 (integrated APIC: 10h to 15h, max LVT entry).
    """
    vcpu = make(vm)
    before = vcpu.lapic.get_reg(apic.LVR)
    assert before & 0xFF in range(0x10, 0x16)
    assert before >> 16 & 0xFF >= 5
    vcpu.lapic.set_reg(apic.LVR, 0)
    assert vcpu.lapic.get_reg(apic.LVR) == before


def test_no_local_apic(vm: Vm) -> None:
    """Without an in-kernel local APIC its state can be neither read nor written: EINVAL.

    Documentation/virt/kvm/api.rst, 4.57 KVM_GET_LAPIC and 4.58 KVM_SET_LAPIC (capability KVM_CAP_IRQCHIP).
    """
    vcpu = vm.create_vcpu()
    with refused(errno.EINVAL):
        vcpu.lapic.get()
    with refused(errno.EINVAL):
        vcpu.lapic.set(kvm_lapic_state())


@pytest.mark.requires("KVM_CAP_X2APIC_API")
def test_unknown_api_flags(vm: Vm) -> None:
    """Flags that KVM_CAP_X2APIC_API does not have are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 7.7 KVM_CAP_X2APIC_API.
    """
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_X2APIC_API, 1 << 63)
    offered = vm.check_extension(KVM_CAP_X2APIC_API)
    unknown = (offered + 1) & ~offered
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_X2APIC_API, unknown)


@pytest.mark.requires(f"KVM_CAP_X2APIC_API&{int(KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST)}")
def test_suppressed_eoi_broadcast_flags(kvm: Kvm) -> None:
    """Enabling suppressed EOI broadcasts needs a split irqchip, and excludes disabling them: EINVAL.

    Documentation/virt/kvm/api.rst, 7.7 KVM_CAP_X2APIC_API.
    """
    enable = int(KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST)
    disable = int(KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST)
    with kvm.create_vm() as vm:
        vm.irq.create_chip()
        with refused(errno.EINVAL):
            vm.enable_cap(KVM_CAP_X2APIC_API, enable)
        vm.enable_cap(KVM_CAP_X2APIC_API, disable)
    with kvm.create_vm() as vm:
        vm.irq.create_split_chip()
        with refused(errno.EINVAL):
            vm.enable_cap(KVM_CAP_X2APIC_API, enable | disable)
        vm.enable_cap(KVM_CAP_X2APIC_API, enable)


@pytest.mark.requires(f"KVM_CAP_X2APIC_API&{int(KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST)}")
def test_suppressed_eoi_broadcast_is_advertised(kvm: Kvm) -> None:
    """The version register offers suppressed EOI broadcasts exactly when they are enabled.

    Documentation/virt/kvm/api.rst, 7.7 KVM_CAP_X2APIC_API; Intel SDM 3A, 12.8.5 (bit 24 of the version).
    """
    for flag, bit in (
        (KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST, 1),
        (KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST, 0),
    ):
        with kvm.create_vm() as vm:
            vm.irq.create_split_chip()
            vm.enable_cap(KVM_CAP_X2APIC_API, flag)
            vcpu = vm.create_vcpu()
            vcpu.cpuid.set(kvm.supported_cpuid)
            vcpu.lapic.set(vcpu.lapic.get())
            assert vcpu.lapic.get_reg(apic.LVR) >> 24 & 1 == bit


@pytest.mark.parametrize(
    "value",
    [ENABLE | 1, ENABLE | 1 << 9, EXTD, ENABLE | 1 << 63],
    ids=["bit0", "bit9", "extd-alone", "bit63"],
)
def test_illegal_base(vm: Vm, value: int) -> None:
    """An APIC base with reserved bits, or x2APIC mode without enable, is refused in MSR and KVM_SET_SREGS.

    Intel SDM 3A, 12.4.4 and 12.12.1 (invalid: EN 0, EXTD 1).
    """
    vcpu = make(vm)
    before = vcpu.msrs.get(APIC_BASE)
    with pytest.raises(MsrError):
        vcpu.msrs.set(APIC_BASE, 0xFEE0_0000 | value)
    sregs = vcpu.regs.get_sregs()
    sregs.apic_base = 0xFEE0_0000 | value
    with refused(errno.EINVAL):
        vcpu.regs.set_sregs(sregs)
    assert vcpu.msrs.get(APIC_BASE) == before


def test_base_without_x2apic_in_cpuid(vm: Vm) -> None:
    """x2APIC mode is refused for a vCPU whose CPUID does not offer it.

    Intel SDM 3A, 12.12.1 (CPUID.01H:ECX.21).
    """
    vcpu = make(vm)
    entries = vm.kvm.supported_cpuid.copy().entries_list()
    for entry in entries:
        if entry.function == 1:
            entry.ecx &= ~(1 << 21)
    vcpu.cpuid.set(entries)
    with pytest.raises(MsrError):
        vcpu.msrs.set(APIC_BASE, 0xFEE0_0000 | ENABLE | EXTD)


def test_sregs_shows_base(vm: Vm) -> None:
    """The APIC base of KVM_GET_SREGS is IA32_APIC_BASE, whichever of both it was written through.

    Documentation/virt/kvm/api.rst, 4.13 KVM_GET_SREGS (apic_base).
    """
    vcpu = make(vm)
    vcpu.msrs.set(APIC_BASE, 0xFEE0_0000 | ENABLE | EXTD | BSP)
    sregs = vcpu.regs.get_sregs()
    assert sregs.apic_base == 0xFEE0_0000 | ENABLE | EXTD | BSP
    sregs.apic_base = 0xFEE0_0000 | BSP
    vcpu.regs.set_sregs(sregs)
    assert vcpu.msrs.get(APIC_BASE) == 0xFEE0_0000 | BSP
