# SPDX-License-Identifier: Apache-2.0
"""What page tables refuse, that a refusal changes nothing, and what several users of them meet."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvmpy.core.address import PAGE_SIZE, SIZE_1G, SIZE_2M, EncryptionBit, Gpa, Gva, RawGpa
from kvmpy.core.memory import OutOfGuestMemoryError
from kvmpy.x86.paging import PageTables
from kvmpy.x86.paging_errors import (
    EncryptionBitError,
    NonCanonicalError,
    NotMappedError,
    OverlapError,
    PagingError,
    PhysicalRangeError,
    TableAccessError,
    UnalignedError,
)
from tests.x86.conftest import SpaceMaker

CBIT = EncryptionBit(51)
SBIT = EncryptionBit(47, set_means_private=False)
BASE = Gva(0x4000_0000)


@pytest.mark.parametrize(
    ("gva", "gpa", "size", "more", "error"),
    [
        (0x1001, 0x1000, 0x1000, {}, UnalignedError),
        (0x1000, 0x1800, 0x1000, {}, UnalignedError),
        (0x1000, 0x1000, 0x1800, {}, UnalignedError),
        (0x1000, 0x1000, 0, {}, UnalignedError),
        (0x1000, 0x1000, -0x1000, {}, UnalignedError),
        (0x20_0000, 0x1000, 0x20_0000, {"page_size": SIZE_2M}, UnalignedError),
        (0x20_0000, 0x20_0000, 0x1000, {"page_size": SIZE_2M}, UnalignedError),
        (0x20_1000, 0x20_0000, 0x20_0000, {"page_size": SIZE_2M}, UnalignedError),
        (0x20_0000, 0x20_0000, 0x20_0000, {"page_size": 0x8000}, UnalignedError),
        (1 << 47, 0x1000, 0x1000, {}, NonCanonicalError),
        ((1 << 47) - 0x1000, 0x1000, 0x2000, {}, NonCanonicalError),
        (0xFFFF_7FFF_FFFF_F000, 0x1000, 0x1000, {}, NonCanonicalError),
        (0xFFFF_7FFF_FFFF_F000, 0x1000, 0x2000, {}, NonCanonicalError),
        (0xFFFF_FFFF_FFFF_F000, 0x1000, 0x2000, {}, NonCanonicalError),
        (0x1000, 1 << 48, 0x1000, {}, PhysicalRangeError),
        (0x1000, (1 << 48) - 0x1000, 0x2000, {}, EncryptionBitError),
        (0x1000, 0, (1 << 41) + 0x1000, {}, EncryptionBitError),
        (0x1000, 1 << 40, 0x1000, {}, EncryptionBitError),
        (0x1000, (1 << 40) - 0x1000, 0x2000, {}, EncryptionBitError),
        (0x1000, 0x1000, 0x1000, {"pat": 8}, ValueError),
        (0x1000, 0x1000, 0x1000, {"protection_key": 16}, ValueError),
    ],
)
def test_bad_mappings(
    make_space: SpaceMaker, gva: int, gpa: int, size: int, more: dict[str, Any], error: type[Exception]
) -> None:
    space = make_space(encryption=EncryptionBit(40), physical_bits=48)
    with pytest.raises(error) as caught:
        space.tables.map(Gva(gva), Gpa(gpa), size, **more)
    assert type(caught.value) is error
    assert space.tables.mappings() == []
    assert space.tables.table_pages == 1


def test_encryption_bit_in_a_gpa_is_named(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    with pytest.raises(EncryptionBitError, match="bit 51, the C-bit"):
        space.tables.map(BASE, Gpa(0x1000 | CBIT.mask), PAGE_SIZE)
    with pytest.raises(EncryptionBitError, match="bit 51, the C-bit"):
        space.tables.remap(BASE, Gpa(0x1000 | CBIT.mask), PAGE_SIZE)


def test_kinds_of_addresses_are_not_mixed(make_space: SpaceMaker) -> None:
    tables = make_space(encryption=CBIT).tables
    with pytest.raises(TypeError, match="RawGpa, not a Gpa"):
        tables.map(BASE, RawGpa(0x1000), PAGE_SIZE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Gpa, not a Gva"):
        tables.walk(Gpa(0x1000))  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G])
def test_overlap_is_refused_as_a_whole(make_space: SpaceMaker, page_size: int) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), page_size, page_size=page_size)
    before = space.tables.dump()
    with pytest.raises(OverlapError, match="0000000040000000"):
        space.tables.map(BASE - PAGE_SIZE, Gpa(0), 2 * PAGE_SIZE)
    assert space.tables.dump() == before


def test_small_page_over_a_huge_one_splits_it(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), SIZE_1G, page_size=SIZE_1G)
    space.tables.map(BASE + 3 * PAGE_SIZE, Gpa(0x9000), PAGE_SIZE, overwrite=True)
    assert space.tables.translate(BASE + 3 * PAGE_SIZE) == Gpa(0x9000)
    assert space.tables.translate(BASE + 4 * PAGE_SIZE) == Gpa(4 * PAGE_SIZE)
    assert (space.tables.table_pages, space.tables.spare_pages) == (4, 0)


@pytest.mark.parametrize("edit", ["unmap", "protect", "remap", "split"])
def test_edits_of_a_hole_are_refused_as_a_whole(make_space: SpaceMaker, edit: str) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), SIZE_2M, page_size=SIZE_2M)
    before = space.tables.dump()
    calls = {
        "unmap": lambda: space.tables.unmap(BASE + SIZE_2M - PAGE_SIZE, 2 * PAGE_SIZE),
        "protect": lambda: space.tables.protect(BASE + SIZE_2M - PAGE_SIZE, 2 * PAGE_SIZE, writable=False),
        "remap": lambda: space.tables.remap(BASE + SIZE_2M - PAGE_SIZE, Gpa(0), 2 * PAGE_SIZE),
        "split": lambda: space.tables.split(BASE + SIZE_2M - PAGE_SIZE, 2 * PAGE_SIZE),
    }
    with pytest.raises(NotMappedError, match="0x1000 bytes are not mapped, first 0x40200000"):
        calls[edit]()
    assert space.tables.dump() == before
    with pytest.raises(NotMappedError):
        space.tables.split(BASE + SIZE_2M)


def test_no_memory_for_tables_changes_nothing(make_space: SpaceMaker) -> None:
    space = make_space(size=6 * PAGE_SIZE)
    space.tables.map(BASE, Gpa(0), SIZE_2M, page_size=SIZE_2M)
    before = space.tables.dump()
    with pytest.raises(OutOfGuestMemoryError):
        space.tables.map(BASE + SIZE_2M, Gpa(0), 8 * SIZE_2M, page_size=PAGE_SIZE)
    assert space.tables.dump() == before
    # What was had before memory ran out is not lost.
    space.tables.map(BASE + SIZE_2M, Gpa(0), 3 * SIZE_2M, page_size=PAGE_SIZE)
    assert space.tables.spare_pages == 0


def test_tables_come_from_fragments_too(make_space: SpaceMaker) -> None:
    space = make_space(size=64 * PAGE_SIZE)
    taken = [space.allocator.alloc() for _ in range(60)]
    for gpa in taken[::2]:
        space.allocator.free(gpa)
    space.tables.map(BASE, Gpa(0), 20 * SIZE_2M, page_size=PAGE_SIZE)
    assert len(list(space.walker().pages(int(BASE), 20 * SIZE_2M))) == 20 * 512


def test_sealed_tables_are_out_of_reach(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)
    space.tables.map(BASE, Gpa(0), PAGE_SIZE)
    space.memory.seal = "the launch encrypted it"
    for call in (
        lambda: space.tables.walk(BASE),
        lambda: space.tables.map(BASE + PAGE_SIZE, Gpa(0), PAGE_SIZE),
        lambda: space.tables.unmap(BASE, PAGE_SIZE),
        space.tables.dump,
    ):
        with pytest.raises(TableAccessError, match=r"\(private\) is out of reach: the launch encrypted it"):
            call()


def test_unmapped_host_memory_is_not_touched(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), PAGE_SIZE)
    make_space.close()
    with pytest.raises(TableAccessError):
        space.tables.walk(BASE)
    space.memory.close()
    with pytest.raises(TableAccessError, match="outside guest memory"):
        space.tables.map(BASE, Gpa(0), PAGE_SIZE, overwrite=True)


def test_a_pointer_outside_memory_ends_the_walk(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), PAGE_SIZE)
    pde = space.tables.walk(BASE).steps[2]
    space.memory.write(Gpa(int(pde.table)) + pde.index * 8, struct.pack("<Q", 0x000F_0000_0000_0007))
    assert [step.name for step in space.tables.walk(BASE).steps] == ["PML4E", "PDPTE", "PDE"]
    with pytest.raises(TableAccessError, match=r"0xf000000000000 .*outside guest memory"):
        space.tables.unmap(BASE, PAGE_SIZE)


@pytest.mark.parametrize("how", [{"levels": 6}, {"physical_bits": 53}, {"max_page_size": 0x8000}])
def test_bad_tables(make_space: SpaceMaker, how: dict[str, int]) -> None:
    space = make_space()
    with pytest.raises(ValueError, match=next(iter(how))):
        PageTables(space.memory, space.allocator, **how)  # type: ignore[arg-type]


def test_private_needs_an_encryption_bit_in_protect(make_space: SpaceMaker) -> None:
    space = make_space()
    space.tables.map(BASE, Gpa(0), PAGE_SIZE)
    with pytest.raises(PagingError, match="no encryption bit"):
        space.tables.protect(BASE, PAGE_SIZE, private=True)


def test_freed_tables_give_their_pages_back(make_space: SpaceMaker) -> None:
    space = make_space(size=8 * PAGE_SIZE)
    for _round in range(5):
        tables = PageTables(space.memory, space.allocator)
        tables.map(BASE, Gpa(0), 2 * SIZE_2M, page_size=PAGE_SIZE)
        assert len(tables.mappings()) == 1
        tables.free()
        with pytest.raises(PagingError, match="freed"):
            tables.walk(BASE)


def test_threads_share_the_tables(make_space: SpaceMaker) -> None:
    space = make_space(encryption=CBIT)

    def work(number: int) -> None:
        for turn in range(200):
            gva = BASE + (number * 1000 + turn) * SIZE_2M
            space.tables.map(gva, Gpa(number * PAGE_SIZE), PAGE_SIZE, private=bool(number & 1))
            if turn % 3:
                space.tables.unmap(gva, PAGE_SIZE)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4), timeout=60))
    results = [
        (int(m.gva - BASE) // SIZE_2M, int(m.gpa) // PAGE_SIZE, m.private) for m in space.tables.mappings()
    ]
    assert results == [(n * 1000 + t, n, bool(n & 1)) for n in range(4) for t in range(0, 200, 3)]
