# SPDX-License-Identifier: Apache-2.0
"""Local APIC modes as the guest switches them, and what each mode's registers refuse."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_X86_QUIRK_LAPIC_MMIO_HOLE,
    Agent,
    Fault,
    GuestVm,
    MakeVm,
    MmioExit,
    Msr,
    Vector,
    apic,
)

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")

OFF = apic.DEFAULT_BASE | 1 << 8  # IA32_APIC_BASE of the boot processor
X2APIC_ALONE = OFF | 1 << 10
XAPIC = OFF | 1 << 11
X2APIC = XAPIC | 1 << 10
GP = Fault(Vector.GP, 0)

REGISTERS = """
#include <kvmpy/guest.h>

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


@pytest.fixture
def agent(make_vm: MakeVm) -> Agent:
    """An agent in xAPIC mode."""
    return Agent(make_vm(AGENT).vcpus[0])


def legal(agent: Agent, *bases: int) -> None:
    """Let the guest write IA32_APIC_BASE, and read it back."""
    for base in bases:
        assert agent.wrmsr(Msr.MSR_IA32_APICBASE, base) is None
        assert agent.rdmsr(Msr.MSR_IA32_APICBASE) == base


def illegal(agent: Agent, *bases: int) -> None:
    """Let the guest write what is #GP and leaves IA32_APIC_BASE alone."""
    before = agent.rdmsr(Msr.MSR_IA32_APICBASE)
    for base in bases:
        assert agent.wrmsr(Msr.MSR_IA32_APICBASE, base) == GP
        assert agent.rdmsr(Msr.MSR_IA32_APICBASE) == before


def msr_of(register: int) -> int:
    """Return the x2APIC MSR of a register."""
    return 0x800 + (register >> 4)


def no_read(agent: Agent, *registers: int) -> None:
    """Expect that reading these x2APIC MSRs is #GP."""
    for register in registers:
        assert agent.rdmsr(msr_of(register)) == GP, f"{register:#x}"


def no_write(agent: Agent, register: int, value: int) -> None:
    """Expect that writing this to an x2APIC MSR is #GP."""
    got = agent.wrmsr(msr_of(register), value)
    assert got == GP, f"WRMSR of {value:#x} to x2APIC register {register:#x}: {got or 'taken'}, expected {GP}"


def test_legal_transitions(agent: Agent) -> None:
    """The guest may go from xAPIC to x2APIC mode, switch either off, and come back to xAPIC mode.

    Intel SDM 3A, 12.12.5 (x2APIC state transitions).
    """
    legal(agent, X2APIC, X2APIC, OFF, XAPIC, OFF, OFF, XAPIC, X2APIC)


def test_x2apic_to_xapic(agent: Agent) -> None:
    """From x2APIC mode the guest cannot go to xAPIC mode directly: #GP, and the mode stays.

    Intel SDM 3A, 12.12.5.1.
    """
    legal(agent, X2APIC)
    illegal(agent, XAPIC)


def test_disabled_to_x2apic(agent: Agent) -> None:
    """From "disabled" the guest cannot go to x2APIC mode directly: #GP, and the mode stays.

    Intel SDM 3A, 12.12.5.1.
    """
    legal(agent, OFF)
    illegal(agent, X2APIC)


def test_invalid_mode(agent: Agent) -> None:
    """x2APIC mode without the global enable bit is invalid from every mode: #GP.

    Intel SDM 3A, 12.12.1 (table of operating modes).
    """
    illegal(agent, X2APIC_ALONE)
    for base in (X2APIC, OFF):
        legal(agent, base)
        illegal(agent, X2APIC_ALONE)


def test_reserved_bits_of_base(agent: Agent) -> None:
    """Reserved bits of IA32_APIC_BASE are #GP.

    Intel SDM 3A, 12.4.4.
    """
    illegal(agent, *(XAPIC | 1 << bit for bit in (0, 9, 63)))


def test_cpuid_follows_enable(agent: Agent) -> None:
    """CPUID.1:EDX.APIC is clear while the APIC is disabled in IA32_APIC_BASE.

    Intel SDM 3A, 12.4.3.
    """
    for base, shown in ((XAPIC, 1), (OFF, 0), (XAPIC, 1)):
        legal(agent, base)
        assert agent.cpuid(1)[3] >> 9 & 1 == shown


def test_msrs_in_xapic_mode(agent: Agent) -> None:
    """In xAPIC mode the x2APIC MSRs are #GP, all of them.

    Intel SDM 3A, 12.12.2 (x2APIC register availability).
    """
    no_read(agent, *range(0, 0x400, 0x10))
    no_write(agent, apic.TPR, 0)
    no_write(agent, apic.EOI, 0)


def test_read_only_msrs(agent: Agent) -> None:
    """Writing ID, version, PPR, LDR, ISR, TMR, IRR or the timer's current count is #GP in x2APIC mode.

    Intel SDM 3A, 12.12.1.2 (register address space).
    """
    legal(agent, X2APIC)
    single = (apic.ID, apic.LVR, apic.PPR, apic.LDR, apic.TMR, apic.TIMER_CURRENT)
    for register in (*single, apic.ISR, apic.ISR + 0x70, apic.IRR, apic.IRR + 0x70):
        value = agent.rdmsr(msr_of(register))
        assert isinstance(value, int)
        no_write(agent, register, value)


def test_write_only_msrs(agent: Agent) -> None:
    """Reading EOI or SELF IPI is #GP in x2APIC mode.

    Intel SDM 3A, 12.12.1.2.
    """
    legal(agent, X2APIC)
    no_read(agent, apic.EOI, apic.SELF_IPI)


def test_absent_msrs(agent: Agent) -> None:
    """DFR, the upper half of the ICR and numbers without a register are #GP in x2APIC mode.

    Intel SDM 3A, 12.12.1.2 and 12.12.1.3 (reserved addresses).
    """
    legal(agent, X2APIC)
    no_read(agent, apic.DFR, apic.ICR2, 0x000, 0x400)
    no_write(agent, apic.DFR, 0xFFFF_FFFF)
    no_write(agent, apic.ICR2, 0)


def test_reserved_bits_of_msrs(agent: Agent) -> None:
    """Reserved bits in x2APIC MSRs are #GP, also a value other than 0 for the error status.

    Intel SDM 3A, 12.12.1.3 (reserved bit checking).
    """
    legal(agent, X2APIC)
    no_write(agent, apic.TPR, 1 << 32)
    no_write(agent, apic.SPIV, 1 << 32 | 0x1FF)
    no_write(agent, apic.LVT_TIMER, 1 << 32 | 1 << 16)
    no_write(agent, apic.ESR, 1)
    no_write(agent, apic.SELF_IPI, 1 << 8 | 0x51)
    no_write(agent, apic.ICR, 1 << 20 | 0x51)


@pytest.mark.parametrize("vcpu_id", [0, 9, 200])
def test_ids(make_vm: MakeVm, vcpu_id: int) -> None:
    """The guest's APIC id is the vCPU id in both modes, and in x2APIC mode the logical id follows from it.

    Documentation/virt/kvm/api.rst, 4.7 KVM_CREATE_VCPU; Intel SDM 3A, 12.12.10.2.
    """
    make_vm.run(REGISTERS, "ids", vcpu_id, vcpu_ids=[vcpu_id])


def test_software_disable_masks(make_vm: MakeVm) -> None:
    """Clearing the software enable bit masks all entries, and they stay masked until it is set.

    Intel SDM 3A, 12.4.7.2 (state after it has been software disabled).
    """
    make_vm.run(REGISTERS, "software_disable")


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
