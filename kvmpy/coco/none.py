# SPDX-License-Identifier: Apache-2.0
"""Protection ``none``: a plain VM whose memory and registers the host sees."""

from __future__ import annotations

from kvmpy.core.kvm import Kvm
from kvmpy.guest.protection import Availability, Protection, Traits


class NoProtection(Protection):
    """No protection at all."""

    name = "none"
    traits = Traits()

    @classmethod
    def availability(cls, kvm: Kvm) -> Availability:  # noqa: ARG003 - the interface
        """Every KVM makes plain VMs."""
        return Availability(True)
