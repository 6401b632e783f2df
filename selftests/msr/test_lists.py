# SPDX-License-Identifier: Apache-2.0
"""MSRs from the host: what KVM lists, reading and writing several at once, feature MSRs."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_CAP_MSR_PLATFORM_INFO,
    KVM_X86_QUIRK_STUFF_FEATURE_MSRS,
    Agent,
    Cpuid,
    Kvm,
    MakeVm,
    Msr,
    Vcpu,
    Vector,
    Vm,
    ioctls,
    kvm_msr_entry,
    kvm_msr_list,
    kvm_msrs,
    refused,
)
from kvmpy.core.vcpu_state import msr_reg_id
from kvmpy.x86.msrs import name
from selftests.msr.conftest import MsrGuestMaker

UNKNOWN_MSR = 0x2000_0000
VMX_MSRS = range(0x480, 0x494)
STAR, LSTAR, CSTAR = Msr.MSR_STAR, Msr.MSR_LSTAR, Msr.MSR_CSTAR
known_only = pytest.mark.requires("param:kvm.ignore_msrs=N")
feature_msrs = pytest.mark.requires("KVM_CAP_GET_MSR_FEATURES")


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    """The vCPU of a bare VM, with the CPUID that KVM supports."""
    new_vcpu = vm.create_vcpu()
    new_vcpu.cpuid.set(vm.kvm.supported_cpuid)
    return new_vcpu


@pytest.mark.parametrize("op", ["KVM_GET_MSR_INDEX_LIST", "KVM_GET_MSR_FEATURE_INDEX_LIST"])
def test_list_too_short(kvm: Kvm, op: str) -> None:
    """A list without room fails with E2BIG and says how many MSRs there are; with that room it succeeds.

    Documentation/virt/kvm/api.rst, 4.3 KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST.
    """
    short = kvm_msr_list.with_entries(0)
    assert kvm.ioctl_raw(ioctls.IOCTLS[op], short) == (-1, errno.E2BIG)
    room = short.nmsrs
    assert room > 0
    exact = kvm_msr_list.with_entries(room)
    kvm.ioctl(ioctls.IOCTLS[op], exact)
    assert exact.nmsrs == room
    one_less = kvm_msr_list.with_entries(room - 1)
    assert kvm.ioctl_raw(ioctls.IOCTLS[op], one_less) == (-1, errno.E2BIG)
    assert one_less.nmsrs == room


def test_list_does_not_change(kvm: Kvm, vm: Vm) -> None:
    """The list is the same before and after VMs and vCPUs came to be, and names each MSR once.

    Documentation/virt/kvm/api.rst, 4.3 KVM_GET_MSR_INDEX_LIST ("but does not change otherwise").
    """
    before = kvm.get_msr_index_list()
    vm.create_vcpu()
    assert kvm.get_msr_index_list() == before
    assert len(set(before)) == len(before)


def test_every_listed_msr_can_be_read(kvm: Kvm, vcpu: Vcpu) -> None:
    """KVM_GET_MSRS reads every MSR that KVM_GET_MSR_INDEX_LIST names.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS ("Supported msr indices can be obtained").
    """
    wanted = kvm.get_msr_index_list()
    assert sorted(vcpu.msrs.get_offered(wanted)) == sorted(wanted)


@feature_msrs
def test_every_feature_msr_can_be_read(kvm: Kvm) -> None:
    """KVM_GET_MSRS on /dev/kvm reads every MSR that KVM_GET_MSR_FEATURE_INDEX_LIST names.

    Documentation/virt/kvm/api.rst, 4.3 ("the list of MSRs that can be passed to the KVM_GET_MSRS system
    ioctl").
    """
    wanted = kvm.get_msr_feature_index_list()
    assert sorted(kvm.get_feature_msrs(wanted)) == sorted(wanted)


@feature_msrs
@known_only
def test_other_msrs_are_no_features(kvm: Kvm) -> None:
    """KVM_GET_MSRS on /dev/kvm stops at an MSR that is no feature MSR and returns how many it read.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS ("number of msrs successfully returned").
    """
    feature = kvm.get_msr_feature_index_list()[0]
    arg = kvm_msrs.of([kvm_msr_entry(index=index) for index in (feature, UNKNOWN_MSR, feature)])
    assert kvm.ioctl(ioctls.KVM_GET_MSRS, arg) == 1


@known_only
def test_partial_read(vcpu: Vcpu) -> None:
    """KVM_GET_MSRS stops at the first MSR that it cannot read and returns how many it read.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS ("number of msrs successfully returned").
    """
    vcpu.msrs.set_many({STAR: 0x10_0000_0000, LSTAR: 0x5000})
    arg = kvm_msrs.of([kvm_msr_entry(index=index) for index in (STAR, LSTAR, UNKNOWN_MSR, CSTAR)])
    assert vcpu.ioctl(ioctls.KVM_GET_MSRS, arg) == 2
    assert [entry.data for entry in arg.entries_list()[:2]] == [0x10_0000_0000, 0x5000]


@known_only
@pytest.mark.parametrize(("bad", "value"), [(UNKNOWN_MSR, 1), (Msr.MSR_EFER, 1 << 63)])
def test_partial_write(vcpu: Vcpu, bad: int, value: int) -> None:
    """KVM_SET_MSRS sets MSRs up to the first that it refuses, none behind it, and returns how many it set.

    Documentation/virt/kvm/api.rst, 4.19 KVM_SET_MSRS ("it stops processing the MSR list").
    """
    before = vcpu.msrs.get(CSTAR)
    pairs = ((STAR, 0x20_0000_0000), (LSTAR, 0x6000), (bad, value), (CSTAR, before ^ 0x7000))
    arg = kvm_msrs.of([kvm_msr_entry(index=index, data=data) for index, data in pairs])
    assert vcpu.ioctl(ioctls.KVM_SET_MSRS, arg) == 2
    assert vcpu.msrs.get_many([STAR, LSTAR, CSTAR]) == {STAR: 0x20_0000_0000, LSTAR: 0x6000, CSTAR: before}


def test_no_msrs(vcpu: Vcpu) -> None:
    """KVM_GET_MSRS and KVM_SET_MSRS of no MSR succeed and return 0.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS and 4.19 KVM_SET_MSRS.
    """
    assert vcpu.ioctl(ioctls.KVM_GET_MSRS, kvm_msrs.with_entries(0)) == 0
    assert vcpu.ioctl(ioctls.KVM_SET_MSRS, kvm_msrs.with_entries(0)) == 0


@pytest.mark.parametrize("op", ["KVM_GET_MSRS", "KVM_SET_MSRS"])
def test_too_many_msrs(vcpu: Vcpu, op: str) -> None:
    """255 MSRs may be passed at once; 256 are refused with E2BIG.

    Documentation/virt/kvm/api.rst, 4.18 and 4.19; MAX_IO_MSRS in arch/x86/kvm/x86.c.
    """
    many = [kvm_msr_entry(index=STAR, data=0x30_0000_0000)] * 256
    assert vcpu.ioctl(ioctls.IOCTLS[op], kvm_msrs.of(many[:255])) == 255
    with refused(errno.E2BIG):
        vcpu.ioctl(ioctls.IOCTLS[op], kvm_msrs.of(many))


@pytest.mark.usefixtures("open_registers")
def test_guest_and_host_agree(msr_guest: MsrGuestMaker) -> None:
    """What the host sets with KVM_SET_MSRS the guest reads, and what the guest writes KVM_GET_MSRS returns.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS and 4.19 KVM_SET_MSRS.
    """
    guest = msr_guest()
    values: dict[int, int] = {
        STAR: 0x0033_0022_0000_0000,
        LSTAR: 0xFFFF_8000_0000_1000,
        Msr.MSR_KERNEL_GS_BASE: 0x7FFF_FFFF_F000,
        Msr.MSR_IA32_SYSENTER_EIP: 0x1234_5678,
    }
    guest.vcpu.msrs.set_many(values)
    assert {index: guest.read(index).value() for index in values} == values
    changed = {index: value ^ 0xF0_0000 for index, value in values.items()}
    for index, value in changed.items():
        guest.write(index, value).done()
    assert guest.vcpu.msrs.get_many(changed) == changed


@feature_msrs
@pytest.mark.requires(f"KVM_CAP_DISABLE_QUIRKS2&{int(KVM_X86_QUIRK_STUFF_FEATURE_MSRS):#x}")
@pytest.mark.parametrize("disable", [False, True], ids=["quirk", "no-quirk"])
def test_initial_feature_msrs(kvm: Kvm, vm: Vm, disable: bool) -> None:
    """A new vCPU has in each feature MSR what KVM supports, or 0 without the quirk, and takes that.

    Two are KVM's own: the microcode's revision is an arbitrary one, and DE_CFG is 0.  VMX is left out.
    Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_STUFF_FEATURE_MSRS;
    arch/x86/kvm/x86.c, kvm_arch_vcpu_create(); svm/svm.c and vmx/vmx.c for the revision.
    """
    indices = [index for index in kvm.get_msr_feature_index_list() if index not in VMX_MSRS]
    supported = kvm.get_feature_msrs(indices)
    if disable:
        vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_STUFF_FEATURE_MSRS)
    vcpu = vm.create_vcpu()
    vcpu.cpuid.set(kvm.supported_cpuid)
    amd = Cpuid.from_struct(kvm.supported_cpuid).is_amd_compatible
    own = {Msr.MSR_IA32_UCODE_REV: 0x0100_0065 if amd else 1 << 32, Msr.MSR_AMD64_DE_CFG: 0}
    expected = dict.fromkeys(indices, 0) if disable else supported | {int(msr): own[msr] for msr in own}
    wrong = [
        f"{name(index)}: {vcpu.msrs.get(index):#x}, not {expected[index]:#x}"
        for index in indices
        if vcpu.msrs.get(index) != expected[index]
    ]
    wrong += [
        f"{name(index)}: {supported[index]:#x} is refused"
        for index in indices
        if not vcpu.msrs.takes(index, supported[index])
    ]
    assert not wrong, "\n".join(wrong)
    assert vcpu.msrs.get_many(indices) == supported


@pytest.mark.requires("KVM_CAP_MSR_PLATFORM_INFO")
def test_platform_info(msr_guest: MsrGuestMaker) -> None:
    """The guest may read MSR_PLATFORM_INFO while the capability is on, and never write it.

    Documentation/virt/kvm/api.rst, 7.15 KVM_CAP_MSR_PLATFORM_INFO.
    """
    guest = msr_guest()
    guest.vm.enable_cap(KVM_CAP_MSR_PLATFORM_INFO, 1)
    value = guest.read(Msr.MSR_PLATFORM_INFO).value()
    assert guest.write(Msr.MSR_PLATFORM_INFO, value).fault() == (Vector.GP, 0)
    guest.vm.enable_cap(KVM_CAP_MSR_PLATFORM_INFO, 0)
    assert guest.read(Msr.MSR_PLATFORM_INFO).fault() == (Vector.GP, 0)


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires("KVM_CAP_MSR_PLATFORM_INFO")
def test_platform_info_of_the_host(make_vm: MakeVm) -> None:
    """The guest reads the ratios that the host wrote into MSR_PLATFORM_INFO, which are fixed once it has run.

    Documentation/virt/kvm/api.rst, 7.15 KVM_CAP_MSR_PLATFORM_INFO; arch/x86/kvm/x86.c, do_set_msr()
    ("immutable feature MSRs").
    """
    vm = make_vm(AGENT)
    vm.enable_cap(KVM_CAP_MSR_PLATFORM_INFO, 1)
    msrs = vm.vcpus[0].msrs
    value = msrs.get(Msr.MSR_PLATFORM_INFO) | 0x1D00
    msrs.set(Msr.MSR_PLATFORM_INFO, value)
    agent = Agent(vm.vcpus[0])
    assert agent.rdmsr(Msr.MSR_PLATFORM_INFO) == value
    assert msrs.takes(Msr.MSR_PLATFORM_INFO, value)
    assert not msrs.takes(Msr.MSR_PLATFORM_INFO, value ^ 0x1D00)
    assert agent.rdmsr(Msr.MSR_PLATFORM_INFO) == value


@pytest.mark.requires("KVM_CAP_ONE_REG")
def test_one_reg(vcpu: Vcpu) -> None:
    """KVM_SET_ONE_REG and KVM_GET_ONE_REG reach the MSRs that KVM_SET_MSRS and KVM_GET_MSRS reach.

    Documentation/virt/kvm/api.rst, 4.68 KVM_SET_ONE_REG, x86 MSR registers.
    """
    vcpu.regs.set_one(msr_reg_id(LSTAR), 0xFFFF_8000_1234_0000)
    assert vcpu.msrs.get(LSTAR) == 0xFFFF_8000_1234_0000
    vcpu.msrs.set(LSTAR, 0x5000)
    assert vcpu.regs.get_one(msr_reg_id(LSTAR)) == 0x5000


@known_only
@pytest.mark.requires("KVM_CAP_ONE_REG")
def test_one_reg_unknown(vcpu: Vcpu) -> None:
    """The id of an MSR that KVM does not know, or of a type that it does not know, is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.68 KVM_SET_ONE_REG ("invalid register ID").
    """
    wrong_type = msr_reg_id(LSTAR) | 0xF << 32
    for reg_id in (msr_reg_id(UNKNOWN_MSR), wrong_type):
        with refused(errno.EINVAL):
            vcpu.regs.get_one(reg_id)
