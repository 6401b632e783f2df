# SPDX-License-Identifier: Apache-2.0
"""Which rule an argument breaks: without a KVM, since few hosts refuse all of them."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.uapi.constants import MemFlag, SevCmd
from kvmpy.uapi.error_hints import HINTS, errno_name, error_words, hint
from kvmpy.uapi.error_rules import Slot
from kvmpy.uapi.field_words import entry_failure, simultaneous
from kvmpy.uapi.ioctls import IOCTLS, SEV_COMMANDS, SEV_PLATFORM_COMMANDS
from kvmpy.uapi.structs import (
    kvm_segment,
    kvm_sev_cmd,
    kvm_sev_snp_launch_start,
    kvm_sregs,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)

REGION = "KVM_SET_USER_MEMORY_REGION"
HVA = 0x7F00_0000_0000
SLOTS = {0: Slot(0, 0x10000, HVA, 0), 1: Slot(0x100000, 0x1000, HVA + 0x10000, 0)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"memory_size": 0x1800}, "memory_size 0x1800 is not page aligned"),
        ({"guest_phys_addr": 0x800}, "guest_phys_addr 0x800 is not page aligned"),
        ({"userspace_addr": HVA + 1}, "is not page aligned"),
        ({"userspace_addr": 0x7FFF_FFFF_E000, "memory_size": 0x2000}, "beyond the addresses of a process"),
        ({"flags": MemFlag.KVM_MEM_GUEST_MEMFD}, "guest_memfd needs KVM_SET_USER_MEMORY_REGION2"),
        ({"slot": 0x7FFF}, "slot 0x7fff is out of range"),
        ({"guest_phys_addr": (1 << 64) - 0x1000, "memory_size": 0x1000}, "wrap"),
        ({"memory_size": 0x800_0000_0000, "userspace_addr": 0}, "at most 2^31 - 1 pages"),
        ({"slot": 7, "memory_size": 0}, "there is no slot 7 to delete"),
        ({"slot": 0, "memory_size": 0x2000}, "slot 0 exists with 0x10000 bytes: a live slot is not resized"),
        ({"slot": 0, "memory_size": 0x10000, "userspace_addr": HVA + 0x1000}, "which a live slot keeps"),
        ({"slot": 0, "memory_size": 0x10000, "flags": 2}, "KVM_MEM_READONLY of a live slot does not change"),
        ({"guest_phys_addr": 1 << 52}, "beyond the host's MAXPHYADDR"),
    ],
)
def test_memory_slots(fields: dict[str, int], words: str) -> None:
    """arch/x86/kvm and virt/kvm/kvm_main.c, kvm_set_memory_region(), in its order."""
    region = kvm_userspace_memory_region(**{"slot": 5, "memory_size": 0x1000, "userspace_addr": HVA} | fields)
    assert words in hint(REGION, errno.EINVAL, region.to_bytes(), SLOTS)


def test_memory_slots_with_guest_memfd() -> None:
    region = kvm_userspace_memory_region2(
        slot=0, flags=MemFlag.KVM_MEM_GUEST_MEMFD, memory_size=0x10000, userspace_addr=HVA
    )
    words = hint(f"{REGION}2", errno.EINVAL, region.to_bytes(), SLOTS)
    assert words == "slot 0 exists, and one with guest_memfd can only be deleted"
    region.guest_memfd_offset = 0x800
    assert "guest_memfd_offset 0x800" in hint(f"{REGION}2", errno.EINVAL, region.to_bytes(), SLOTS)
    region.flags |= MemFlag.KVM_MEM_LOG_DIRTY_PAGES
    assert "neither dirty log" in hint(f"{REGION}2", errno.EINVAL, region.to_bytes(), SLOTS)


def test_an_overlap_names_the_other_slot() -> None:
    region = kvm_userspace_memory_region(
        slot=5, guest_phys_addr=0xF000, memory_size=0x2000, userspace_addr=HVA
    )
    words = hint(REGION, errno.EEXIST, region.to_bytes(), SLOTS)
    assert words == "0xf000 to 0x10fff overlaps slot 0, 0x0 to 0xffff"
    # Of another address space (SMM) it may overlap; without slots there is the general remark.
    region.slot = 1 << 16
    assert hint(REGION, errno.EEXIST, region.to_bytes(), SLOTS) == "the range overlaps another memory slot"
    assert hint(REGION, errno.EEXIST, region.to_bytes()) == "the range overlaps another memory slot"


LONG = {"cr0": 0x8000_0001, "cr4": 0x20, "efer": 0x500, "apic_base": 0xFEE0_0900}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cr4": 0}, "EFER.LME with CR0.PG needs CR4.PAE"),
        ({"efer": 0x100}, "EFER.LME with CR0.PG needs EFER.LMA"),
        ({"efer": 0x400}, "EFER.LMA is set without EFER.LME"),
        ({"cr0": 1}, "EFER.LMA is set without paging"),
        ({"efer": 0, "cs": kvm_segment(l=1)}, "segment: cs.l"),
        ({"cr0": 0x1_8000_0001}, "has upper bits"),
        ({"cr0": 0xA000_0001}, "CR0.NW is set without CR0.CD"),
        ({"cr0": 0x8000_0000}, "CR0.PG is set without CR0.PE"),
        ({"apic_base": 0xFEE0_0901}, "apic_base 0xfee00901 has reserved bits 0x1"),
        ({"apic_base": 0xFEE0_0400}, "x2APIC of an APIC that is off"),
        ({"cr4": 0x20 | 1 << 22}, "CR4 0x400020, EFER 0x500"),
    ],
)
def test_system_registers(fields: dict[str, Any], words: str) -> None:
    """arch/x86/kvm/regs.c, kvm_is_valid_sregs(); arch/x86/kvm/lapic.c, kvm_apic_set_base()."""
    sregs = kvm_sregs(**{**LONG, **fields})
    for name in ("KVM_SET_SREGS", "KVM_SET_SREGS2"):
        assert words in hint(name, errno.EINVAL, sregs.to_bytes())


def sev(command: SevCmd, number: int, *, status: int = 0, nested: bytes = b"") -> str:
    content = kvm_sev_cmd(id=command, error=status).to_bytes()
    return hint("KVM_MEMORY_ENCRYPT_OP", number, content, None, nested)


def test_sev_commands() -> None:
    """arch/x86/kvm/svm/sev.c, by command; a status of the firmware's is the firmware's refusal."""
    update = SevCmd.KVM_SEV_SNP_LAUNCH_UPDATE
    assert "the firmware was not asked" in sev(update, errno.EIO)
    assert sev(update, errno.EIO, status=16) == HINTS["KVM_MEMORY_ENCRYPT_OP"]["EIO"]
    assert sev(update, errno.EIO, status=0xFFFF_FFFF) == sev(update, errno.EIO)
    assert "gfn_start is in no slot with guest_memfd" in sev(update, errno.EINVAL)
    assert "status is 0" in sev(SevCmd.KVM_SEV_LAUNCH_MEASURE, errno.EIO)
    assert "takes the SNP commands only" in sev(SevCmd.KVM_SEV_LAUNCH_START, errno.EPERM)
    start = SevCmd.KVM_SEV_SNP_LAUNCH_START
    policy = kvm_sev_snp_launch_start(policy=0x10000).to_bytes()
    assert sev(start, errno.EINVAL, nested=policy) == "policy 0x10000 lacks bit 17, which must be one"
    flags = kvm_sev_snp_launch_start(policy=0x30000, flags=4).to_bytes()
    assert sev(start, errno.EINVAL, nested=flags) == "flags are 0x4, must be 0"
    assert "issued already" in sev(start, errno.EINVAL)
    unknown = kvm_sev_cmd(id=77).to_bytes()
    assert hint("KVM_MEMORY_ENCRYPT_OP", errno.EINVAL, unknown) == "there is no command 77"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (SevCmd.KVM_SEV_SEND_UPDATE_DATA, "guest_uaddr + guest_len goes beyond a page"),
        (SevCmd.KVM_SEV_RECEIVE_UPDATE_DATA, "guest_uaddr + guest_len goes beyond a page"),
        (SevCmd.KVM_SEV_RECEIVE_UPDATE_DATA, "an address or length is 0"),
        (SevCmd.KVM_SEV_GET_ATTESTATION_REPORT, "len is more than 16 KiB"),
        (SevCmd.KVM_SEV_LAUNCH_START, "more than 16 KiB"),
        (SevCmd.KVM_SEV_RECEIVE_START, "more than 16 KiB"),
    ],
)
def test_every_command_that_checks_its_ranges_says_so(command: SevCmd, words: str) -> None:
    """arch/x86/kvm/svm/sev.c, by command; drivers/crypto/ccp/sev-dev.c, psp_copy_user_blob()."""
    assert words in sev(command, errno.EINVAL)
    assert words in hint(command.name, errno.EINVAL)


def test_an_invalid_argument_of_no_command_asks_for_its_name() -> None:
    """Each command has rules of its own; with a command there are those, or nothing."""
    assert "name the command" in error_words("KVM_MEMORY_ENCRYPT_OP", errno.EINVAL)
    assert sev(SevCmd.KVM_SEV_GUEST_STATUS, errno.EINVAL) == ""
    assert hint("KVM_SEV_GUEST_STATUS", errno.EINVAL) == ""


def test_what_the_tables_name_exists() -> None:
    assert HINTS.keys() - {""} <= IOCTLS.keys() | SEV_COMMANDS.keys() | SEV_PLATFORM_COMMANDS.keys()
    names = {errno_name(number) for number in range(134)}
    assert names.issuperset(name for hints in HINTS.values() for name in hints)


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("SEV_FACTORY_RESET", errno.EBUSY, "guests are active"),
        ("SEV_PEK_GEN", errno.EBUSY, "the secure processor does not answer; reboot"),
        ("SEV_PEK_GEN", errno.EIO, "the firmware refused: its status is in the field error"),
        ("SEV_PEK_GEN", errno.EMFILE, HINTS[""]["EMFILE"]),
        ("KVM_NMI", errno.EMFILE, HINTS[""]["EMFILE"]),
        ("KVM_NMI", errno.EDOM, ""),
        (None, errno.EINVAL, ""),
    ],
)
def test_a_command_has_the_hints_of_its_ioctl_too(name: str | None, number: int, words: str) -> None:
    assert hint(name, number) == words


@given(
    st.sampled_from(sorted(IOCTLS)),
    st.sampled_from([errno.EINVAL, errno.EEXIST, errno.EIO]),
    st.binary(max_size=400),
)
def test_any_argument_has_some_hint(name: str, number: int, content: bytes) -> None:
    assert isinstance(hint(name, number, content, SLOTS), str)


def test_entries_that_failed() -> None:
    """Intel SDM volume 3, 28.8 and 32.4; AMD APM volume 2, 15.5.1."""
    assert entry_failure((1 << 64) - 1).startswith("SVM: VMEXIT_INVALID")
    assert entry_failure(0x8000_0021) == "VMX: VM entry failed, invalid guest state"
    assert entry_failure(7) == "VMX: invalid control fields of the VMCS"
    assert entry_failure(0) == ""


def test_simultaneous_exceptions() -> None:
    words = simultaneous([0x8000_0B0D, 0x8000_0B0E, 2, 0])
    assert words == "exception PF_VECTOR while exception GP_VECTOR was delivered, error code 0x2"
