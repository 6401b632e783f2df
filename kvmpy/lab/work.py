# SPDX-License-Identifier: Apache-2.0
"""How tests are dealt out to the machines: file by file, in smaller shares towards the end. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_SHARE = 80
MIN_SHARE = 8


@dataclass(frozen=True)
class Share:
    """Tests of one file that a machine runs in one go.

    *args* are pytest's arguments for the file. The first share of a file has the tests that only the machine
    finds, too: *others* are the file's tests in other shares.
    """

    args: tuple[str, ...]
    ids: tuple[str, ...]
    first: bool = True
    others: frozenset[str] = frozenset()

    def message(self, done: Iterable[str]) -> dict[str, Any]:
        """Return what the session inside has to know, when the tests *done* are not to run again."""
        over = set(done)
        if self.first:
            return {"args": self.args, "skip": sorted(self.others | (over & set(self.ids)))}
        return {"args": self.args, "only": [nodeid for nodeid in self.ids if nodeid not in over]}


@dataclass
class _File:
    args: tuple[str, ...]
    ids: tuple[str, ...]
    waiting: deque[str] = field(init=False)
    begun: bool = False

    def __post_init__(self) -> None:
        self.waiting = deque(self.ids)


class Queue:
    """The shares that no machine has yet."""

    def __init__(self, files: Sequence[tuple[Sequence[str], Sequence[str]]]) -> None:
        self._files = deque(_File(tuple(args), tuple(ids)) for args, ids in files)
        self._returned: deque[Share] = deque()

    def __bool__(self) -> bool:
        return bool(self._returned or self._files)

    def waiting(self) -> int:
        """Return the number of tests that no machine has."""
        fresh = sum(len(file.waiting) for file in self._files)
        return fresh + sum(len(share.ids) for share in self._returned)

    def take(self, machines: int) -> Share | None:
        """Return the next share for one of *machines*, None when there is no more."""
        if self._returned:
            return self._returned.popleft()
        if not self._files:
            return None
        file = self._files[0]
        size = len(file.ids)
        if machines > 1:
            size = min(MAX_SHARE, max(MIN_SHARE, self.waiting() // (2 * machines)))
        if len(file.waiting) < size + MIN_SHARE:
            size = len(file.waiting)
        ids = tuple(file.waiting.popleft() for _ in range(size))
        first, file.begun = not file.begun, True
        if not file.waiting:
            self._files.popleft()
        return Share(file.args, ids, first, frozenset(file.ids) - frozenset(ids))

    def give_back(self, share: Share) -> None:
        """Put *share* first in the queue: its machine is gone."""
        self._returned.appendleft(share)


def by_file(args: Sequence[str], tests: Mapping[str, Sequence[str]]) -> list[tuple[list[str], list[str]]]:
    """Return pytest's arguments and the tests for each file.

    *args* are the session's arguments, *tests* the selected tests of each file by its absolute path. A file
    is asked for as a whole unless the arguments only name tests in it.
    """
    results = []
    for file, ids in tests.items():
        own = [arg for arg in args if "::" in arg and Path(arg.partition("::")[0]).absolute() == Path(file)]
        whole = any("::" not in arg and Path(file).is_relative_to(Path(arg).absolute()) for arg in args)
        results.append(([file] if whole or not own else own, list(ids)))
    return results
