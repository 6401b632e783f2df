# SPDX-License-Identifier: Apache-2.0
"""Memory slots: the mapping of guest-physical ranges onto host memory and guest_memfd."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from pyroaring import BitMap

from kvmpy.core.address import Gpa
from kvmpy.core.backing import Anonymous, Backing, MappedGuestMemfd, Mapping
from kvmpy.core.fd import KvmFd
from kvmpy.core.frames import mark
from kvmpy.core.gmem import GuestMemfd
from kvmpy.core.memory import GuestMemory, Segment
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE
from kvmpy.uapi.structs import (
    kvm_create_guest_memfd,
    kvm_memory_attributes,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)

# Plain: an operator of a flag takes longer than the ioctl's whole way through Python.
_PRIVATE = int(KVM_MEMORY_ATTRIBUTE_PRIVATE)


@dataclass
class MemorySlot:
    """One memory slot; changes go to KVM at once.

    *gpa* is the address that KVM was given: for an alias of private memory it carries the encryption bit.
    *aliases* are further slots that show the same guest range (its private view); changes apply to them
    too.
    """

    vm: VmSlots
    slot: int
    gpa: int
    size: int
    mapping: Mapping
    flags: int = 0
    hva: int = 0
    gmem: GuestMemfd | None = None
    gmem_offset: int = 0
    segment: Segment | None = None
    aliases: list[MemorySlot] = field(default_factory=list)

    def _set(self, gpa: int, size: int, flags: int) -> None:
        if self.gmem is None:
            self.vm.set_user_memory_region(self.slot, gpa, size, self.hva, flags)
        else:
            self.vm.set_user_memory_region2(
                self.slot, gpa, size, self.hva, flags, gmem=self.gmem, gmem_offset=self.gmem_offset
            )

    def renew(self) -> None:
        """Give the slot to KVM once more, as it is, after a test took it away behind this object's back."""
        self._set(self.gpa, self.size, self.flags)

    def set_flags(self, flags: int) -> None:
        """Change the flags (KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY); KvmError where KVM refuses the
        change.
        """
        if self.gmem is not None:
            flags |= KVM_MEM_GUEST_MEMFD
        self._set(self.gpa, self.size, flags)
        self.flags = flags
        for alias in self.aliases:
            alias.set_flags(flags)

    def move(self, gpa: Gpa) -> None:
        """Move the slot to another guest-physical address."""
        self._set(int(gpa), self.size, self.flags)
        for alias in self.aliases:
            # The alias keeps its distance: that is the encryption bit.
            alias.move(Gpa(int(gpa) + alias.gpa - self.gpa))
        if self.segment is not None:
            old = self.segment
            self.vm.memory.remove(old)
            self.segment = replace(old, gpa=gpa)
            self.vm.memory.add(self.segment)
        self.gpa = int(gpa)

    def delete(self) -> None:
        """Remove the slot from the VM; its host memory stays until the VM is closed."""
        self.vm.set_user_memory_region(self.slot, self.gpa, 0, self.hva, 0)
        if self.segment is not None:
            self.vm.memory.remove(self.segment)
            self.segment = None
        del self.vm.slots[self.slot]
        for alias in self.aliases:
            alias.delete()
        self.aliases.clear()


class VmSlots(KvmFd):
    """The part of a VM that is about its memory slots."""

    kind = "vm"

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, name)
        self.memory = GuestMemory()
        self.slots: dict[int, MemorySlot] = {}
        self._attributes = BitMap()
        self._conversion = kvm_memory_attributes()
        self._mappings: list[Mapping] = []
        self._gmems: list[GuestMemfd] = []

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Set, move, change or (size 0) delete a slot, exactly as given (KVM_SET_USER_MEMORY_REGION).

        The caller keeps the memory at *hva* alive as long as the slot uses it.
        """
        arg = kvm_userspace_memory_region(
            slot=slot, flags=flags, guest_phys_addr=int(gpa), memory_size=size, userspace_addr=hva
        )
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, arg)

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int = 0,
        *,
        gmem: GuestMemfd | int | None = None,
        gmem_offset: int = 0,
    ) -> None:
        """The same with a guest_memfd behind the slot's private pages (KVM_SET_USER_MEMORY_REGION2).

        KVM_MEM_GUEST_MEMFD is not added to *flags* by itself: a negative test may leave it out.
        """
        arg = kvm_userspace_memory_region2(
            slot=slot,
            flags=flags,
            guest_phys_addr=int(gpa),
            memory_size=size,
            userspace_addr=hva,
            guest_memfd_offset=gmem_offset,
            guest_memfd=0 if gmem is None else (gmem if isinstance(gmem, int) else gmem.fd),
        )
        self.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION2, arg)

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """Create a guest_memfd of *size* bytes (KVM_CREATE_GUEST_MEMFD); it is closed with the VM."""
        fd = self.ioctl(ioctls.KVM_CREATE_GUEST_MEMFD, kvm_create_guest_memfd(size=size, flags=flags))
        os.set_inheritable(fd, False)  # unlike other KVM file descriptors it is made without O_CLOEXEC
        gmem = GuestMemfd(self, fd, size, flags)
        self._gmems.append(gmem)
        return gmem

    def set_memory_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> None:
        """Set the attributes of a range, such as KVM_MEMORY_ATTRIBUTE_PRIVATE (KVM_SET_MEMORY_ATTRIBUTES).

        KVM has no way to read them back: :attr:`private_attributes` notes what it accepted.
        """
        with self.memory.lock:
            fields = self._conversion.cdata
            fields.address, fields.size, fields.attributes, fields.flags = gpa, size, attributes, flags
            self.ioctl(ioctls.KVM_SET_MEMORY_ATTRIBUTES, self._conversion)
            mark(self._attributes, gpa, size, int(attributes) & _PRIVATE != 0)

    @property
    def private_attributes(self) -> BitMap:
        """Frames whose last accepted attributes have KVM_MEMORY_ATTRIBUTE_PRIVATE, as of now."""
        with self.memory.lock:
            return self._attributes.copy()

    def own(self, mapping: Mapping) -> Mapping:
        """Let the VM keep *mapping* alive until it is closed, and return it."""
        self._mappings.append(mapping)
        return mapping

    def back(self, size: int, backing: Backing | None = None) -> tuple[Mapping, GuestMemfd | None]:
        """Make *size* bytes of host memory the way *backing* says (default anonymous), with its guest_memfd
        if it has one.

        The caller owns the mapping; a guest_memfd belongs to the VM.
        """
        if not isinstance(backing, MappedGuestMemfd):
            return (backing or Anonymous()).map(size), None
        gmem = self.create_guest_memfd(size, backing.flags)
        try:
            return gmem.map(), gmem
        except OSError:
            self._gmems.remove(gmem)
            gmem.close()
            raise

    def next_slot(self) -> int:
        """Return the lowest slot number that is free."""
        slot = 0
        while slot in self.slots:
            slot += 1
        return slot

    def add_slot(
        self,
        gpa: Gpa,
        size: int,
        *,
        backing: Backing | Mapping | None = None,
        slot: int | None = None,
        flags: int = 0,
        gmem: GuestMemfd | None = None,
        gmem_offset: int = 0,
        always_shared: bool = False,
    ) -> MemorySlot:
        """Map *size* bytes of host memory at *gpa* and return the slot.

        *backing* is how the host memory is made (default :class:`~kvmpy.core.backing.Anonymous`) or a
        mapping that exists. With *gmem* the slot is bound to the guest_memfd at *gmem_offset*;
        *always_shared* keeps private pages out of it.  On failure nothing stays behind.
        """
        self.memory.check_free(gpa, size)
        number = self.next_slot() if slot is None else slot
        owned = not isinstance(backing, Mapping)
        if isinstance(backing, Mapping):
            mapping = backing
        else:
            mapping, own = self.back(size, backing)
            gmem = gmem or own
        segment = Segment(gpa, size, mapping, mapping, always_shared=always_shared)
        self.memory.add(segment)
        entry = MemorySlot(
            self, number, int(gpa), size, mapping, flags, mapping.hva, gmem, gmem_offset, segment
        )
        if gmem is not None:
            entry.flags |= KVM_MEM_GUEST_MEMFD
        try:
            entry._set(int(gpa), size, entry.flags)
        except OSError:
            self.memory.remove(segment)
            if owned:
                mapping.close()
            raise
        if owned:
            self.own(mapping)
        self.slots[number] = entry
        return entry

    def add_alias(
        self,
        gpa: int,
        size: int,
        mapping: Mapping,
        *,
        offset: int = 0,
        slot: int | None = None,
        flags: int = 0,
        gmem: GuestMemfd | None = None,
    ) -> MemorySlot:
        """Map *size* bytes of *mapping* at *gpa* without entering the range into :attr:`memory`.

        For second views of memory, such as the alias that carries an emulated encryption bit.
        """
        number = self.next_slot() if slot is None else slot
        entry = MemorySlot(self, number, gpa, size, mapping, flags, mapping.hva + offset, gmem, offset)
        if gmem is not None:
            entry.flags |= KVM_MEM_GUEST_MEMFD
        entry._set(gpa, size, entry.flags)
        self.slots[number] = entry
        return entry

    def close(self) -> None:
        """Close the VM, then give its memory back."""
        if not self.closed:
            super().close()
            for gmem in self._gmems:
                gmem.close()
            self.memory.close()
            self.slots.clear()
            for mapping in self._mappings:
                mapping.close()
            self._mappings.clear()
