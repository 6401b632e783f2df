# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.coalesced import ENTRIES, CoalescedRing, CoalescedWrite


class Kernel:
    """Fills the page as KVM does: it leaves one entry free, so that full and empty differ."""

    def __init__(self) -> None:
        self.page = bytearray(4096)

    def write(self, addr: int, data: bytes, pio: bool = False) -> bool:
        first, last = struct.unpack_from("<II", self.page)
        if (last + 1) % ENTRIES == first:
            return False
        struct.pack_into("<QII8s", self.page, 8 + last * 24, addr, len(data), int(pio), data)
        struct.pack_into("<I", self.page, 4, (last + 1) % ENTRIES)
        return True


def test_a_page_holds_169_writes() -> None:
    kernel = Kernel()
    ring = CoalescedRing(memoryview(kernel.page))
    accepted = 0
    while kernel.write(0x1000 + accepted, b"x"):
        accepted += 1
    assert accepted == 169
    assert len(ring) == 169
    assert [write.addr for write in ring.drain()] == list(range(0x1000, 0x1000 + 169))
    assert len(ring) == 0


def test_entries_have_address_data_and_kind() -> None:
    kernel = Kernel()
    ring = CoalescedRing(memoryview(kernel.page))
    kernel.write(0xFEC0_0000, b"\x34\x12")
    kernel.write(0x80, b"\x01", pio=True)
    assert ring.drain() == [
        CoalescedWrite(0xFEC0_0000, b"\x34\x12", False),
        CoalescedWrite(0x80, b"\x01", True),
    ]


def test_value_is_little_endian() -> None:
    assert CoalescedWrite(0, b"\x34\x12", False).value == 0x1234


def test_length_counts_across_the_end_of_the_ring() -> None:
    kernel = Kernel()
    ring = CoalescedRing(memoryview(kernel.page))
    for burst in (160, 30):
        for number in range(burst):
            kernel.write(number, b"1")
        assert len(ring) == burst
        ring.drain()


@given(st.lists(st.integers(0, 200), max_size=20))
def test_no_write_is_lost_or_doubled_when_the_ring_wraps(bursts: list[int]) -> None:
    kernel = Kernel()
    ring = CoalescedRing(memoryview(kernel.page))
    sent: list[int] = []
    seen: list[int] = []
    number = 0
    for burst in bursts:
        for _ in range(burst):
            number += 1
            if kernel.write(number, b"1234"):
                sent.append(number)
        seen += [write.addr for write in ring.drain()]
    assert seen == sent


@pytest.mark.parametrize(("first", "last"), [(170, 0), (0, 170), (0xFFFF_FFFF, 0xFFFF_FFFF)])
def test_indices_outside_the_ring_are_an_error_not_a_loop(first: int, last: int) -> None:
    page = bytearray(4096)
    struct.pack_into("<II", page, 0, first, last)
    ring = CoalescedRing(memoryview(page))
    with pytest.raises(ValueError, match="broken"):
        ring.drain()
    with pytest.raises(ValueError, match="broken"):
        len(ring)


def test_an_entry_with_too_much_data_is_an_error() -> None:
    page = bytearray(4096)
    struct.pack_into("<IIQI", page, 0, 0, 1, 0x1000, 9)
    with pytest.raises(ValueError, match="9 bytes"):
        CoalescedRing(memoryview(page)).drain()


def test_less_than_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="4095"):
        CoalescedRing(memoryview(bytearray(4095)))
