# SPDX-License-Identifier: Apache-2.0
"""Sets of frames whose changes are noted, beside plain sets."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.frames import GFN_LIMIT, NotedFrames
from kvmpy.uapi import lib

FRAMES = 64

changes = st.tuples(st.integers(0, FRAMES), st.integers(0, FRAMES), st.booleans())


@given(st.lists(st.lists(changes, max_size=5), max_size=8))
def test_whenever_it_is_asked_it_is_the_set(batches: list[list[tuple[int, int, bool]]]) -> None:
    frames, model = NotedFrames(), set[int]()
    for batch in batches:
        for first, count, there in batch:
            frames.note(Gpa(first * PAGE_SIZE), count * PAGE_SIZE, there)
            part = set(range(first, first + count))
            model = model | part if there else model - part
        assert set(frames.bitmap) == model
    assert set(frames.bitmap) == model


def test_a_change_by_hand_comes_between_notes() -> None:
    frames = NotedFrames()
    frames.note(0, 4 * PAGE_SIZE, True)
    frames.bitmap.remove(1)
    frames.note(2 * PAGE_SIZE, PAGE_SIZE, False)
    assert list(frames.bitmap) == [0, 3]


def test_parts_of_pages_do_not_count() -> None:
    frames = NotedFrames()
    frames.note(PAGE_SIZE, 2 * PAGE_SIZE - 1, True)
    assert list(frames.bitmap) == [1]


def test_frames_that_no_bitmap_holds_are_left_out() -> None:
    frames = NotedFrames()
    frames.note((GFN_LIMIT - 2) * PAGE_SIZE, 4 * PAGE_SIZE, True)
    frames.note(GFN_LIMIT * PAGE_SIZE, PAGE_SIZE, True)
    frames.note((1 << 64) - PAGE_SIZE, PAGE_SIZE, True)
    assert list(frames.bitmap) == [GFN_LIMIT - 2, GFN_LIMIT - 1]
    frames.note((GFN_LIMIT - 1) * PAGE_SIZE, 9 * PAGE_SIZE, False)
    assert list(frames.bitmap) == [GFN_LIMIT - 2]


def test_notes_do_not_pile_up() -> None:
    frames = NotedFrames()
    many = lib.KVMPY_NOTES_MANY
    for turn in range(3 * many + 1):
        frames.note(turn % 7 * PAGE_SIZE, PAGE_SIZE, turn % 2 == 0)
        assert frames.notes.count < many
    assert set(frames.bitmap) == {turn % 7 for turn in range(3 * many - 6, 3 * many + 1) if turn % 2 == 0}


def test_threads_find_what_was_noted_before_they_asked() -> None:
    """Each thread owns a stretch and must always see its own last note, whoever else is asking."""
    frames = NotedFrames()
    wrong: list[int] = []

    def work(own: int) -> None:
        for turn in range(2000):
            frames.note(own * 8 * PAGE_SIZE, 8 * PAGE_SIZE, turn % 2 == 0)
            if frames.bitmap.range_cardinality(own * 8, own * 8 + 8) != (8 if turn % 2 == 0 else 0):
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert not frames.bitmap
