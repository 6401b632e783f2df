# SPDX-License-Identifier: Apache-2.0
"""A fleet on this machine, of the real commands, with tests of its own that do not need KVM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from tests.ended import Ended

pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parents[2]
MARK = "KVMPY_TEST_FLEET"
SECONDS = 110.0


class Fleet:
    """Starts the commands, *within* another one if there is one; all of their processes have a mark."""

    def __init__(self, folder: Path, bytecode: Path) -> None:
        self.folder = folder
        (folder / "cache" / "kvmpy").mkdir(parents=True)
        (folder / "cache" / "kvmpy" / "pycache").symlink_to(bytecode)
        self.journal = folder / "journal.jsonl"
        self.within: Sequence[str] = ()
        self._mark = uuid4().hex
        self._processes: list[subprocess.Popen[str]] = []

    def tests(self, text: str, name: str = "test_own.py") -> None:
        """Write a file of tests."""
        head = "import os\nimport signal\nfrom pathlib import Path\n\nimport psutil\nimport pytest\n"
        (self.folder / name).write_text(head + text)

    def start(self, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start `kvmpy fleet` with *words*."""
        process = subprocess.Popen(
            [*self.within, sys.executable, "-m", "kvmpy", "fleet", *words],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": str(self.folder / "cache"),
                "FLEET_FOLDER": str(self.folder),
                MARK: self._mark,
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        return process

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start a run of all tests in the folder."""
        reports = ["--json", "out.json", "--ktap", "out.ktap", "--journal", str(self.journal)]
        what = [] if "--resume" in words else ["./test_own.py"]
        return self.start("run", *reports, *words, *what)

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Wait for the end of a command."""
        text, _ = process.communicate(timeout=SECONDS)
        return Ended(process.returncode, text, self.folder)

    def run(self, *words: str) -> Ended:
        """Run all tests in the folder, and see that nothing is left."""
        ended = self.end(self.begin(*words))
        assert self.left() == []
        return ended

    def events(self) -> list[dict[str, Any]]:
        """Return what the journal holds."""
        lines = self.journal.read_text().splitlines()
        return [json.loads(line) for line in lines if line]

    def starts(self) -> Counter[str]:
        """Return how often each test began."""
        begun = [event for event in self.events() if event["event"] == "start"]
        return Counter(f"{event['column']} {event['nodeid'].rpartition('::')[2]}".strip() for event in begun)

    def processes(self) -> list[psutil.Process]:
        """Return what lives of this fleet, this process aside."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def left(self) -> list[str]:
        """Return what is left after a moment, in words."""
        psutil.wait_procs(self.processes(), timeout=15)
        return [" ".join(process.cmdline()) for process in self.processes()]

    def serve(self, listen: str = "127.0.0.1") -> subprocess.Popen[str]:
        """Serve a fleet, and return when it has an address."""
        process = self.start("serve", "--listen", listen, "--port", "0")
        self.wait_for(self.served / "address")
        return process

    @property
    def served(self) -> Path:
        """Where the certificate and the address are."""
        return self.folder / "cache" / "kvmpy" / "fleet"

    def join(self, name: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Let a host join."""
        return self.start("join", "--name", name, *words, environment=environment)

    def hosts(self) -> str:
        """Return what `kvmpy fleet hosts` prints."""
        return self.end(self.start("hosts")).text

    def joined(self, number: int) -> None:
        """Wait until so many hosts have joined."""
        limit = time.monotonic() + SECONDS
        while f": {number} host" not in (text := self.end(self.start("status")).text):
            assert time.monotonic() < limit, text

    def wait_for(self, path: Path) -> None:
        """Wait until there is a file."""
        limit = time.monotonic() + SECONDS
        while not path.exists():
            assert time.monotonic() < limit, f"there is no {path}"
            os.sched_yield()

    def close(self) -> None:
        """Leave nothing behind, whatever became of the test."""
        for process in self.processes():
            process.kill()
        for child in self._processes:
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


@pytest.fixture(scope="session")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sessions compile, for all of them."""
    return tmp_path_factory.mktemp("bytecode")


@pytest.fixture
def fleet(tmp_path: Path, bytecode: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, bytecode)
    yield fleet
    fleet.close()
