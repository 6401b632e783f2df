# SPDX-License-Identifier: Apache-2.0
"""A test process that dies or hangs costs one verdict, and never the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvmpy.testing import journal
from kvmpy.testing.supervisor import supervise
from tests.testing.support import Suite


@pytest.fixture
def here(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.chdir(suite.folder)
    return suite


# Blocked signals keep pytest-timeout out, as a process stuck in the kernel does.
HANGS = """
import signal, threading
import pytest

def test_before():
    pass

@pytest.mark.timeout(1)
def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    threading.Event().wait(100)

def test_after():
    pass
"""


def test_a_hung_xdist_worker_is_replaced(here: Suite) -> None:
    here.add("test_a.py", HANGS)
    outcome = here.run("-n1", "-o", "faulthandler_timeout=2")
    assert outcome.verdicts() == {"test_before": "pass", "test_hangs": "lost", "test_after": "pass"}
    assert outcome.status == 1


def test_a_hung_process_is_killed_and_its_test_lost(here: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    here.add("test_a.py", HANGS)
    said: list[str] = []
    status = supervise(here.arguments(), said.append, grace=2.0)
    outcome = here.outcome(status, capfd.readouterr().out)
    assert outcome.verdicts() == {"test_before": "pass", "test_hangs": "lost", "test_after": "pass"}
    assert "hung" in outcome.reason("test_hangs")
    assert outcome.status == 1
    assert len(said) == 1


def test_fixtures_and_seed_outlive_a_death(here: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    here.add(
        "test_a.py",
        "import os, pytest\n"
        "@pytest.fixture(scope='module')\ndef shared(): return 5\n"
        "def test_a(shared, seed):\n    with open('seeds', 'a') as stream: stream.write(f'{seed}\\n')\n"
        "def test_dies(): os._exit(0)\n"
        "def test_b(shared): assert shared == 5\n",
    )
    status = supervise(here.arguments(), lambda _: None)
    outcome = here.outcome(status, capfd.readouterr().out)
    assert outcome.verdicts() == {"test_a": "pass", "test_dies": "lost", "test_b": "pass"}
    assert len((here.folder / "seeds").read_text().split()) == 1
    assert outcome.text.count(f"seed {outcome.report['seed']},") >= 2


def test_a_death_outside_of_a_test_ends_the_run(here: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    here.add("test_a.py", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\ndef test_a(): pass\n")
    said: list[str] = []
    assert supervise(here.arguments(), said.append) == 128 + signal.SIGKILL
    assert said == ["kvmpy run: the test process was killed by SIGKILL, outside of any test"]


def test_a_death_after_the_last_test_is_no_success(here: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    here.add(
        "test_a.py",
        "import atexit, os, signal\n"
        "def test_a(): atexit.register(lambda: os.kill(os.getpid(), signal.SIGKILL))\n",
    )
    said: list[str] = []
    status = supervise(here.arguments(), said.append)
    assert status == 128 + signal.SIGKILL
    assert said == ["kvmpy run: the test process was killed by SIGKILL, after the last test"]
    assert here.outcome(status, capfd.readouterr().out).verdicts() == {"test_a": "pass"}


@pytest.mark.parametrize(
    ("source", "args", "expected"),
    [
        ("def test_a(): pass\n", [], 0),
        ("def test_a(): assert 0\n", [], 1),
        ("def test_a(): pass\n", ["-k", "zzz"], 5),
        ("def test_a(): pass\n", ["--no-such-option"], 4),
    ],
)
def test_the_exit_status_is_pytests(
    here: Suite, capfd: pytest.CaptureFixture[str], source: str, args: list[str], expected: int
) -> None:
    here.add("test_a.py", source)
    said: list[str] = []
    assert supervise([*here.arguments(), *args], said.append) == expected
    assert said == []
    capfd.readouterr()


WAITS = "import threading\ndef test_a():\n    open('started', 'w').close()\n    threading.Event().wait(100)\n"


def _start(here: Suite) -> subprocess.Popen[bytes]:
    os.mkfifo(here.folder / "started")
    here.add("test_a.py", WAITS)
    code = (
        "import sys\nfrom kvmpy.testing.supervisor import supervise\n"
        f"sys.exit(supervise({here.arguments()!r}, print))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # Opening the pipe waits for the test to open its end.
    (here.folder / "started").read_bytes()
    return process


def test_sigterm_ends_the_session_in_order(here: Suite) -> None:
    with _start(here) as process:
        process.terminate()
        assert process.wait(60) == 2
    outcome = here.outcome(2, "")
    assert outcome.verdicts() == {"test_a": "lost"}


def test_a_killed_supervisor_leaves_no_child(here: Suite) -> None:
    with _start(here) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 1
        process.kill()
        process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []


def test_a_journal_that_ends_in_half_a_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('{"event": "session", "seed": 7}\n{"event": "start", "nodeid": "a", "limit": 3.0}\n{"eve')
    history = journal.read(path)
    assert (history.seed, history.running, history.limit, history.finished) == (7, "a", 3.0, False)
    journal.mark_lost(path, "a", "gone")
    assert journal.read(path).lost == {"a": "gone"}
