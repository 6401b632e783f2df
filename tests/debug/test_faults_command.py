# SPDX-License-Identifier: Apache-2.0
"""``kvmpy faults``: what it shows, how it ends, and what it says where it cannot trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmpy.cli.faults import faults
from kvmpy.debug.watch import faults as events
from kvmpy.debug.watch import tracefs
from kvmpy.debug.watch.tracefs import Tracefs, TracefsError
from tests.debug import fake_tracefs as fake
from tests.debug.fake_tracefs import FakeTracefs

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTracefs:
    """A false tracefs in which two events wait."""
    fake_tracefs = FakeTracefs(tmp_path, monkeypatch)
    fake_tracefs.pages[1] = [
        fake.page(
            5_000_000_000,
            fake.short(0, fake.attributes(77, 0x80000, 0x80001, 8)),
            fake.short(1000, fake.fault(77, 0x8000_0008, 1 << 49 | 6, vcpu=2)),
        )
    ]
    monkeypatch.setattr(tracefs, "MOUNTS", (tmp_path,))
    return fake_tracefs


@pytest.fixture
def run() -> Run:
    def invoke(*words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(faults, list(words))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_events_of_a_command(folder: FakeTracefs, run: Run) -> None:
    """Lines with time, thread, address and the decoded error code; the status is the command's."""
    status, out, err = run("--", sys.executable, "-S", "-c", "raise SystemExit(3)")
    first, second = out.splitlines()
    assert status == 3
    assert first.split()[:5] == ["5.000000", "cpu", "1", "tid", "77"]
    assert first.endswith("gpa 0x000080000000  size 0x1000  -> private")
    assert "vcpu 2  address 0x000080000008  rip 0x400123  [W U PRIVATE_ACCESS] user write, page not" in second
    assert second.endswith("access to private memory")
    assert err == "kvmpy faults: 2 events\n"
    assert folder.settings["options/event-fork"] == "1"
    assert folder.left == []


def test_json(folder: FakeTracefs, run: Run) -> None:
    """One object for each event."""
    _, out, _ = run("--json", "--", "true")
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["event"], first["gpa"], first["attributes"]) == ("attributes", 0x8000_0000, 8)
    assert (second["event"], second["error_code"]) == ("pagefault", 1 << 49 | 6)
    assert second["error_bits"] == ["W", "U", "PRIVATE_ACCESS"]


def test_count(folder: FakeTracefs, run: Run) -> None:
    """--count ends after so many events, and the command with it."""
    status, out, err = run("--count", "1", "--", "sleep", "100")
    assert (status, len(out.splitlines())) == (128 + signal.SIGTERM, 1)
    assert err.startswith("kvmpy faults: 1 events\n")


def test_lost(folder: FakeTracefs, run: Run) -> None:
    """What the kernel's buffers lost is told."""
    folder.pages[0] = [fake.page(0, fake.short(0, fake.fault(77, 0, 0)), lost=12)]
    _, _, err = run("--", "true")
    assert err == "kvmpy faults: 3 events, 12 lost\n"


@pytest.mark.parametrize(
    ("options", "advised"), [((), True), (("--mappings",), False)], ids=["plain", "mappings"]
)
def test_no_fault_came(folder: FakeTracefs, run: Run, options: tuple[str, ...], advised: bool) -> None:
    """Silence is explained, and nobody is told to do what was done."""
    folder.pages[1] = []
    status, out, err = run(*options, "--", "true")
    assert (status, out) == (0, "")
    assert "0 events" in err
    assert "has no kvm_page_fault event" in err
    assert ("--mappings works with every KVM" in err) == advised


def test_a_process_that_ends(folder: FakeTracefs, run: Run) -> None:
    """With --pid it ends when the process does."""
    child = subprocess.Popen(["sleep", "0"])
    status, out, _ = run("--pid", str(child.pid))
    assert (status, len(out.splitlines())) == (0, 2)
    assert folder.settings["set_event_pid"] == str(child.pid)
    child.wait(30)


@pytest.mark.parametrize("words", [(), ("--pid", "1", "--", "true")], ids=["neither", "both"])
def test_process_or_command(run: Run, words: tuple[str, ...]) -> None:
    """One of a process and a command is needed."""
    status, _, err = run(*words)
    assert status == 2
    assert "give either" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--pid", str(1 << 30)), f"no process {1 << 30}"),
        (("--", "no-such-command-here"), "no command no-such-command-here"),
    ],
)
def test_nothing_to_watch(folder: FakeTracefs, run: Run, words: tuple[str, ...], text: str) -> None:
    """A process or command that does not exist is an error without an instance."""
    assert run(*words) == (1, "", f"kvmpy faults: {text}\n")
    assert folder.made == []


def test_no_permission(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission: one line that says what helps; the command does not run."""

    def refuse(self: Tracefs) -> Path:
        raise TracefsError("no permission to mount tracefs", "run as root (sudo)")

    monkeypatch.setattr(Tracefs, "_find", refuse)
    status, out, err = run("--", "touch", str(tmp_path / "ran"))
    assert (status, out, list(tmp_path.iterdir())) == (1, "", [])
    assert err == "kvmpy faults: no permission to mount tracefs: run as root (sudo)\n"


def test_a_format_of_the_future(folder: FakeTracefs, run: Run) -> None:
    """An event with other fields is an error that names them."""
    path = folder.root / "events/kvm/kvm_page_fault/format"
    path.write_text(path.read_text().replace("error_code", "code"))
    status, _, err = run("--", "true")
    assert status == 1
    assert "no field error_code" in err
    assert folder.left == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_ended_by_a_signal(number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end it cleanly: no instance, no command is left."""
    try:
        with Tracefs() as real:
            real.instance().close()
            real.format(events.KINDS["faults"].system, events.KINDS["faults"].event)
            instances = set(os.listdir(real.root / "instances"))
    except TracefsError as error:
        pytest.skip(str(error))
    script = "import os; print(os.getpid(), flush=True); import signal; signal.pause()"
    command = [sys.executable, "-m", "kvmpy", "faults", "--", sys.executable, "-S", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        inner = int(child.stdout.readline())
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
    assert err.startswith("kvmpy faults: 0 events")
    assert child.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(inner, 0)
    with Tracefs() as real:
        left = set(os.listdir(real.root / "instances")) - instances
    assert not [name for name in left if name.startswith(f"kvmpy-{child.pid}-")]
