# SPDX-License-Identifier: Apache-2.0
"""Sets of frames that ranges change, beside plain sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.frames import GFN_LIMIT, mark

FRAMES = 64

changes = st.tuples(st.integers(0, FRAMES), st.integers(0, FRAMES), st.booleans())


@given(st.lists(changes, max_size=40))
def test_it_is_the_set(taken: list[tuple[int, int, bool]]) -> None:
    frames, model = BitMap(), set[int]()
    for first, count, there in taken:
        mark(frames, Gpa(first * PAGE_SIZE), count * PAGE_SIZE, there)
        part = set(range(first, first + count))
        model = model | part if there else model - part
        assert set(frames) == model


def test_parts_of_pages_do_not_count() -> None:
    frames = BitMap()
    mark(frames, PAGE_SIZE, 2 * PAGE_SIZE - 1, True)
    assert list(frames) == [1]


def test_frames_that_no_bitmap_holds_are_left_out() -> None:
    frames = BitMap()
    mark(frames, (GFN_LIMIT - 2) * PAGE_SIZE, 4 * PAGE_SIZE, True)
    mark(frames, GFN_LIMIT * PAGE_SIZE, PAGE_SIZE, True)
    mark(frames, (1 << 64) - PAGE_SIZE, PAGE_SIZE, True)
    assert list(frames) == [GFN_LIMIT - 2, GFN_LIMIT - 1]
    mark(frames, (GFN_LIMIT - 1) * PAGE_SIZE, 9 * PAGE_SIZE, False)
    assert list(frames) == [GFN_LIMIT - 2]
