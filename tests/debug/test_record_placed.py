# SPDX-License-Identifier: Apache-2.0
"""Where debugged memory of the host lies in its page is kept: replays and C files harm no host more than the
run that was recorded.
"""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvmpy import Kvm
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.backing import Anonymous
from kvmpy.debug.record import world
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.prune import target_of
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.replay import Replay
from kvmpy.debug.record.repro import write_c
from kvmpy.debug.record.script import Script, build
from kvmpy.uapi import ffi, lib
from kvmpy.uapi.structs import kvm_sev_dbg
from tests.debug.test_record_repro import run_c

pytestmark = pytest.mark.requires("kvm")
MEMORY, PLACE, TEXT = Gpa(0x10_0000), 0xE30, b"a debugger's own" * 4


def debugged(command: str, folder: Path) -> Script:
    """Record a DBG command on a VM that is no SEV guest: it fails, and its memory is in the record."""
    path = folder / "dbg.rec"
    with Recorder(path), Kvm() as kvm, kvm.create_vm() as vm, closing(Anonymous().map(PAGE_SIZE)) as page:
        vm.add_slot(MEMORY, PAGE_SIZE)
        page.look(PLACE, len(TEXT))[:] = TEXT
        here, there = page.hva + PLACE, vm.memory.hva(MEMORY) + PLACE
        source, target = (here, there) if command == "DBG_ENCRYPT" else (there, here)
        arg = kvm_sev_dbg(src_uaddr=source, dst_uaddr=target, len=len(TEXT))
        assert not vm.sev.command_raw(command, arg, sev_fd=0).ok
    return build(Record.load(path))


class Lib:
    """kvmpy's C library, looking at the buffers of DBG commands."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.places: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def kvmpy_ioctl(self, label: Any, fd: int, request: int, value: int) -> int:
        """Note the places in their pages of what the argument leads to."""
        if request & 0xFF == 0xBA:
            call = ffi.cast("struct kvm_sev_cmd *", value)
            arg = ffi.cast("struct kvm_sev_dbg *", call.data)
            self.places.append((arg.src_uaddr % PAGE_SIZE, arg.dst_uaddr % PAGE_SIZE))
        return int(self._real.kvmpy_ioctl(label, fd, request, value))


@pytest.mark.parametrize("command", ["DBG_ENCRYPT", "DBG_DECRYPT"])
def test_a_replay(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Lib(lib)
    monkeypatch.setattr(world, "lib", seen)
    assert Replay(debugged(command, tmp_path)).run().first_difference is None
    assert seen.places == [(PLACE, PLACE)]


@pytest.mark.parametrize("command", ["DBG_ENCRYPT", "DBG_DECRYPT"])
def test_a_c_file(command: str, tmp_path: Path) -> None:
    script = debugged(command, tmp_path)
    text = write_c(script, target_of(script), limit=5)
    assert re.search(r"static unsigned char data\w*_page\[3696\] __attribute__\(\(aligned\(4096\)\)\);", text)
    assert re.search(r"data\w*_page \+ 0xe30\)", text)
    assert run_c(text, tmp_path) == (0, "reproduced\n")
