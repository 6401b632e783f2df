# SPDX-License-Identifier: Apache-2.0
"""The state machine of conversions, on memory that is a model itself: right, and wrong in known ways."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from selftests.private_memory import machine


class Memory:
    """Pages with two words each."""

    def __init__(self) -> None:
        self.words = {True: [0] * machine.PAGES, False: [0] * machine.PAGES}
        self.private = [False] * machine.PAGES

    def convert(self, first: int, pages: int, *, private: bool) -> None:
        self.private[first : first + pages] = [private] * pages

    def write(self, page: int, value: int, offset: int = 0, *, cpu: int = 0) -> None:  # noqa: ARG002
        self.words[self.private[page]][page] = value

    def read(self, page: int, offset: int = 0, *, cpu: int = 0) -> int:  # noqa: ARG002
        return self.words[self.private[page]][page]

    def fill(self, first: int, pages: int, value: int) -> None:
        for number in range(pages):
            self.write(first + number, value + number)

    def host_write(self, page: int, value: int) -> None:
        self.words[False][page] = value

    def host_read(self, page: int) -> int:
        return self.words[False][page]

    def punch(self, first: int, pages: int) -> None:
        self.words[True][first : first + pages] = [0] * pages

    def allocate(self, first: int, pages: int) -> None:
        pass

    def pre_fault(self, first: int, pages: int) -> None:
        pass

    def renew(self, slot: int) -> None:
        pass


class ForgetsTheLastPage(Memory):
    """Converts all pages of a range but the last, where there are more than two."""

    def convert(self, first: int, pages: int, *, private: bool) -> None:
        super().convert(first, pages - (3 <= pages < machine.PAGES), private=private)


class ClearsOnTheWay(Memory):
    """Loses private content when a page becomes shared."""

    def convert(self, first: int, pages: int, *, private: bool) -> None:
        super().convert(first, pages, private=private)
        if not private:
            self.punch(first, pages)


class PunchesShared(Memory):
    """A hole takes shared content, too."""

    def punch(self, first: int, pages: int) -> None:
        super().punch(first, pages)
        self.words[False][first : first + pages] = [0] * pages


class RenewsPrivate(Memory):
    """A renewed slot has lost its private content."""

    def renew(self, slot: int) -> None:
        self.punch(*((0, machine.SLOTS[0]), (machine.SLOTS[0], machine.SLOTS[1]))[slot])


def found(memory: Memory, seed: int = 1) -> tuple[list[str], str]:
    told: list[str] = []
    with pytest.raises(AssertionError):
        machine.run(memory, seed, examples=100, steps=20, tell=told.append)
    (text,) = told
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return lines[1:], text


def test_right_memory_passes() -> None:
    """Memory that does what is promised passes, and nothing is told."""
    told: list[str] = []
    machine.run(Memory(), 1, examples=30, steps=20, tell=told.append)
    assert told == []


@pytest.mark.parametrize(
    ("memory", "longest", "word"),
    [
        (ForgetsTheLastPage, 10, "convert"),
        (ClearsOnTheWay, 10, "convert"),
        (PunchesShared, 10, "punch"),
        (RenewsPrivate, 16, "renew"),
    ],
)
def test_wrong_memory_is_found(memory: type[Memory], longest: int, word: str) -> None:
    """A broken promise is found and told as a short test that ends in the assertion that fails."""
    steps, text = found(memory())
    relevant = [step for step in steps if not step.startswith("assert")]
    assert len(relevant) <= longest, text
    assert any(step.startswith(f"region.{word}(") for step in relevant)
    assert steps[-1].startswith("assert region.")
    compile(text[text.index("def ") :], "found", "exec")


def test_the_seed_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed finds the same and tells it, also when another module was loaded in between."""
    before = found(ClearsOnTheWay(), 3)
    # In no folder called tests, whose constants hypothesis leaves alone.
    module = ModuleType("some_numbers")
    module.__file__ = str(tmp_path / "some_numbers.py")
    Path(module.__file__).write_text(f"NUMBERS = {list(range(1, 0x1000, 7))}\n")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert found(ClearsOnTheWay(), 3) == before
    assert before[1].startswith("seed 3;")
