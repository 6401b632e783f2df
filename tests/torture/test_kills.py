# SPDX-License-Identifier: Apache-2.0
"""Kills at random times of everything that runs tests: no verdict is lost but of tests that were running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import psutil
import pytest

from tests.torture.conftest import Torture

TESTS = 12
SUITE = f"""
import os, threading
import pytest

@pytest.mark.parametrize("number", range({TESTS}))
def test_it(number):
    # What a test leaves running must not outlive the run.
    if number == 3:
        os.posix_spawnp("sleep", ["sleep", "1000"], os.environ, setsid=True)
    threading.Event().wait(0.02)
"""
MARK = "KVMPY_TORTURE_MARK"
PATIENCE = 120.0


def family(mark: str) -> list[psutil.Process]:
    """Every process that was started below the one with *mark* in its environment."""
    running = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return running


def start(folder: Path, workers: list[str], mark: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kvmpy", "run", "--lab", "never", "test_a.py", "--json", "o.json"]
    return subprocess.Popen(
        [*command, *workers, "--", "-p", "no:hypothesispytest", "-o", "kvmpy_leaks=off"],
        cwd=folder,
        env={**os.environ, MARK: mark, "KVMPY_DEV_KVM": "/nonexistent"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_gone(mark: str) -> list[psutil.Process]:
    """Wait for the whole family; return who outlives it."""
    _, alive = psutil.wait_procs(family(mark), timeout=PATIENCE)
    return alive or family(mark)


def pytest_processes(mark: str) -> list[psutil.Process]:
    """The processes that run tests or control those that do."""
    chosen = []
    for process in family(mark):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "-m pytest" in line or "sys.stdin.readline" in line:
            chosen.append(process)
    return chosen


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_killed_test_processes_cost_only_the_tests_they_run(
    torture: Torture, tmp_path: Path, workers: list[str]
) -> None:
    """SIGKILL of a test process at a random time: every test has a verdict, at most one of them is lost."""
    (tmp_path / "test_a.py").write_text(SUITE)
    kills = lost = 0
    wrong: list[str] = []
    left: list[psutil.Process] = []
    for _ in torture.rounds():
        mark = uuid.uuid4().hex
        (tmp_path / "o.json").unlink(missing_ok=True)
        delay = torture.random.uniform(0.3, 4.0)
        with start(tmp_path, workers, mark) as process:
            threading.Event().wait(delay)
            victims = pytest_processes(mark)
            if victims:
                torture.random.choice(victims).kill()
                kills += 1
            process.wait(PATIENCE)
        left += wait_gone(mark)
        try:
            report = json.loads((tmp_path / "o.json").read_text())
        except (OSError, ValueError) as error:
            wrong += [f"{error}, after {delay:.2f} s"] * TESTS
            continue
        verdicts = [test["verdict"] for test in report["tests"]]
        running = min(verdicts.count("lost"), bool(victims))
        # Of each test the verdict is that it passed, but of the one that was killed.
        wrong += [f"{verdicts}, after {delay:.2f} s"] * (TESTS - verdicts.count("pass") - running)
        lost += running
    torture.figure("kills", kills)
    torture.figure("tests lost that were running", lost)
    torture.figure("verdicts lost", len(wrong))
    torture.figure("processes left", len(left))
    assert (wrong, left) == ([], [])


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_a_signal_leaves_nothing_running(torture: Torture, tmp_path: Path, workers: list[str]) -> None:
    """SIGINT, SIGTERM, SIGHUP and SIGKILL of ``kvmpy run`` at a random time: no process outlives it."""
    (tmp_path / "test_a.py").write_text(SUITE)
    signals = 0
    left: list[str] = []
    for _ in torture.rounds():
        mark = uuid.uuid4().hex
        chosen = torture.random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
        with start(tmp_path, workers, mark) as process:
            threading.Event().wait(torture.random.uniform(0.0, 4.0))
            process.send_signal(chosen)
            process.wait(PATIENCE)
        left += [f"{process} after {chosen.name}" for process in wait_gone(mark)]
        signals += 1
    torture.figure("signals", signals)
    torture.figure("processes left", len(left))
    assert left == []
