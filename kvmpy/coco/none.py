# SPDX-License-Identifier: Apache-2.0
"""Protection ``none``: a plain VM whose memory and registers the host sees."""

from __future__ import annotations

from kvmpy.core.address import Gpa
from kvmpy.core.backing import Backing
from kvmpy.core.kvm import Kvm
from kvmpy.core.slots import MemorySlot
from kvmpy.guest.protection import Availability, Protection, Traits
from kvmpy.guest.vm import GuestVm


class NoProtection(Protection):
    """No protection at all."""

    name = "none"
    traits = Traits()

    @classmethod
    def availability(cls, kvm: Kvm) -> Availability:  # noqa: ARG003 - the interface
        """Every KVM makes plain VMs."""
        return Availability(True)

    def add_memory(
        self,
        vm: GuestVm,
        gpa: Gpa,
        size: int,
        *,
        backing: Backing | None,
        slot: int | None,
        flags: int,
        private: bool,  # noqa: ARG002 - no page is private
    ) -> MemorySlot:
        """Add an ordinary memory slot."""
        return vm.add_slot(gpa, size, backing=backing, slot=slot, flags=flags)
