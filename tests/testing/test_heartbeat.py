# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it lasts, and that its summary fits on a screen."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmpy.testing import heartbeat as heartbeats
from kvmpy.testing import journal, supervisor
from kvmpy.testing.heartbeat import ERASE, LINE_SECONDS, LIVE_SECONDS, Heartbeat
from kvmpy.testing.supervisor import _Child, _Progress, supervise
from kvmpy.testing.table import print_report
from kvmpy.testing.verdicts import TestVerdict, Verdict
from tests.testing.support import NO_KVM, Suite


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_pipe_gets_a_line_from_time_to_time(clock: Clock) -> None:
    stream = io.StringIO()
    heartbeat = Heartbeat(stream, None, clock)
    heartbeat.selected(1200)
    heartbeat.begins("gw0", "x/selftests/memory/test_a.py::test_slow[cbit]")
    for _ in range(int(LINE_SECONDS) * 8):
        clock.now += 0.25
        heartbeat.tick()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("kvmpy: 0 of 1,200 tests in 0:30")
    assert "now memory/test_a.py::test_slow[cbit] for 60 s" in lines[1]
    assert "\x1b" not in stream.getvalue()


def test_nothing_is_shown_before_the_tests_are_known(clock: Clock) -> None:
    stream = io.StringIO()
    heartbeat = Heartbeat(stream, None, clock)
    clock.now += 10 * LINE_SECONDS
    heartbeat.tick()
    assert stream.getvalue() == ""


def test_a_terminal_has_one_line_that_fits_and_goes(clock: Clock) -> None:
    stream = io.StringIO()
    heartbeat = Heartbeat(stream, lambda: 40, clock)
    heartbeat.selected(5)
    heartbeat.begins("", f"test_a.py::test_{'long' * 40}")
    clock.now += LIVE_SECONDS
    heartbeat.tick()
    heartbeat.tick()
    shown = stream.getvalue()
    assert shown.count(ERASE) == 1
    assert "\n" not in shown
    assert len(shown.removeprefix(ERASE)) == 39
    heartbeat.clear()
    heartbeat.clear()
    assert stream.getvalue() == shown + ERASE


def test_the_longest_test_comes_first_and_the_rest_is_counted(clock: Clock) -> None:
    heartbeat = Heartbeat(io.StringIO(), None, clock)
    heartbeat.selected(9)
    for number in range(5):
        heartbeat.begins(f"gw{number}", f"test_a.py::test_{number}")
        clock.now += 1
    heartbeat.idle("gw0")
    assert heartbeat.line().endswith(
        "now test_a.py::test_1 for 4 s, test_a.py::test_2 for 3 s, test_a.py::test_3 for 2 s, and 1 more"
    )
    heartbeat.idle()
    assert "now" not in heartbeat.line()


def test_failures_are_shown_at_once_and_everything_else_is_a_sum(clock: Clock) -> None:
    stream = io.StringIO()
    heartbeat = Heartbeat(stream, None, clock)
    heartbeat.selected(50)
    for number in range(40):
        heartbeat.judged(f"t.py::test_{number}", (Verdict.SKIP, Verdict.XFAIL)[number % 2], "as expected")
    heartbeat.judged("t.py::test_x", Verdict.FAIL, "3 pages\nare dirty \x1b[2J")
    heartbeat.judged("t.py::test_y", Verdict.LOST, "panic", told=True)
    assert stream.getvalue() == "FAIL  t.py::test_x: 3 pages are dirty \\x1b[2J\n"
    assert heartbeat.line() == ("42 of 50 tests in 0:00: 1 failed, 1 lost, 20 skipped, 20 failed as expected")


# ---- a whole run

SLEEPER = """
import signal, threading
def test_good(): pass
def test_bad(): assert 4 == 5
def test_waits(): threading.Event().wait(100)
def test_after(): pass
"""


@pytest.fixture
def here(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.chdir(suite.folder)
    return suite


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["one process", "xdist"])
def test_a_run_shows_failures_before_its_end(here: Suite, workers: list[str]) -> None:
    """The failure is there while another test still waits; Ctrl-C ends the run with its summary."""
    here.add("test_a.py", SLEEPER)
    code = (
        "import sys; from kvmpy.testing.supervisor import supervise; "
        "sys.exit(supervise(sys.argv[1:], lambda text: print(text, flush=True)))"
    )
    command = [sys.executable, "-c", code, *here.arguments(), "--kvmpy-brief", *workers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None
        watchdog = threading.Timer(90, child.kill)
        watchdog.start()
        try:
            before = []
            for line in child.stdout:
                before.append(line)
                if line.startswith("FAIL "):
                    break
            assert before[-1] == "FAIL  test_a.py::test_bad: assert 4 == 5\n", before
            child.send_signal(signal.SIGTERM)
            after = child.stdout.read()
        finally:
            watchdog.cancel()
    assert child.returncode == 2
    assert "verdicts, seed" in after
    assert re.search(r"^fail +test_a.py::test_bad: assert 4 == 5$", after, re.MULTILINE)
    # Neither letters nor names of files.
    assert not re.search(r"^(test_a.py )?[.Fs]+( |$)", "".join(before) + after, re.MULTILINE)


DIES = """
import os
def test_bad(): assert 4 == 5
def test_dies(): os.kill(os.getpid(), 9)
def test_worse(): assert 6 == 7
"""


@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["one process", "xdist"])
def test_a_death_costs_no_line(here: Suite, capfd: pytest.CaptureFixture[str], workers: list[str]) -> None:
    """What failed before and after a process died is shown once, the dead test by who found it."""
    here.add("test_a.py", DIES)
    said: list[str] = []
    status = supervise([*here.arguments(), "--kvmpy-brief", *workers], said.append)
    text = capfd.readouterr().out
    outcome = here.outcome(status, text)
    assert outcome.verdicts() == {"test_bad": "fail", "test_dies": "lost", "test_worse": "fail"}
    assert text.count("FAIL  test_a.py::test_bad: assert 4 == 5\n") == 1
    told = "\n".join([text, *said])
    assert re.search(r"(LOST  |in )test_a.py::test_dies", told)


@pytest.mark.parametrize(
    ("extra", "brief"),
    [
        ([], True),
        (["-q"], True),
        (["-v"], False),
        (["-s"], False),
        (["--setup-show"], False),
    ],
)
def test_who_wants_to_see_tests_sees_them(here: Suite, extra: list[str], brief: bool) -> None:
    here.add("test_a.py", "def test_bad(): assert 4 == 5\n")
    result = here.pytester.runpytest_subprocess(*here.arguments(), "--kvmpy-brief", *extra, timeout=100)
    assert (here.pytester.path / "out.json").exists()
    named = [line for line in result.outlines if re.match(r"\s*test_a\.py(?!:\d)", line)]
    assert bool(named) is not brief, named
    areas = [line for line in result.outlines if line.startswith(" area ")]
    assert bool(areas) is not brief
    assert sum(line.strip().startswith("total") for line in result.outlines) == 1


def test_quiet_has_no_heartbeat(here: Suite) -> None:
    here.add("test_a.py", "def test_bad(): assert 4 == 5\n")
    for extra, told in (([], True), (["-q"], False)):
        path = here.folder / f"journal{len(extra)}"
        arguments = [*here.arguments(), "--kvmpy-brief", "--kvmpy-journal", str(path), *extra]
        here.pytester.runpytest_subprocess(*arguments, timeout=100)
        events = journal.Follower(path).events()
        assert [event["heartbeat"] for event in events if event["event"] == "session"] == [told]
        assert events[-2]["event"] == "summary"
        finish = next(event for event in events if event["event"] == "finish")
        assert (finish["verdict"], finish["reason"]) == (Verdict.FAIL, "assert 4 == 5")


def test_on_a_terminal_the_line_goes_before_the_summary(here: Suite) -> None:
    here.add("test_a.py", "import threading\ndef test_a(): threading.Event().wait(2)\n")
    code = (
        "import sys; from kvmpy.testing.supervisor import supervise; sys.exit(supervise(sys.argv[1:], print))"
    )
    command = [sys.executable, "-c", code, *here.arguments(), "--kvmpy-brief"]
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=slave, stdin=subprocess.DEVNULL, env=environment) as child:
        os.close(slave)
        watchdog = threading.Timer(90, child.kill)
        watchdog.start()
        data = b""
        try:
            while chunk := os.read(master, 65536):
                data += chunk
        except OSError:
            pass  # the other end is closed
        finally:
            watchdog.cancel()
            os.close(master)
    assert child.returncode == 0, data
    text = data.decode()
    assert f"{ERASE}0 of 1 tests in 0:0" in text
    live, _, rest = text.rpartition(ERASE)
    assert "now test_a.py::test_a for " in live
    assert "verdicts, seed" in rest
    assert " tests in 0:0" not in rest


def test_a_reader_that_leaves_ends_no_run(here: Suite) -> None:
    here.add("test_a.py", "".join(f"def test_{n}(): assert {n} < 0\n" for n in range(30)))
    code = (
        "import sys; from kvmpy.testing.supervisor import supervise; "
        "sys.exit(supervise(sys.argv[1:], lambda text: None))"
    )
    command = [sys.executable, "-c", code, *here.arguments(), "--kvmpy-brief"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.close()
        _, errors = child.communicate(timeout=90)
    assert child.returncode == 1
    assert b"Traceback" not in errors
    assert here.outcome(1, "").report["summary"]["fail"] == 30


# ---- a journal that is read while it is written


def test_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    follower = journal.Follower(path)
    assert follower.events() == []
    path.write_bytes(
        b'\n{"event": "start", "nodeid": "a"}\n{"event": "report", "nodeid": "a"}\n{"event": "fin'
    )
    assert [(event["event"], event["nodeid"]) for event in follower.events()] == [("start", "a")]
    assert follower.events() == []
    with path.open("ab") as stream:
        stream.write(b'ish", "nodeid": "a", "verdict": "pass"}\nrubbish\n')
    assert [(event["event"], event["verdict"]) for event in follower.events()] == [("finish", Verdict.PASS)]


# ---- the summary


def verdict(number: int, kind: Verdict, reason: str, protection: str | None) -> TestVerdict:
    name = f"area{number % 30}/test_a.py::test_{number}[{protection}]"
    missing = (reason,) if kind is Verdict.SKIP else ()
    return TestVerdict(
        name,
        name,
        f"area{number % 30}",
        kind,
        "host",
        protection=protection,
        reason=reason,
        missing=missing,
        how=tuple(f"get {what}" for what in missing),
    )


def printed(verdicts: list[TestVerdict], *, brief: bool) -> list[str]:
    stream = io.StringIO()
    print_report(stream, verdicts, title="verdicts", labels={}, width=100, color=False, brief=brief)
    return stream.getvalue().splitlines()


def test_the_summary_of_a_good_run_fits_on_a_screen() -> None:
    protections = ["snp", "sev-es", "sev", "sw-protected", "cbit", "none", None]
    verdicts = [
        verdict(number, kind, f"{kind.value} reason {number % 60}", protections[number % 7])
        for number in range(4000)
        for kind in [(Verdict.PASS, Verdict.SKIP, Verdict.XFAIL)[number % 3]]
    ]
    lines = printed(verdicts, brief=True)
    assert len(lines) <= 36
    text = "\n".join(lines)
    assert sum("get it: get skip reason" in line for line in lines) == 4
    # Nothing is left out of the sums.
    for title in ("failed as expected, by reason:", "skipped, by what is missing:"):
        counts = []
        for line in lines[lines.index(title) + 1 :]:
            if not (match := re.match(r" +(\d+)  (?!get it)", line)):
                if "get it" in line:
                    continue
                break
            counts.append(int(match[1]))
        kind = Verdict.SKIP if "skipped" in title else Verdict.XFAIL
        assert sum(counts) == sum(entry.verdict is kind for entry in verdicts), text
    full = printed(verdicts, brief=False)
    assert sum(line.startswith("       area") for line in full) == 1333
    assert len(full) > 1400


def test_a_summary_names_all_that_is_bad() -> None:
    verdicts = [verdict(number, Verdict.FAIL, "no", "none") for number in range(100)]
    assert sum(line.startswith("fail ") for line in printed(verdicts, brief=True)) == 100


def test_kvmpy_run_is_brief_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_a(): pass\n")
    environment = os.environ | {"KVMPY_DEV_KVM": NO_KVM, "KVMPY_LAB": "never"}
    command = [sys.executable, "-m", "kvmpy", "run", "test_own.py"]
    texts = [
        subprocess.run(
            [*command, *extra],
            check=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        ).stdout
        for extra in ([], ["--verbose"], ["-v"])
    ]
    letters = [bool(re.search(r"^(\S+ )?\. +\[1/1\]$", text, re.MULTILINE)) for text in texts]
    areas = [bool(re.search(r"^ area +protection", text, re.MULTILINE)) for text in texts]
    assert letters == areas == [False, True, True]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_supervisor_leaves_the_terminal_to_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the session has said that its tests are over, it takes the line away itself."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(heartbeats, "LIVE_SECONDS", 0.0)
    path = tmp_path / "journal"
    progress = _Progress(path)

    def tell(**event: object) -> str:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")
        before = len(terminal.getvalue())
        progress.tick([path])
        return terminal.getvalue()[before:]

    tell(event="session", heartbeat=True)
    tell(event="selected", ids=["t.py::a", "t.py::b"])
    assert "now t.py::a for 0 s" in tell(event="start", nodeid="t.py::a")
    assert " t.py::a: boom\n" in tell(event="finish", nodeid="t.py::a", verdict="fail", reason="boom")
    assert tell(event="summary") == ""
    assert tell(event="end") == ""
    progress.clear()
    assert terminal.getvalue().endswith("1 failed")
    # The next session has the terminal again; what is judged when it says so is for its summary to tell.
    assert ERASE in tell(event="session", heartbeat=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"event": "finish", "nodeid": "t.py::b", "verdict": "fail"}) + "\n")
    assert tell(event="summary") == ""


def test_a_summary_between_two_looks_is_not_erased(here: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child may end before the supervisor looks again: the line was taken away all the same."""
    opened = here.folder / "opened"
    os.mkfifo(opened)
    here.add("test_a.py", f"import pathlib\ndef test_a(): pathlib.Path({str(opened)!r}).read_text()\n")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(heartbeats, "LIVE_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "_POLL", 90.0)
    path = here.folder / "journal"
    progress = _Progress(path)
    child = _Child([*here.arguments(), "--kvmpy-brief"], path, 60.0, 10.0, progress)
    with opened.open("w"):
        progress.tick([path])
        shown = terminal.getvalue()
    assert "now test_a.py::test_a for 0 s" in shown
    assert child.wait() == 0
    progress.clear()
    assert terminal.getvalue() == shown
