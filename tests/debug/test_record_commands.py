# SPDX-License-Identifier: Apache-2.0
"""kvmpy replay, shrink and repro on the command line, and --record of a test session."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvmpy import Kvm
from kvmpy.cli.main import main
from kvmpy.debug.record.events import Ioctl
from kvmpy.debug.record.format import FileHeader
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.recorder import Recorder
from kvmpy.testing.recording import file_name
from tests.debug.scenarios import SCENARIOS


def call(*arguments: str | Path) -> Result:
    """Call kvmpy with *arguments*."""
    return CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.fixture
def refused(kvm: Kvm, tmp_path: Path) -> Path:
    """A record of system registers that are refused."""
    path = tmp_path / "refused.rec"
    with Recorder(path), Kvm() as own:
        SCENARIOS["set_sregs"](own)
    return path


def test_replay(refused: Path) -> None:
    """A record that repeats has exit status 0; -v shows every ioctl with its result."""
    done = call("replay", "-v", refused)
    assert done.exit_code == 0
    assert re.search(r"KVM_SET_SREGS +-1 EINVAL", done.output)
    assert "0 with a different result" in done.output


def test_replay_shows_the_difference(refused: Path) -> None:
    """A difference is shown side by side with the decoded argument; exit status 1."""
    record = Record.load(refused)
    last = record.ioctls[-1]
    assert isinstance(last.what, Ioctl)
    wrong = last.but(replace(last.what, errno=1))
    entries = [wrong if each is last else each for each in record.entries]
    record.with_entries(entries).save(refused)
    done = call("replay", "--stop-on-difference", refused)
    assert done.exit_code == 1
    assert re.search(r"ioctl \d+: KVM_SET_SREGS on vm\d+/vcpu0", done.output)
    assert re.search(r"result +-1 EPERM +-1 EINVAL", done.output)
    assert "cr4=0x8" in done.output


def test_until(refused: Path) -> None:
    """--until stops behind that ioctl; one that is not there is refused."""
    assert "3 ioctls replayed" in call("replay", "--until", "3", refused).output
    done = call("replay", "--until", "99", refused)
    assert done.exit_code == 1
    assert "there is no ioctl 99" in done.output


def test_shrink(refused: Path, tmp_path: Path) -> None:
    """The result goes where it should, and shows the same."""
    target = tmp_path / "small.rec"
    done = call("shrink", refused, "--until", "errno==EINVAL at KVM_SET_SREGS", "-o", target)
    assert done.exit_code == 0, done.output
    assert len(Record.load(target).ioctls) == 3
    assert "attempts" in done.output


def test_shrink_what_is_not_there(refused: Path) -> None:
    """A condition that does not hold for the record itself is an error."""
    done = call("shrink", refused, "--until", "errno==EPERM")
    assert done.exit_code == 1
    assert "does not reproduce here" in done.output


@pytest.mark.parametrize("arguments", [("--until", "nonsense"), ("--until", "errno==1", "--test", "true")])
def test_shrink_usage(arguments: tuple[str, ...], refused: Path) -> None:
    """Conditions that make no sense are errors of usage."""
    assert call("shrink", refused, *arguments).exit_code == 2


def test_repro(refused: Path, tmp_path: Path) -> None:
    """The command writes the file, says how to compile it, and that works."""
    target = tmp_path / "bug.c"
    done = call("repro", refused, "-o", target)
    assert done.exit_code == 0, done.output
    command = next(line for line in done.output.splitlines() if line.startswith("gcc "))
    ran = subprocess.run(
        ["/bin/sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout == "reproduced\n"
    text = target.read_text()
    assert ".cr4 = 0x8000000000000000ULL," in text
    assert "KVM_SET_REGS" not in text
    everything = call("repro", refused, "--all")
    assert "KVM_SET_REGS" in everything.output


def test_bad_files(tmp_path: Path) -> None:
    """Every command says what is wrong with a file, and nothing else."""
    newer, other, none = tmp_path / "newer.rec", tmp_path / "other.rec", tmp_path / "none.rec"
    newer.write_bytes(FileHeader(major=7).pack())
    other.write_bytes(FileHeader(arch=183).pack())
    none.write_bytes(b"text")
    empty = tmp_path / "empty.rec"
    empty.write_bytes(FileHeader().pack())
    for command in ("replay", "shrink", "repro"):
        for path, says in (
            (newer, "format version 7.0"),
            (other, "ELF machine 183"),
            (none, "not a record"),
            (empty, "no ioctl that returned"),
            (tmp_path / "missing.rec", "No such file"),
        ):
            done = call(command, path)
            assert done.exit_code == 1, (command, path, done.output)
            assert says in done.output
            assert "Traceback" not in done.output


def test_damaged_record(refused: Path) -> None:
    """Of a damaged record that much is replayed as could be read, and it says where it ends."""
    data = bytearray(refused.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    refused.write_bytes(bytes(data))
    done = call("replay", refused)
    assert done.exit_code == 0
    assert re.search(r"\d+ ioctls; at byte \d+: ", done.output)


SESSION = """
import os, signal
import pytest

def test_good(kvm):
    assert kvm.check_extension(0) >= 0

def test_bad(vm):
    vm.create_vcpu()
    assert vm.check_extension(0) == -5

def test_without_kvm():
    pass

def test_skipped(kvm):
    pytest.skip("not today")
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("mode", "kept"), [("failures", {"test_bad"}), ("all", {"test_bad", "test_good"})])
def test_record_option(mode: str, kept: set[str], kvm: Kvm, pytester: pytest.Pytester) -> None:
    """--record keeps the records of failures or of all tests with KVM, and failures offer the command."""
    pytester.makepyfile(test_it=SESSION)
    done = pytester.runpytest_subprocess(f"--record={mode}", "--record-dir=out", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=2, failed=1, skipped=1)
    files = {path.name for path in (pytester.path / "out").iterdir()}
    assert files == {file_name(f"test_it.py::{name}") for name in kept}
    done.stdout.re_match_lines([r"kvmpy repro .*test_bad\.rec -o bug\.c"])
    record = Record.load(pytester.path / "out" / file_name("test_it.py::test_bad"))
    assert record.complete
    assert record.host["test"].endswith("test_bad")


@pytest.mark.timeout(600)
def test_record_of_a_test_that_was_killed(kvm: Kvm, pytester: pytest.Pytester) -> None:
    """A test that takes the process with it leaves its record."""
    pytester.makepyfile(
        test_it="import os\ndef test_dies(vm):\n    vm.create_vcpu()\n    os.kill(os.getpid(), 9)\n"
    )
    done = pytester.runpytest_subprocess("--record=failures", "--record-dir=out", "-p", "no:cacheprovider")
    assert done.ret == -signal.SIGKILL
    record = Record.load(pytester.path / "out" / file_name("test_it.py::test_dies"))
    assert not record.complete
    assert len(record.ioctls) >= 4


@pytest.mark.timeout(600)
def test_record_dir_that_cannot_be(pytester: pytest.Pytester) -> None:
    """A folder that cannot be made is an error of usage."""
    pytester.makepyfile("def test_it():\n    pass\n")
    (pytester.path / "file").write_text("")
    done = pytester.runpytest_subprocess("--record=all", "--record-dir=file/below")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*--record-dir*"])
    assert os.path.isfile(pytester.path / "file")
