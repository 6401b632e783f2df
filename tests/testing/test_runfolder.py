# SPDX-License-Identifier: Apache-2.0
"""A run on a machine that may crash: what is on the disk when it does, and who cannot be ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from kvmpy.testing import ending, journal, machine, runfolder
from kvmpy.testing.machine import KernelLog, KernelLogFollower
from kvmpy.testing.results import Results
from kvmpy.testing.runfolder import RunFolder, Step, pack_dead, run_step
from kvmpy.testing.supervisor import supervise
from tests.testing.support import Suite

# A parent waits in uninterruptible sleep until what it vforked ends or runs another program.
IN_D = """
#include <unistd.h>
int main(void)
{
	if (vfork() == 0) {
		write(1, "x", 1);
		for (;;)
			pause();
	}
	return 0;
}
"""
HANGS = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print('on', flush=True); "


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "made.tar.gz") as run_folder:
        yield run_folder


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sleeper") / "sleeper"
    subprocess.run(["gcc", "-w", "-x", "c", "-o", root, "-"], input=IN_D.encode(), check=True, timeout=60)
    return root


@pytest.fixture
def deaf(sleeper: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process in uninterruptible sleep that no signal of this process reaches."""
    with subprocess.Popen([sleeper], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"x"  # from the child of vfork: its parent waits in the kernel now
        family = psutil.Process(child.pid).children()
        try:
            with monkeypatch.context() as patch:
                for kind in (subprocess.Popen, psutil.Process):
                    for name in ("terminate", "kill"):
                        patch.setattr(kind, name, lambda _: None)
                yield child
        finally:
            for process in family:
                process.kill()
            child.kill()


def python(name: str, code: str, seconds: float = 60.0) -> Step:
    return Step(name, [sys.executable, "-c", code], f"{name}.txt", seconds)


def notes(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.path / runfolder.STEPS).read_text().splitlines()]


def run(folder: RunFolder, step: Step, **options: float) -> tuple[int, bytes, list[str]]:
    shown = bytearray()
    said: list[str] = []
    return run_step(folder, step, said.append, show=shown.extend, **options), bytes(shown), said


# Steps.


def test_what_a_step_prints_is_on_the_disk_as_it_comes(folder: RunFolder) -> None:
    os.mkfifo(folder.path / "go")
    code = f"print('first', flush=True); open({str(folder.path / 'go')!r}).read(); print('second')"
    seen: list[bytes] = []

    def show(chunk: bytes) -> None:
        seen.append((folder.path / "slow.txt").read_bytes())
        if len(seen) == 1:
            (folder.path / "go").write_bytes(b"")

    assert run_step(folder, python("slow", code), print, show=show) == 0
    assert seen[0].startswith(b"first")
    assert b"second" not in seen[0]
    assert seen[-1] == b"first\nsecond\n"
    assert (folder.path / "slow.txt").stat().st_mode & 0o777 == 0o600
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_every_append_reaches_the_disk(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    folder.append("a", b"one")
    folder.append("a", b"two")
    assert synced == [3, 6]


def test_a_step_that_hangs_is_ended_and_the_next_one_runs(folder: RunFolder) -> None:
    code = HANGS + "import threading; threading.Event().wait(100)"
    status, shown, said = run(folder, python("hangs", code, 1.0), grace=0.2)
    assert (status, shown) == (-9, b"on\n")
    assert said == ["step hangs: no end after 1 s; it is ended now"]
    assert notes(folder)[-1]["ended"] == "step hangs: no end after 1 s"
    assert run(folder, python("next", "print('ran')")) == (0, b"ran\n", [])


def test_a_step_may_end_in_order(folder: RunFolder) -> None:
    code = (
        "import signal, sys, threading\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "try: threading.Event().wait(100)\nfinally: print('what was left to say')\n"
    )
    status, shown, _ = run(folder, python("slow", code, 2.0), grace=60.0)
    assert (status, shown) == (7, b"what was left to say\n")


def test_what_a_step_started_is_ended_with_it(folder: RunFolder) -> None:
    child = f"{HANGS}import threading; threading.Event().wait(100)"
    code = (
        "import subprocess, sys, threading\n"
        f"made = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(made.pid, flush=True); threading.Event().wait(100)\n"
    )
    status, shown, _ = run(folder, python("parent", code, 3.0), grace=0.2, patience=20.0)
    assert status == -15
    pid = next(int(word) for word in shown.split() if word.isdigit())
    assert not psutil.pid_exists(pid)


def test_a_step_ends_although_somebody_holds_its_output(folder: RunFolder) -> None:
    child = "import time, threading; threading.Event().wait(100)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    status, shown, said = run(folder, python("leaves", code))
    assert (status, said) == (0, [])
    psutil.Process(int(shown)).kill()


# Who cannot be ended.


def test_a_process_in_uninterruptible_sleep_is_reported_and_left_behind(
    deaf: subprocess.Popen[bytes],
) -> None:
    left = ending.end(deaf, grace=0.1, patience=0.3)
    assert deaf.returncode is None
    assert len(left) == 2  # and what it vforked
    assert left[0].startswith(f"process {deaf.pid} (sleeper): in uninterruptible sleep in ")
    assert left[1].endswith("(sleeper): SIGKILL did not end it")


def test_where_a_thread_sleeps_is_read_from_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_PROC", tmp_path)
    for tid, state, place in ((7, "S", "futex_wait"), (8, "D", "sev_do_cmd"), (9, "R", "0")):
        task = tmp_path / "7" / "task" / str(tid)
        task.mkdir(parents=True)
        (task / "stat").write_text(f"{tid} (x) D (y) {state} 1 7 7")
        (task / "wchan").write_text(place)
    assert ending.sleeps_in(7) == "sev_do_cmd"
    (tmp_path / "7/task/8/wchan").write_text("0")
    assert ending.sleeps_in(7) == "an unknown place"
    (tmp_path / "7/task/8/stat").write_text("8 (x) S 1 7 7")
    assert ending.sleeps_in(7) is None
    assert ending.sleeps_in(99) is None


def test_a_step_that_cannot_be_ended_is_left_behind(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[subprocess.Popen[bytes]] = []

    def end(child: subprocess.Popen[bytes], **_: float) -> list[str]:
        gone.append(child)
        return ["process 1 (x): in uninterruptible sleep in sev_do_cmd"]

    monkeypatch.setattr(ending, "end", end)
    code = "import threading; print('on', flush=True); threading.Event().wait(100)"
    status, shown, said = run(folder, python("stuck", code, 2.0))
    assert (status, shown) == (-9, b"on\n")
    assert said[-1] == "left behind: process 1 (x): in uninterruptible sleep in sev_do_cmd"
    assert notes(folder)[-1]["left_behind"] == ["process 1 (x): in uninterruptible sleep in sev_do_cmd"]
    gone[0].kill()
    gone[0].wait(60)


def test_a_test_that_cannot_be_ended_is_lost_and_the_rest_goes_on(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(suite.folder)
    suite.add(
        "test_a.py",
        "import pytest, signal, threading\n"
        "@pytest.mark.timeout(1)\ndef test_stuck():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "    threading.Event().wait(100)\n"
        "def test_after(): pass\n",
    )
    gone: list[subprocess.Popen[bytes]] = []

    def end(child: subprocess.Popen[bytes], **_: float) -> list[str]:
        gone.append(child)
        return [f"process {child.pid} (python): in uninterruptible sleep in sev_do_cmd"]

    monkeypatch.setattr(ending, "end", end)
    said: list[str] = []
    status = supervise(suite.arguments(), said.append, grace=1.0)
    outcome = suite.outcome(status, capfd.readouterr().out)
    assert outcome.verdicts() == {"test_stuck": "lost", "test_after": "pass"}
    assert f"left behind: process {gone[0].pid} (python)" in outcome.reason("test_stuck")
    assert gone[0].poll() is None
    gone[0].kill()
    gone[0].wait(60)


# The journal and the folder.


def journaled(path: Path, config: Any) -> journal.Journal:
    keeper = journal.Journal(config, path, 5, Results("host"))
    for name in ("a", "b"):
        item: Any = SimpleNamespace(
            nodeid=f"t.py::{name}", location=("t.py", 0, name), get_closest_marker=lambda _: None
        )
        keeper.pytest_runtest_protocol(item)
        keeper.pytest_runtest_logfinish(item.nodeid)
    keeper.pytest_unconfigure()
    keeper.close()
    return keeper


@pytest.mark.parametrize("kept", [True, False])
def test_a_kept_journal_reaches_the_disk_with_every_test(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def sync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").read_text())

    monkeypatch.setattr(os, "fsync", sync)
    path = tmp_path / "journal"
    if kept:
        journal.create_kept(path)
    config: Any = SimpleNamespace(getini=lambda _: "1", getoption=lambda *_: "no")
    journaled(path, config)
    assert [text.splitlines()[-1].split('"')[3] for text in synced] == (
        ["kept", "start", "start", "end"] if kept else []
    )
    assert journal.read(path).kept is kept
    if kept:
        with pytest.raises(FileExistsError):
            journal.create_kept(path)


def test_a_run_that_goes_on_is_not_packed(folder: RunFolder) -> None:
    said: list[str] = []
    assert pack_dead(folder.path.parent, said.append) == []
    assert folder.path.is_dir()


def test_somebody_elses_folder_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path / "made.tar.gz") as folder:
        pass
    (tmp_path / "other.running").mkdir()  # no lock: not one of kvmpy's
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert pack_dead(tmp_path, print) == []
    monkeypatch.undo()
    assert pack_dead(tmp_path, print) == [tmp_path / "made.tar.gz"]
    assert not folder.path.exists()


def test_the_kernels_last_words_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pstore = tmp_path / "pstore"
    pstore.mkdir()
    monkeypatch.setattr(machine, "PSTORE", pstore)
    for name, age in (("dmesg-efi-1", 60), ("dmesg-efi-0", -3600)):
        (pstore / name).write_text("Oops#1 Part1\nfault of jdoe\n")
        with RunFolder(tmp_path / "made.tar.gz") as folder:
            folder.append(runfolder.JOURNAL, b"")
        since = (folder.path / runfolder.LOCK).stat().st_mtime
        os.utime(pstore / name, (since + age, since + age))
        pack_dead(tmp_path, print)
        with tarfile.open(tmp_path / "made.tar.gz") as archive:
            inside = archive.getnames()
        (tmp_path / "made.tar.gz").unlink()
        assert "made/pstore/dmesg-efi-1" in inside
        assert "made/pstore/dmesg-efi-0" not in inside


def test_the_kernels_messages_are_kept_as_they_come(tmp_path: Path) -> None:
    fifo = tmp_path / "kmsg"
    os.mkfifo(fifo)
    log = KernelLog(fifo)
    kept: list[bytes] = []
    came = threading.Event()

    def keep(data: bytes) -> None:
        kept.append(data)
        came.set()

    with open(fifo, "wb", buffering=0) as kernel, KernelLogFollower(log, keep):
        kernel.write(b"3,1,5000000,-;SEV: the secure processor does not answer\n")
        assert came.wait(30)
    assert kept == [b"[    5.000000] SEV: the secure processor does not answer\n"]


@pytest.mark.parametrize("whole", [True, False], ids=["all-killed", "parent-killed"])
def test_what_a_killed_run_left_is_packed_by_the_next_call(whole: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    (tmp_path / "test_two.py").write_text(
        "import threading\ndef test_before(): pass\n"
        "def test_dies():\n    open('started', 'w').close()\n    threading.Event().wait(100)\n"
        "def test_after(): pass\n"
    )
    arguments = [sys.executable, "-m", "kvmpy", "hardware", "--require", "", "-o", "made.tar.gz"]
    common: dict[str, Any] = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*arguments, "--no-bench", "test_two.py"], **common) as process:
        (tmp_path / "started").read_bytes()  # waits until the test opens its end
        everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(everybody) == 4
        # Together, as a panic does it; or the first alone: then its children end with it.
        for each in everybody if whole else everybody[:1]:
            each.suspend() if whole else each.kill()
        for each in everybody if whole else []:
            each.kill()
        _, alive = psutil.wait_procs(everybody[1:], timeout=60)
        assert alive == []
    left = {path.name for path in (tmp_path / "made.running").iterdir()}
    assert {
        "machine.json",
        "platform.json",
        "boot.txt",
        "dmesg.txt",
        "doctor.txt",
        "run.txt",
        "journal",
    } <= left
    # A suite whose parent alone died has ended in order.
    assert ("verdicts.json" in left) == (not whole)
    packed = subprocess.run([*arguments[:-1], "other.tar.gz", "--pack"], timeout=110, check=True, **common)
    assert packed.returncode == 0
    assert not (tmp_path / "made.running").exists()
    assert not (tmp_path / "other.tar.gz").exists()
    with tarfile.open(tmp_path / "made.tar.gz") as tar:
        names = {name.removeprefix("made/") for name in tar.getnames()}
        verdicts = json.load(tar.extractfile("made/verdicts.json"))  # type: ignore[arg-type]
        ktap = tar.extractfile("made/verdicts.ktap").read().decode()  # type: ignore[union-attr]
    assert left - {"lock", "journal", "records"} <= names
    verdict_of = {entry["id"].partition("::")[2]: entry["verdict"] for entry in verdicts["tests"]}
    assert verdict_of == {"test_before": "pass", "test_dies": "lost"}
    assert verdicts["host"]["kernel"].startswith(os.uname().release)
    assert "test_before" in ktap
    [lost] = [entry for entry in verdicts["tests"] if entry["verdict"] == "lost"]
    assert not whole or lost["reason"] == runfolder.DIED
