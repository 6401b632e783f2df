# SPDX-License-Identifier: Apache-2.0
"""Page tables of 32-bit entries and of PAE, judged by a walk that shares nothing with the editor."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy.core.address import PAGE_SIZE, SIZE_1G, SIZE_2M, SIZE_4M, EncryptionBit, Gpa, Gva
from kvmpy.x86.paging import PageTables
from kvmpy.x86.paging_errors import (
    NonCanonicalError,
    NotMappedError,
    OverlapError,
    PagingError,
    PhysicalRangeError,
    UnalignedError,
)
from tests.x86.conftest import Space, SpaceMaker

AT = 0x4000_0000
HUGE = {2: SIZE_4M, 3: SIZE_2M}
# Page numbers at which ranges begin and end: around the borders of tables, and up to the last page.
CUTS = (
    *(0, 1, 511, 512, 513, 1023, 1024, 1025, 2048),
    *(262143, 262144, 262656, 263168, 1047552, 1048575, 1 << 20),
)
PROBES = sorted({p for cut in CUTS for p in (cut - 1, cut) if 0 <= p < 1 << 20})


class Seen(NamedTuple):
    """What a walk found of one page."""

    physical: int
    size: int
    writable: bool
    user: bool
    nx: bool
    pat: int


def seen(space: Space, levels: int, gva: int, cr3: int) -> Seen | None:
    """Walk by the formats of the AMD APM, volume 2, figures 5-3 to 5-13."""

    def read(at: int, size: int) -> int:
        return int.from_bytes(space.memory.read(Gpa(at), size), "little")

    if levels == 2:
        pde = read((cr3 & ~0xFFF) + (gva >> 22) * 4, 4)
        shift, index, size = 22, gva >> 12 & 0x3FF, 4
    else:
        pdpte = read((cr3 & ~0x1F) + (gva >> 30) * 8, 8)
        if not pdpte & 1:
            return None
        assert pdpte & 0x1E6 == 0, "rights and flags are reserved in the top level of PAE"
        pde = read((pdpte & 0xF_FFFF_FFFF_F000) + (gva >> 21 & 0x1FF) * 8, 8)
        shift, index, size = 21, gva >> 12 & 0x1FF, 8
    if not pde & 1:
        return None
    upper: list[int] = []
    if pde & 0x80:
        page, entry, high = 1 << shift, pde, pde >> 12 & 1
    else:
        entry = read((pde & 0xF_FFFF_FFFF_F000) + index * size, size)
        if not entry & 1:
            return None
        upper, page, high = [pde], PAGE_SIZE, entry >> 7 & 1
    rights = [entry, *upper]
    physical = entry & 0xF_FFFF_FFFF_F000 & -page
    return Seen(
        physical + (gva & page - 1),
        page,
        all(each & 2 for each in rights),
        all(each & 4 for each in rights),
        any(each >> 63 for each in rights),
        (entry >> 3 & 3) | high << 2,
    )


ranges = st.tuples(st.sampled_from(CUTS), st.sampled_from(CUTS)).filter(lambda pair: pair[0] < pair[1])


class Edit(NamedTuple):
    """One edit of the pages from number *first* to *end*."""

    what: str
    pages: tuple[int, int]
    physical: int
    writable: bool
    user: bool
    pat: int


edits = st.builds(
    Edit,
    st.sampled_from(("map", "map huge", "unmap", "protect", "split")),
    ranges,
    st.sampled_from((0, 1, 512, 1024, 2048)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 7),
)


class Run:
    """The tables, and a model of them: pages by number, and how large each may be."""

    def __init__(self, space: Space) -> None:
        self.space, self.tables = space, space.tables
        self.levels = space.tables.levels
        self.pages: dict[int, Seen] = {}
        self.limit: dict[int, int] = {}

    def apply(self, edit: Edit) -> None:
        """Do one edit in both worlds; where the model refuses it, so must the tables."""
        first, end = edit.pages
        inside = [p for p in PROBES if first <= p < end]
        gva, size = Gva(first * PAGE_SIZE), (end - first) * PAGE_SIZE
        if edit.what.startswith("map"):
            refused = self.refusal(edit)
            if refused is None:
                self.map(edit, inside)
            else:
                with pytest.raises(refused):
                    self.map(edit, [])
        elif edit.what == "unmap":
            self.tables.unmap(gva, size, missing_ok=True)
            for p in inside:
                self.pages.pop(p, None)
        elif all(p in self.pages for p in inside):
            self.change(edit, inside, gva, size)

    def refusal(self, edit: Edit) -> type[PagingError] | None:
        """Tell how the tables must refuse to map."""
        first, end = edit.pages
        unit = HUGE[self.levels] // PAGE_SIZE if edit.what == "map huge" else 1
        if first % unit or end % unit:
            return UnalignedError
        if self.levels == 2 and edit.physical + end - first > 1 << 20:
            return PhysicalRangeError
        return UnalignedError if edit.physical % unit else None

    def map(self, edit: Edit, inside: list[int]) -> None:
        """Map in both worlds."""
        first, end = edit.pages
        unit = HUGE[self.levels] if edit.what == "map huge" else None
        nx = self.levels == 3 and not edit.user
        self.tables.map(
            Gva(first * PAGE_SIZE), Gpa(edit.physical * PAGE_SIZE), (end - first) * PAGE_SIZE, page_size=unit,
            writable=edit.writable, user=edit.user, nx=nx, pat=edit.pat, overwrite=True,
        )  # fmt: skip
        for p in inside:
            where = (edit.physical + p - first) * PAGE_SIZE
            self.pages[p] = Seen(where, 0, edit.writable, edit.user, nx, edit.pat)
            self.limit[p] = unit or HUGE[self.levels]

    def change(self, edit: Edit, inside: list[int], gva: Gva, size: int) -> None:
        """Change the rights or the sizes of pages in both worlds."""
        try:
            if edit.what == "protect":
                self.tables.protect(gva, size, writable=edit.writable)
            else:
                self.tables.split(gva, size)
        except NotMappedError:  # a hole between two probes
            return
        for p in inside:
            if edit.what == "protect":
                self.pages[p] = self.pages[p]._replace(writable=edit.writable)
            else:
                self.limit[p] = PAGE_SIZE

    def check(self) -> None:
        """Compare every probe, by the independent walk and the tables' own."""
        for p in PROBES:
            found = seen(self.space, self.levels, p * PAGE_SIZE, int(self.tables.cr3))
            own = self.tables.walk(Gva(p * PAGE_SIZE))
            assert (found is not None) == own.present == (p in self.pages)
            if found is not None:
                assert found._replace(size=0) == self.pages[p]
                assert found.size <= self.limit[p]
                assert (own.gpa, own.page_size, own.writable, own.user, own.nx, own.pat) == (
                    Gpa(found.physical), found.size, found.writable, found.user, found.nx, found.pat,
                )  # fmt: skip


@pytest.mark.parametrize("levels", [2, 3])
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(edits=st.lists(edits, max_size=12))
def test_random_edits(make_space: SpaceMaker, levels: int, edits: list[Edit]) -> None:
    run = Run(make_space(levels=levels, at=AT, size=16 << 20))
    for edit in edits:
        run.apply(edit)
    run.check()
    run.tables.unmap(Gva(0), 1 << 32, missing_ok=True)
    assert run.tables.mappings() == []
    assert run.tables.spare_pages == run.tables.table_pages - 1
    make_space.close()


def test_the_largest_page_that_fits(make_space: SpaceMaker) -> None:
    for levels, size in HUGE.items():
        space = make_space(levels=levels, at=AT)
        space.tables.map(Gva(size), Gpa(size), 2 * size)
        assert [m.page_size for m in space.tables.mappings()] == [size]
        assert f"{size >> 20} MiB page" in str(space.tables.walk(Gva(size)))
        with pytest.raises(OverlapError):
            space.tables.map(Gva(size), Gpa(size), PAGE_SIZE)
        for wrong in {SIZE_2M, SIZE_4M, SIZE_1G} - {size}:
            with pytest.raises(UnalignedError, match=f"pages are 4 KiB or {size >> 20} MiB"):
                space.tables.map(Gva(0), Gpa(0), wrong, page_size=wrong)


def test_entries_are_shown_as_wide_as_they_are(make_space: SpaceMaker) -> None:
    space = make_space(levels=2, at=AT)
    space.tables.map(Gva(0x1000), Gpa(0x5000), PAGE_SIZE, user=True)
    assert "= 0x00005007  4 KiB page 0x5000 P RW US" in str(space.tables.walk(Gva(0x1000)))
    assert len(space.tables.walk(Gva(0x1000)).steps) == 2


@pytest.mark.parametrize(
    ("levels", "how"), [(2, {"nx": True}), (2, {"protection_key": 1}), (3, {"protection_key": 1})]
)
def test_bits_that_a_format_lacks(make_space: SpaceMaker, levels: int, how: dict[str, int]) -> None:
    tables = make_space(levels=levels, at=AT).tables
    with pytest.raises(PagingError, match=next(iter(how))):
        tables.map(Gva(0), Gpa(0), PAGE_SIZE, **how)  # type: ignore[arg-type]
    assert not tables.mappings()


def test_addresses_end_at_4_gib(make_space: SpaceMaker) -> None:
    tables = make_space(levels=3, at=AT).tables
    tables.map(Gva(0xFFFF_F000), Gpa(0xF_FFFF_F000), PAGE_SIZE)
    assert tables.translate(Gva(0xFFFF_F123)) == Gpa(0xF_FFFF_F123)
    for gva in (0x1_0000_0000, 0xFFFF_FFFF_FFFF_F000):
        with pytest.raises(NonCanonicalError):
            tables.walk(Gva(gva))
    with pytest.raises(MemoryError, match="below 4 GiB"):
        make_space(levels=3)


def test_encryption_in_pae(make_space: SpaceMaker) -> None:
    """Leaves have the bit; CR3 and the tables, which are shared, have not."""
    space = make_space(levels=3, at=AT, encryption=EncryptionBit(47), poison=True, private_tables=False)
    space.tables.map(Gva(0x1000), Gpa(0x5000), PAGE_SIZE, private=True)
    walk = space.tables.walk(Gva(0x1000))
    assert (int(walk.steps[-1].value) >> 47, walk.private, walk.tables_private) == (1, True, (False,) * 3)
    assert int(space.tables.cr3) < 1 << 32


@pytest.mark.parametrize(("levels", "bit"), [(2, EncryptionBit(47)), (3, EncryptionBit(51, False))])
def test_no_room_for_an_encryption_bit(make_space: SpaceMaker, levels: int, bit: EncryptionBit) -> None:
    space = make_space(at=AT)
    with pytest.raises(ValueError, match="no room"):
        PageTables(space.memory, space.allocator, levels=levels, encryption=bit)
