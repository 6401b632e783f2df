# SPDX-License-Identifier: Apache-2.0
"""The address space that a vCPU is in: that of the program's tables, or whatever its registers say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmpy.core.address import PAGE_SIZE, Gpa, Gva
from kvmpy.x86.bits import CR0, CR4, EFER
from kvmpy.x86.entry import Walk
from kvmpy.x86.paging import walk_from
from kvmpy.x86.paging_errors import NotMappedError

if TYPE_CHECKING:
    from kvmpy.guest.vm import GuestVm
    from kvmpy.uapi.structs import kvm_segment, kvm_sregs

_LEVELS_LONG = 4


def code_bits(sregs: kvm_sregs) -> int:
    """Return the size of the code that a vCPU runs: 16, 32 or 64."""
    if sregs.efer & EFER.LMA and sregs.cs.l:
        return 64
    return 32 if sregs.cs.db else 16


def linear(sregs: kvm_sregs, segment: kvm_segment, offset: int) -> int:
    """Return the linear address of *offset* in CS or SS, which has a base outside 64-bit mode only."""
    return offset if code_bits(sregs) == 64 else (segment.base + offset) & 0xFFFF_FFFF


def _levels(sregs: kvm_sregs) -> int:
    if not sregs.cr0 & CR0.PG:
        return 0
    if sregs.efer & EFER.LMA:
        return _LEVELS_LONG + bool(sregs.cr4 & CR4.LA57)
    return 3 if sregs.cr4 & CR4.PAE else 2


class AddressSpace:
    """What linear addresses mean for a vCPU with *sregs*; None, or the program's own CR3: the program's."""

    def __init__(self, vm: GuestVm, sregs: kvm_sregs | None) -> None:
        self.vm = vm
        self.sregs = sregs
        self.bits = vm.program.bits if sregs is None else code_bits(sregs)
        # 0: linear addresses are guest-physical ones.
        self.levels = vm.pages.levels if sregs is None else _levels(sregs)
        same = sregs is None or not self.levels or sregs.cr3 == int(vm.pages.cr3)
        self.own = same and self.levels == vm.pages.levels

    def walk(self, address: int) -> Walk | None:
        """Walk the tables for *address*; None where paging is off."""
        if not self.levels:
            return None
        if self.sregs is None or self.own:
            return self.vm.pages.walk(Gva(address))
        encryption = self.vm.encryption if self.levels > 2 else None
        return walk_from(
            self.vm.memory, int(self.sregs.cr3), self.levels, Gva(address), encryption=encryption
        )

    def walk_lines(self, address: int) -> Iterator[str]:
        """Yield the walk as text."""
        walk = self.walk(address)
        if walk is None:
            yield f"paging is off: gpa {address:#x}"
        else:
            yield from str(walk).splitlines()

    def read(self, address: int, size: int) -> bytes:
        """Return memory at a linear address; ValueError where nothing is mapped."""
        if self.own:
            return self.vm.read(Gva(address), size)
        parts = []
        while size:
            part = min(size, PAGE_SIZE - address % PAGE_SIZE)
            walk = self.walk(address)
            gpa = Gpa(address) if walk is None else walk.gpa
            if gpa is None:
                raise NotMappedError(str(walk))
            parts.append(self.vm.memory.read(gpa, part))
            address, size = address + part, size - part
        return b"".join(parts)
