# SPDX-License-Identifier: Apache-2.0
"""``--ktap`` of a run that goes on, is killed, is taken up again, read by the kernel's own parser."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvmpy import caches
from tests.testing.support import parse_ktap

ROOT = Path(__file__).resolve().parents[2]
PARSER = "tools/testing/kunit/kunit_parser.py"
SECONDS = 90.0
# The second file's second test waits until it is told; the third dies with its process.
TESTS = {
    "test_a.py": "import pytest\ndef test_1(): pass\ndef test_2(): pytest.skip('no')\n",
    "test_b.py": """
import os
from pathlib import Path
import pytest

def test_1():
    assert 1 == 2

def test_2():
    Path("go").read_bytes()

@pytest.mark.skipif(Path("no_death").exists(), reason="it may not")
def test_3():
    os._exit(3)

def test_4(): pass
""",
    "test_c.py": "def test_1(): pass\n",
}
HALF = [
    "1..3",
    "  KTAP version 1",
    "  # Subtest: test_a.py",
    "  1..2",
    "  ok 1 test_1",
    "  ok 2 test_2 # SKIP no",
    "ok 1 test_a.py",
    "  KTAP version 1",
    "  # Subtest: test_b.py",
    "  1..4",
    "  not ok 1 test_1",
]


class Run:
    """``kvmpy run`` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in TESTS.items():
            (folder / name).write_text(text)
        os.mkfifo(folder / "go")
        self.processes: list[subprocess.Popen[bytes]] = []

    def let_go(self) -> None:
        """Let the test that waits go on."""
        (self.folder / "go").write_bytes(b"")

    def start(self, *words: str, stdout: Any = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kvmpy", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self.folder / "cache")}
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=stdout, stderr=subprocess.DEVNULL
        )
        self.processes.append(process)
        return process

    def run(self, *words: str) -> int:
        return self.start(*words).wait(SECONDS)

    def until(self, path: Path, line: str) -> list[str]:
        """Wait for a line; return the lines without diagnostics."""
        end = time.monotonic() + SECONDS
        while True:
            text = path.read_text() if path.exists() else ""
            if f"{line}\n" in text:
                return plain(text)
            assert time.monotonic() < end, text
            os.sched_yield()


def plain(text: str) -> list[str]:
    """Return the lines without those of the header and of failures."""
    lines = text.splitlines()
    return [line for line in lines[1:] if not line.lstrip().startswith("#") or "# Subtest" in line]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    for process in made.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait(SECONDS)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def kunit() -> Any:
    """The kernel's own parser of KTAP, from a tree in the lab's cache."""
    trees = caches.base() / "lab" / "trees"
    found = next(iter(sorted(trees.glob(f"*/{PARSER}"))), None)
    if found is None:
        pytest.skip(f"no kernel tree with {PARSER} in {trees}: kvmpy lab build brings one")
    sys.path.insert(0, str(found.parent))
    try:
        spec = importlib.util.spec_from_file_location("kunit_parser", found)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["kunit_parser"] = module  # its dataclasses look for it there
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(found.parent))
        for name in ("kunit_parser", "kunit_printer"):
            sys.modules.pop(name, None)


def parsed(kunit: Any, text: str) -> Any:
    printer = importlib.import_module("kunit_printer").Printer(print=False)
    return kunit.parse_run_tests(text.splitlines(), printer)


def test_verdicts_are_there_as_they_come(run: Run, kunit: Any) -> None:
    """In the middle of the run all that is known is in the file; the end completes it, with a lost test."""
    path = run.folder / "out.ktap"
    process = run.start("run", "--lab", "never", "--ktap", "out.ktap", "--journal", "j", ".")
    assert run.until(path, "  not ok 1 test_1") == HALF
    # Who reads it now knows that it is not all.
    half = parsed(kunit, path.read_text())
    assert half.counts.errors > 0
    run.let_go()
    assert process.wait(SECONDS) == 1
    text = path.read_text()
    assert plain(text) == [
        *HALF,
        "  ok 2 test_2",
        "  not ok 3 test_3 # ERROR lost: the test process ended itself with status 3",
        "  ok 4 test_4",
        "not ok 2 test_b.py",
        "  KTAP version 1",
        "  # Subtest: test_c.py",
        "  1..1",
        "  ok 1 test_1",
        "ok 3 test_c.py",
    ]
    parse_ktap(text)
    whole = parsed(kunit, text).counts
    assert (whole.passed, whole.failed, whole.skipped, whole.crashed, whole.errors) == (4, 2, 1, 0, 0)
    assert run.run("results", "j", "--ktap", "again.ktap") == 1
    assert (run.folder / "again.ktap").read_text() == text


def test_a_killed_run_leaves_the_beginning_of_what_a_later_one_writes(run: Run, kunit: Any) -> None:
    path = run.folder / "out.ktap"
    process = run.start("run", "--lab", "never", "--ktap", "out.ktap", "--journal", "j", "--seed", "1", ".")
    run.until(path, "  not ok 1 test_1")
    process.send_signal(signal.SIGKILL)
    process.wait(SECONDS)
    begun = path.read_text()
    assert plain(begun) == HALF
    assert run.run("run", "--resume", "--journal", "j") == 1
    text = path.read_text()
    assert text.startswith(begun)
    assert "  not ok 2 test_2 # ERROR lost: the run ended in it" in text
    assert parsed(kunit, text).counts.errors == 0


def test_standard_output_gets_them_as_they_come(run: Run) -> None:
    """Nobody waits for the end of the run, and a process that dies in between repeats nothing."""
    process = run.start("run", "--lab", "never", "--kselftest", "--ktap", "-", ".", stdout=subprocess.PIPE)
    assert process.stdout is not None
    begun = b""
    while b"  not ok 1 test_1\n" not in begun:
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        assert chunk, begun
        begun += chunk
    assert plain(begun.decode()) == HALF
    run.let_go()
    text = (begun + process.stdout.read()).decode()
    assert process.wait(SECONDS) == 1
    assert text.count("ok 1 test_a.py") == 1
    assert [result[1] for result in parse_ktap(text).results] == ["test_a.py", "test_b.py", "test_c.py"]


def test_many_processes_write_one_document(run: Run, kunit: Any) -> None:
    (run.folder / "no_death").touch()
    process = run.start("run", "--lab", "never", "-n", "2", "--ktap", "out.ktap", "--journal", "j", ".")
    run.let_go()
    assert process.wait(SECONDS) == 1
    text = (run.folder / "out.ktap").read_text()
    counts = parsed(kunit, text).counts
    assert (counts.passed, counts.failed, counts.skipped, counts.errors) == (4, 1, 2, 0)
    run.run("results", "j", "--ktap", "again.ktap")
    assert (run.folder / "again.ktap").read_text() == text


def test_tests_that_are_not_started_have_a_place(run: Run, kunit: Any) -> None:
    """What pytest's -x leaves out is in the plan, and not ok."""
    assert run.run("run", "--lab", "never", "--ktap", "out.ktap", ".", "--", "-x") == 1
    text = (run.folder / "out.ktap").read_text()
    assert text.count("# ERROR not started\n") == 4
    counts = parsed(kunit, text).counts
    assert (counts.passed, counts.failed, counts.skipped, counts.errors) == (1, 5, 1, 0)
