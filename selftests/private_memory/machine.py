# SPDX-License-Identifier: Apache-2.0
"""Any sequence of conversions, accesses and holes against a model of two words for each page.

A sequence that fails is shrunk by hypothesis and told as a test that can be pasted into a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from selftests import sequences

SLOTS = (7, 5)
PAGES = sum(SLOTS)

_RANGES = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
    lambda pair: (pair[0], min(pair[1], PAGES - pair[0]))
)
_PAGE = st.integers(0, PAGES - 1)
_VALUE = st.integers(1, 0xFFFF)
_CPU = st.integers(0, 1)


class Machine(Protocol):
    """What the sequences act on: :class:`~selftests.private_memory.conftest.Region` is one."""

    def convert(self, first: int, pages: int, *, private: bool) -> None: ...
    def write(self, page: int, value: int, offset: int = 0, *, cpu: int = 0) -> None: ...
    def fill(self, first: int, pages: int, value: int) -> None: ...
    def read(self, page: int, offset: int = 0, *, cpu: int = 0) -> int: ...
    def host_write(self, page: int, value: int) -> None: ...
    def host_read(self, page: int) -> int: ...
    def punch(self, first: int, pages: int) -> None: ...
    def allocate(self, first: int, pages: int) -> None: ...
    def pre_fault(self, first: int, pages: int) -> None: ...
    def renew(self, slot: int) -> None: ...


MADE = f"make_region({PAGES}, slots={SLOTS}, vcpus=2)"


def as_test(steps: list[str], made: str = MADE) -> str:
    """Return the steps as the source of a test; *made* is what they act on."""
    head = f"def test_found(make_region: MakeRegion) -> None:\n    region = {made}\n"
    return head + "".join(f"    {step}\n" for step in steps)


class Sequences(RuleBasedStateMachine):
    """Steps on :attr:`machine`, each noted in :attr:`steps`."""

    machine: Machine
    steps: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.words = {True: [0] * PAGES, False: [0] * PAGES}
        self.private = [False] * PAGES
        # Everything as in a new VM, without making one.
        self.machine.convert(0, PAGES, private=False)
        self.machine.punch(0, PAGES)
        for page in range(PAGES):
            self.machine.host_write(page, 0)
        self.steps.clear()

    def step(self, name: str, *words: Any, **options: Any) -> Any:
        """Do one thing and note it."""
        arguments = [repr(word) for word in words] + [f"{key}={value!r}" for key, value in options.items()]
        self.steps.append(f"region.{name}({', '.join(arguments)})")
        return getattr(self.machine, name)(*words, **options)

    def expect(self, expected: int, name: str, *words: Any, **options: Any) -> None:
        """Read something and note what it must be."""
        got = self.step(name, *words, **options)
        self.steps[-1] = f"assert {self.steps[-1]} == {expected:#x}"
        assert got == expected, f"{self.steps[-1]}: it is {got:#x}"

    @rule(where=_RANGES, private=st.booleans())
    def convert(self, where: tuple[int, int], private: bool) -> None:
        """Convert a range."""
        self.step("convert", *where, private=private)
        self.private[where[0] : sum(where)] = [private] * where[1]

    @rule(page=_PAGE, value=_VALUE, cpu=_CPU)
    def write(self, page: int, value: int, cpu: int) -> None:
        """Let a vCPU write."""
        self.step("write", page, value, cpu=cpu)
        self.words[self.private[page]][page] = value

    @rule(page=_PAGE, cpu=_CPU)
    def read(self, page: int, cpu: int) -> None:
        """Let a vCPU read."""
        self.expect(self.words[self.private[page]][page], "read", page, cpu=cpu)

    @rule(where=_RANGES, value=_VALUE)
    def fill(self, where: tuple[int, int], value: int) -> None:
        """Let a vCPU write into each page of a range, counting up."""
        self.step("fill", *where, value)
        for number in range(where[1]):
            page = where[0] + number
            self.words[self.private[page]][page] = value + number

    @rule(where=_RANGES, private=st.booleans(), value=_VALUE)
    def convert_and_fill(self, where: tuple[int, int], private: bool, value: int) -> None:
        """Convert a range and write into it: what most of the wrong memories need first."""
        self.convert(where, private)
        self.fill(where, value)

    @rule(page=_PAGE, value=_VALUE)
    def host_write(self, page: int, value: int) -> None:
        """Write shared memory."""
        self.step("host_write", page, value)
        self.words[False][page] = value

    @rule(where=_RANGES)
    def punch(self, where: tuple[int, int]) -> None:
        """Punch a hole."""
        self.step("punch", *where)
        self.words[True][where[0] : sum(where)] = [0] * where[1]

    @rule(where=_RANGES, mode=st.sampled_from(["allocate", "pre_fault"]))
    def in_advance(self, where: tuple[int, int], mode: str) -> None:
        """Allocate private memory, or map a range, before anybody needs it."""
        self.step(mode, *where)

    @rule(slot=st.integers(0, len(SLOTS) - 1))
    def renew(self, slot: int) -> None:
        """Delete a slot and make it again."""
        self.step("renew", slot)

    def teardown(self) -> None:
        """Read everything, and the other side of everything."""
        if self.steps:
            for page in range(PAGES):
                self.read(page, page % 2)
                self.expect(self.words[False][page], "host_read", page)
            for page in range(PAGES):
                self.convert((page, 1), not self.private[page])
                self.read(page, page % 2)


def run(
    machine: Machine,
    seed: int,
    *,
    examples: int,
    steps: int,
    tell: Callable[[str], None] = print,
    made: str = MADE,
) -> None:
    """Run sequences on *machine*, which is *made* in a test; a failure is told as a test, and raised."""
    noted: list[str] = []
    bound = type("Sequences", (Sequences,), {"machine": machine, "steps": noted})
    try:
        sequences.run(bound, seed, examples=examples, steps=steps)
    except BaseException:
        # hypothesis has just run the shortest sequence once more.
        tell(f"seed {seed}; the shortest sequence that fails:\n\n{as_test(noted, made)}")
        raise
