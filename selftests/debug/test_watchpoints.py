# SPDX-License-Identifier: Apache-2.0
"""Watchpoints: debug registers that look at data."""

from __future__ import annotations

import pytest

from kvmpy import DebugPoint, Vector
from selftests.debug.conftest import LineMaker

pytestmark = [
    pytest.mark.requires("KVM_CAP_SET_GUEST_DEBUG"),
    pytest.mark.usefixtures("open_registers", "open_tables", "debug_registers"),
]
rings = pytest.mark.parametrize("ring", ["kernel", "user"])

DR6_ACTIVE_LOW = 0xFFFF_0FF0
UNTOUCHED = (3, 0, 0, 0, 0)


@pytest.mark.requires("trait:host_sees_private")
@rings
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_write(line: LineMaker, ring: str, size: int) -> None:
    """A watchpoint for writes exits behind the instruction that wrote, with the data already in memory.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG; Intel SDM volume 3, 18.3.1.2 Data Memory
    Breakpoint.
    """
    guest = line(ring)
    guest.vcpu.debug.set_points([DebugPoint(guest.data, "w", size)])
    got = guest.hit()
    assert (got.exception, got.pc, got.dr6) == (Vector.DB, guest.at("c"), DR6_ACTIVE_LOW | 1)
    assert guest.vm.variable(guest.data, 8).u64 == 2
    assert guest.finish() == UNTOUCHED


@rings
@pytest.mark.parametrize("slot", [1, 2, 3])
def test_write_in_each_register(line: LineMaker, ring: str, slot: int) -> None:
    """A watchpoint is as good in DR1 to DR3, and the bit in DR6 says which it was.

    Intel SDM volume 3, 18.2.3 Debug Status Register (B0 to B3).
    """
    guest = line(ring)
    others = [DebugPoint(guest.data + 16, "rw", 8)] * slot
    guest.vcpu.debug.set_points([*others, DebugPoint(guest.data, "w", 8)])
    got = guest.hit()
    assert (got.exception, got.pc, got.dr6) == (Vector.DB, guest.at("c"), DR6_ACTIVE_LOW | 1 << slot)
    assert guest.finish() == UNTOUCHED


@rings
def test_read_and_write(line: LineMaker, ring: str) -> None:
    """A watchpoint for both exits behind the write and behind the read.

    Intel SDM volume 3, 18.2.4 Debug Control Register (R/W0 to R/W3).
    """
    guest = line(ring)
    guest.vcpu.debug.set_points([DebugPoint(guest.data, "rw", 8)])
    assert [guest.hit().pc for _ in range(2)] == [guest.at("c"), guest.at("d")]
    assert guest.finish() == UNTOUCHED


@rings
def test_part(line: LineMaker, ring: str) -> None:
    """A watchpoint on any byte of what is written exits.

    Intel SDM volume 3, 18.2.5 Breakpoint Field Recognition.
    """
    guest = line(ring)
    guest.vcpu.debug.set_points([DebugPoint(guest.data + 7, "w", 1)])
    assert guest.hit().pc == guest.at("c")
    assert guest.finish() == UNTOUCHED


@rings
def test_neighbours(line: LineMaker, ring: str) -> None:
    """Accesses beside a watchpoint do not exit.

    Intel SDM volume 3, 18.2.5 Breakpoint Field Recognition.
    """
    guest = line(ring)
    beside = (guest.data - 1, guest.data + 8)
    guest.vcpu.debug.set_points([DebugPoint(address, "rw", 1) for address in beside])
    assert guest.finish() == UNTOUCHED
