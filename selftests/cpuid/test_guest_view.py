# SPDX-License-Identifier: Apache-2.0
"""What the CPUID instruction returns in the guest, for a table of the test's own."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, CR4, PAGE_SIZE, Agent, Cpuid, CpuidEntry, Kvm, MakeVm, Missing, kvm_cpuid2
from kvmpy.core.kvm import Kvm as CoreKvm
from kvmpy.x86.cpuid import SIGNIFICANT_INDEX
from selftests.cpuid.conftest import CpuidGuest, CpuidGuestMaker

# Basic leaves that no CPU has and KVM gives no meaning to.
LEAF = 0x30
NOTHING = (0, 0, 0, 0)


def add(cpuid: Cpuid, function: int, values: tuple[int, int, int, int], index: int | None = None) -> None:
    """Add a leaf with *values*, indexed when *index* is given, and let the basic leaves reach up to LEAF."""
    flags = 0 if index is None else SIGNIFICANT_INDEX
    cpuid.entries.append(CpuidEntry(function, index or 0, flags, *values))
    cpuid.ensure(0).eax = LEAF


def set_vendor(cpuid: Cpuid, vendor: bytes) -> None:
    """Put a vendor string into leaf 0."""
    leaf = cpuid.ensure(0)
    leaf.ebx, leaf.edx, leaf.ecx = (
        int.from_bytes(vendor[offset : offset + 4], "little") for offset in (0, 4, 8)
    )


def test_leaf(cpuid_guest: CpuidGuestMaker) -> None:
    """The guest gets all four registers of a leaf as KVM_SET_CPUID2 set them.

    Documentation/virt/kvm/api.rst, 4.20 KVM_SET_CPUID ("Defines the vcpu responses to the cpuid
    instruction").
    """
    values = (0x1111_2222, 0x8333_4444, 0xFFFF_FFFF, 0x7654_3210)
    guest = cpuid_guest(lambda cpuid: add(cpuid, LEAF, values))
    assert guest.cpuid(LEAF) == values


def deviations(guest: CpuidGuest, vcpu: int) -> dict[str, tuple[object, object]]:
    """Return what CPUID and KVM_GET_CPUID2 of a vCPU say where they differ, by leaf and subleaf."""
    different: dict[str, tuple[object, object]] = {}
    for entry in Cpuid.from_struct(guest.vm.vcpus[vcpu].cpuid.get()).entries:
        registers = guest.cpuid(entry.function, entry.index, vcpu=vcpu)
        if registers != entry.registers:
            different[f"{entry.function:#x}.{entry.index}"] = registers, entry.registers
    return different


@pytest.mark.usefixtures("open_registers")
def test_every_leaf(cpuid_guest: CpuidGuestMaker, kvm: Kvm) -> None:
    """Every leaf and subleaf of KVM_GET_SUPPORTED_CPUID is for each vCPU what KVM_GET_CPUID2 returns.

    So it is with CR4.OSXSAVE and CR4.PKE, which leaves 1 and 7 show.  Documentation/virt/kvm/api.rst, 4.20
    KVM_SET_CPUID and 4.46 KVM_GET_SUPPORTED_CPUID; Intel SDM volume 2, CPUID.
    """
    guest = cpuid_guest(vcpus=2)
    given = Cpuid.from_struct(kvm.supported_cpuid)
    for vcpu in (1, 0):
        assert deviations(guest, vcpu) == {}
        kept = Cpuid.from_struct(guest.vm.vcpus[vcpu].cpuid.get())
        places = [(entry.function, entry.index, entry.flags) for entry in kept.entries]
        assert places == [(entry.function, entry.index, entry.flags) for entry in given.entries]
    for feature, bit in (("xsave", CR4.OSXSAVE), ("pku", CR4.PKE)):
        if given.has(feature):
            guest.change_cr4(put=bit)
            assert deviations(guest, 0) == {}


def test_hidden_features(cpuid_guest: CpuidGuestMaker) -> None:
    """Features that the table lacks are not there for the guest, whatever the CPU has.

    Documentation/virt/kvm/api.rst, 4.46 KVM_GET_SUPPORTED_CPUID ("to emulate older hardware").
    """
    features = ("cx16", "popcnt", "sse4_2", "avx2", "bmi2", "umip", "rdtscp", "pdpe1gb")

    def change(cpuid: Cpuid) -> None:
        for feature in features:
            cpuid.clear_feature(feature)

    guest = cpuid_guest(change)
    assert [feature for feature in features if guest.has(feature)] == []


def test_subleaves(cpuid_guest: CpuidGuestMaker) -> None:
    """Entries with KVM_CPUID_FLAG_SIGNIFCANT_INDEX answer for their ECX alone; others are zeros.

    Documentation/virt/kvm/api.rst, 4.46 KVM_GET_SUPPORTED_CPUID (index, flags).
    """
    subleaves = {0: (1, 2, 3, 4), 1: (5, 6, 7, 8), 0x8000_0005: (9, 10, 11, 12)}

    def change(cpuid: Cpuid) -> None:
        for index, values in subleaves.items():
            add(cpuid, LEAF, values, index)

    guest = cpuid_guest(change)
    assert {index: guest.cpuid(LEAF, index) for index in subleaves} == subleaves
    assert guest.cpuid(LEAF, 2) == NOTHING


def test_index_without_meaning(cpuid_guest: CpuidGuestMaker) -> None:
    """An entry without KVM_CPUID_FLAG_SIGNIFCANT_INDEX answers whatever ECX holds.

    Documentation/virt/kvm/api.rst, 4.46 KVM_GET_SUPPORTED_CPUID ("if the index field is valid").
    """
    values = (0xA, 0xB, 0xC, 0xD)
    guest = cpuid_guest(lambda cpuid: add(cpuid, LEAF, values))
    assert [guest.cpuid(LEAF, ecx) for ecx in (0, 7, 0xFFFF_FFFF)] == [values] * 3


@pytest.mark.parametrize(
    ("vendor", "beyond"),
    [(b"GenuineIntel", (0x51, 0x52, 0x53, 0x54)), (b"AuthenticAMD", NOTHING)],
    ids=["intel", "amd"],
)
def test_leaf_out_of_range(
    cpuid_guest: CpuidGuestMaker, vendor: bytes, beyond: tuple[int, int, int, int]
) -> None:
    """Beyond the highest basic leaf an Intel guest sees that leaf again and an AMD guest zeros.

    Intel SDM volume 2, CPUID ("Information Returned by CPUID Instruction"); AMD APM volume 3, CPUID;
    arch/x86/kvm/cpuid.c, get_out_of_range_cpuid_entry().
    """

    def change(cpuid: Cpuid) -> None:
        set_vendor(cpuid, vendor)
        add(cpuid, LEAF, (0x51, 0x52, 0x53, 0x54))

    guest = cpuid_guest(change)
    assert guest.cpuid(LEAF + 1) == beyond
    assert guest.cpuid(0x2000_0000) == beyond


@pytest.mark.parametrize("vendor", [b"GenuineIntel", b"AuthenticAMD"], ids=["intel", "amd"])
def test_missing_leaf_in_range(cpuid_guest: CpuidGuestMaker, vendor: bytes) -> None:
    """A leaf that is missing below the highest one reads as zeros for both vendors.

    Intel SDM volume 2, CPUID ("reserved leaves"); AMD APM volume 3, CPUID.
    """

    def change(cpuid: Cpuid) -> None:
        set_vendor(cpuid, vendor)
        add(cpuid, LEAF, (0x51, 0x52, 0x53, 0x54))

    guest = cpuid_guest(change)
    assert guest.cpuid(LEAF - 1) == NOTHING


def test_upper_halves(make_vm: MakeVm) -> None:
    """CPUID ignores the upper halves of RAX and RCX, and clears those of the four registers that it writes.

    Intel SDM volume 2, CPUID.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    upper = 0xFFFF_FFFF_0000_0000
    end = agent.must(b"\x0f\xa2", rax=upper, rbx=(1 << 64) - 1, rcx=upper, rdx=(1 << 64) - 1)
    leaf0 = Cpuid.from_struct(agent.vm.kvm.supported_cpuid).find(0)
    assert leaf0 is not None
    assert (end.rax, end.rbx, end.rcx, end.rdx) == leaf0.registers


def test_each_vcpu_its_own(cpuid_guest: CpuidGuestMaker) -> None:
    """Every vCPU answers with the table that was set for it, such as its own APIC id.

    Documentation/virt/kvm/api.rst, 4.20 KVM_SET_CPUID (a vCPU ioctl).
    """
    guest = cpuid_guest(vcpus=3)
    assert [guest.cpuid(1, vcpu=index)[1] >> 24 for index in range(3)] == [0, 1, 2]


def emulates_movbe(kvm: CoreKvm) -> Missing | None:
    """Ask KVM_GET_EMULATED_CPUID for MOVBE."""
    if Cpuid.from_struct(kvm.get_emulated_cpuid()).has("movbe"):
        return None
    return Missing("MOVBE in KVM_GET_EMULATED_CPUID", "a KVM that emulates it", ("cpuid-emulated:movbe",))


@pytest.mark.requires("KVM_CAP_EXT_EMUL_CPUID", emulates_movbe)
def test_emulated_feature_works(make_vm: MakeVm) -> None:
    """A guest whose CPUID shows MOVBE can use it when KVM_GET_EMULATED_CPUID names it, whatever the CPU has.

    Documentation/virt/kvm/api.rst, 4.88 KVM_GET_EMULATED_CPUID.
    """

    def edit(table: kvm_cpuid2) -> kvm_cpuid2:
        cpuid = Cpuid.from_struct(table)
        cpuid.set_feature("movbe")
        return cpuid.to_struct()

    vm = make_vm(AGENT, cpuid=edit)
    word = vm.variable(vm.alloc(PAGE_SIZE, private=False), 8)
    agent = Agent(vm.vcpus[0])
    word.u64 = 0x1122_3344_5566_7788
    assert (
        agent.must(b"\x48\x0f\x38\xf0\x07", rdi=int(word.gva)).rax == 0x8877_6655_4433_2211
    )  # movbe (%rdi), %rax
    assert agent.cpuid(1)[2] >> 22 & 1 == 1
    agent.must(b"\x0f\x38\xf1\x07", rdi=int(word.gva), rax=0xAABB_CCDD)  # movbe %eax, (%rdi)
    assert word.u64 == 0x1122_3344_DDCC_BBAA
