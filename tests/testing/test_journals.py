# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, and what their journals are good for: to go on, and to make the reports."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpy.testing import journal, journals, machine
from kvmpy.testing.supervisor import supervise
from tests.testing.support import NO_KVM, SUITE_INI

# The third test waits to be killed, the first time.
TESTS = """
import pathlib, pytest, signal

@pytest.mark.parametrize("number", range(6))
def test_number(number):
    with open({log!r}, "a") as log:
        log.write(f"{{number}}\\n")
    if number == 2 and not pathlib.Path({log!r} + ".again").exists():
        with open({log!r} + ".there", "w") as pipe:
            pipe.write("here")
        signal.pause()
    assert number != 4
"""
NAMES = [f"test_own.py::test_number[{number}]" for number in range(6)]


class Here:
    """A folder with tests, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.log = folder / "log"
        waits = Path(f"{self.log}.there")
        os.mkfifo(waits)
        self._waits = os.open(waits, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        (folder / "test_own.py").write_text(TESTS.format(log=str(self.log)))

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"XDG_CACHE_HOME": str(self.cache), "KVMPY_DEV_KVM": NO_KVM, "KVMPY_LAB": "never"}

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kvmpy", *words]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def kvmpy(self, *words: str) -> tuple[int, str]:
        with self.start(*words) as process:
            output, _ = process.communicate(timeout=110)
        return process.returncode, output.decode()

    def killed(self, *words: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Start a run, and end it in the third test."""
        with self.start("run", "test_own.py", *words) as process:
            self.until_it_waits()
            process.send_signal(number)
            process.communicate(timeout=100)
        # From now on it does not wait.
        Path(f"{self.log}.again").touch()

    def until_it_waits(self) -> None:
        """Wait for the third test."""
        assert select.select([self._waits], [], [], 100)[0]

    def close(self) -> None:
        os.close(self._waits)

    def ran(self) -> list[int]:
        return sorted(int(line) for line in self.log.read_text().split())

    def journals(self) -> list[Path]:
        return sorted((self.cache / "kvmpy" / "journals").glob("*"))

    def verdicts(self, name: str) -> dict[str, str]:
        report: dict[str, Any] = json.loads((self.folder / name).read_text())
        return {test["id"]: test["verdict"] for test in report["tests"]}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    here = Here(tmp_path)
    yield here
    here.close()


def expected(**others: str) -> dict[str, str]:
    verdicts = dict.fromkeys(NAMES, "pass") | {NAMES[2]: "lost", NAMES[4]: "fail"}
    return verdicts | {NAMES[int(number[1:])]: verdict for number, verdict in others.items()}


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "two workers"])
def test_a_killed_run_goes_on_behind_its_last_verdict(here: Here, workers: tuple[str, ...]) -> None:
    """The test in which it was killed is lost; no other runs twice, and none is left out."""
    here.killed(*workers)
    status, text = here.kvmpy("run", "--resume", "--json", "r.json")
    assert "going on from" in text
    verdicts = here.verdicts("r.json")
    assert verdicts[NAMES[2]] == "lost"
    assert status == 1
    if workers:
        # The other worker may have been in a test, too.
        assert {verdict for name, verdict in verdicts.items() if name != NAMES[4]} == {"pass", "lost"}
        assert list(verdicts.values()).count("lost") <= 2
    else:
        assert verdicts == expected()
    # A worker's verdict that had not reached the journal is found once more; and one that was killed between
    # a test's start in the journal and the test itself has lost it all the same.
    lost = {number for number, name in enumerate(NAMES) if verdicts[name] == "lost"}
    assert set(here.ran()) | lost == set(range(6))
    assert workers or here.ran() == list(range(6))
    (path,) = here.journals()
    assert journal.read(path).complete
    status, text = here.kvmpy("run", "--resume")
    assert status == 1
    assert "no journal of a run that did not come to its end" in text


def test_an_interrupted_run_goes_on_too(here: Here) -> None:
    """After SIGINT the test that was interrupted runs again."""
    here.killed("--journal", "own.jsonl", number=signal.SIGINT)
    assert here.kvmpy("run", "--resume", "--journal", "own.jsonl", "--json", "r.json")[0] == 1
    assert here.verdicts("r.json").keys() == set(NAMES)
    assert here.ran().count(3) == here.ran().count(5) == 1
    assert here.journals() == []


def test_the_reports_of_a_run_that_was_killed(here: Here) -> None:
    """What had a verdict has it, the test in which the run ended is lost, and the journal stays as it is."""
    here.killed()
    (path,) = (each for each in here.journals() if each.suffix == ".jsonl")
    before = path.read_bytes()
    status, text = here.kvmpy("results", "--json", "r.json", "--ktap", "r.ktap")
    assert status == 2
    assert "the run did not come to its end" in text
    assert here.verdicts("r.json") == {NAMES[0]: "pass", NAMES[1]: "pass", NAMES[2]: "lost"}
    assert "# 3 selected tests were not started" in (here.folder / "r.ktap").read_text()
    assert path.read_bytes() == before
    assert here.kvmpy("run", "--resume")[0] == 1
    assert here.kvmpy("results", str(path), "--json", "whole.json")[0] == 1
    assert here.verdicts("whole.json") == expected()


def test_a_run_that_goes_on_is_left_alone(here: Here) -> None:
    """Nobody else goes on from its journal; its reports so far blame no test."""
    with here.start("run", "test_own.py", "--journal", "own.jsonl") as process:
        here.until_it_waits()
        status, text = here.kvmpy("run", "--resume", "--journal", "own.jsonl")
        assert (status, "its run has not ended yet" in text) == (3, True)
        status, text = here.kvmpy("results", "own.jsonl", "--json", "r.json")
        assert (status, "the run goes on" in text) == (2, True)
        assert here.verdicts("r.json") == {NAMES[0]: "pass", NAMES[1]: "pass"}
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)


def test_a_journal_is_not_overwritten(here: Here) -> None:
    (here.folder / "own.jsonl").write_text("mine\n")
    status, text = here.kvmpy("run", "test_own.py", "--journal", "own.jsonl")
    assert (status, "own.jsonl: File exists" in text) == (3, True)
    assert (here.folder / "own.jsonl").read_text() == "mine\n"
    for words, why in (
        (("results", "own.jsonl"), "holds nothing of a run"),
        (("results", "none.jsonl"), "No such file"),
        (("results",), "no journal of a run in"),
    ):
        status, text = here.kvmpy(*words)
        assert (status, why in text) == (1, True), text


def test_the_last_journals_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old ones go with what lies beside them, but not one that a run writes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = journals.folder()
    assert place is not None
    place.mkdir(parents=True, exist_ok=True)
    paths = [place / f"20260101-0000{number:02}-1.jsonl" for number in range(journals.KEPT + 3)]
    for path in paths:
        path.touch()
    Path(f"{paths[1]}.stack").touch()
    with journals.writing(paths[0]):
        assert journals.fresh() is not None
    left = sorted(place.iterdir())
    assert left == [paths[0], *paths[4:]]


def test_what_the_dying_kernel_said_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pstore's records from after the journal's last word go to the test that the machine died in."""
    path, store = tmp_path / "journal", tmp_path / "pstore"
    store.mkdir()
    journal.create_kept(path, ["test_own.py"])
    with path.open("a") as stream:
        for event in (
            {"event": "session", "seed": 7},
            {"event": "selected", "ids": ["test_own.py::test_x"]},
            {"event": "start", "nodeid": "test_own.py::test_x", "location": ["test_own.py", 0, "test_x"]},
        ):
            stream.write(json.dumps(event) + "\n")
    stamp = path.stat().st_mtime
    for name, later in (("dmesg-old", -60), ("dmesg-new", 60)):
        (store / name).write_text(f"Oops: {name}\n")
        os.utime(store / name, (stamp + later, stamp + later))
    monkeypatch.setattr(machine, "PSTORE", store)
    (tmp_path / "test_own.py").write_text("def test_x(): pass\n")
    args = ["-c", str(SUITE_INI), f"--rootdir={tmp_path}", str(tmp_path)]
    assert supervise(args, lambda _: None, kept=path, resume=True) == 1
    reason = journal.read(path).lost["test_own.py::test_x"]
    assert "Oops: dmesg-new" in reason
    assert "Oops: dmesg-old" not in reason


def test_a_fleets_journal_has_a_test_for_each_host_and_a_part_for_each_column(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    events: list[dict[str, Any]] = [
        {"event": "session", "seed": 7},
        {"event": "column", "column": "new", "data": {"key": "k"}},
        {"event": "start", "nodeid": "a", "host": "one", "column": "new"},
        {"event": "start", "nodeid": "a", "host": "two", "column": "old"},
        {"event": "start", "nodeid": "b", "host": "three", "column": "new"},
        {"event": "finish", "nodeid": "a", "host": "one", "column": "new"},
        {"event": "start", "nodeid": "c", "host": "one", "column": "new"},
        {"event": "lost", "nodeid": "b", "reason": "why", "column": "new", "data": {"host": "three"}},
    ]
    path.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    new, old = journal.read(path, "new"), journal.read(path, "old")
    assert (new.seed, old.seed) == (7, 7)
    assert (list(new.done), new.lost, new.begun) == (["a"], {"b": "why"}, {"one": "c"})
    assert new.about == {"b": {"host": "three"}}
    assert (old.done, old.lost, old.begun) == ({}, {}, {"two": "a"})
    assert new.columns == old.columns == {"new": {"key": "k"}}
