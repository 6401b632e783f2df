# SPDX-License-Identifier: Apache-2.0
"""Page tables, case by case: exact entries, both encryption bits, splits, questions."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kvmpy.core.address import PAGE_SIZE, SIZE_1G, SIZE_2M, EncryptionBit, Gpa, Gva, RawGpa
from kvmpy.core.backing import Anonymous
from kvmpy.core.memory import Segment
from kvmpy.x86.entry import flag_words, pat_bits
from kvmpy.x86.paging_errors import MixedPrivacyError, NotMappedError
from selftests.paging.walker import Walker
from tests.x86.conftest import Space, SpaceMaker

CBIT = EncryptionBit(51)
SBIT = EncryptionBit(47, set_means_private=False)
BASE = Gva(0x4000_0000)


def entries(space: Space, gva: int) -> list[int]:
    """Return the entry values on the way to *gva*, read by the independent walker."""
    return [entry.value for entry in space.walker().walk(gva).entries]


# What exactly is written.


def test_leaf_and_tables_hold_the_expected_bits(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0x1234_5000), PAGE_SIZE)
    first = 0x4_0000_0000
    assert int(space.tables.cr3) == first
    assert entries(space, int(BASE)) == [first + 0x1007, first + 0x2007, first + 0x3007, 0x1234_5003]


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        ({}, 0x3),
        ({"writable": False}, 0x1),
        ({"user": True}, 0x7),
        ({"nx": True}, 1 << 63 | 3),
        ({"global_": True}, 0x103),
        ({"pat": 1}, 0x00B),
        ({"pat": 2}, 0x013),
        ({"pat": 4}, 0x083),
        ({"pat": 7}, 0x09B),
        ({"protection_key": 5}, 5 << 59 | 3),
    ],
)
def test_flags_of_a_small_leaf(make_space: SpaceMaker, how: dict[str, Any], bits: int) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0x7000), PAGE_SIZE, **how)
    assert entries(space, int(BASE))[-1] == 0x7000 | bits


@pytest.mark.parametrize(("page_size", "steps"), [(PAGE_SIZE, 4), (SIZE_2M, 3), (SIZE_1G, 2)])
@pytest.mark.parametrize("pat", [0, 3, 4])
def test_leaf_of_each_size(make_space: SpaceMaker, page_size: int, steps: int, pat: int) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0x8000_0000), page_size, page_size=page_size, pat=pat)
    entries_found = entries(space, int(BASE))
    assert len(entries_found) == steps
    high = (0x80 if page_size == PAGE_SIZE else 0x1000) if pat & 4 else 0
    large = 0 if page_size == PAGE_SIZE else 0x80
    assert entries_found[-1] == 0x8000_0000 | large | high | (pat & 3) << 3 | 3


@pytest.mark.parametrize(
    ("encryption", "private", "bit"),
    [(CBIT, True, 1 << 51), (CBIT, False, 0), (SBIT, True, 0), (SBIT, False, 1 << 47)],
)
@pytest.mark.parametrize("page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G])
def test_encryption_bit_in_leaves(
    make_space: SpaceMaker, encryption: EncryptionBit, private: bool, bit: int, page_size: int
) -> None:
    space = make_space(encryption=encryption)
    space.tables.map(BASE, Gpa(0x8000_0000), page_size, page_size=page_size, private=private)
    assert entries(space, int(BASE))[-1] & ~0xFFF == 0x8000_0000 | bit
    walk = space.tables.walk(BASE + 0x123)
    assert (walk.gpa, walk.private, walk.raw) == (Gpa(0x8000_0123), private, RawGpa(0x8000_0123 | bit))


@pytest.mark.parametrize(
    ("encryption", "private_tables", "bit"),
    [(CBIT, True, 1 << 51), (CBIT, False, 0), (SBIT, True, 0), (SBIT, False, 1 << 47)],
)
@pytest.mark.parametrize("levels", [4, 5])
def test_encryption_bit_in_table_pointers_and_cr3(
    make_space: SpaceMaker, encryption: EncryptionBit, private_tables: bool, bit: int, levels: int
) -> None:
    # The alias that the tables are not in is full of garbage: reading or writing it would show.
    space = make_space(encryption=encryption, private_tables=private_tables, levels=levels, poison=True)
    space.tables.map(BASE, Gpa(0x5000), PAGE_SIZE, private=not private_tables)
    assert int(space.tables.cr3) & encryption.mask == bit
    *pointers, leaf = entries(space, int(BASE))
    assert [pointer & encryption.mask for pointer in pointers] == [bit] * (levels - 1)
    assert leaf & encryption.mask == bit ^ encryption.mask
    assert space.tables.walk(BASE).tables_private == (private_tables,) * levels
    assert space.memory.is_private(encryption.from_raw(space.tables.cr3)[0]) == private_tables


def test_an_entry_that_lacks_the_bit_is_noticed(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    space.tables.map(BASE, Gpa(0x5000), PAGE_SIZE, private=True)
    step = space.tables.walk(BASE).steps[-1]
    where = CBIT.from_raw(step.table)[0] + step.index * 8
    space.memory.write(where, struct.pack("<Q", step.value & ~CBIT.mask))
    assert space.tables.walk(BASE).private is False
    assert space.walker().walk(int(BASE)).private is False
    # A table pointer that lacks it leads into the other alias, where there are no tables.
    pde = space.tables.walk(BASE).steps[-2]
    where = CBIT.from_raw(pde.table)[0] + pde.index * 8
    space.memory.write(where, struct.pack("<Q", pde.value & ~CBIT.mask))
    assert not space.tables.walk(BASE).present
    assert space.walker().walk(int(BASE)).fault == "not-present"


@pytest.mark.parametrize(
    ("levels", "gva"), [(4, 0xFFFF_FFFF_FFFF_F000), (5, 0x00FF_FFFF_FFFF_F000), (5, 0xFF00 << 48)]
)
def test_ends_of_the_address_space(make_space: SpaceMaker, levels: int, gva: int) -> None:
    space = make_space(levels=levels)
    space.tables.map(Gva(gva), Gpa(0x9000), PAGE_SIZE)
    assert space.walker().walk(gva).physical == 0x9000
    assert space.tables.translate(Gva(gva + 5)) == Gpa(0x9005)
    assert len(space.tables.walk(Gva(gva)).steps) == levels
    assert [m.gva for m in space.tables.mappings()] == [Gva(gva)]


# Which page sizes are chosen.


def test_largest_pages_that_fit(make_space: SpaceMaker) -> None:
    space = make_space(max_page_size=SIZE_1G)
    start, end = SIZE_1G - SIZE_2M - PAGE_SIZE, 2 * SIZE_1G + SIZE_2M + PAGE_SIZE
    space.tables.map(Gva(start), Gpa(start), end - start)
    assert [(int(m.gva), m.size, m.page_size) for m in space.tables.mappings()] == [
        (start, PAGE_SIZE, PAGE_SIZE),
        (SIZE_1G - SIZE_2M, SIZE_2M, SIZE_2M),
        (SIZE_1G, SIZE_1G, SIZE_1G),
        (2 * SIZE_1G, SIZE_2M, SIZE_2M),
        (end - PAGE_SIZE, PAGE_SIZE, PAGE_SIZE),
    ]


@pytest.mark.parametrize(("offset", "page_size"), [(PAGE_SIZE, PAGE_SIZE), (SIZE_2M, SIZE_2M), (0, SIZE_1G)])
def test_largest_pages_need_addresses_that_agree(make_space: SpaceMaker, offset: int, page_size: int) -> None:
    space = make_space(max_page_size=SIZE_1G)
    space.tables.map(Gva(SIZE_1G), Gpa(SIZE_1G + offset), SIZE_1G)
    assert {m.page_size for m in space.tables.mappings()} == {page_size}


def test_largest_page_is_2m_unless_said_otherwise(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(Gva(SIZE_1G), Gpa(SIZE_1G), SIZE_1G)
    assert {m.page_size for m in space.tables.mappings()} == {SIZE_2M}


@pytest.mark.parametrize("encryption", [CBIT, SBIT])
def test_pages_follow_the_bitmap(make_space: SpaceMaker, encryption: EncryptionBit) -> None:
    space = make_space(encryption=encryption)
    space.memory.private.add_range(512 + 3, 512 + 5)
    space.memory.private.add_range(2048, 4096)
    space.tables.map(Gva(0), Gpa(0), 16 << 20)
    assert [(int(m.gpa), m.size, m.page_size, m.private) for m in space.tables.mappings()] == [
        (0, SIZE_2M, SIZE_2M, False),
        (0x20_0000, 0x3000, PAGE_SIZE, False),
        (0x20_3000, 0x2000, PAGE_SIZE, True),
        (0x20_5000, 0x1F_B000, PAGE_SIZE, False),
        (0x40_0000, 2 * SIZE_2M, SIZE_2M, False),
        (0x80_0000, 4 * SIZE_2M, SIZE_2M, True),
    ]


def test_alternating_privacy_takes_one_table(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    space.memory.private.update(range(0, 512, 2))
    before = space.tables.table_pages
    space.tables.map(Gva(0), Gpa(0), SIZE_2M)
    assert [space.tables.walk(Gva(p << 12)).private for p in range(4)] == [True, False, True, False]
    assert (space.tables.table_pages, space.tables.spare_pages) == (before + 3, 0)


def test_pages_beyond_the_bitmap_are_shared(make_space: SpaceMaker) -> None:
    space = make_space(encryption=EncryptionBit(50))
    space.memory.private.add_range((1 << 32) - 1, 1 << 32)
    space.tables.map(Gva(0), Gpa((1 << 44) - PAGE_SIZE), 2 * PAGE_SIZE)
    space.tables.map(BASE, Gpa(1 << 45), PAGE_SIZE)
    assert [space.tables.walk(Gva(p)).private for p in (0, PAGE_SIZE, int(BASE))] == [True, False, False]


def test_new_tables_inside_the_mapped_range_are_private(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    start = space.memory.segments()[0].gpa
    space.tables.map(Gva(0), start, 8 << 20)
    for page in range(space.tables.table_pages):
        assert space.tables.walk(Gva(page << 12)).private is True
    assert space.tables.walk(Gva(space.tables.table_pages << 12)).private is False


def test_new_tables_may_split_the_very_page_that_needs_them(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    space.allocator.alloc(511, private=True)
    # The next tables lie in the second 2 MiB, which was shared as a whole when the mapping was planned.
    space.tables.map(Gva(0), space.memory.segments()[0].gpa, 8 << 20)
    pages = 512 + space.tables.table_pages - 1
    assert [(m.size, m.page_size, m.private) for m in space.tables.mappings()] == [
        (SIZE_2M, SIZE_2M, True),
        ((pages - 512) * PAGE_SIZE, PAGE_SIZE, True),
        ((1024 - pages) * PAGE_SIZE, PAGE_SIZE, False),
        (2 * SIZE_2M, SIZE_2M, False),
    ]


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G])
def test_mixed_huge_page_is_refused_and_may_be_forced(make_space: SpaceMaker, page_size: int) -> None:
    space = make_space(encryption=CBIT)
    space.memory.private.add(7)
    with pytest.raises(MixedPrivacyError, match=r"page at gpa 0x0 mixes .*at gpa 0x7000"):
        space.tables.map(Gva(0), Gpa(0), page_size, page_size=page_size)
    space.tables.map(Gva(0), Gpa(0), page_size, page_size=page_size, private=True)
    assert space.tables.walk(Gva(0)).page_size == page_size


# Edits.


@pytest.mark.parametrize("pat", [0, 5])
def test_split_of_2m_keeps_everything(make_space: SpaceMaker, pat: int) -> None:
    space = make_space(encryption=CBIT)
    space.tables.map(
        BASE,
        Gpa(SIZE_2M),
        SIZE_2M,
        page_size=SIZE_2M,
        private=True,
        nx=True,
        user=True,
        global_=True,
        pat=pat,
    )
    space.tables.protect(BASE, SIZE_2M, accessed=True, dirty=True)
    space.tables.split(BASE)
    want = CBIT.mask | 1 << 63 | 0x167 | pat_bits(pat, 1)
    for index in (0, 1, 511):
        assert entries(space, int(BASE) + index * PAGE_SIZE)[-1] == want | (SIZE_2M + index * PAGE_SIZE)
    assert space.tables.mappings()[0].size == SIZE_2M


def test_split_of_1g_in_steps(make_space: SpaceMaker) -> None:
    space = make_space(encryption=SBIT)
    space.tables.map(BASE, Gpa(SIZE_1G), SIZE_1G, page_size=SIZE_1G, private=False, pat=4)
    space.tables.split(BASE + SIZE_2M, PAGE_SIZE, page_size=SIZE_2M)
    assert entries(space, int(BASE) + 3 * SIZE_2M)[-1] == SIZE_1G + 3 * SIZE_2M | SBIT.mask | 0x1083
    space.tables.split(BASE + SIZE_2M, PAGE_SIZE)
    assert [(m.page_size, m.size) for m in space.tables.mappings()] == [
        (SIZE_2M, SIZE_2M),
        (PAGE_SIZE, SIZE_2M),
        (SIZE_2M, SIZE_1G - 2 * SIZE_2M),
    ]
    assert entries(space, int(BASE) + SIZE_2M)[-1] == SIZE_1G + SIZE_2M | SBIT.mask | 0x83
    assert space.tables.spare_pages == 0


def test_split_of_what_is_small_changes_nothing(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), 2 * PAGE_SIZE)
    before = space.tables.dump()
    space.tables.split(BASE, 2 * PAGE_SIZE)
    assert space.tables.dump() == before


def test_unmap_inside_a_1g_page(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(SIZE_1G), SIZE_1G, page_size=SIZE_1G)
    space.tables.unmap(BASE + 5 * PAGE_SIZE, PAGE_SIZE)
    assert [(int(m.gpa) - SIZE_1G, m.size) for m in space.tables.mappings()] == [
        (0, 5 * PAGE_SIZE),
        (6 * PAGE_SIZE, SIZE_2M - 6 * PAGE_SIZE),
        (SIZE_2M, SIZE_1G - SIZE_2M),
    ]
    assert (space.tables.table_pages, space.tables.spare_pages) == (4, 0)


def test_empty_tables_are_used_again(make_space: SpaceMaker) -> None:
    space = make_space(size=64 << 10)
    for number in range(50):
        space.tables.map(BASE + number * SIZE_1G, Gpa(0), SIZE_2M, page_size=PAGE_SIZE)
        space.tables.unmap(BASE + number * SIZE_1G, SIZE_2M)
        assert (space.tables.table_pages, space.tables.spare_pages) == (4, 3)


def test_overwrite_with_huge_pages_recycles_tables(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), 4 * SIZE_2M, page_size=PAGE_SIZE)
    pages = space.tables.table_pages
    space.tables.map(BASE + SIZE_2M, Gpa(SIZE_1G), 2 * SIZE_2M, page_size=SIZE_2M, overwrite=True)
    assert (space.tables.table_pages, space.tables.spare_pages) == (pages, 2)
    assert [(int(m.gpa), m.size) for m in space.tables.mappings()] == [
        (0, SIZE_2M),
        (SIZE_1G, 2 * SIZE_2M),
        (3 * SIZE_2M, SIZE_2M),
    ]
    # A recycled table starts empty.
    space.tables.map(BASE + 8 * SIZE_2M, Gpa(0), PAGE_SIZE)
    assert not space.tables.walk(BASE + 8 * SIZE_2M + PAGE_SIZE).present


def test_protect_changes_only_what_it_names(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    space.tables.map(BASE, Gpa(0), SIZE_2M, page_size=SIZE_2M, private=True, nx=True, pat=4, protection_key=3)
    space.tables.protect(BASE, SIZE_2M, writable=False, user=True, protection_key=9)
    assert entries(space, int(BASE))[-1] == CBIT.mask | 1 << 63 | 9 << 59 | 0x1085
    space.tables.protect(BASE + PAGE_SIZE, PAGE_SIZE, private=False, nx=False)
    assert entries(space, int(BASE))[-1] == CBIT.mask | 1 << 63 | 9 << 59 | 0x85
    assert entries(space, int(BASE) + PAGE_SIZE)[-1] == PAGE_SIZE | 9 << 59 | 0x85


def test_remap_keeps_permissions_and_huge_pages(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    space.tables.map(BASE, Gpa(0), 2 * SIZE_2M, page_size=SIZE_2M, user=True, nx=True, pat=4)
    space.memory.private.add_range(2 * 512, 3 * 512)
    space.tables.remap(BASE, Gpa(2 * SIZE_2M), 2 * SIZE_2M)
    assert entries(space, int(BASE))[-1] == 2 * SIZE_2M | CBIT.mask | 1 << 63 | 0x1087
    assert entries(space, int(BASE) + SIZE_2M)[-1] == 3 * SIZE_2M | 1 << 63 | 0x1087
    space.tables.remap(BASE + PAGE_SIZE, Gpa(0x9000), PAGE_SIZE, private=True)
    assert entries(space, int(BASE) + PAGE_SIZE)[-1] == 0x9000 | CBIT.mask | 1 << 63 | 0x87
    assert entries(space, int(BASE))[-1] == 2 * SIZE_2M | CBIT.mask | 1 << 63 | 0x87


def test_remap_of_huge_pages_to_an_odd_place_splits_them(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), SIZE_1G, page_size=SIZE_1G)
    space.tables.remap(BASE, Gpa(3 * SIZE_2M), SIZE_1G)
    assert [(int(m.gpa), m.size, m.page_size) for m in space.tables.mappings()] == [
        (3 * SIZE_2M, SIZE_1G, SIZE_2M)
    ]
    space.tables.remap(BASE, Gpa(PAGE_SIZE), SIZE_2M)
    assert space.tables.mappings()[0].page_size == PAGE_SIZE
    assert (space.tables.table_pages, space.tables.spare_pages) == (4, 0)


def test_refresh_private_follows_conversions(make_space: SpaceMaker) -> None:
    space = make_space(encryption=SBIT)
    space.tables.map(BASE, Gpa(0), 2 * SIZE_2M, nx=True)
    space.memory.private.add_range(512 + 1, 512 + 3)
    assert {m.private for m in space.tables.mappings()} == {False}
    space.tables.refresh_private(BASE, 4 * SIZE_2M)
    assert [(int(m.gpa), m.size, m.private, m.page_size) for m in space.tables.mappings()] == [
        (0, SIZE_2M, False, SIZE_2M),
        (SIZE_2M, PAGE_SIZE, False, PAGE_SIZE),
        (SIZE_2M + PAGE_SIZE, 2 * PAGE_SIZE, True, PAGE_SIZE),
        (SIZE_2M + 3 * PAGE_SIZE, 509 * PAGE_SIZE, False, PAGE_SIZE),
    ]
    assert all(m.entry >> 63 for m in space.tables.mappings())


# Questions.


def test_extents_join_and_stop_at_holes(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0x5000), 2 * PAGE_SIZE)
    space.tables.map(BASE + 2 * PAGE_SIZE, Gpa(0x7000), PAGE_SIZE, writable=False)
    space.tables.map(BASE + 3 * PAGE_SIZE, Gpa(0x1000), PAGE_SIZE)
    assert space.tables.extents(BASE + 0x10, 0x3FE0) == [(Gpa(0x5010), 0x2FF0), (Gpa(0x1000), 0xFF0)]
    assert space.tables.extents(BASE + 0xFFF, 1) == [(Gpa(0x5FFF), 1)]
    with pytest.raises(NotMappedError, match="gva 0x40004000"):
        space.tables.extents(BASE, 0x4001)


def test_walk_of_a_hole_tells_where_it_ends(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0x5000), PAGE_SIZE)
    walk = space.tables.walk(BASE + SIZE_2M)
    assert (walk.present, walk.level, walk.gpa, walk.page_size) == (False, 2, None, 0)
    assert str(walk).splitlines()[0] == "gva 0x40200000 -> not mapped"
    assert str(walk).splitlines()[-1].endswith("not present")
    with pytest.raises(NotMappedError, match="PDE"):
        space.tables.translate(BASE + SIZE_2M)


def test_permissions_of_a_walk_are_those_of_all_levels(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0x5000), PAGE_SIZE, user=True)
    assert (space.tables.walk(BASE).writable, space.tables.walk(BASE).user, space.tables.walk(BASE).nx) == (
        True,
        True,
        False,
    )
    pde = space.tables.walk(BASE).steps[2]
    space.memory.write(Gpa(int(pde.table)) + pde.index * 8, struct.pack("<Q", pde.value & ~6 | 1 << 63))
    walk = space.tables.walk(BASE)
    assert (walk.writable, walk.user, walk.nx) == (False, False, True)


def test_dump_and_walk_show_the_encryption_bit(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    space.tables.map(BASE, Gpa(0x20_0000), SIZE_2M, page_size=SIZE_2M, private=True, nx=True)
    head, line = space.tables.dump().splitlines()
    assert head.endswith("4 levels, C-bit 51, tables private")
    assert line.split() == [
        *("0000000040000000..00000000401fffff", "->", "000000200000", "1", "x", "2", "MiB"),
        *("private", "P", "RW", "PS", "NX"),
    ]
    text = str(space.tables.walk(BASE))
    assert "gpa 0x200000 (private)" in text
    assert (
        "PDE   table 0x8000400002000 [  0] = 0x8008000000200083  2 MiB page 0x200000 private P RW PS NX"
        in text
    )


def test_mappings_of_a_range_and_across_many_runs(make_space: SpaceMaker) -> None:
    space = make_space(size=32 << 20)
    count = 9000  # more than the editor hands over at once
    for number in range(count):
        space.tables.map(BASE + number * PAGE_SIZE, Gpa((number ^ 1) * PAGE_SIZE), PAGE_SIZE)
    leaves = space.tables.mappings()
    assert [int(m.gpa) // PAGE_SIZE for m in leaves] == [number ^ 1 for number in range(count)]
    assert [int(m.gpa) for m in space.tables.mappings(BASE + PAGE_SIZE, 2 * PAGE_SIZE)] == [0, 3 * PAGE_SIZE]


def test_mappings_do_not_tell_accessed_and_dirty_apart(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), 4 * PAGE_SIZE)
    space.tables.protect(BASE + PAGE_SIZE, PAGE_SIZE, accessed=True)
    space.tables.protect(BASE + 2 * PAGE_SIZE, PAGE_SIZE, dirty=True)
    assert [m.size for m in space.tables.mappings()] == [4 * PAGE_SIZE]
    space.tables.protect(BASE + 2 * PAGE_SIZE, PAGE_SIZE, writable=False)
    assert [m.size // PAGE_SIZE for m in space.tables.mappings()] == [2, 1, 1]


def test_a_large_page_bit_above_1g_makes_no_leaf(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0x5000), PAGE_SIZE)
    pml4e = space.tables.walk(BASE).steps[0]
    space.memory.write(Gpa(int(pml4e.table)) + pml4e.index * 8, struct.pack("<Q", pml4e.value | 0x80))
    walk = space.tables.walk(BASE)
    assert [step.level for step in walk.steps] == [4, 3, 2, 1]
    assert walk.gpa == Gpa(0x5000)
    assert space.walker().walk(int(BASE)).fault == "reserved"  # what a CPU makes of it


def test_tables_spread_over_several_ranges_of_memory(make_space: SpaceMaker) -> None:
    space = make_space(size=4 * PAGE_SIZE)
    for number in range(1, 6):
        more = Anonymous().map(4 * PAGE_SIZE)
        make_space.mappings.append(more)
        # Added out of order: below, above, below ...
        address = Gpa(0x4_0000_0000 + (number if number % 2 else -number) * 0x10_0000)
        space.memory.add(Segment(address, 4 * PAGE_SIZE, more, more))
    space.tables.map(BASE, Gpa(0), 20 * SIZE_2M, page_size=PAGE_SIZE)
    assert space.tables.table_pages == 23
    assert [(int(m.gpa), m.size) for m in space.tables.mappings()] == [(0, 20 * SIZE_2M)]

    def read(raw: int) -> int:
        return int(struct.unpack("<Q", space.memory.read(Gpa(raw), 8))[0])

    pages = list(Walker(read, int(space.tables.cr3)).pages(int(BASE), 20 * SIZE_2M))
    assert [page.physical for page in pages] == [n * PAGE_SIZE for n in range(20 * 512)]
    space.tables.unmap(BASE, 20 * SIZE_2M)
    assert space.tables.spare_pages == 22


def test_flag_words() -> None:
    assert flag_words(0x1000 | 1 << 63 | 5 << 59 | 0x1E7, 1) == "P RW US PAT4 A D G PK5 NX"
    assert flag_words(0x20_10E3, 2) == "P RW PAT4 A D PS"
    assert flag_words(0x101F, 4) == "P RW US PWT PCD"
    assert flag_words(0x1000, 1) == "not present"
