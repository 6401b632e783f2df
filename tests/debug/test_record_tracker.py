# SPDX-License-Identifier: Apache-2.0
"""The recorder's look at memory and its descriptors: what it observes does not notice."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.core.address import PAGE_SIZE
from kvmpy.core.backing import Anonymous, Mapping
from kvmpy.core.errors import MissingError
from kvmpy.core.uffd import Userfaultfd
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.tracker import MemoryTracker
from kvmpy.debug.record.writer import RecordWriter, out_of_the_way
from kvmpy.uapi.constants import UffdRegisterMode


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[MemoryTracker]:
    writer = RecordWriter(tmp_path / "a.rec")
    memory_tracker = MemoryTracker(writer)
    yield memory_tracker
    memory_tracker.close()
    writer.close()


@pytest.fixture
def area() -> Iterator[Mapping]:
    """Three pages; the one in the middle begins with a word, the others were never touched."""
    mapping = Anonymous(huge="never").map(3 * PAGE_SIZE)
    mapping.look(PAGE_SIZE, 4)[:] = b"word"
    yield mapping
    mapping.close()


def test_a_look_populates_nothing(tracker: MemoryTracker, area: Mapping) -> None:
    expected = bytes(PAGE_SIZE) + b"word".ljust(2 * PAGE_SIZE, b"\0")
    assert tracker.look(area.hva, area.size) == expected
    assert tracker.look(area.hva + PAGE_SIZE - 2, 8) == b"\0\0word\0\0"
    assert area.touched(0, area.size) == [(PAGE_SIZE, PAGE_SIZE)]


def test_memory_that_lost_its_access(tracker: MemoryTracker, area: Mapping) -> None:
    """A view may be of memory that is PROT_NONE by now: whoever reads it dies of SIGSEGV."""
    with Recorder(tracker._writer.path + "2") as recorder:
        recorder.memory.slot_set("vm", area.hva, area.size, 1)
        recorder.memory_shown(area.look(0, area.size), False)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(area.hva), ctypes.c_size_t(area.size), 0) == 0
        recorder.memory.compare(1)
        recorder.memory.look_again()
        assert tracker.look(area.hva + PAGE_SIZE, 4) == b"word"
        assert libc.mprotect(ctypes.c_void_p(area.hva), ctypes.c_size_t(area.size), mmap.PROT_READ) == 0


def test_memory_that_somebody_serves(tracker: MemoryTracker, area: Mapping) -> None:
    """A fault of the recorder's would wait for a handler, and be served in place of the guest's."""
    try:
        uffd = Userfaultfd()
    except MissingError as error:
        pytest.skip(str(error))
    with uffd:
        uffd.register(area.hva, area.size, UffdRegisterMode.UFFDIO_REGISTER_MODE_MISSING)
        assert tracker.look(area.hva, area.size)[PAGE_SIZE:][:4] == b"word"
        assert uffd.read() == []


def test_a_recorder_takes_no_low_descriptor(tmp_path: Path) -> None:
    """What it opens lies where the observed program does not come: its own next number is what it was."""
    lowest = os.dup(0)
    os.close(lowest)
    with Recorder(tmp_path / "a.rec"):
        now = os.dup(0)
        os.close(now)
    assert now == lowest


@pytest.mark.parametrize("room", [True, False])
def test_the_limit_of_descriptors_stays(room: bool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if room:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1024), hard))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        moved = out_of_the_way(os.dup(0))
        os.close(moved)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
        if before[1] >= before[0] + 1024:
            assert moved >= min(before[0], 1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
