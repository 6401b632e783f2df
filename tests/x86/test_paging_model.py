# SPDX-License-Identifier: Apache-2.0
"""Random edits of page tables against a dictionary of pages, judged by the independent walker."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy.core.address import PAGE_SIZE, SIZE_1G, SIZE_2M, EncryptionBit, Gpa, Gva
from kvmpy.x86.paging_errors import MixedPrivacyError, NotMappedError, OverlapError, UnalignedError
from tests.x86.conftest import Space, SpaceMaker

# Ranges start and end at these page numbers, so that between two of them all pages share one fate.
CUTS = (
    *(0, 1, 2, 5, 511, 512, 513, 700, 1023, 1024, 1536, 1543, 2048),
    *(262143, 262144, 262145, 262656, 263000, 393216, 524288, 524800, 525000, 786432),
)
PROBES = sorted({p for a, b in pairwise(CUTS) for p in (a, b - 1, (a + b) // 2)})
PHYSICAL = (0, 1, 3, 512, 515, 1024, 262144, 262144 + 512, 262144 + 7, 524288)


@dataclass(frozen=True)
class Page:
    """What the model knows of one mapped page."""

    physical: int
    private: bool | None
    writable: bool = True
    user: bool = False
    nx: bool = False
    global_: bool = False
    pat: int = 0
    key: int = 0


class Model:
    """Pages by number, and which physical pages are private, kept as plainly as can be."""

    def __init__(self, encrypted: bool) -> None:
        self.encrypted = encrypted
        self.pages: dict[int, Page] = {}
        self.conversions: list[tuple[int, int, bool]] = []
        self.limit: dict[int, int] = {}

    def is_private(self, page: int) -> bool | None:
        """Tell what the bitmap says of physical *page*."""
        if not self.encrypted:
            return None
        last = [private for first, end, private in self.conversions if first <= page < end]
        return last[-1] if last else False

    def changes(self, first: int, end: int) -> list[int]:
        """Return the physical pages in (first, end) at which privacy changes."""
        points = {p for a, b, _private in self.conversions for p in (a, b) if first < p < end}
        return [p for p in points if self.is_private(p - 1) != self.is_private(p)]


ALIGNED = tuple(c for c in CUTS if c % 512 == 0)
cut_pairs = st.tuples(st.sampled_from(CUTS), st.sampled_from(CUTS)).filter(lambda p: p[0] != p[1]).map(sorted)
aligned_pairs = (
    st.tuples(st.sampled_from(ALIGNED), st.sampled_from(ALIGNED)).filter(lambda p: p[0] != p[1]).map(sorted)
)
tri = st.none() | st.booleans()
flags = st.fixed_dictionaries(
    {
        "writable": st.booleans(),
        "user": st.booleans(),
        "nx": st.booleans(),
        "global_": st.booleans(),
        "pat": st.integers(0, 7),
        "key": st.integers(0, 15),
    }
)
maps = st.fixed_dictionaries(
    {
        "op": st.just("map"),
        "range": cut_pairs,
        "physical": st.sampled_from(PHYSICAL),
        "page_size": st.sampled_from((None, None, PAGE_SIZE, SIZE_2M, SIZE_1G)),
        "private": tri,
        "overwrite": st.booleans(),
        "how": flags,
    }
)
# Where addresses are aligned to each other, the pages are huge.
huge_maps = st.fixed_dictionaries(
    {
        "op": st.just("map"),
        "range": aligned_pairs,
        "physical": st.sampled_from((0, 512, 262144, 524288)),
        "page_size": st.sampled_from((None, None, SIZE_2M)),
        "private": tri,
        "overwrite": st.just(True),
        "how": flags,
    }
)
whole_maps = st.fixed_dictionaries(
    {
        "op": st.just("map"),
        "range": st.just([0, CUTS[-1]]),
        "physical": st.just(0),
        "page_size": st.sampled_from((None, SIZE_2M, SIZE_1G)),
        "private": tri,
        "overwrite": st.just(True),
        "how": flags,
    }
)
ops = st.one_of(
    maps,
    huge_maps,
    whole_maps,
    st.fixed_dictionaries({"op": st.just("unmap"), "range": cut_pairs, "missing_ok": st.booleans()}),
    st.fixed_dictionaries(
        {
            "op": st.just("protect"),
            "range": cut_pairs,
            "how": st.fixed_dictionaries(
                {"writable": tri, "user": tri, "nx": tri, "global_": tri, "private": tri}
            ),
        }
    ),
    st.fixed_dictionaries(
        {"op": st.just("remap"), "range": cut_pairs, "physical": st.sampled_from(PHYSICAL), "private": tri}
    ),
    st.fixed_dictionaries(
        {"op": st.just("split"), "range": cut_pairs, "page_size": st.sampled_from((PAGE_SIZE, SIZE_2M))}
    ),
    st.fixed_dictionaries({"op": st.just("convert"), "range": cut_pairs, "private": st.booleans()}),
    st.fixed_dictionaries({"op": st.just("refresh"), "range": cut_pairs}),
)


class Run:
    """The tables and the model, edited side by side."""

    def __init__(self, space: Space, base: int) -> None:
        self.space, self.tables, self.base = space, space.tables, base
        self.model = Model(space.tables.encryption is not None)

    def _probes(self, op: dict[str, Any]) -> list[int]:
        first, end = op["range"]
        return [p for p in PROBES if first <= p < end]

    def _where(self, op: dict[str, Any]) -> tuple[Gva, int]:
        first, end = op["range"]
        return Gva(self.base + first * PAGE_SIZE), (end - first) * PAGE_SIZE

    def _holes(self, op: dict[str, Any]) -> bool:
        return any(p not in self.model.pages for p in self._probes(op))

    def apply(self, op: dict[str, Any]) -> None:
        """Do one edit in both worlds; where the model refuses it, so must the tables, and change nothing."""
        error = getattr(self, f"_refuse_{op['op']}", lambda _op: None)(op)
        if error is None:
            getattr(self, f"_do_{op['op']}")(op)
            return
        before = self.tables.dump()
        with pytest.raises(error):
            getattr(self, f"_edit_{op['op']}")(op)
        assert self.tables.dump() == before

    def _refuse_map(self, op: dict[str, Any]) -> type[Exception] | None:
        first, end = op["range"]
        unit = (op["page_size"] or PAGE_SIZE) // PAGE_SIZE
        if first % unit or end % unit or op["physical"] % unit:
            return UnalignedError
        if self.model.encrypted and op["private"] is None and unit > 1:
            changes = self.model.changes(op["physical"], op["physical"] + end - first)
            if any(p % unit for p in changes):
                return MixedPrivacyError
        if not op["overwrite"] and any(p in self.model.pages for p in self._probes(op)):
            return OverlapError
        return None

    def _edit_map(self, op: dict[str, Any]) -> None:
        gva, size = self._where(op)
        options = dict(op["how"])
        key = options.pop("key")
        self.tables.map(
            gva,
            Gpa(op["physical"] * PAGE_SIZE),
            size,
            page_size=op["page_size"],
            private=op["private"],
            overwrite=op["overwrite"],
            protection_key=key,
            **options,
        )

    def _privacy(self, physical: int, asked: bool | None) -> bool | None:
        if not self.model.encrypted:
            return None
        return self.model.is_private(physical) if asked is None else asked

    def _do_map(self, op: dict[str, Any]) -> None:
        self._edit_map(op)
        first, _end = op["range"]
        for p in self._probes(op):
            physical = op["physical"] + p - first
            self.model.pages[p] = Page(physical, self._privacy(physical, op["private"]), **op["how"])
            self.model.limit[p] = op["page_size"] or SIZE_1G

    def _refuse_unmap(self, op: dict[str, Any]) -> type[Exception] | None:
        return NotMappedError if self._holes(op) and not op["missing_ok"] else None

    def _edit_unmap(self, op: dict[str, Any]) -> None:
        self.tables.unmap(*self._where(op), missing_ok=op["missing_ok"])

    def _do_unmap(self, op: dict[str, Any]) -> None:
        self._edit_unmap(op)
        for p in self._probes(op):
            self.model.pages.pop(p, None)

    def _how_protect(self, op: dict[str, Any]) -> dict[str, bool | None]:
        keywords = dict(op["how"])
        if not self.model.encrypted:
            keywords["private"] = None
        return keywords

    def _refuse_protect(self, op: dict[str, Any]) -> type[Exception] | None:
        return NotMappedError if self._holes(op) else None

    def _edit_protect(self, op: dict[str, Any]) -> None:
        gva, size = self._where(op)
        self.tables.protect(gva, size, **self._how_protect(op))

    def _do_protect(self, op: dict[str, Any]) -> None:
        self._edit_protect(op)
        changes: dict[str, Any] = {
            n: value for n, value in self._how_protect(op).items() if value is not None
        }
        for p in self._probes(op):
            self.model.pages[p] = replace(self.model.pages[p], **changes)

    def _refuse_remap(self, op: dict[str, Any]) -> type[Exception] | None:
        return NotMappedError if self._holes(op) else None

    def _edit_remap(self, op: dict[str, Any]) -> None:
        gva, size = self._where(op)
        self.tables.remap(gva, Gpa(op["physical"] * PAGE_SIZE), size, private=op["private"])

    def _do_remap(self, op: dict[str, Any]) -> None:
        self._edit_remap(op)
        first, _end = op["range"]
        for p in self._probes(op):
            physical = op["physical"] + p - first
            self.model.pages[p] = replace(
                self.model.pages[p], physical=physical, private=self._privacy(physical, op["private"])
            )

    def _refuse_split(self, op: dict[str, Any]) -> type[Exception] | None:
        return NotMappedError if self._holes(op) else None

    def _edit_split(self, op: dict[str, Any]) -> None:
        gva, size = self._where(op)
        self.tables.split(gva, size, page_size=op["page_size"])

    def _do_split(self, op: dict[str, Any]) -> None:
        self._edit_split(op)
        for p in self._probes(op):
            self.model.limit[p] = min(self.model.limit[p], op["page_size"])

    def _do_convert(self, op: dict[str, Any]) -> None:
        first, end = op["range"]
        self.model.conversions.append((first, end, op["private"]))
        bitmap = self.space.memory.private
        (bitmap.add_range if op["private"] else bitmap.remove_range)(first, end)

    def _do_refresh(self, op: dict[str, Any]) -> None:
        self.tables.refresh_private(*self._where(op))
        for p in self._probes(op):
            if p in self.model.pages:
                page = self.model.pages[p]
                self.model.pages[p] = replace(page, private=self.model.is_private(page.physical))

    def check(self) -> None:
        """Compare every probe, through the independent walker and through the tables' own walk."""
        walker = self.space.walker()
        for p in PROBES:
            gva = self.base + p * PAGE_SIZE
            seen = walker.walk(gva)
            own = self.tables.walk(Gva(gva))
            page = self.model.pages.get(p)
            if page is None:
                assert seen.fault == "not-present"
                assert not own.present
                continue
            assert seen.fault is None
            assert page == Page(
                seen.physical // PAGE_SIZE,
                seen.private,
                seen.writable,
                seen.user,
                not seen.executable,
                seen.global_,
                seen.pat,
                seen.key,
            )
            assert seen.page_size <= self.model.limit[p]
            assert all(seen.table_privacy)
            assert own.gpa == Gpa(page.physical * PAGE_SIZE)
            assert (own.private, own.page_size, own.pat) == (seen.private, seen.page_size, seen.pat)

    def clean_up(self) -> None:
        """Unmap everything: all tables but the root must be spare again, and zero."""
        self.tables.unmap(Gva(self.base), CUTS[-1] * PAGE_SIZE, missing_ok=True)
        assert self.tables.mappings() == []
        assert self.tables.spare_pages == self.tables.table_pages - 1
        mapping = self.space.mappings[1]
        for page in self.space.allocator.used:
            if page * PAGE_SIZE >= int(self.space.memory.segments()[0].gpa):
                offset = page * PAGE_SIZE - int(self.space.memory.segments()[0].gpa)
                assert not any(mapping.view(offset, PAGE_SIZE))


@pytest.mark.parametrize("encryption", [None, EncryptionBit(47), EncryptionBit(51, set_means_private=False)])
@pytest.mark.parametrize("levels", [4, 5])
@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(edits=st.lists(ops, max_size=14), high=st.booleans())
def test_edits_match_the_model(
    make_space: SpaceMaker,
    encryption: EncryptionBit | None,
    levels: int,
    edits: list[dict[str, Any]],
    high: bool,
) -> None:
    space = make_space(encryption=encryption, levels=levels, max_page_size=SIZE_1G)
    half = 1 << (11 + 9 * levels)
    # The last window ends with the lower half, the first one starts with the upper half of the address space.
    run = Run(space, (1 << 64) - half if high else half - CUTS[-1] * PAGE_SIZE)
    for op in edits:
        run.apply(op)
    run.check()
    run.clean_up()
    make_space.close()
