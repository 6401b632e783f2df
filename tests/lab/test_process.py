# SPDX-License-Identifier: Apache-2.0
"""Nothing that a build starts outlives it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import psutil
import pytest

from kvmpy.lab.process import call

# A child with a child of its own, in make's manner; each says who it is.
FAMILY = textwrap.dedent("""
    sh -c 'echo $$ >> {pids}; sleep 600 & echo $! >> {pids}; wait' &
    echo $$ >> {pids}; echo $! >> {pids}
    wait
""")
PARENT = """
import os, subprocess, sys
from kvmpy.lab.process import call
call(["sh", "-c", sys.argv[1]], stdout=sys.stdout.buffer, stderr=subprocess.STDOUT, seconds=600,
     environment=os.environ, tick=lambda _: print("tick", flush=True))
"""


def _pids(file: Path) -> list[int]:
    return sorted({int(word) for word in file.read_text().split()}) if file.exists() else []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_parent_that_is_killed_takes_all_descendants_along(tmp_path: Path, number: signal.Signals) -> None:
    pids = tmp_path / "pids"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, FAMILY.format(pids=pids)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        for _ in parent.stdout:
            if len(_pids(pids)) >= 3:
                break
        family = [psutil.Process(pid) for pid in _pids(pids)]
        parent.send_signal(number)
        parent.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_time_is_limited_and_the_descendants_end_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    family: list[psutil.Process] = []

    def tick(_passed: float) -> None:
        if len(result := _pids(pids)) >= 3 and not family:
            family.extend(psutil.Process(pid) for pid in result)

    command = ["sh", "-c", FAMILY.format(pids=pids)]
    with (tmp_path / "out").open("wb") as out:
        limited = partial(
            call, command, stdout=out, stderr=subprocess.STDOUT, environment=os.environ, tick=tick
        )
        with pytest.raises(subprocess.TimeoutExpired):
            limited(seconds=3.0)
    assert len(family) == 3
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_status_is_the_commands(tmp_path: Path, script: str, status: int) -> None:
    with (tmp_path / "out").open("wb") as out:
        got = call(
            ["sh", "-c", script], stdout=out, stderr=subprocess.STDOUT, seconds=60, environment=os.environ
        )
    assert got == status


def test_output_and_folder_are_those_asked_for(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        command = ["sh", "-c", 'pwd; echo "$NAME" >&2']
        call(command, stdout=out, stderr=err, seconds=60, environment={"NAME": "a b"}, folder=tmp_path)
    assert (tmp_path / "out").read_text() == f"{tmp_path}\n"
    assert (tmp_path / "err").read_text() == "a b\n"
