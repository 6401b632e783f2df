# SPDX-License-Identifier: Apache-2.0
"""Sequences that nobody thought of."""

from __future__ import annotations

import pytest

from selftests.private_memory import machine
from selftests.private_memory.conftest import MakeRegion

pytestmark = [
    pytest.mark.protections("sw-protected"),
    pytest.mark.requires("KVM_CAP_PRE_FAULT_MEMORY"),
    pytest.mark.timeout(600),
]


def test_any_sequence(make_region: MakeRegion, seed: int) -> None:
    """After any sequence of conversions, accesses by host and guests, holes, allocations, pre-faults and
    renewed slots, each page holds the last word of its kind.

    Documentation/virt/kvm/api.rst 4.140 to 4.143.
    """
    region = make_region(machine.PAGES, slots=machine.SLOTS, vcpus=2)
    region.launch()
    machine.run(region, seed, examples=40, steps=30)
