# SPDX-License-Identifier: Apache-2.0
"""Protection ``cbit``: a plain VM whose encryption bit is emulated by a second view of guest memory.

Every range of guest memory has two memory slots: at GPA for shared pages and at GPA | bit for private ones,
with different host memory behind them.  The bit is the top physical address bit, so page-table entries,
table pointers and CR3 carry it as they carry the C-bit on AMD hardware, and whatever lacks it reaches the
other memory.  Nothing is encrypted: results say "emulated encryption bit".
"""

from __future__ import annotations

import functools

from kvmpy.core.address import EncryptionBit, Gpa
from kvmpy.core.backing import Backing
from kvmpy.core.errors import MissingError
from kvmpy.core.kvm import Kvm
from kvmpy.core.memory import Segment
from kvmpy.core.slots import MemorySlot
from kvmpy.guest.protection import Availability, Protection, Traits
from kvmpy.guest.vm import GuestVm

MIN_MAXPHYADDR = 36


@functools.cache
def _max_physical_bits(path: str) -> int:
    with Kvm(path) as kvm:
        return max_physical_bits(kvm)


def max_physical_bits(kvm: Kvm) -> int:
    """Return the guest's MAXPHYADDR as KVM_GET_SUPPORTED_CPUID has it (CPUID 0x80000008 EAX bits 7:0; 36
    without the leaf).
    """
    for entry in kvm.supported_cpuid.entries_list():
        if entry.function == 0x80000008:
            return int(entry.eax & 0xFF)
    return 36


class EmulatedEncryptionBit(Protection):
    """The emulated encryption bit; runs on every KVM."""

    name = "cbit"
    traits = Traits(has_encryption_bit=True, has_private_memory=True, policies=("all", "data"), emulated=True)
    label = "emulated encryption bit"

    @classmethod
    def availability(cls, kvm: Kvm) -> Availability:
        """Needs only a physical address bit to spare."""
        bits = _max_physical_bits(kvm.path)
        if bits >= MIN_MAXPHYADDR:
            return Availability(True, note=f"bit {bits - 1}, nothing is encrypted")
        missing = MissingError(
            f"MAXPHYADDR >= {MIN_MAXPHYADDR} (is {bits})", "no spare address bit on this host's KVM"
        )
        return Availability(False, (missing,))

    def encryption_bit(self, kvm: Kvm) -> EncryptionBit:
        """The top physical address bit, set for private pages."""
        return EncryptionBit(_max_physical_bits(kvm.path) - 1, set_means_private=True)

    def add_memory(
        self,
        vm: GuestVm,
        gpa: Gpa,
        size: int,
        *,
        backing: Backing | None,
        slot: int | None,
        flags: int,
        private: bool,
    ) -> MemorySlot:
        """Add the shared and the private view of the range."""
        bit = self.encryption_bit(vm.kvm)
        bit.check(gpa)
        if not private:
            return vm.add_slot(gpa, size, backing=backing, slot=slot, flags=flags, always_shared=True)
        vm.memory.check_free(gpa, size)
        shared, shared_gmem = vm.back(size, backing)
        try:
            hidden, private_gmem = vm.back(size, backing)
        except BaseException:
            shared.close()
            raise
        segment = Segment(gpa, size, shared, hidden)
        vm.memory.add(segment)
        first: MemorySlot | None = None
        try:
            at, private_at = int(bit.to_raw(gpa, False)), int(bit.to_raw(gpa, True))
            first = vm.add_alias(at, size, shared, slot=slot, flags=flags, gmem=shared_gmem)
            alias = vm.add_alias(private_at, size, hidden, flags=flags, gmem=private_gmem)
        except OSError:
            vm.memory.remove(segment)
            if first is not None:
                first.delete()
            shared.close()
            hidden.close()
            raise
        vm.own(shared)
        vm.own(hidden)
        first.segment = segment
        first.aliases.append(alias)
        return first
