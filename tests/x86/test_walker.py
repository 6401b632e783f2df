# SPDX-License-Identifier: Apache-2.0
"""The independent walker itself, on tables written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from selftests.paging.walker import Translation, Walker

CBIT = 1 << 51


def walker(memory: dict[int, int], cr3: int = 0x1000, levels: int = 4, **more: Any) -> Walker:
    """Return a walker over a sparse memory of 8-byte words."""
    return Walker(lambda raw: memory.get(raw, 0), cr3, levels=levels, **more)


def test_four_levels_by_hand() -> None:
    memory = {
        0x1000 + 8 * 1: 0x2007,
        0x2000 + 8 * 2: 0x3007,
        0x3000 + 8 * 3: 0x4007,
        0x4000 + 8 * 4: 0x9_9063,
    }
    gva = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x567
    step = walker(memory).walk(gva)
    assert step == Translation(
        gva, None, 0x9_9567, 0x9_9567, None, 4096, True, False, True, accessed=True, dirty=True
    )
    assert [(entry.level, entry.at, entry.value) for entry in step.entries] == [
        (4, 0x1008, 0x2007),
        (3, 0x2010, 0x3007),
        (2, 0x3018, 0x4007),
        (1, 0x4020, 0x9_9063),
    ]


def test_five_levels_by_hand() -> None:
    memory = {0x1000 + 8 * 0x100: 0x2003, 0x2000: 0x3003, 0x3000: 0x8000_0083}
    walk_result = walker(memory, levels=5).walk(0xFF00_0000_0000_1234)
    assert (walk_result.fault, walk_result.physical, walk_result.page_size) == (None, 0x8000_1234, 1 << 30)


@pytest.mark.parametrize(
    ("levels", "gva", "canonical"),
    [
        (4, 0x0000_7FFF_FFFF_FFFF, True),
        (4, 0x0000_8000_0000_0000, False),
        (4, 0xFFFF_7FFF_FFFF_FFFF, False),
        (4, 0xFFFF_8000_0000_0000, True),
        (5, 0x0000_8000_0000_0000, True),
        (5, 0x00FF_FFFF_FFFF_FFFF, True),
        (5, 0x0100_0000_0000_0000, False),
        (5, 0xFEFF_FFFF_FFFF_FFFF, False),
        (5, 0xFF00_0000_0000_0000, True),
    ],
)
def test_canonical_addresses(levels: int, gva: int, canonical: bool) -> None:
    assert walker({}, levels=levels).walk(gva).fault == ("not-present" if canonical else "non-canonical")


@pytest.mark.parametrize(
    ("value", "level", "fault"),
    [
        (0x80 | 3, 4, "reserved"),  # PS in a PML4 entry
        (0x4000_0083, 3, None),
        (0x4000_2083, 3, "reserved"),  # bit 13 of a 1 GiB leaf
        (0x4000_1083, 3, None),  # bit 12 is PAT
        (0x6000_0083, 3, "reserved"),
        (0x4020_0083, 2, None),
        (0x4010_0083, 2, "reserved"),
        (0x4020_1083, 2, None),
        (1 << 45 | 3, 1, None),
        (1 << 46 | 3, 1, "reserved"),  # above the physical width
        (CBIT | 3, 1, None),
        (1 << 50 | 3, 1, "reserved"),
    ],
)
def test_reserved_bits(value: int, level: int, fault: str | None) -> None:
    memory = {0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003}
    memory[0x1000 * (5 - level)] = value
    assert walker(memory, physical_bits=46, encryption_bit=51).walk(0).fault == fault


def test_every_level_may_forbid() -> None:
    memory = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x9007}
    for address, value in memory.items():
        entry = walker({**memory, address: value & ~2}).walk(0)
        assert (entry.writable, entry.user, entry.executable) == (False, True, True)
        entry = walker({**memory, address: value & ~4}).walk(0)
        assert (entry.writable, entry.user, entry.executable) == (True, False, True)
        entry = walker({**memory, address: value | 1 << 63}).walk(0)
        assert (entry.writable, entry.user, entry.executable) == (True, True, False)


@pytest.mark.parametrize("set_is_private", [True, False])
def test_encryption_bit_of_every_step(set_is_private: bool) -> None:
    memory = {CBIT | 0x1000: 0x2003, 0x2000: CBIT | 0x3003, CBIT | 0x3000: 0x4003, 0x4000: CBIT | 0x9003}
    entry = walker(memory, CBIT | 0x1000, encryption_bit=51, set_is_private=set_is_private).walk(0x10)
    assert entry.table_privacy == tuple(bit == set_is_private for bit in (True, False, True, False))
    assert (entry.raw, entry.physical, entry.private) == (CBIT | 0x9010, 0x9010, set_is_private)


def test_pages_skip_holes() -> None:
    memory = {0x1000: 0x2003, 0x2000: 0x3003, 0x3000: 0x4003, 0x4008: 0x9003, 0x3008: 0x20_0083}
    pages = list(walker(memory).pages(0, 0x40_0000))
    assert [(page.gva, page.page_size) for page in pages] == [(0x1000, 4096), (0x20_0000, 0x20_0000)]
