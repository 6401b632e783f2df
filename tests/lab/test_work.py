# SPDX-License-Identifier: Apache-2.0
"""How tests are dealt out: every test once, whatever machines come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.lab.work import MIN_SHARE, Queue, Share, by_file


def _files(sizes: list[int]) -> list[tuple[list[str], list[str]]]:
    return [([f"/f{file}.py"], [f"f{file}.py::t{n}" for n in range(size)]) for file, size in enumerate(sizes)]


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
    assert sorted(done) == sorted(nodeid for _, ids in files for nodeid in ids)
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
    return _files([size])[0][1]


def test_a_file_that_cannot_be_collected_here_is_tried_inside() -> None:
    queue = Queue([(["/broken.py"], [])])
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
    assert by_file(args, {"/s/a.py": ["a.py::x"]}) == [(wanted, ["a.py::x"])]


def test_relative_arguments_count_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path / "s" / "a.py")
    assert by_file(["s/a.py::x"], {file: ["s/a.py::x"]}) == [(["s/a.py::x"], ["s/a.py::x"])]
