# SPDX-License-Identifier: Apache-2.0
"""The protections in the order of their strength, which of them a host offers, and why not the others."""

from __future__ import annotations

from kvmpy.coco.cbit import EmulatedEncryptionBit
from kvmpy.coco.none import NoProtection
from kvmpy.coco.sw_protected import SoftwareProtected
from kvmpy.core.errors import MissingError
from kvmpy.core.kvm import Kvm
from kvmpy.guest.protection import Availability, Protection

_LADDER: tuple[type[Protection], ...] = (
    SoftwareProtected,
    EmulatedEncryptionBit,
    NoProtection,
)


def protections() -> tuple[str, ...]:
    """Return the names of all protections, strongest first."""
    return tuple(protection.name for protection in _LADDER)


def availability(kvm: Kvm) -> dict[str, Availability]:
    """Tell for every protection whether *kvm* offers it, strongest first."""
    return {protection.name: protection.availability(kvm) for protection in _LADDER}


def get(name: str) -> Protection:
    """Return the protection *name*; ValueError with the known names when there is none."""
    for protection in _LADDER:
        if protection.name == name:
            return protection()
    raise ValueError(f"no protection {name!r}: one of auto, {', '.join(protections())}")


def resolve(name: str, kvm: Kvm) -> Protection:
    """Return the protection *name*, or for ``auto`` the strongest that *kvm* offers.

    MissingError, naming what is missing, when *kvm* does not offer the one asked for.
    """
    if name == "auto":
        name = next(found for found, answer in availability(kvm).items() if answer.available)
    protection = get(name)
    answer = protection.availability(kvm)
    if not answer.available:
        raise MissingError(
            f"protection {name}: {'; '.join(piece.missing for piece in answer.missing)}",
            "; ".join(piece.how for piece in answer.missing if piece.how),
        )
    return protection
