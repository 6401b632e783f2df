# SPDX-License-Identifier: Apache-2.0
"""The hosts of a run: what each offers, and what none has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from kvmpy.fleet.host import MAX_DEATHS
from kvmpy.fleet.launch import Launcher
from kvmpy.fleet.reports import HostFacts
from kvmpy.testing import labels
from kvmpy.testing.dealer import Hand, Needs


@dataclass
class Host:
    """A host of the run. *missing* is what it lacks of each label, None until it has told."""

    name: str
    facts: HostFacts
    launcher: Launcher | None = None
    deaths_allowed: int = MAX_DEATHS
    address: str = ""
    lane: str = ""
    column: str = ""
    missing: dict[str, str] | None = None
    hand: Hand = field(default_factory=Hand)
    retired: str = ""
    wanted: bool = True
    task: Any = None
    heard: float = 0.0
    back_until: float = 0.0
    dangerous: bool = False

    def meets(self, label: str) -> bool:
        """Whether the host has a label, or is called so."""
        known = self.facts
        named = {known.name, known.summary.configuration.partition(" (")[0], known.summary.platform}
        offers = self.hand.offers
        return label in named or label in offers or f"protection:{label}" in offers


def hint(needs: Needs, told: Sequence[Host]) -> str:
    """Return what a host lacks of what none has, which says how to get it."""
    for host in told:
        for label in sorted(needs):
            if text := (host.missing or {}).get(label, ""):
                return f"on {host.name}: {text}"
    return ""


def nobody(needs: Needs, offers: Sequence[Needs]) -> str:
    """Return the words for tests that no host can run: the fewest labels that none has together."""
    names = sorted(needs)
    absent = [name for name in names if not any(name in offered for offered in offers)]
    if absent:
        return f"no host of this fleet has {' or '.join(map(labels.plain, absent))}"
    for one, other in combinations(names, 2):
        if not any({one, other} <= offered for offered in offers):
            return f"no host of this fleet has {labels.plain(one)} together with {labels.plain(other)}"
    first, *others = map(labels.plain, names)
    return f"no host of this fleet has {first} together with {' and '.join(others)}"
