# SPDX-License-Identifier: Apache-2.0
"""The list that scenarios of records enter themselves in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmpy import Kvm
from kvmpy.core.errors import KvmError

Scenario = Callable[[Kvm], None]
SCENARIOS: dict[str, Scenario] = {}
# Name of a scenario -> what its C file says it shows.
SHOWS: dict[str, tuple[str, ...]] = {}
# Name of a scenario -> the protection that it needs.
NEEDS: dict[str, str] = {}


def names() -> list[Any]:
    """Return the names of all scenarios as pytest's parameters, with what some of them need."""
    return [
        pytest.param(name, marks=[pytest.mark.requires(f"protection:{NEEDS[name]}")] if name in NEEDS else [])
        for name in sorted(SCENARIOS)
    ]


def scenario(*shows: str, needs: str | None = None) -> Callable[[Scenario], Scenario]:
    """Enter the function as a scenario whose last word is *shows*, one of them where KVMs differ."""

    def enter(function: Scenario) -> Scenario:
        name = function.__name__.strip("_")
        SCENARIOS[name] = function
        SHOWS[name] = shows
        if needs is not None:
            NEEDS[name] = needs
        return function

    return enter


def fails(function: Callable[[], object]) -> None:
    """Call *function*, whose ioctl is refused."""
    try:
        function()
    except KvmError:
        return
    raise AssertionError("the ioctl was not refused")
