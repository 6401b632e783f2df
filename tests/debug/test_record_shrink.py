# SPDX-License-Identifier: Apache-2.0
"""Records are cut down to what a condition needs, and no further."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kvmpy import Kvm
from kvmpy.cli.main import main
from kvmpy.core.address import Gpa
from kvmpy.debug.record.command import command_of
from kvmpy.debug.record.condition import (
    Condition,
    ConditionError,
    SameOutcome,
    ShellTest,
    UntilExpression,
    parse,
)
from kvmpy.debug.record.events import Ioctl, Memory
from kvmpy.debug.record.format import MAGIC
from kvmpy.debug.record.model import Record, request_name
from kvmpy.debug.record.prune import target_of
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.script import build
from kvmpy.debug.record.shrink import Shrinker, ddmin, leaves
from kvmpy.debug.record.worker import Answer, Player, Replayed
from kvmpy.owned import sweep
from kvmpy.uapi.structs import kvm_sregs
from tests.debug.record_scenarios import machine
from tests.debug.scenarios import SCENARIOS


@given(st.sets(st.integers(0, 60)))
def test_ddmin_finds_what_is_needed(needed: set[int]) -> None:
    """Of many things exactly those remain without which it does not work."""
    assert set(ddmin(range(61), lambda part: needed <= set(part))) == needed


@given(st.integers(0, 30), st.integers(0, 30))
def test_ddmin_either(one: int, other: int) -> None:
    """Where either of two things suffices, one remains."""
    kept = ddmin(range(31), lambda part: one in part or other in part)
    assert len(kept) == 1
    assert kept[0] in (one, other)


def record_with_noise(folder: Path) -> Path:
    """Record system registers that are refused, among much else."""
    path = folder / "a.rec"
    with Recorder(path), Kvm() as own, machine(own, b"\xb0\x01\xe6\x10\xf4", vcpus=2) as vm:
        vm.add_slot(Gpa(0x100_0000), 4096)
        vm.vcpus[0].run(5)
        vm.vcpus[1].cpuid.set(own.get_supported_cpuid())
        SCENARIOS["set_sregs"](own)
        own.check_extension(1)
    return path


def test_shrink_to_an_error(kvm: Kvm, tmp_path: Path) -> None:
    """What is left of a record with a refused KVM_SET_SREGS: a VM, a vCPU, one wrong field."""
    record = Record.load(record_with_noise(tmp_path))
    said: list[str] = []
    with Player() as player:
        condition = UntilExpression(player, parse("errno==EINVAL at KVM_SET_SREGS"))
        with Shrinker(record, condition, progress=said.append) as shrinker:
            assert shrinker.holds()
            small = shrinker.run()
    assert [request_name(e.what) for e in small.ioctls] == [
        "KVM_CREATE_VM",
        "KVM_CREATE_VCPU",
        "KVM_SET_SREGS",
    ]
    assert not any(isinstance(e.what, Memory) for e in small.entries)
    last = small.ioctls[-1].what
    assert isinstance(last, Ioctl)
    sregs = kvm_sregs.from_bytes(last.argument_in or b"")
    assert sum(1 for start, size in leaves(sregs) if any(sregs.to_bytes()[start : start + size])) == 1
    assert said[0].startswith("ioctls: 3 ioctls")


def test_memory_that_matters(kvm: Kvm, tmp_path: Path) -> None:
    """Of a page full of code and data, what the guest executes and reads remains."""
    path = tmp_path / "a.rec"
    with Recorder(path), Kvm() as own, machine(own, b"\xa0\x00\x30\xe6\x10\xf4".ljust(4096, b"\x90")) as vm:
        for page in range(2, 12):
            vm.memory.write(Gpa(page * 4096), bytes([page]) * 4096)
        vm.vcpus[0].run(5)
    record = Record.load(path)
    with Player() as player:
        order = target_of(build(record)).entry.order
        with Shrinker(record, SameOutcome(player, order)) as shrinker:
            small = shrinker.run()
    left = [page for page in small.pages.values() if any(page)]
    used = {i for e in small.entries if isinstance(e.what, Memory) for i in e.what.ids if i}
    assert len(used) == 2
    assert sum(4096 - small.page(i).count(0) for i in used) <= 48
    assert left


def test_attempts_are_bounded(kvm: Kvm, tmp_path: Path) -> None:
    """No more attempts are made than were allowed, and the best so far is what remains."""
    record = Record.load(record_with_noise(tmp_path))
    with Player() as player:
        condition = UntilExpression(player, parse("errno==EINVAL at KVM_SET_SREGS"))
        with Shrinker(record, condition, limit=5) as shrinker:
            small = shrinker.run()
            assert shrinker.attempts == 5
    assert len(small.ioctls) <= len(record.ioctls)


class Interrupted(Condition):
    """Holds for a few records that are not empty, and then Ctrl-C comes."""

    def __init__(self) -> None:
        self.left = 6

    def holds(self, path: str) -> bool:
        """Count down."""
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return bool(Record.load(path).ioctls)


def test_interrupted(kvm: Kvm, tmp_path: Path) -> None:
    """Ctrl-C leaves the best record so far."""
    record = Record.load(record_with_noise(tmp_path))
    with Shrinker(record, Interrupted()) as shrinker:
        with pytest.raises(KeyboardInterrupt):
            shrinker.run()
        assert len(shrinker.best.entries) < len(record.entries)


ENDS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@contextmanager
def searching(*arguments: str | Path, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Give a command that has begun to minimise."""
    command = [sys.executable, "-m", "kvmpy", *map(str, arguments)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **more
    ) as child:
        try:
            assert child.stderr is not None
            next(line for line in child.stderr if "attempts" in line)
            yield child
        finally:
            child.kill()


@ENDS
def test_a_signal_keeps_the_smallest_record_so_far(kvm: Kvm, tmp_path: Path, number: int) -> None:
    del kvm
    record, small = record_with_noise(tmp_path), tmp_path / "small.rec"
    # Each attempt takes long enough to be in the middle of one.
    with searching("shrink", record, "-o", small, "--test", "sleep 0.2; test -s {}") as child:
        child.send_signal(number)
        assert child.wait(60) == 128 + number
    assert len(Record.load(small).entries) < len(Record.load(record).entries)
    assert not list(tmp_path.glob(".small*"))


@ENDS
def test_a_signal_keeps_the_reproducer(kvm: Kvm, tmp_path: Path, number: int) -> None:
    del kvm
    with searching("repro", record_with_noise(tmp_path), "-o", tmp_path / "bug.c") as child:
        child.send_signal(number)
        assert child.wait(60) in (128 + number, 0)  # 0: it was through already
    assert "KVM_SET_SREGS" in (tmp_path / "bug.c").read_text()


def test_a_target_that_is_no_file(kvm: Kvm, tmp_path: Path) -> None:
    """A folder is refused before the work; what is no regular file is written, and stays what it is."""
    del kvm
    record = record_with_noise(tmp_path)
    for command in ("shrink", "repro"):
        refusal = CliRunner().invoke(main, [command, str(record), "-o", str(tmp_path)])
        assert refusal.exit_code == 2
        assert "is a directory" in refusal.output
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    Record.load(record).save(fifo)
    reader.join(30)
    assert fifo.is_fifo()
    assert read[0].startswith(MAGIC)


def test_a_search_that_was_killed_leaves_its_folder_to_the_next(
    kvm: Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del kvm
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    with searching(
        "shrink", record_with_noise(tmp_path), "--test", "sleep 0.2; test -s {}", env=environment
    ) as child:
        child.kill()
        child.wait(60)
    assert list((tmp_path / "tmp").glob("kvmpy-shrink-*"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    end = time.monotonic() + 30
    while list((tmp_path / "tmp").glob("kvmpy-shrink-*")):
        assert time.monotonic() < end
        sweep()  # its children, which hold the lock, end a moment later


def test_shell_test(tmp_path: Path) -> None:
    """A command decides by its exit status, with the path where it wants it; one that hangs says no."""
    record = tmp_path / "a.rec"
    record.write_bytes(b"x")
    assert ShellTest("test -s").holds(str(record))
    assert ShellTest("test -s {} -a 1 = 1").holds(str(record))
    assert not ShellTest("test -d").holds(str(record))
    assert not ShellTest("read x < /dev/zero; :", timeout=0.05).holds(str(record))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("errno=EINVAL", "expected errno"),
        ("errno==EWHAT", "not a number, errno or constant"),
        ("errno==EINVAL at KVM_WHAT", "not an ioctl"),
        ("", "expected errno"),
        ("errno==1 and", "expected errno"),
    ],
)
def test_expressions_that_are_none(text: str, says: str) -> None:
    """An expression that cannot be understood is refused with what was expected."""
    with pytest.raises(ConditionError, match=says):
        parse(text)


def test_expression_terms() -> None:
    """Terms are joined by "and"; exits and errors have their names."""
    terms = parse("result < 0 and errno == EFAULT and exit == KVM_EXIT_MEMORY_FAULT at KVM_RUN")
    assert [(t.field, t.value) for t in terms.terms] == [("result", 0), ("errno", 14), ("exit", 39)]
    assert terms.ioctl == "KVM_RUN"


def test_expressions_about_the_secure_processor() -> None:
    """A SEV command stands for its ioctl, and the firmware's status is compared by name."""
    terms = parse("errno==EIO and firmware==SEV_RET_INVALID_PARAM at KVM_SEV_SNP_LAUNCH_UPDATE")
    update = Replayed(
        7, "KVM_MEMORY_ENCRYPT_OP", -1, errno.EIO, None, False, None, "KVM_SEV_SNP_LAUNCH_UPDATE", 0x16
    )
    assert terms.match(Answer((update,))) is update
    assert terms.match(Answer((replace(update, firmware=0x15),))) is None
    assert terms.match(Answer((replace(update, command="KVM_SEV_SNP_LAUNCH_FINISH"),))) is None
    assert parse("errno==EIO at KVM_MEMORY_ENCRYPT_OP").match(Answer((update,))) is update


@pytest.mark.requires("protection:snp")
def test_shrink_to_a_firmware_status(kvm: Kvm, tmp_path: Path) -> None:
    """A launch is cut down to what the refused page needs: the VM, its memory, two commands before it."""
    path = tmp_path / "a.rec"
    with Recorder(path), Kvm() as own:
        SCENARIOS["snp_program"](own)
        SCENARIOS["snp_cpuid"](own)
    with Player() as player:
        condition = UntilExpression(
            player, parse("firmware==SEV_RET_INVALID_PARAM and errno==EIO at KVM_SEV_SNP_LAUNCH_UPDATE")
        )
        with Shrinker(Record.load(path), condition) as shrinker:
            assert shrinker.holds()
            shrinker.events()
    left = [str(command_of(e.what) or request_name(e.what)) for e in shrinker.best.ioctls]
    assert left == [
        "KVM_CREATE_VM",
        "KVM_SEV_INIT2",
        "KVM_CREATE_GUEST_MEMFD",
        "KVM_SET_USER_MEMORY_REGION2",
        "KVM_SET_MEMORY_ATTRIBUTES",
        "KVM_SEV_SNP_LAUNCH_START",
        "KVM_SEV_SNP_LAUNCH_UPDATE",
    ]
