# SPDX-License-Identifier: Apache-2.0
"""How tests are dealt out: every test once, whatever machines come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.lab.listing import by_file
from kvmpy.testing.dealer import MIN_SHARE, Begun, Dealer, DealError, File, Hand, Queue, Share


def _files(sizes: list[int]) -> list[File]:
    return [
        File([f"/f{file}.py"], [f"f{file}.py::t{n}" for n in range(size)]) for file, size in enumerate(sizes)
    ]


@given(
    st.lists(st.integers(min_value=0, max_value=300), max_size=12),
    st.integers(min_value=1, max_value=9),
    st.randoms(use_true_random=False),
)
def test_every_test_is_handed_out_once_although_machines_die(
    sizes: list[int], machines: int, rng: object
) -> None:
    files = _files(sizes)
    queue = Queue(files)
    done: list[str] = []
    lost_machines = 5
    while (share := queue.take(machines)) is not None:
        if lost_machines and rng.random() < 0.2:  # type: ignore[attr-defined]
            lost_machines -= 1
            queue.give_back(share)
            continue
        done += share.ids
    assert sorted(done) == sorted(nodeid for file in files for nodeid in file.ids)
    assert not queue
    assert queue.waiting() == 0


def test_one_machine_takes_files_as_a_whole() -> None:
    queue = Queue(_files([300, 2]))
    shares = [queue.take(1), queue.take(1)]
    assert [len(share.ids) for share in shares if share] == [300, 2]


def test_shares_get_smaller_towards_the_end() -> None:
    queue = Queue(_files([300]))
    sizes = []
    while share := queue.take(2):
        sizes.append(len(share.ids))
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sizes[0] > 2 * sizes[-1]
    assert min(sizes) >= MIN_SHARE


def test_only_the_first_share_of_a_file_has_what_nobody_knew() -> None:
    queue = Queue(_files([100]))
    first, second = queue.take(4), queue.take(4)
    assert first is not None
    assert second is not None
    message = first.message(done=[first.ids[0], "elsewhere"])
    assert set(message["skip"]) == {
        first.ids[0],
        *(nodeid for nodeid in queue_ids(100) if nodeid not in first.ids),
    }
    assert second.message(done=[second.ids[0]]) == {"args": ("/f0.py",), "only": list(second.ids[1:])}


def queue_ids(size: int) -> list[str]:
    return list(_files([size])[0].ids)


def test_a_file_that_cannot_be_collected_here_is_tried_inside() -> None:
    queue = Queue([File(["/broken.py"], [])])
    assert queue.take(2) == Share(("/broken.py",), ())
    assert queue.take(2) is None


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["/s"], ["/s/a.py"]),
        (["/s/a.py"], ["/s/a.py"]),
        (["/s/a.py::x", "/s/a.py::y", "/s/b.py::x"], ["/s/a.py::x", "/s/a.py::y"]),
        (["/s/a.py::x", "/s"], ["/s/a.py"]),
        (["/s/b.py::x"], ["/s/a.py"]),
    ],
)
def test_a_file_is_asked_for_as_on_the_command_line(args: list[str], wanted: list[str]) -> None:
    assert by_file(args, {"/s/a.py": ["a.py::x"]}) == [File(wanted, ["a.py::x"])]


def test_relative_arguments_count_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path / "s" / "a.py")
    assert by_file(["s/a.py::x"], {file: ["s/a.py::x"]}) == [File(["s/a.py::x"], ["s/a.py::x"])]


def _begun(nodeid: str) -> Begun:
    return Begun(nodeid, ("f.py", None, nodeid), 1.0)


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def dealer(hand: Hand) -> Dealer:
    """A dealer that has given its only share to the hand."""
    dealer = Dealer(Queue(_files([2])))
    hand.ask(1)
    assert dealer.deal(hand, 1) is not None
    return dealer


def test_what_a_lane_says_has_to_fit(dealer: Dealer, hand: Hand) -> None:
    first, second = hand.shares[1].ids
    with pytest.raises(DealError, match="share 3 after 1"):
        hand.ask(3)
    with pytest.raises(DealError, match="not given a share 2"):
        dealer.over(hand, 2)
    with pytest.raises(DealError, match="elsewhere is not to start"):
        dealer.begins(hand, _begun("elsewhere"))
    dealer.begins(hand, _begun(first))
    with pytest.raises(DealError, match="is not to start"):
        dealer.begins(hand, _begun(second))
    with pytest.raises(DealError, match="does not run"):
        dealer.ends(hand, second)
    dealer.ends(hand, first)
    with pytest.raises(DealError, match="is not to start"):
        dealer.begins(hand, _begun(first))
    with pytest.raises(DealError, match=rf"without {second}"):
        dealer.over(hand, 1)


def test_a_lost_lane_costs_the_test_that_had_begun_alone(dealer: Dealer, hand: Hand) -> None:
    first, second = hand.shares[1].ids
    dealer.begins(hand, _begun(first))
    victim = dealer.lose(hand)
    assert victim is not None
    assert (victim.test.nodeid, victim.blame("why")) == (first, "why")
    assert dealer.take_back(hand)
    other = Hand()
    other.ask(1)
    share = dealer.deal(other, 1)
    assert share is not None
    assert share.message(dealer.done)["skip"] == [first]
    assert dealer.collected(other, 1, [second]) == []
    dealer.begins(other, _begun(second))
    dealer.ends(other, second)
    dealer.over(other, 1)
    assert dealer.done == {first, second}
    assert not dealer.queue


def test_a_lane_that_is_lost_in_vain_twice_is_not_worth_another_try(dealer: Dealer, hand: Hand) -> None:
    tries = []
    for _ in range(3):
        assert dealer.lose(hand) is None
        tries.append(dealer.take_back(hand))
        hand.anew()
    assert tries == [True, False, False]


def test_a_test_that_a_lane_does_not_find_is_told(dealer: Dealer, hand: Hand) -> None:
    first, second = hand.shares[1].ids
    assert dealer.collected(hand, 1, [second, "new"]) == [first]
    assert hand.owns("new")


def test_only_a_lane_that_offers_what_they_need_gets_tests() -> None:
    """What needs most goes first; what no lane can run any more is withdrawn by name."""
    files = [
        File(["/any.py"], ["any"], grows=False),
        File(["/a.py"], ["a"], frozenset("A"), grows=False),
        File(["/ab.py"], ["ab"], frozenset("AB"), grows=False),
    ]
    queue = Queue(files, least=1)
    both, one, none = frozenset("ABX"), frozenset("AX"), frozenset("B")
    taken = [queue.take(3, none), queue.take(3, none), queue.take(3, both), queue.take(3, one)]
    assert [share and share.ids for share in taken] == [("any",), None, ("ab",), ("a",)]
    assert not queue
    for share in taken:
        if share is not None:
            queue.give_back(share)
    assert queue.waiting() == 3
    assert queue.withdraw([one, none]) == [(frozenset("AB"), ["ab"])]
    assert queue.withdraw([none]) == [(frozenset("A"), ["a"])]
    assert queue.withdraw([]) == [(frozenset(), ["any"])]
    assert not queue
