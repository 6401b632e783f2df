# SPDX-License-Identifier: Apache-2.0
"""Labels: what tests need of a host, as they say it themselves, and what a host answers.

A label is a requirement (``KVM_CAP_IRQCHIP``, ``protection:snp``, ``root``, ...), or ``dangerous``, with the
fix that makes it harmless behind a colon. Requirements that are functions have none: they are asked where
the test runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from kvmpy.testing import protections
from kvmpy.testing.fixes import FIXES
from kvmpy.testing.fixtures import REQUIREMENTS
from kvmpy.testing.options import SETTINGS

DANGEROUS = "dangerous"
_PROTECTION = "protection:"


def of_item(item: pytest.Item) -> list[str]:
    """Return the labels of a test."""
    wanted: list[Any] = [need for mark in item.iter_markers("requires") for need in mark.args]
    found = [need for need in wanted if isinstance(need, str) and not need.startswith(protections.TRAIT)]
    if (name := protections.of_item(item)) is not None:
        found.append(f"{_PROTECTION}{name}")
    elif "kvm" in getattr(item, "fixturenames", ()):
        found.append("kvm")
    if (mark := item.get_closest_marker("dangerous")) is not None:
        fix = mark.kwargs.get("unless")
        found.append(f"{DANGEROUS}:{fix}" if fix else DANGEROUS)
    return list(dict.fromkeys(found))


def answers(config: pytest.Config, asked: Iterable[str]) -> dict[str, str]:
    """Return for each label what this host lacks, empty where it has all.

    What means nothing is said to be there: the test itself tells.
    """
    return {label: _missing(config, label) for label in asked}


def _missing(config: pytest.Config, label: str) -> str:
    kind, _, fix = label.partition(":")
    if kind == DANGEROUS:
        harmless = config.stash[SETTINGS].run_dangerous or (fix in FIXES and FIXES[fix].known())
        return "" if harmless else "permission for tests that can crash an unfixed host"
    try:
        return "; ".join(str(entry) for entry in config.stash[REQUIREMENTS].missing([label]))
    except ValueError:
        return ""


def plain(label: str) -> str:
    """Return how a label is called in a sentence: a protection by its name alone."""
    return label.removeprefix(_PROTECTION)
