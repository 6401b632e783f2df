# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.irq import (
    HvSintRoute,
    IrqchipRoute,
    Msi,
    MsiRoute,
    RedirectionEntry,
    XenEvtchnRoute,
    default_routes,
)


def test_msi_to_a_physical_apic() -> None:
    assert Msi.to(3, 0x41) == Msi(0xFEE0_3000, 0x41)


def test_msi_fields_have_their_places() -> None:
    msi = Msi.to(0xFF, 0x20, delivery_mode=4, logical=True, redirection_hint=True, level=True)
    assert msi == Msi(0xFEEF_F00C, 0xC420)


def test_msi_to_a_32_bit_apic_id() -> None:
    assert Msi.to(0x1234_5678, 0x30).address == 0x1234_5600_FEE7_8000


@pytest.mark.parametrize(
    ("dest", "vector", "mode"), [(1 << 32, 0x20, 0), (0, 256, 0), (0, 0x20, 8), (-1, 0x20, 0)]
)
def test_msi_fields_out_of_range_are_refused(dest: int, vector: int, mode: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Msi.to(dest, vector, delivery_mode=mode)


@given(st.integers(0, (1 << 64) - 1))
def test_redirection_entries_survive_a_round_trip(bits: int) -> None:
    known = bits & 0xFF00_0000_0001_FFFF
    assert RedirectionEntry.from_bits(bits).bits == known


def test_redirection_entry_fields() -> None:
    got = RedirectionEntry.from_bits(0x0300_0000_0001_8931)
    assert got == RedirectionEntry(
        vector=0x31, delivery_mode=1, logical=True, level=True, masked=True, dest_id=3
    )
    with pytest.raises(ValueError, match="out of range"):
        _ = RedirectionEntry(vector=256).bits


def test_default_routing_reaches_both_controllers_below_16() -> None:
    routes = default_routes()
    assert len(routes) == 40
    assert [route.irqchip for route in routes if route.gsi == 9] == [2, 1]
    assert [(route.irqchip, route.pin) for route in routes if route.gsi == 20] == [(2, 20)]


def test_entries_have_the_kernels_layout() -> None:
    entry = IrqchipRoute(5, 2, 17).entry()
    assert (entry.gsi, entry.type, entry.u.irqchip.irqchip, entry.u.irqchip.pin) == (5, 1, 2, 17)
    entry = MsiRoute(6, Msi(0x1_FEE0_0000, 0x77), devid=9).entry()
    assert (entry.type, entry.flags, entry.u.msi.devid) == (2, 1, 9)
    assert (entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data) == (0xFEE0_0000, 1, 0x77)
    assert MsiRoute(6, Msi(0xFEE0_0000, 1)).entry().flags == 0
    entry = HvSintRoute(7, 1, 2).entry()
    assert (entry.type, entry.u.hv_sint.vcpu, entry.u.hv_sint.sint) == (4, 1, 2)
    entry = XenEvtchnRoute(8, 3, 1).entry()
    assert (entry.type, entry.u.xen_evtchn.port, entry.u.xen_evtchn.vcpu) == (5, 3, 1)
    assert entry.u.xen_evtchn.priority == 0xFFFF_FFFF
