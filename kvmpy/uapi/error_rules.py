# SPDX-License-Identifier: Apache-2.0
"""Which of an ioctl's rules an argument breaks, for those that have many and one errno for all.

Each rule stands where KVM checks it (Linux 7.2: virt/kvm/kvm_main.c, kvm_set_memory_region();
arch/x86/kvm/regs.c, kvm_is_valid_sregs(); arch/x86/kvm/svm/sev.c, by command), in the order of its checks.
The selftests of memory slots, registers and SEV test the same rules on a KVM.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvmpy.uapi.constants import MemFlag
from kvmpy.uapi.structs import (
    kvm_sev_snp_launch_start,
    kvm_sregs,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)

PAGE = 4096
_USER_END = 0x7FFF_FFFF_F000
_MOST_PAGES = (1 << 31) - 1
_SLOTS = (1 << 15) - 1
_SPACES = 2
_V1_FLAGS = MemFlag.KVM_MEM_LOG_DIRTY_PAGES | MemFlag.KVM_MEM_READONLY
_GMEM = MemFlag.KVM_MEM_GUEST_MEMFD
_SNP_RESERVED_ONE = 1 << 17

_PE, _NW, _CD, _PG = 1 << 0, 1 << 29, 1 << 30, 1 << 31
_PAE = 1 << 5
_LME, _LMA = 1 << 8, 1 << 10
_X2APIC, _APIC_ENABLED, _APIC_RESERVED = 1 << 10, 1 << 11, 0x2FF


@dataclass(frozen=True)
class Slot:
    """A memory slot as a VM has it."""

    gpa: int
    size: int
    hva: int
    flags: int

    @property
    def text(self) -> str:
        """The slot's guest memory."""
        return f"{self.gpa:#x} to {self.gpa + self.size - 1:#x}"


Slots = Mapping[int, Slot]
Rule = Callable[[bytes, "Slots | None", int], str]
"""Returns the rule that an argument of a VM with these slots breaks, ``""`` where that cannot be told."""


def region_of(content: bytes) -> tuple[int, Slot, int]:
    """Return number, slot and offset in the guest_memfd of a struct kvm_userspace_memory_region(2)."""
    kind = kvm_userspace_memory_region2
    region = kind.from_bytes(content[: kind.SIZE].ljust(kind.SIZE, b"\0"))
    known = Slot(region.guest_phys_addr, region.memory_size, region.userspace_addr, region.flags)
    return region.slot, known, region.guest_memfd_offset


def _flags_rule(content: bytes, slot: Slot) -> str:
    first = len(content) <= kvm_userspace_memory_region.SIZE
    known = int(_V1_FLAGS if first else _V1_FLAGS | _GMEM)
    if slot.flags & ~known:
        why = ": guest_memfd needs KVM_SET_USER_MEMORY_REGION2" if slot.flags & ~known == _GMEM else ""
        return f"flags known are {known:#x}, not {slot.flags & ~known:#x}{why}"
    if slot.flags & _GMEM and slot.flags & _V1_FLAGS:
        return "a slot with guest_memfd takes neither dirty log nor KVM_MEM_READONLY"
    return ""


def _place_rule(number: int, slot: Slot, offset: int) -> str:
    for name, value in (
        ("memory_size", slot.size),
        ("guest_phys_addr", slot.gpa),
        ("userspace_addr", slot.hva),
    ):
        if value % PAGE:
            return f"{name} {value:#x} is not page aligned"
    if slot.hva + slot.size > _USER_END:
        return f"userspace_addr {slot.hva:#x} and the size reach beyond the addresses of a process"
    if slot.flags & _GMEM and (offset % PAGE or offset + slot.size >= 1 << 64):
        return f"guest_memfd_offset {offset:#x} is not page aligned, or wraps with the size"
    if number & 0xFFFF >= _SLOTS or number >> 16 >= _SPACES:
        return f"slot {number:#x} is out of range: see KVM_CAP_NR_MEMSLOTS and KVM_CAP_MULTI_ADDRESS_SPACE"
    if slot.gpa + slot.size >= 1 << 64:
        return f"guest_phys_addr {slot.gpa:#x} and memory_size {slot.size:#x} wrap"
    if slot.size // PAGE > _MOST_PAGES:
        return f"memory_size {slot.size:#x}: a slot has at most 2^31 - 1 pages"
    return ""


def _change_rule(number: int, slot: Slot, old: Slot) -> str:
    if slot.flags & _GMEM:
        return f"slot {number} exists, and one with guest_memfd can only be deleted"
    if slot.size != old.size:
        return f"slot {number} exists with {old.size:#x} bytes: a live slot is not resized, delete it first"
    if slot.hva != old.hva:
        return f"slot {number} exists with userspace_addr {old.hva:#x}, which a live slot keeps"
    if (slot.flags ^ old.flags) & (MemFlag.KVM_MEM_READONLY | _GMEM):
        return f"slot {number} exists: KVM_MEM_READONLY of a live slot does not change"
    return ""


def _beyond(slot: Slot) -> str:
    end = f"guest_phys_addr {slot.gpa:#x} and the size reach {slot.gpa + slot.size:#x}"
    return f"{end}, beyond the host's MAXPHYADDR (CPUID 0x80000008)"


def memory_slot_rule(content: bytes, slots: Slots | None, number: int) -> str:
    """Return which rule of memory slots is broken; *slots* are those of the VM, None where not known."""
    which, slot, offset = region_of(content)
    if number == errno.EEXIST:
        for other, each in (slots or {}).items():
            space = other >> 16 == which >> 16
            if (
                other != which
                and space
                and slot.gpa < each.gpa + each.size
                and each.gpa < slot.gpa + slot.size
            ):
                return f"{slot.text} overlaps slot {other}, {each.text}"
        return ""
    broken = _flags_rule(content, slot) or _place_rule(which, slot, offset)
    if broken:
        return broken
    old = (slots or {}).get(which)
    if not slot.size:
        return f"there is no slot {which} to delete"
    if old is not None:
        return _change_rule(which, slot, old) or _beyond(slot)
    if slots is not None:
        return _beyond(slot)
    return f"slot {which} exists with another size, userspace_addr or KVM_MEM_READONLY, or {_beyond(slot)}"


def sregs_rule(content: bytes, slots: Slots | None, number: int) -> str:
    """Return which rule of the system registers is broken (struct kvm_sregs and kvm_sregs2 begin alike)."""
    del slots, number
    if len(content) < kvm_sregs.SIZE:
        return ""
    sregs = kvm_sregs.from_bytes(content[: kvm_sregs.SIZE])
    cr0, cr4, efer, base = sregs.cr0, sregs.cr4, sregs.efer, sregs.apic_base
    rules = (
        (efer & _LME and cr0 & _PG and not cr4 & _PAE, "EFER.LME with CR0.PG needs CR4.PAE"),
        (efer & _LME and cr0 & _PG and not efer & _LMA, "EFER.LME with CR0.PG needs EFER.LMA"),
        (efer & _LMA and not efer & _LME, "EFER.LMA is set without EFER.LME"),
        (efer & _LMA and not cr0 & _PG, "EFER.LMA is set without paging (CR0.PG)"),
        (sregs.cs.l and not efer & _LMA, "segment: cs.l, 64-bit code, outside long mode (EFER.LMA)"),
        (cr0 >> 32, f"CR0 {cr0:#x} has upper bits"),
        (cr0 & _NW and not cr0 & _CD, "CR0.NW is set without CR0.CD"),
        (cr0 & _PG and not cr0 & _PE, "CR0.PG is set without CR0.PE"),
        (base & _APIC_RESERVED, f"apic_base {base:#x} has reserved bits {base & _APIC_RESERVED:#x}"),
        (base & _X2APIC and not base & _APIC_ENABLED, "apic_base asks for x2APIC of an APIC that is off"),
    )
    for broken, text in rules:
        if broken:
            return text
    return (
        f"CR4 {cr4:#x}, EFER {efer:#x}, apic_base {base:#x} or CR3 {sregs.cr3:#x} has a bit that the vCPU's "
        "CPUID does not offer, or the state is protected (SEV-ES, SNP, TDX)"
    )


def snp_start_rule(content: bytes, slots: Slots | None, number: int) -> str:
    """Return which rule of KVM_SEV_SNP_LAUNCH_START's struct is broken."""
    del slots, number
    if len(content) < kvm_sev_snp_launch_start.SIZE:
        return ""
    start = kvm_sev_snp_launch_start.from_bytes(content[: kvm_sev_snp_launch_start.SIZE])
    if start.flags:
        return f"flags are {start.flags:#x}, must be 0"
    return (
        ""
        if start.policy & _SNP_RESERVED_ONE
        else f"policy {start.policy:#x} lacks bit 17, which must be one"
    )
