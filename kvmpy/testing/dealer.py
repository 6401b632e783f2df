# SPDX-License-Identifier: Apache-2.0
"""Deals tests to lanes, and judges what a lost lane costs: the test that had begun, and no other.

What a lane is - a process, a virtual machine, a host - is for others to know. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MAX_SHARE = 80
MIN_SHARE = 8
# How often a lane may be lost in a row without a verdict.
_VAIN = 1

Needs = frozenset[str]
NOTHING: Needs = frozenset()
"""What tests need that every lane can run."""


class DealError(ValueError):
    """What a lane says does not fit what it was dealt."""


@dataclass(frozen=True)
class Share:
    """Tests of one file that a lane runs in one go.

    *args* are pytest's arguments for the file. The first share of a file has the tests that only the lane
    finds, too: *others* are the file's tests in other shares. *needs* is what a lane must offer.
    """

    args: tuple[str, ...]
    ids: tuple[str, ...]
    first: bool = True
    others: frozenset[str] = frozenset()
    needs: Needs = NOTHING

    def message(self, done: Collection[str]) -> dict[str, Any]:
        """Return what the session of a lane has to know, when the tests *done* are not to run again."""
        over = {nodeid for nodeid in self.ids if nodeid in done}
        if self.first:
            return {"args": self.args, "skip": sorted(self.others | over)}
        return {"args": self.args, "only": [nodeid for nodeid in self.ids if nodeid not in over]}


@dataclass(frozen=True)
class File:
    """A file's tests, for lanes that offer what they need; with *grows* a lane may find more of them."""

    args: Sequence[str]
    ids: Sequence[str]
    needs: Needs = NOTHING
    grows: bool = True


@dataclass
class _Rest:
    file: File
    waiting: deque[str] = field(init=False)
    begun: bool = False

    def __post_init__(self) -> None:
        self.waiting = deque(self.file.ids)
        self.begun = not self.file.grows


@dataclass
class _Deck:
    """Tests that need the same, with their number."""

    rests: deque[_Rest] = field(default_factory=deque)
    returned: deque[Share] = field(default_factory=deque)
    waiting: int = 0

    def __bool__(self) -> bool:
        return bool(self.returned or self.rests)


class Queue:
    """The shares that no lane has yet; with several lanes each has from *least* to *most* tests."""

    def __init__(self, files: Iterable[File], *, most: int = MAX_SHARE, least: int = MIN_SHARE) -> None:
        self._most, self._least = most, least
        decks: dict[Needs, _Deck] = {}
        for file in files:
            deck = decks.setdefault(file.needs, _Deck())
            deck.rests.append(_Rest(file))
            deck.waiting += len(file.ids)
        # A lane first takes what needs most: fewest others can run it.
        self._decks = dict(sorted(decks.items(), key=lambda entry: -len(entry[0])))

    def __bool__(self) -> bool:
        return any(self._decks.values())

    def waiting(self) -> int:
        """Return the number of tests that no lane has."""
        return sum(deck.waiting for deck in self._decks.values())

    def take(self, lanes: int, offers: Needs = NOTHING) -> Share | None:
        """Return the next share for one of *lanes*, by what it offers; None when there is no more for it."""
        for needs, deck in self._decks.items():
            if deck and needs <= offers:
                return self._from(deck, lanes)
        return None

    def _from(self, deck: _Deck, lanes: int) -> Share:
        if deck.returned:
            share = deck.returned.popleft()
            deck.waiting -= len(share.ids)
            return share
        rest = deck.rests[0]
        file = rest.file
        size = len(file.ids)
        if lanes > 1:
            size = min(self._most, max(self._least, deck.waiting // (2 * lanes)))
        if len(rest.waiting) < size + self._least:
            size = len(rest.waiting)
        ids = tuple(rest.waiting.popleft() for _ in range(size))
        deck.waiting -= size
        first, rest.begun = not rest.begun, True
        if not rest.waiting:
            deck.rests.popleft()
        others = frozenset(file.ids) - frozenset(ids) if first else frozenset[str]()
        return Share(tuple(file.args), ids, first, others, file.needs)

    def give_back(self, share: Share) -> None:
        """Put *share* first in the queue: its lane is gone."""
        deck = self._decks.setdefault(share.needs, _Deck())
        deck.returned.appendleft(share)
        deck.waiting += len(share.ids)

    def withdraw(self, offers: Collection[Needs]) -> list[tuple[Needs, list[str]]]:
        """Take out and return the tests that no lane can run, by their needs; *offers* are the lanes'."""
        gone = []
        for needs, deck in self._decks.items():
            if deck and not any(needs <= offered for offered in offers):
                ids = [nodeid for share in deck.returned for nodeid in share.ids]
                gone.append((needs, ids + [nodeid for rest in deck.rests for nodeid in rest.waiting]))
                self._decks[needs] = _Deck()
        return gone


@dataclass(frozen=True)
class Begun:
    """A test that has begun; *limit* is its time-out in seconds, 0 without one."""

    nodeid: str
    location: tuple[str, int | None, str]
    limit: float


@dataclass
class Hand:
    """What one lane holds: its shares by their numbers, the test that runs, and the last one that ended.

    *wants* is the share that it waits for; *vain* counts how often it was lost in a row without a verdict.
    """

    offers: Needs = NOTHING
    shares: dict[int, Share] = field(default_factory=dict)
    asked: int = 0
    wants: int | None = None
    running: Begun | None = None
    last: Begun | None = None
    progress: int = 0
    vain: int = 0

    def owns(self, nodeid: str) -> bool:
        """Whether the test is in one of the shares."""
        return any(nodeid in share.ids for share in self.shares.values())

    def share(self, number: int) -> Share:
        """Return the share *number*; DealError where the lane has none."""
        if number not in self.shares:
            raise DealError(f"it was not given a share {number}")
        return self.shares[number]

    def ask(self, number: int) -> None:
        """The lane waits for the share *number*; DealError where another one was due."""
        if number != self.asked + 1:
            raise DealError(f"it wants share {number} after {self.asked}")
        self.wants = self.asked = number

    def anew(self) -> None:
        """The lane begins anew: nothing was dealt to it yet."""
        self.shares.clear()
        self.asked = self.progress = 0
        self.wants = self.running = self.last = None


@dataclass(frozen=True)
class Victim:
    """The test that a lost lane costs; *late* where it had ended, and the lane died right after it."""

    test: Begun
    late: bool

    def blame(self, reason: str) -> str:
        """Return the verdict's words."""
        return f"right after this test: {reason}" if self.late else reason


class Dealer:
    """Deals the tests of a queue, each once, and again only to whom a lost lane owed them.

    *done* are the tests with a verdict; those of an earlier run are given.
    """

    def __init__(self, queue: Queue, done: Iterable[str] = ()) -> None:
        self.queue = queue
        self.done = set(done)

    # ---- what a lane says: DealError where it cannot be

    def collected(self, hand: Hand, number: int, ids: Sequence[str]) -> list[str]:
        """The share *number* has the tests *ids*; return those that were expected, and are not there."""
        share = hand.share(number)
        found = set(ids)
        hand.shares[number] = replace(share, ids=tuple(ids), first=False)
        return [nodeid for nodeid in share.ids if nodeid not in found and nodeid not in self.done]

    def begins(self, hand: Hand, test: Begun) -> None:
        """A test begins."""
        if hand.running is not None or test.nodeid in self.done or not hand.owns(test.nodeid):
            raise DealError(f"{test.nodeid} is not to start")
        hand.running = test

    def ends(self, hand: Hand, nodeid: str) -> Begun:
        """A test has its verdict; return it."""
        test = hand.running
        if test is None or test.nodeid != nodeid:
            raise DealError(f"{nodeid} ends and does not run")
        hand.running, hand.last = None, test
        hand.progress += 1
        self.done.add(nodeid)
        return test

    def over(self, hand: Hand, number: int) -> None:
        """All tests of a share have run."""
        if left := set(hand.share(number).ids) - self.done:
            raise DealError(f"share {number} is over without {min(left)}")
        del hand.shares[number]
        hand.progress += 1

    # ---- what it gets

    def deal(self, hand: Hand, lanes: int) -> Share | None:
        """Return the next share for a lane that waits, one of *lanes*; None when there is none for it."""
        share = self.queue.take(lanes, hand.offers)
        if share is not None and hand.wants is not None:
            hand.shares[hand.wants], hand.wants = share, None
        return share

    # ---- its end

    def lose(self, hand: Hand) -> Victim | None:
        """The lane is lost: return the test that it costs, which is done now; None where none had begun."""
        test = hand.running or hand.last
        if test is None:
            return None
        late = hand.running is None
        hand.running = None
        hand.progress += 1
        self.done.add(test.nodeid)
        return Victim(test, late)

    def take_back(self, hand: Hand) -> bool:
        """Let others have what a lost lane had not begun; return whether it is worth another try."""
        for number in sorted(hand.shares, reverse=True):
            share = hand.shares.pop(number)
            # What a first share holds is known to a lane alone.
            ids = share.ids if share.first else tuple(entry for entry in share.ids if entry not in self.done)
            if ids or share.first:
                self.queue.give_back(replace(share, ids=ids))
        hand.vain = 0 if hand.progress else hand.vain + 1
        return hand.vain <= _VAIN
