# SPDX-License-Identifier: Apache-2.0
"""A test process that dies or hangs costs one verdict, and never the run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from kvmpy.core import sev_device
from kvmpy.core.errors import DeadProcessorError
from kvmpy.owned import OwnedFolder
from kvmpy.testing import journal
from kvmpy.testing.supervisor import supervise
from tests.testing.support import Suite


@pytest.fixture
def here(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.chdir(suite.folder)
    return suite


# Blocked signals keep pytest-timeout out, as a process stuck in the kernel does.
HANGS = """
import signal, threading, time
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


@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["one process", "xdist"])
def test_a_hung_process_is_killed_and_its_test_lost(
    here: Suite, capfd: pytest.CaptureFixture[str], workers: list[str]
) -> None:
    here.add("test_a.py", HANGS)
    said: list[str] = []
    status = supervise([*here.arguments(), *workers], said.append, grace=2.0)
    outcome = here.outcome(status, capfd.readouterr().out)
    assert outcome.verdicts() == {"test_before": "pass", "test_hangs": "lost", "test_after": "pass"}
    assert re.fullmatch(
        r"the test process hung: no end \d+ s after the test began; it was killed",
        outcome.reason("test_hangs"),
    )
    # A worker has threads that take the signal.
    place = (
        r'File ".*test_a.py", line 11 in test_hangs'
        if workers
        else r"no stack: it takes no signal\n  thread \d+: state S, in the kernel at \w*futex"
    )
    assert re.search(place, outcome.test("test_hangs")["details"])
    assert outcome.status == 1
    assert len(said) == (0 if workers else 1)


@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["one process", "xdist"])
def test_a_secure_processor_that_died_with_a_test_ends_the_run(
    here: Suite, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    def check_processor(because: str) -> None:
        raise DeadProcessorError(because)

    monkeypatch.setattr(sev_device, "check_processor", check_processor)
    # Workers that know the test but not yet that the run ends take one more, at most.
    here.add("test_a.py", HANGS + "".join(f"\ndef test_{n}():\n    time.sleep(1)\n" for n in range(40)))
    said: list[str] = []
    status = supervise([*here.arguments(), *workers], said.append, grace=2.0)
    outcome = here.outcome(status, capfd.readouterr().out)
    assert said[-1] == "kvmpy run: the secure processor does not answer; reboot"
    assert outcome.status != 0
    verdicts = outcome.verdicts()
    assert verdicts["test_hangs"] == "lost"
    assert len(verdicts) < 40, verdicts


@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["one process", "xdist"])
def test_a_hung_test_shows_its_stacks(
    here: Suite, capfd: pytest.CaptureFixture[str], workers: list[str]
) -> None:
    here.add(
        "test_a.py",
        "import signal, threading\nimport pytest\n"
        "def stands_here(): threading.Event().wait(100)\n"
        "@pytest.mark.timeout(1)\n"
        "def test_hangs():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "    thread = threading.Thread(target=stands_here, daemon=True)\n    thread.start()\n"
        "    thread.join()\n",
    )
    status = supervise([*here.arguments(), *workers], lambda _: None, grace=1.0)
    details = here.outcome(status, capfd.readouterr().out).test("test_hangs")["details"]
    assert details.startswith("the test process hung: ")
    assert re.search(r'File ".*test_a.py", line 3 in stands_here', details)
    assert re.search(r'File ".*test_a.py", line 9 in test_hangs', details)


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


# Kills the process in which a hook is called, once for each name.
ONCE = """
import os, signal
def die(name):
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
def number(config):
    return getattr(config, "workerinput", {}).get("workerid", "main")
"""
NUMBERED = "import pytest\n@pytest.mark.parametrize('number', range(6))\ndef test_it(number): pass\n"
ALL = {f"test_it[{number}]": "pass" for number in range(6)}
AFTER = "def pytest_runtest_logfinish(nodeid):\n    if '2]' in nodeid: die('after')\n"
BEFORE = (
    "import pytest\n@pytest.hookimpl(wrapper=True)\n"
    "def pytest_runtest_protocol(item):\n    if '3]' in item.nodeid: die('before')\n"
    "    return (yield)\n"
)
COLLECTION = "def pytest_collection_modifyitems(config): die('collection')\n"
REPORTS = "def pytest_sessionfinish(session): die('reports')\n"


@pytest.mark.parametrize(
    ("place", "workers"),
    [
        pytest.param(AFTER, [], id="after a test"),
        pytest.param(AFTER, ["-n2"], id="of a worker, after a test"),
        pytest.param(BEFORE, [], id="before a test"),
        pytest.param(BEFORE, ["-n2"], id="of a worker, before a test"),
        pytest.param(COLLECTION, [], id="in the collection"),
        pytest.param(REPORTS, [], id="before the reports"),
    ],
)
def test_a_death_between_tests_costs_nothing(
    here: Suite, capfd: pytest.CaptureFixture[str], place: str, workers: list[str]
) -> None:
    here.add("conftest.py", ONCE + place)
    here.add("test_a.py", NUMBERED)
    status = supervise([*here.arguments(), *workers], lambda _: None)
    outcome = here.outcome(status, capfd.readouterr().out)
    assert outcome.verdicts() == ALL
    assert outcome.status == 0
    assert outcome.report["exit_status"] == 0
    assert len(outcome.junit.findall(".//testcase")) == 6


def test_a_dead_controller_of_xdist_costs_nothing(here: Suite, capfd: pytest.CaptureFixture[str]) -> None:
    here.add(
        "conftest.py",
        ONCE + "import pytest\n@pytest.fixture(autouse=True)\ndef _name(request):\n"
        "    with open('ran', 'a') as stream: stream.write(request.node.name + '\\n')\n"
        "def pytest_configure(config):\n    global CONFIG\n    CONFIG = config\n"
        "def pytest_runtest_logfinish(nodeid):\n"
        "    if '2]' in nodeid and number(CONFIG) == 'main': die('controller')\n",
    )
    here.add("test_a.py", NUMBERED + "def test_bad(): assert 1 == 2\n")
    said: list[str] = []
    status = supervise([*here.arguments(), "-n1"], said.append)
    outcome = here.outcome(status, capfd.readouterr().out)
    assert outcome.verdicts() == {**ALL, "test_bad": "fail"}
    assert (outcome.status, outcome.report["exit_status"]) == (1, 1)
    assert said == ["kvmpy run: the test process was killed by SIGKILL, outside of any test"]
    # What was judged did not run again.
    ran = (here.folder / "ran").read_text().split()
    assert [ran.count(f"test_it[{number}]") for number in range(3)] == [1, 1, 1]


def test_a_death_in_every_collection_ends_the_run_with_reports(
    here: Suite, capfd: pytest.CaptureFixture[str]
) -> None:
    here.add(
        "test_a.py",
        "import os, signal\n"
        "if os.path.exists('ran'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_a(): pass\n"
        "def test_dies():\n    open('ran', 'w').close()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def test_b(): pass\n",
    )
    said: list[str] = []
    status = supervise(here.arguments(), said.append)
    assert status == 128 + signal.SIGKILL
    outside = "kvmpy run: the test process was killed by SIGKILL, outside of any test"
    assert said[1:] == [outside, outside]
    assert "in test_a.py::test_dies; that test is lost" in said[0]
    outcome = here.outcome(status, capfd.readouterr().out)
    assert outcome.verdicts() == {"test_a": "pass", "test_dies": "lost"}
    assert outcome.report["not_run"] == ["test_a.py::test_b"]
    assert outcome.report["exit_status"] == 2


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


def _start(here: Suite, *workers: str, background: bool = False) -> subprocess.Popen[bytes]:
    os.mkfifo(here.folder / "started")
    here.add("test_a.py", WAITS)
    code = (
        "import sys\nfrom kvmpy.testing.supervisor import supervise\n"
        f"sys.exit(supervise({[*here.arguments(), *workers]!r}, print))\n"
    )
    # A shell starts its background jobs with SIGINT ignored.
    interrupts = signal.SIG_IGN if background else signal.default_int_handler
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts) and None,  # noqa: PLW1509 - one thread
    )
    # Opening the pipe waits for the test to open its end.
    (here.folder / "started").read_bytes()
    return process


@pytest.mark.parametrize(
    ("number", "background", "workers"),
    [
        (signal.SIGTERM, False, []),
        (signal.SIGTERM, True, []),
        (signal.SIGHUP, False, []),
        (signal.SIGINT, False, []),
        # The child gets SIGTERM for each; its workers inherit what the background ignores.
        (signal.SIGHUP, False, ["-n1"]),
        (signal.SIGINT, False, ["-n1"]),
        (signal.SIGTERM, True, ["-n1"]),
    ],
)
def test_a_signal_ends_the_session_in_order(
    here: Suite, number: signal.Signals, background: bool, workers: list[str]
) -> None:
    with _start(here, *workers, background=background) as process:
        process.send_signal(number)
        assert process.wait(100) == 2
    outcome = here.outcome(2, "")
    assert outcome.verdicts() == {"test_a": "lost"}
    # It was not killed for want of an answer.
    assert outcome.reason("test_a") == "the session ended in the middle of it"


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


def test_what_dead_owners_left_is_swept_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal, sys, tempfile\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from kvmpy.owned import OwnedFolder\n"
        "folder = OwnedFolder('run')\n"
        "(folder.path / 'content').write_text('x')\n"
        "print(folder.path, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as dead,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alive,
    ):
        assert dead.stdout is not None
        assert alive.stdout is not None
        left, kept = Path(dead.stdout.readline().strip()), Path(alive.stdout.readline().strip())
        dead.kill()
        dead.wait(60)
        assert (left / "content").exists()
        (tmp_path / "kvmpy-notes").mkdir()
        (tmp_path / "kvmpy-notes" / "mine").write_text("no lock: not one of these")
        with OwnedFolder("run") as own:
            assert {path.name for path in tmp_path.iterdir()} == {own.name, kept.name, "kvmpy-notes"}
        assert not own.exists()
        alive.kill()
