# SPDX-License-Identifier: Apache-2.0
"""Programs to trace, and `kvmpy trace` as a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from kvmpy.testing import host

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "programs" / "kvm_calls.c"
TIMEOUT = 60


def need_kvm() -> None:
    """Skip where there is no KVM to trace."""
    missing = host.kvm_missing()
    if missing is not None:
        pytest.skip(f"{missing.what}: {missing.how}")


def need_gcc() -> None:
    """Skip where nothing can be compiled."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed (apt-get install gcc libc6-dev)")


def compile_program(folder: Path, *flags: str, source: Path = SOURCE) -> Path:
    """Compile a program of many modes."""
    need_gcc()
    target = folder / source.stem
    command = [
        "gcc",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        *flags,
        *([f"-I{ROOT / 'kvmpy/uapi/cdef'}"] if source == SOURCE else []),
        "-pthread",
    ]
    done = subprocess.run(
        [*command, "-o", target, source], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    if done.returncode and "-static" in flags and "cannot find" in done.stderr:
        pytest.skip("no static C library (apt-get install libc6-dev)")
    assert not done.returncode, done.stderr
    return target


@lru_cache
def kvmpy_command() -> tuple[str, ...]:
    """Return how kvmpy is started."""
    return (sys.executable, "-m", "kvmpy")


def kvmpy(*arguments: str | Path, timeout: float = TIMEOUT, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run kvmpy to its end."""
    return subprocess.run(
        [*kvmpy_command(), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        cwd=more.pop("cwd", ROOT),
        stdin=subprocess.DEVNULL,
        **more,
    )


class Trace:
    """A finished `kvmpy trace --json`: ``status``, ``rows`` (ioctls), ``notes`` (other lines)."""

    def __init__(self, *arguments: str | Path, **more: Any) -> None:
        # In a file of its own: what the program says is on standard error, too.
        with tempfile.NamedTemporaryFile("r", prefix="kvmpy-test-", suffix=".json") as file:
            done = kvmpy("trace", "--json", "-t", file.name, *arguments, **more)
            every = [json.loads(line) for line in file]
        self.status = done.returncode
        self.stdout = done.stdout
        self.other = done.stderr.splitlines()
        self.rows = [row for row in every if "ioctl" in row]
        self.notes = [row for row in every if "note" in row]

    def named(self, name: str) -> list[dict[str, Any]]:
        """Return the ioctls of one name."""
        return [row for row in self.rows if row["ioctl"].split()[0] == name]

    def calls(self) -> list[tuple[str, str, int, str]]:
        """Return name, target, result and errno of all ioctls."""
        return [
            (row["ioctl"].split()[0], row["target"], row["result"], row.get("errno", "")) for row in self.rows
        ]
