# SPDX-License-Identifier: Apache-2.0
"""A thousand hosts in one process: what dealing a test costs, and that each has its verdict."""

from __future__ import annotations

import random
import resource
import time

from kvmpy.fleet.ledger import LEAST, MOST
from kvmpy.testing.dealer import Begun, Dealer, File, Hand, Needs, Queue

HOSTS, TESTS, DYING, FILES = 1000, 100_000, 50, 400
KINDS: tuple[Needs, ...] = (
    frozenset(),
    frozenset({"kvm"}),
    frozenset({"kvm", "protection:snp"}),
    frozenset({"kvm", "root", "cap"}),
)
OFFERS: tuple[Needs, ...] = (
    frozenset({"kvm", "protection:snp"}),
    frozenset({"kvm", "root", "cap"}),
    frozenset({"kvm", "root", "cap", "protection:snp"}),
)


class _Lane:
    """A host: has at most two shares, as the sessions have, and runs their tests in order."""

    def __init__(self, number: int) -> None:
        self.hand = Hand(OFFERS[number % len(OFFERS)])
        self.todo: list[tuple[int, list[str]]] = []
        self.dies_after = -1

    def turn(self, dealer: Dealer, begun: dict[str, int]) -> str:
        """Do what a host does next: ask, begin or end a test; return the test that it begins."""
        hand = self.hand
        if hand.running is not None:
            dealer.ends(hand, hand.running.nodeid)
            return ""
        while self.todo and not self.todo[0][1]:
            dealer.over(hand, self.todo.pop(0)[0])
        if len(self.todo) < 2:
            if hand.wants is None:
                hand.ask(hand.asked + 1)
            number = hand.asked
            share = dealer.deal(hand, HOSTS)
            if share is not None:
                assert share.needs <= hand.offers
                assert dealer.collected(hand, number, share.ids) == []
                self.todo.append((number, [entry for entry in share.ids if entry not in dealer.done]))
        if not self.todo or not self.todo[0][1]:
            return ""
        nodeid = self.todo[0][1].pop(0)
        dealer.begins(hand, Begun(nodeid, ("f.py", None, nodeid), 1.0))
        begun[nodeid] = begun.get(nodeid, 0) + 1
        return nodeid


def test_a_thousand_hosts_and_a_hundred_thousand_tests() -> None:
    """Five in a hundred hosts die in the middle of a test: each costs that test, and no other."""
    rng = random.Random(0)
    size = TESTS // FILES
    names = [[f"f{file}.py::t{number}" for number in range(size)] for file in range(FILES)]
    files = [
        File([f"f{number}.py"], ids, KINDS[number % len(KINDS)], grows=False)
        for number, ids in enumerate(names)
    ]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    dealer = Dealer(Queue(files, most=MOST, least=LEAST))
    lanes = [_Lane(number) for number in range(HOSTS)]
    for lane in rng.sample(lanes, DYING):
        lane.dies_after = rng.randrange(1, TESTS // HOSTS // 2)
    begun: dict[str, int] = {}
    lost: list[str] = []
    expected: list[str] = []
    alive = list(lanes)
    while len(dealer.done) < TESTS:
        dead = []
        for lane in alive:
            nodeid = lane.turn(dealer, begun)
            if nodeid and lane.dies_after >= 0:
                lane.dies_after -= 1
                if lane.dies_after < 0:
                    expected.append(nodeid)
                    victim = dealer.lose(lane.hand)
                    assert victim is not None
                    lost.append(victim.test.nodeid)
                    dealer.take_back(lane.hand)
                    dead.append(lane)
        if dead:
            alive = [lane for lane in alive if lane not in dead]
    seconds = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    print(f"{HOSTS} hosts, {TESTS} tests: {seconds / TESTS * 1e6:.1f} us a test, {memory >> 10} MiB more")
    assert dealer.done == {nodeid for ids in names for nodeid in ids}
    assert lost == expected
    assert len(lost) == DYING
    assert set(begun.values()) == {1}
    assert len(begun) == TESTS
    assert not dealer.queue
    assert seconds / TESTS < 1e-3
