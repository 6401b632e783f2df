# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGHUP end the commands that watch in order: records closed, files written, nothing left."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvmpy.debug.record.format import FrameReader, FrameType
from kvmpy.debug.watch.uevents import why_unreachable
from tests.debug.tracing import ROOT, compile_program, kvmpy_command, need_kvm

TIMEOUT = 60
ENDS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, dynamically linked."""
    need_kvm()
    return compile_program(tmp_path_factory.mktemp("dynamic"))


@pytest.fixture(scope="module")
def static_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, statically linked."""
    need_kvm()
    return compile_program(tmp_path_factory.mktemp("static"), "-static")


@contextmanager
def started(*arguments: str | Path, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Give a command that runs, ended behind the block."""
    child = subprocess.Popen([*kvmpy_command(), *map(str, arguments)], text=True, cwd=ROOT, **more)
    try:
        yield child
    finally:
        child.kill()
        child.wait(TIMEOUT)
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def folders() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("kvmpy-trace-")}


def trace_until(number: int, folder: Path, *command: str | Path) -> tuple[int, int]:
    """Trace a program that loops, send *number*; return the exit status and the program's process."""
    lines, record = folder / "lines", folder / "record"
    with started("trace", "-t", lines, "-o", record, "--", *command, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout is not None
        pid = int(tracer.stdout.readline().split()[1])
        tracer.send_signal(number)
        status = tracer.wait(TIMEOUT)
    assert "KVM_SET_SREGS" in lines.read_text()
    reader = FrameReader(record.read_bytes())
    assert list(reader)[-1].type == FrameType.END
    assert reader.problem is None
    return status, pid


@ENDS
def test_a_trace_ends_its_program(program: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = folders()
    status, pid = trace_until(number, tmp_path, program, "loop")
    assert status == 128 + number
    assert not psutil.pid_exists(pid)
    assert folders() <= before


@ENDS
def test_a_trace_through_ptrace_ends_its_program(
    static_program: Path, tmp_path: Path, number: signal.Signals
) -> None:
    status, pid = trace_until(number, tmp_path, static_program, "loop")
    assert status == 128 + number
    assert not psutil.pid_exists(pid)


def test_a_program_that_ignores_the_signal_is_killed(program: Path, tmp_path: Path) -> None:
    """Once the time for an orderly end is over."""
    status, pid = trace_until(signal.SIGTERM, tmp_path, "sh", "-c", f'trap "" TERM; exec {program} loop')
    assert status == 128 + signal.SIGKILL
    assert not psutil.pid_exists(pid)


@ENDS
def test_an_attached_trace_lets_go(program: Path, tmp_path: Path, number: signal.Signals) -> None:
    record = tmp_path / "record"
    child = subprocess.Popen([program, "loop"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    arguments = ("trace", "-p", str(child.pid), "-o", record)
    with started(*arguments, stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr is not None
        for line in tracer.stderr:
            if "KVM_RUN" in line:
                break
        tracer.send_signal(number)
        assert "detached" in tracer.stderr.read()
        assert tracer.wait(TIMEOUT) == 0
    assert child.poll() is None
    assert list(FrameReader(record.read_bytes()))[-1].type == FrameType.END
    child.kill()
    child.wait(TIMEOUT)
    child.stdout.close()


@ENDS
def test_watch_ends(number: signal.Signals) -> None:
    reason = why_unreachable()
    if reason is not None:
        pytest.skip(f"no uevents here: {reason}")
    with started("watch", stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        assert "watching" in child.stderr.readline()
        child.send_signal(number)
        assert child.stderr.read() == ""
        assert child.wait(TIMEOUT) == 128 + number


@ENDS
def test_top_gives_the_terminal_back(number: signal.Signals) -> None:
    ours, theirs = pty.openpty()
    try:
        before = termios.tcgetattr(theirs)
        with started("top", "--interval", "0.1", stdin=theirs, stdout=theirs) as child:
            deadline = time.monotonic() + TIMEOUT
            while termios.tcgetattr(theirs) == before and time.monotonic() < deadline:
                os.read(ours, 4096)
            assert termios.tcgetattr(theirs) != before
            child.send_signal(number)
            assert child.wait(TIMEOUT) == 128 + number
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_signal_in_a_callback_of_the_interpreter_is_not_lost() -> None:
    """There an exception is printed and forgotten: a weak reference's callback, importlib has some."""
    code = (
        "import click, signal, weakref\n"
        "from kvmpy.cli.main import main\n"
        "class Thing: pass\n"
        "def gone(_):\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('the handler runs here at the latest')\n"
        "with click.Context(main) as context:\n"
        "    context.invoked_subcommand = 'ps'\n"
        "    main.callback.__wrapped__(context)\n"
        "thing = Thing()\n"
        "watched = weakref.ref(thing, gone)\n"
        "del thing\n"
        "signal.pause()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


def test_ps_ends() -> None:
    with started("ps", "--interval", "60", stderr=subprocess.PIPE) as child:
        while not any(thread.system_time for thread in psutil.Process(child.pid).threads()):
            continue
        deadline = time.monotonic() + TIMEOUT
        # Before its handlers are there the signal ends it, too: that is as good.
        while child.poll() is None and time.monotonic() < deadline:
            child.send_signal(signal.SIGTERM)
        assert child.wait(TIMEOUT) in (128 + signal.SIGTERM, -signal.SIGTERM)
        assert child.stderr is not None
        assert "Traceback" not in child.stderr.read()
