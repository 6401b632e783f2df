# SPDX-License-Identifier: Apache-2.0
"""Local APIC modes as the guest switches them, and what each mode's registers refuse."""

from __future__ import annotations

import pytest

from kvmpy import KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_LAPIC_MMIO_HOLE, GuestVm, MakeVm, MmioExit, apic

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")

TRANSITIONS = """
#include <kvmpy/guest.h>

#define FIXED	(0xfee00000ull | APICBASE_BSP)
#define OFF	FIXED
#define XAPIC	(FIXED | APICBASE_ENABLE)
#define X2APIC	(FIXED | APICBASE_ENABLE | APICBASE_EXTD)

static void legal(u64 to)
{
	GUEST_ASSERT(!wrmsr_safe(MSR_IA32_APICBASE, to).faulted);
	GUEST_ASSERT_EQ(rdmsr(MSR_IA32_APICBASE), to);
}

static void illegal(u64 to)
{
	u64 before = rdmsr(MSR_IA32_APICBASE);
	struct guest_fault fault = wrmsr_safe(MSR_IA32_APICBASE, to);

	GUEST_ASSERT_EQ(fault.vector, GP_VECTOR);
	GUEST_ASSERT_EQ(rdmsr(MSR_IA32_APICBASE), before);
}

void legal_transitions(void)
{
	legal(X2APIC);
	legal(X2APIC);
	legal(OFF);
	legal(XAPIC);
	legal(OFF);
	legal(OFF);
	legal(XAPIC);
	legal(X2APIC);
}

void x2apic_to_xapic(void)
{
	legal(X2APIC);
	illegal(XAPIC);
}

void disabled_to_x2apic(void)
{
	legal(OFF);
	illegal(X2APIC);
}

void invalid(void)
{
	illegal(FIXED | APICBASE_EXTD);
	legal(X2APIC);
	illegal(FIXED | APICBASE_EXTD);
	legal(OFF);
	illegal(FIXED | APICBASE_EXTD);
}

void reserved_bits(void)
{
	illegal(XAPIC | BIT(0));
	illegal(XAPIC | BIT(9));
	illegal(XAPIC | BIT(63));
}

void cpuid_bit(void)
{
	GUEST_ASSERT_EQ(cpuid(1, 0).edx >> 9 & 1, 1u);
	legal(OFF);
	GUEST_ASSERT_EQ(cpuid(1, 0).edx >> 9 & 1, 0u);
	legal(XAPIC);
	GUEST_ASSERT_EQ(cpuid(1, 0).edx >> 9 & 1, 1u);
}
"""

REGISTERS = """
#include <kvmpy/guest.h>

#define X2(reg)		(MSR_X2APIC_BASE + ((reg) >> 4))

static void no_read(u32 msr)
{
	u64 value;

	GUEST_ASSERT_EQ(rdmsr_safe(msr, &value).vector, GP_VECTOR);
}

static void no_write(u32 msr, u64 value)
{
	GUEST_ASSERT_EQ(wrmsr_safe(msr, value).vector, GP_VECTOR);
}

void msrs_in_xapic_mode(void)
{
	u32 reg;

	apic_enable();
	for (reg = 0; reg < 0x400; reg += 0x10)
		no_read(X2(reg));
	no_write(X2(APIC_TASKPRI), 0);
	no_write(X2(APIC_EOI), 0);
}

void read_only(void)
{
	static const u16 regs[] = {
		APIC_ID, APIC_LVR, APIC_PROCPRI, APIC_LDR, APIC_ISR, APIC_ISR + 0x70,
		APIC_TMR, APIC_IRR, APIC_IRR + 0x70, APIC_TMCCT,
	};
	u32 i;

	x2apic_enable();
	for (i = 0; i < ARRAY_SIZE(regs); i++) {
		u64 value = x2apic_read(regs[i]);

		no_write(X2(regs[i]), value);
	}
}

void write_only(void)
{
	x2apic_enable();
	no_read(X2(APIC_EOI));
	no_read(X2(APIC_SELF_IPI));
}

void absent(void)
{
	x2apic_enable();
	no_read(X2(APIC_DFR));
	no_write(X2(APIC_DFR), ~0u);
	no_read(X2(APIC_ICR2));
	no_write(X2(APIC_ICR2), 0);
	no_read(X2(0x000));
	no_read(X2(0x3f0) + 1);
}

void reserved(void)
{
	x2apic_enable();
	no_write(X2(APIC_TASKPRI), BIT(32));
	no_write(X2(APIC_SPIV), BIT(32) | 0x1ff);
	no_write(X2(APIC_LVTT), BIT(32) | APIC_LVT_MASKED);
	no_write(X2(APIC_ESR), 1);
	no_write(X2(APIC_SELF_IPI), BIT(8) | 0x51);
	no_write(X2(APIC_ICR), BIT(20) | 0x51);
}

void ids(u64 id)
{
	apic_enable();
	GUEST_ASSERT_EQ(xapic_read(APIC_ID), (u32)id << 24);
	x2apic_enable();
	GUEST_ASSERT_EQ(x2apic_read(APIC_ID), id);
	GUEST_ASSERT_EQ(x2apic_read(APIC_LDR), id / 16 << 16 | 1u << id % 16);
}

void software_disable(void)
{
	apic_enable();
	xapic_write(APIC_LVTT, 0x51);
	xapic_write(APIC_LVT1, 0x400);
	GUEST_ASSERT_EQ(xapic_read(APIC_LVTT), 0x51u);
	xapic_write(APIC_SPIV, 0xff);
	GUEST_ASSERT_EQ(xapic_read(APIC_LVTT), 0x51u | APIC_LVT_MASKED);
	GUEST_ASSERT_EQ(xapic_read(APIC_LVT1), 0x400u | APIC_LVT_MASKED);
	/* Unmasking has no effect until the APIC is enabled again. */
	xapic_write(APIC_LVTT, 0x51);
	GUEST_ASSERT_EQ(xapic_read(APIC_LVTT), 0x51u | APIC_LVT_MASKED);
	xapic_write(APIC_SPIV, 0x1ff);
	xapic_write(APIC_LVTT, 0x51);
	GUEST_ASSERT_EQ(xapic_read(APIC_LVTT), 0x51u);
}

void page_while_disabled(void)
{
	apic_disable();
	GUEST_SYNC(xapic_read(APIC_ID));
	xapic_write(APIC_TASKPRI, 0x20);
	GUEST_SYNC(1);
	wrmsr(MSR_IA32_APICBASE, 0xfee00000ull | APICBASE_BSP | APICBASE_ENABLE);
	GUEST_ASSERT_EQ(xapic_read(APIC_TASKPRI), 0u);
}
"""


def run(make_vm: MakeVm, source: str, entry: str, *args: int, vcpu_id: int = 0) -> None:
    """Run *entry* of *source* to its end; the guest asserts."""
    vm = make_vm(source, vcpu_ids=[vcpu_id])
    vm.vcpus[0].set_entry(entry, *args)
    vm.launch()
    vm.vcpus[0].run_to_done()


def test_legal_transitions(make_vm: MakeVm) -> None:
    """The guest may go from xAPIC to x2APIC mode, switch either off, and come back to xAPIC mode.

    Intel SDM 3A, 12.12.5 (x2APIC state transitions).
    """
    run(make_vm, TRANSITIONS, "legal_transitions")


def test_x2apic_to_xapic(make_vm: MakeVm) -> None:
    """From x2APIC mode the guest cannot go to xAPIC mode directly: #GP, and the mode stays.

    Intel SDM 3A, 12.12.5.1.
    """
    run(make_vm, TRANSITIONS, "x2apic_to_xapic")


def test_disabled_to_x2apic(make_vm: MakeVm) -> None:
    """From "disabled" the guest cannot go to x2APIC mode directly: #GP, and the mode stays.

    Intel SDM 3A, 12.12.5.1.
    """
    run(make_vm, TRANSITIONS, "disabled_to_x2apic")


def test_invalid_mode(make_vm: MakeVm) -> None:
    """x2APIC mode without the global enable bit is invalid from every mode: #GP.

    Intel SDM 3A, 12.12.1 (table of operating modes).
    """
    run(make_vm, TRANSITIONS, "invalid")


def test_reserved_bits_of_base(make_vm: MakeVm) -> None:
    """Reserved bits of IA32_APIC_BASE are #GP.

    Intel SDM 3A, 12.4.4.
    """
    run(make_vm, TRANSITIONS, "reserved_bits")


def test_cpuid_follows_enable(make_vm: MakeVm) -> None:
    """CPUID.1:EDX.APIC is clear while the APIC is disabled in IA32_APIC_BASE.

    Intel SDM 3A, 12.4.3.
    """
    run(make_vm, TRANSITIONS, "cpuid_bit")


def test_msrs_in_xapic_mode(make_vm: MakeVm) -> None:
    """In xAPIC mode the x2APIC MSRs are #GP, all of them.

    Intel SDM 3A, 12.12.2 (x2APIC register availability).
    """
    run(make_vm, REGISTERS, "msrs_in_xapic_mode")


def test_read_only_msrs(make_vm: MakeVm) -> None:
    """Writing ID, version, PPR, LDR, ISR, TMR, IRR or the timer's current count is #GP in x2APIC mode.

    Intel SDM 3A, 12.12.1.2 (register address space).
    """
    run(make_vm, REGISTERS, "read_only")


def test_write_only_msrs(make_vm: MakeVm) -> None:
    """Reading EOI or SELF IPI is #GP in x2APIC mode.

    Intel SDM 3A, 12.12.1.2.
    """
    run(make_vm, REGISTERS, "write_only")


def test_absent_msrs(make_vm: MakeVm) -> None:
    """DFR, the upper half of the ICR and numbers without a register are #GP in x2APIC mode.

    Intel SDM 3A, 12.12.1.2 and 12.12.1.3 (reserved addresses).
    """
    run(make_vm, REGISTERS, "absent")


def test_reserved_bits_of_msrs(make_vm: MakeVm) -> None:
    """Reserved bits in x2APIC MSRs are #GP, also a value other than 0 for the error status.

    Intel SDM 3A, 12.12.1.3 (reserved bit checking).
    """
    run(make_vm, REGISTERS, "reserved")


@pytest.mark.parametrize("vcpu_id", [0, 9, 200])
def test_ids(make_vm: MakeVm, vcpu_id: int) -> None:
    """The guest's APIC id is the vCPU id in both modes, and in x2APIC mode the logical id follows from it.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU; Intel SDM 3A, 12.12.10.2.
    """
    run(make_vm, REGISTERS, "ids", vcpu_id, vcpu_id=vcpu_id)


def test_software_disable_masks(make_vm: MakeVm) -> None:
    """Clearing the software enable bit masks all entries, and they stay masked until it is set.

    Intel SDM 3A, 12.4.7.2 (state after it has been software disabled).
    """
    run(make_vm, REGISTERS, "software_disable")


def test_page_of_disabled_apic(make_vm: MakeVm) -> None:
    """By KVM's quirk the page of a disabled APIC reads as all ones and ignores writes.

    Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2: KVM_X86_QUIRK_LAPIC_MMIO_HOLE.
    """
    vm = make_vm.start(REGISTERS, "page_while_disabled")
    assert [call.args for call in vm.vcpus[0].syncs()] == [(0xFFFF_FFFF,), (1,)]


@pytest.mark.requires(f"KVM_CAP_DISABLE_QUIRKS2&{int(KVM_X86_QUIRK_LAPIC_MMIO_HOLE)}")
def test_page_of_disabled_apic_without_quirk(make_vm: MakeVm) -> None:
    """With KVM_X86_QUIRK_LAPIC_MMIO_HOLE disabled the page of a disabled APIC is MMIO of user space.

    Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2.
    """

    def before(vm: GuestVm) -> None:
        vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_LAPIC_MMIO_HOLE)

    vcpu = make_vm.start(REGISTERS, "page_while_disabled", before_vcpus=before).vcpus[0]
    got = vcpu.expect(MmioExit)
    assert (got.phys_addr, got.is_write) == (apic.DEFAULT_BASE + apic.ID, False)
    got.respond(0x1234)
    assert vcpu.sync().args == (0x1234,)
    got = vcpu.expect(MmioExit)
    assert (got.phys_addr, got.is_write, got.value) == (apic.DEFAULT_BASE + apic.TPR, True, 0x20)
    assert vcpu.sync().args == (1,)
    vcpu.run_to_done()
