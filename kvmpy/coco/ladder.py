# SPDX-License-Identifier: Apache-2.0
"""The protections in the order of their strength, which of them a host offers, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from kvmpy.coco.cbit import EmulatedEncryptionBit
from kvmpy.coco.none import NoProtection
from kvmpy.coco.sev import Sev, SevEs
from kvmpy.coco.snp import Snp
from kvmpy.coco.sw_protected import SoftwareProtected
from kvmpy.core.errors import MissingError
from kvmpy.core.kvm import Kvm
from kvmpy.guest.protection import Availability, Protection

_LADDER: tuple[type[Protection], ...] = (
    Snp,
    SevEs,
    Sev,
    SoftwareProtected,
    EmulatedEncryptionBit,
    NoProtection,
)


def protections() -> tuple[str, ...]:
    """Return the names of all protections, strongest first."""
    return tuple(protection.name for protection in _LADDER)


# What a KVM offers does not change while it is open, and asking takes longer than making a VM.
_answers: WeakKeyDictionary[Kvm, dict[str, Availability]] = WeakKeyDictionary()


def _ask(protection: type[Protection], kvm: Kvm) -> Availability:
    known = _answers.setdefault(kvm, {})
    if protection.name not in known:
        known[protection.name] = protection.availability(kvm)
    return known[protection.name]


def availability(kvm: Kvm) -> dict[str, Availability]:
    """Tell for every protection whether *kvm* offers it, strongest first."""
    return {protection.name: _ask(protection, kvm) for protection in _LADDER}


@dataclass(frozen=True)
class Choice:
    """The strongest protection that a host offers, and why it is none of the stronger ones."""

    name: str
    label: str
    refused: Mapping[str, Availability]

    def lines(self) -> list[str]:
        """Return the choice as text: what was taken, then a line for each stronger protection with what it
        lacks and how to get it.
        """
        about = f" ({self.label})" if self.label else ""
        lines = [f"protection auto: {self.name}{about}, the strongest that this host offers"]
        for name, answer in self.refused.items():
            what = "; ".join(piece.missing for piece in answer.missing)
            how = "; ".join(dict.fromkeys(piece.how for piece in answer.missing if piece.how))
            lines.append(f"  not {name}: needs {what}{f' (get it: {how})' if how else ''}")
        return lines


def choose(kvm: Kvm) -> Choice:
    """Return the strongest protection that *kvm* offers, with what each stronger one lacks."""
    refused: dict[str, Availability] = {}
    for protection in _LADDER:
        answer = _ask(protection, kvm)
        if answer.available:
            return Choice(protection.name, protection.label, refused)
        refused[protection.name] = answer
    raise MissingError("any protection", "a KVM that makes VMs")


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
        name = choose(kvm).name
    protection = get(name)
    answer = _ask(type(protection), kvm)
    if not answer.available:
        raise MissingError(
            f"protection {name}: {'; '.join(piece.missing for piece in answer.missing)}",
            "; ".join(piece.how for piece in answer.missing if piece.how),
        )
    return protection
