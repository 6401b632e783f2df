# SPDX-License-Identifier: Apache-2.0
"""Private memory in a guest_memfd, told apart by memory attributes: what every protection built on it shares.

A slot has host memory for its shared pages and a guest_memfd for its private ones; the attribute
KVM_MEMORY_ATTRIBUTE_PRIVATE of a page says which of the two KVM maps.  The host cannot map the guest_memfd,
so what it prepares before launch lies in a staging mapping, which stands for the private pages until the
launch brings it in.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SHIFT, PAGE_SIZE, Gpa
from kvmpy.core.backing import Anonymous, Inaccessible
from kvmpy.core.errors import KvmError, MissingError, VcpuBusyError
from kvmpy.core.kvm import Kvm
from kvmpy.core.memory import Segment
from kvmpy.core.slots import MemorySlot
from kvmpy.guest.options import SlotOptions
from kvmpy.guest.protection import Protection
from kvmpy.guest.vm import GuestVm
from kvmpy.uapi.constants import (
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CAP_USER_MEMORY2,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FdBackedProtection(Protection):
    """A protection whose private pages live in a guest_memfd."""

    @classmethod
    def missing_capabilities(cls, kvm: Kvm, how: str) -> list[MissingError]:
        """Return what *kvm* lacks for private memory in a guest_memfd; *how* is the way to get it."""
        wanted = {
            "KVM_CAP_USER_MEMORY2": bool(kvm.check_extension(KVM_CAP_USER_MEMORY2)),
            "KVM_CAP_GUEST_MEMFD": bool(kvm.check_extension(KVM_CAP_GUEST_MEMFD)),
            "KVM_CAP_MEMORY_ATTRIBUTES with KVM_MEMORY_ATTRIBUTE_PRIVATE": bool(
                kvm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES) & KVM_MEMORY_ATTRIBUTE_PRIVATE
            ),
        }
        return [MissingError(name, how) for name, there in wanted.items() if not there]

    def add_memory(self, vm: GuestVm, gpa: Gpa, size: int, **options: Unpack[SlotOptions]) -> MemorySlot:
        """Add a slot with host memory for shared pages and a guest_memfd for private ones."""
        vm.memory.check_free(gpa, size)
        shared, own = vm.back(size, options.get("backing"))
        staging = None
        slot = options.get("slot")
        number = vm.next_slot() if slot is None else slot
        flags = options.get("flags", 0) | KVM_MEM_GUEST_MEMFD
        try:
            staging = None if vm.launched else Anonymous().map(size)
            gmem = own or vm.create_guest_memfd(size)
            vm.set_user_memory_region2(number, int(gpa), size, shared.hva, flags, gmem=gmem)
        except BaseException:
            shared.close()
            if staging is not None:
                staging.close()
            raise
        vm.own(shared)
        if staging is not None:
            vm.own(staging)
        segment = Segment(gpa, size, shared, staging)
        vm.memory.add(segment)
        entry = MemorySlot(vm, number, int(gpa), size, shared, flags, shared.hva, gmem, 0, segment)
        vm.slots[number] = entry
        return entry

    # Launch.

    def make_private(self, vm: GuestVm) -> None:
        """Tell KVM which pages are private, before the image is brought in."""
        for gpa, size in vm.private.runs():
            vm.set_memory_attributes(int(gpa), size, KVM_MEMORY_ATTRIBUTE_PRIVATE)

    def drop_staging(self, vm: GuestVm) -> None:
        """Give back what held the image before launch."""
        for segment in vm.memory.segments():
            # A plain slot has one mapping for both, and it stays.
            if segment.private is not None and segment.private is not segment.shared:
                segment.private.close()

    # Conversions.

    def convert(self, vm: GuestVm, gpa: Gpa, size: int, private: bool, discard: bool) -> None:
        """Set the attributes; with *discard* give back the memory that the pages leave."""
        vm.set_memory_attributes(gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0)
        if discard:
            self._discard(vm, gpa, size, shared=private)

    def _discard(self, vm: GuestVm, gpa: Gpa, size: int, *, shared: bool) -> None:
        for slot in _slots(vm, gpa, size):
            first = max(int(gpa), slot.gpa)
            length = min(int(gpa) + size, slot.gpa + slot.size) - first
            if not shared:
                if slot.gmem is not None:
                    slot.gmem.punch_hole(slot.gmem_offset + first - slot.gpa, length)
            elif slot.segment is not None:
                offset = slot.segment.shared_offset + first - slot.gpa
                if slot.mapping.fd >= 0:
                    slot.mapping.madvise(mmap.MADV_REMOVE, offset, length)
                else:
                    slot.mapping.madvise(mmap.MADV_DONTNEED, offset, length)

    def private_in_kvm(self, vm: GuestVm, gpa: Gpa, size: int) -> BitMap | None:
        """Ask KVM_PRE_FAULT_MEMORY to map each page while the slot's host memory is out of reach.

        A private page comes from the guest_memfd all the same, a shared one fails with EFAULT.  The slot is
        replaced for that time: VcpuBusyError while a vCPU runs.  Private pages that had no memory get it.
        """
        if not vm.vcpus or not vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY):
            return None
        for vcpu in vm.vcpus:
            if vcpu.running:
                raise VcpuBusyError(
                    f"{vcpu.name} runs: KVM can be asked which pages are private when it does not"
                )
        frames = BitMap()
        for slot in _slots(vm, gpa, size):
            if slot.gmem is None:
                continue
            first = max(int(gpa), slot.gpa)
            end = min(int(gpa) + size, slot.gpa + slot.size)
            frames |= _without_host_memory(vm, slot, first, end)
        return frames


def _slots(vm: GuestVm, gpa: Gpa, size: int) -> list[MemorySlot]:
    end = int(gpa) + size
    return [
        slot
        for slot in vm.slots.values()
        if slot.segment is not None and slot.gpa < end and int(gpa) < slot.gpa + slot.size
    ]


def _without_host_memory(vm: GuestVm, slot: MemorySlot, first: int, end: int) -> BitMap:
    nothing = Inaccessible().map(slot.size)
    try:
        vm.set_user_memory_region(slot.slot, slot.gpa, 0, 0)
        try:
            vm.set_user_memory_region2(
                slot.slot,
                slot.gpa,
                slot.size,
                nothing.hva,
                slot.flags,
                gmem=slot.gmem,
                gmem_offset=slot.gmem_offset,
            )
            try:
                return _mappable(vm, first, end)
            finally:
                vm.set_user_memory_region(slot.slot, slot.gpa, 0, 0)
        finally:
            slot.renew()
    finally:
        nothing.close()


def _mappable(vm: GuestVm, first: int, end: int) -> BitMap:
    bitmaps = BitMap()
    vcpu = vm.vcpus[0]
    position = first
    while position < end:
        try:
            after, _left = vcpu.pre_fault_memory(position, end - position)
        except KvmError as error:
            if error.errno != errno.EFAULT:
                raise
            after = position
        bitmaps.add_range(position >> PAGE_SHIFT, after >> PAGE_SHIFT)
        # What stopped it, if it was stopped, is no private page.
        position = after + PAGE_SIZE if after < end else end
    return bitmaps
