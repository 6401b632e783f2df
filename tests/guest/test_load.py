# SPDX-License-Identifier: Apache-2.0
"""What the load expects in memory, against a simulation of its writers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.address import PAGE_SIZE
from kvmpy.guest.load import WORDS, Load, LoadError, Order, Wrong

PAGES = 13
COUNTS = st.tuples(st.integers(0, 40), st.integers(0, 40))


def load_of(loss: str = "none") -> Load:
    """A load of two writers, without a VM."""
    bare: Any = object.__new__(Load)
    bare.pages, bare._loss, bare.vm = PAGES, loss, SimpleNamespace(name="vm")
    bare.orders = [Order(0, 2, 7, 3), Order(1, 2, 6, 5)]
    load: Load = bare
    return load


def simulate(load: Load, memory: bytearray, since: tuple[int, ...], until: tuple[int, ...]) -> set[int]:
    """Let the writers go on from *since* to *until*; return the pages that they wrote."""
    words = memoryview(memory).cast("Q")
    seen = set()
    for order, start, end in zip(load.orders, since, until, strict=True):
        index = start * order.stride % order.count
        for visit in range(start, end):
            page = order.first + index * order.step
            for word in WORDS:
                words[page * 512 + word] = (visit // order.count + 1) << 32 | page << 9 | word
            index = (index + order.stride) % order.count
            seen.add(page)
    return seen


@given(start=COUNTS, more=COUNTS)
def test_memory_between_two_moments(start: tuple[int, int], more: tuple[int, int]) -> None:
    """Memory of any time between two moments is right; what was written in between is known."""
    load = load_of()
    memory = bytearray(PAGES * PAGE_SIZE)
    end = (start[0] + more[0], start[1] + more[1])
    simulate(load, memory, (0, 0), start)
    assert load.wrong(memory, start, start) == []
    wrote = simulate(load, memory, start, end)
    assert load.wrong(memory, start, end) == []
    assert load.wrong(memory, end, end) == []
    assert set(load.written(start, end)) <= wrote <= set(load.touched(start, end))
    # A visit that is under way wrote a part of its words.
    at = load.orders[0].page(end[0])
    words = memoryview(memory).cast("Q")
    words[at * 512] = (end[0] // 7 + 1) << 32 | at << 9
    assert load.wrong(memory, end, end) == []
    assert at in load.touched(end, end)


@given(start=COUNTS, page=st.integers(0, PAGES - 1), word=st.sampled_from(WORDS))
def test_one_word_of_another_time(start: tuple[int, int], page: int, word: int) -> None:
    """An older word, a newer one, one of another page and a zero are found, each where it is."""
    load = load_of()
    memory = bytearray(PAGES * PAGE_SIZE)
    # Every page was written once, and none is under way twice.
    since = (start[0] + 14, start[1] + 12)
    simulate(load, memory, (0, 0), since)
    words = memoryview(memory).cast("Q")
    place = page * 512 + word
    right = words[place]
    for value in (right - (1 << 32), right + (2 << 32), right ^ 1, right ^ 1 << 9, 0, 1, 1 << 63):
        words[place] = value
        assert [(wrong.page, wrong.word, wrong.found) for wrong in load.wrong(memory, since, since)] == [
            (page, word, value)
        ]
    words[place] = 0
    assert load_of("zero").wrong(memory, since, since) == []
    words[place] = right - (1 << 32)
    assert load_of("zero").wrong(memory, since, since) != []
    assert load_of("older").wrong(memory, since, since) == []
    words[place] = right + (2 << 32)
    assert load_of("older").wrong(memory, since, since) != []


def test_what_an_error_says() -> None:
    """A check names the words that are wrong, the first ones in full."""
    load = load_of()
    memory = bytearray(PAGES * PAGE_SIZE)
    simulate(load, memory, (0, 0), (14, 12))
    memory[: 4 * PAGE_SIZE] = bytes(4 * PAGE_SIZE)
    with pytest.raises(LoadError) as caught:
        load.check(memory, (14, 12), (14, 12), "the copy has")
    assert caught.value.wrong[0] == Wrong("the copy has", 0, 0, 2, 3, 0)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the copy has page 0, word 0: expected generation 2 to 3, found 0"
    assert lines[2] == "the copy has page 2, word 0: expected generation 2, found 0"
    assert lines[-1] == "and 4 more"


def test_memory_of_another_size() -> None:
    """A view of something else is refused."""
    with pytest.raises(ValueError, match="are not the 13 pages of the load"):
        load_of().check(bytearray(PAGE_SIZE), (0, 0), (0, 0))
