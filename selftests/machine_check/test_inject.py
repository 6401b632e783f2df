# SPDX-License-Identifier: Apache-2.0
"""Machine checks that user space injects: what is recorded, what the guest is told, what is refused."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    CR4,
    KVM_CAP_MCE,
    Agent,
    GuestVcpu,
    Kvm,
    MakeVm,
    Msr,
    ShutdownExit,
    Vcpu,
    Vm,
    kvm_x86_mce,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_MCE")

VALID, OVERFLOW, UNCORRECTED, ENABLED = 1 << 63, 1 << 62, 1 << 61, 1 << 60
ADDRESS_VALID, MISC_VALID, CORRUPT = 1 << 58, 1 << 59, 1 << 57
IN_PROGRESS, RESTARTABLE = 1 << 2, 1 << 0
HAS_CTL, HAS_CMCI = 1 << 8, 1 << 10
ALL_ONES = (1 << 64) - 1
MC0_CTL2 = 0x280

BANK = 3
FATAL = VALID | UNCORRECTED | ENABLED | ADDRESS_VALID | MISC_VALID | CORRUPT | 0x0136
CORRECTED = VALID | ENABLED | ADDRESS_VALID | 0x0151

GUEST = """
#include <kvmpy/guest.h>

#define BANK		3
#define MC_STATUS	(0x401 + 4 * BANK)

GUEST_SHARED struct { u64 checks, global_status, status, address, misc; } seen;

static void machine_check(struct exception_frame *frame)
{
	(void)frame;
	seen.checks++;
	seen.global_status = rdmsr(0x17a);
	seen.status = rdmsr(MC_STATUS);
	seen.address = rdmsr(MC_STATUS + 1);
	seen.misc = rdmsr(MC_STATUS + 2);
	wrmsr(MC_STATUS, 0);
	wrmsr(0x17a, 0);
}

void guest_main(void)
{
	guest_exception_install(MC_VECTOR, machine_check);
	guest_agent();
}
"""


class Checked:
    """A guest that counts its machine checks, with CR4.MCE on unless *enable* is False."""

    def __init__(self, make_vm: MakeVm, enable: bool = True) -> None:
        self.vm = make_vm(GUEST)
        self.vcpu: GuestVcpu = self.vm.vcpus[0]
        self.agent = Agent(self.vcpu)
        self.vcpu.events.setup_mce(BANK + 1)
        self.agent.start()
        if enable:
            assert self.agent.change_cr(4, put=CR4.MCE) is None

    def look(self) -> tuple[int, ...]:
        """Let the guest run on; return its count and what its handler read last."""
        self.agent.must(b"")
        return tuple(self.vm.symbol("seen").view("Q"))

    @property
    def recorded(self) -> tuple[int, ...]:
        """STATUS, ADDR and MISC of the bank."""
        first = Msr.MSR_IA32_MC0_CTL + 4 * BANK
        return tuple(self.vcpu.msrs.get_many([first + 1, first + 2, first + 3]).values())


def error(
    status: int, *, global_status: int = 0, bank: int = BANK, address: int = 0x1234_5000
) -> kvm_x86_mce:
    return kvm_x86_mce(status=status, addr=address, misc=0x8C, mcg_status=global_status, bank=bank)


@pytest.mark.usefixtures("open_registers")
def test_uncorrected_error_is_an_exception(make_vm: MakeVm) -> None:
    """An uncorrected error raises #MC, once, and the guest finds all of it in the bank and in MCG_STATUS.

    Documentation/virt/kvm/api.rst, 4.106 KVM_X86_SET_MCE.
    """
    guest = Checked(make_vm)
    guest.vcpu.events.set_mce(error(FATAL, global_status=IN_PROGRESS | RESTARTABLE))
    seen = (1, IN_PROGRESS | RESTARTABLE, FATAL, 0x1234_5000, 0x8C)
    assert guest.look() == seen
    assert guest.look() == seen


@pytest.mark.usefixtures("open_registers")
def test_corrected_error_is_only_recorded(make_vm: MakeVm) -> None:
    """A corrected error is recorded in its bank, and no exception is raised.

    Documentation/virt/kvm/api.rst, 4.106 KVM_X86_SET_MCE ("If ... an uncorrected error").
    """
    guest = Checked(make_vm)
    guest.vcpu.events.set_mce(error(CORRECTED))
    assert guest.recorded == (CORRECTED, 0x1234_5000, 0x8C)
    assert guest.look()[0] == 0


@pytest.mark.usefixtures("open_registers")
def test_corrected_error_over_another(make_vm: MakeVm) -> None:
    """A second corrected error takes the place of the first, with the overflow flag.

    Intel SDM, volume 3, "Overwrite Rules for Machine Check Overflow"; arch/x86/kvm/x86.c.
    """
    guest = Checked(make_vm)
    guest.vcpu.events.set_mce(error(CORRECTED))
    guest.vcpu.events.set_mce(error(CORRECTED, address=0x6000))
    assert guest.recorded == (CORRECTED | OVERFLOW, 0x6000, 0x8C)


@pytest.mark.usefixtures("open_registers")
@pytest.mark.parametrize("why", ["in-progress", "switched-off"])
def test_error_that_cannot_be_handled(make_vm: MakeVm, why: str) -> None:
    """While a machine check is in progress, or CR4.MCE is clear, an uncorrected error is a shutdown.

    Documentation/virt/kvm/api.rst, 4.106 KVM_X86_SET_MCE ("KVM_EXIT_SHUTDOWN"); Intel SDM, volume 3, CR4.MCE.
    """
    guest = Checked(make_vm, enable=why == "in-progress")
    if why == "in-progress":
        guest.vcpu.msrs.set(Msr.MSR_IA32_MCG_STATUS, IN_PROGRESS)
    guest.vcpu.events.set_mce(error(FATAL, global_status=IN_PROGRESS))
    guest.agent.begin(b"")
    guest.vcpu.expect(ShutdownExit)


@pytest.mark.usefixtures("open_registers")
def test_bank_that_reports_nothing(make_vm: MakeVm) -> None:
    """With a bank's CTL MSR clear, its uncorrected errors are neither recorded nor reported.

    Intel SDM, volume 3, "IA32_MCi_CTL MSRs"; arch/x86/kvm/x86.c.
    """
    guest = Checked(make_vm)
    guest.vcpu.msrs.set(Msr.MSR_IA32_MC0_CTL + 4 * BANK, 0)
    guest.vcpu.events.set_mce(error(FATAL, global_status=IN_PROGRESS))
    assert guest.recorded == (0, 0, 0)
    assert guest.look()[0] == 0


def test_bank_out_of_range(vcpu: Vcpu) -> None:
    """A bank that KVM_X86_SETUP_MCE did not make is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.106 KVM_X86_SET_MCE.
    """
    vcpu.events.setup_mce(BANK)
    vcpu.events.set_mce(error(CORRECTED, bank=BANK - 1))
    with refused(errno.EINVAL):
        vcpu.events.set_mce(error(CORRECTED, bank=BANK))


def test_error_that_is_not_valid(vcpu: Vcpu) -> None:
    """A status without the VAL bit is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.106 KVM_X86_SET_MCE.
    """
    with refused(errno.EINVAL):
        vcpu.events.set_mce(error(CORRECTED & ~VALID))


def test_number_of_banks(vm: Vm) -> None:
    """KVM_CAP_MCE is the largest number of banks; none and one more are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.105 KVM_X86_SETUP_MCE.
    """
    vcpu = vm.create_vcpu()
    most = vm.check_extension(KVM_CAP_MCE)
    for count in (0, most + 1):
        with refused(errno.EINVAL):
            vcpu.events.setup_mce(count)
    for count in (1, most):
        vcpu.events.setup_mce(count)
        assert vcpu.msrs.get(Msr.MSR_IA32_MCG_CAP) == count


def test_unsupported_features(kvm: Kvm) -> None:
    """Features outside KVM_X86_GET_MCE_CAP_SUPPORTED are refused with EINVAL, and those in it are taken.

    Documentation/virt/kvm/api.rst, 4.104 KVM_X86_GET_MCE_CAP_SUPPORTED and 4.105 KVM_X86_SETUP_MCE.
    """
    supported = kvm.x86_get_mce_cap_supported()
    # Bits 16 to 23 are a count of registers, which any vCPU may be given.
    features = [1 << bit for bit in range(8, 64) if not 16 <= bit < 24]
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        for feature in features:
            if supported & feature:
                vcpu.events.setup_mce(BANK | feature)
                assert vcpu.msrs.get(Msr.MSR_IA32_MCG_CAP) & 0xFF == BANK
            else:
                with refused(errno.EINVAL):
                    vcpu.events.setup_mce(BANK | feature)


def test_banks_start_enabled(kvm: Kvm) -> None:
    """After KVM_X86_SETUP_MCE the banks report every error: their CTL MSRs, and MCG_CTL, are all ones.

    Documentation/virt/kvm/api.rst, 4.105 KVM_X86_SETUP_MCE; arch/x86/kvm/x86.c.
    """
    has_ctl = kvm.x86_get_mce_cap_supported() & HAS_CTL
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.events.setup_mce(BANK | has_ctl)
        for bank in range(BANK):
            assert vcpu.msrs.get(Msr.MSR_IA32_MC0_CTL + 4 * bank) == ALL_ONES
        assert vcpu.msrs.get(Msr.MSR_IA32_MCG_CTL) == (ALL_ONES if has_ctl else 0)


def _needs_cmci(kvm: Kvm) -> str | None:
    if kvm.x86_get_mce_cap_supported() & HAS_CMCI:
        return None
    return "corrected machine-check interrupts (MCG_CMCI_P in KVM_X86_GET_MCE_CAP_SUPPORTED)"


CMCI_GUEST = """
#include <kvmpy/guest.h>

#define VECTOR	0xa4

GUEST_SHARED u64 interrupts, machine_checks;

static void interrupt(struct exception_frame *frame)
{
	(void)frame;
	interrupts++;
	apic_eoi();
}

static void machine_check(struct exception_frame *frame)
{
	(void)frame;
	machine_checks++;
}

void guest_main(void)
{
	guest_exception_install(VECTOR, interrupt);
	guest_exception_install(MC_VECTOR, machine_check);
	write_cr4(read_cr4() | BIT(6));
	apic_enable();
	apic_write(0x2f0, VECTOR);
	guest_agent();
}
"""


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires.with_args(_needs_cmci)
def test_uncorrected_error_without_action(make_vm: MakeVm) -> None:
    """An uncorrected error that needs no action is recorded, and interrupts where the bank's CTL2 says so.

    Intel SDM, volume 3, "UCR Error Classification" and "Corrected Machine Check Interrupt";
    arch/x86/kvm/x86.c, kvm_vcpu_x86_set_ucna().
    """
    vm = make_vm(CMCI_GUEST)
    vcpu = vm.vcpus[0]
    vcpu.events.setup_mce((BANK + 1) | HAS_CMCI)
    agent = Agent(vcpu)
    seen = []
    for enable in (1 << 30, 0):
        assert agent.wrmsr(MC0_CTL2 + BANK, enable) is None
        vcpu.events.set_mce(error(VALID | UNCORRECTED | ENABLED | ADDRESS_VALID, address=0x5000 + enable))
        agent.must(b"\xfb\x90\xfa")  # sti; nop; cli
        seen.append((vm.symbol("interrupts").u64, vm.symbol("machine_checks").u64))
        assert vcpu.msrs.get(Msr.MSR_IA32_MC0_CTL + 4 * BANK + 2) == 0x5000 + enable
    assert seen == [(1, 0), (1, 0)]


@pytest.mark.usefixtures("open_registers")
def test_nobody_else_is_told(make_vm: MakeVm) -> None:
    """A machine check belongs to the vCPU whose descriptor it was injected through.

    Documentation/virt/kvm/api.rst, 4.106 KVM_X86_SET_MCE (a vCPU ioctl).
    """
    vm = make_vm(GUEST, vcpus=2)
    for vcpu in vm.vcpus:
        assert Agent(vcpu).change_cr(4, put=CR4.MCE) is None
    status = Msr.MSR_IA32_MC0_CTL + 4 * BANK + 1
    vm.vcpus[1].events.set_mce(error(CORRECTED))
    assert [vcpu.msrs.get(status) for vcpu in vm.vcpus] == [0, CORRECTED]
