# SPDX-License-Identifier: Apache-2.0
"""Protection ``cbit``: a plain VM whose encryption bit is emulated by a second view of guest memory.

Every range of guest memory has two memory slots: at GPA for shared pages and at GPA | bit for private ones,
with different host memory behind them.  The bit is the highest that KVM can map, so page-table entries,
table pointers and CR3 carry it as they carry the C-bit on AMD hardware, and whatever lacks it reaches the
other memory.  Nothing is encrypted: results say "emulated encryption bit".
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvmpy.core.address import EncryptionBit, Gpa
from kvmpy.core.errors import MissingError
from kvmpy.core.kvm import Kvm
from kvmpy.core.memory import Segment
from kvmpy.core.slots import MemorySlot
from kvmpy.guest.options import SlotOptions
from kvmpy.guest.protection import Availability, Protection, Traits
from kvmpy.guest.vm import GuestVm
from kvmpy.x86.cpuid import Cpuid

if TYPE_CHECKING:
    from typing_extensions import Unpack

MIN_BITS = 36


@functools.cache
def _mappable_bits(path: str) -> int:
    with Kvm(path) as kvm:
        return mappable_bits(kvm)


def mappable_bits(kvm: Kvm) -> int:
    """Return how many bits a guest physical address can have here and still be mapped.

    Nested paging of four levels maps 48 bits, whatever MAXPHYADDR is: KVM says so in GuestPhysAddrSize, CPUID
    0x80000008 EAX[23:16] of KVM_GET_SUPPORTED_CPUID (arch/x86/kvm/cpuid.c, __do_cpuid_func()).
    """
    return Cpuid.from_struct(kvm.supported_cpuid).guest_maxphyaddr


class EmulatedEncryptionBit(Protection):
    """The emulated encryption bit; runs on every KVM."""

    name = "cbit"
    traits = Traits(has_encryption_bit=True, has_private_memory=True, policies=("all", "data"), emulated=True)
    label = "emulated encryption bit"

    @classmethod
    def availability(cls, kvm: Kvm) -> Availability:
        """Needs only an address bit to spare."""
        bits = _mappable_bits(kvm.path)
        if bits >= MIN_BITS:
            return Availability(True, note=f"bit {bits - 1}, nothing is encrypted")
        missing = MissingError(
            f"guest physical addresses of {MIN_BITS} bits (here {bits})",
            "no spare address bit on this host's KVM",
        )
        return Availability(False, (missing,))

    def encryption_bit(self, kvm: Kvm) -> EncryptionBit:
        """The top bit of the addresses that can be mapped, set for private pages."""
        return EncryptionBit(_mappable_bits(kvm.path) - 1, set_means_private=True)

    def add_memory(self, vm: GuestVm, gpa: Gpa, size: int, **options: Unpack[SlotOptions]) -> MemorySlot:
        """Add the shared and the private view of the range."""
        bit = self.encryption_bit(vm.kvm)
        backing, flags = options.get("backing"), options.get("flags", 0)
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
            address, private_at = int(bit.to_raw(gpa, False)), int(bit.to_raw(gpa, True))
            first = vm.add_alias(
                address, size, shared, slot=options.get("slot"), flags=flags, gmem=shared_gmem
            )
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
