# SPDX-License-Identifier: Apache-2.0
"""A folder that looks like tracefs, and an encoder of ring-buffer pages that knows nothing of the reader."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from kvmpy.debug.watch import tracefs

HEADER_PAGE = """\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""

HEADER_EVENT = """\
# compressed entry header
\ttype_len    :    5 bits
\ttime_delta  :   27 bits
\tarray       :   32 bits

\tpadding     : type == 29
\ttime_extend : type == 30
\ttime_stamp : type == 31
\tdata max type_len  == 28
"""

_COMMON = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""

FAULT_ID, ATTRIBUTES_ID, RMP_ID, OTHER_ID = 100, 131, 140, 7
# The fields lie elsewhere than in any real kernel: only the format file may be believed.
FORMATS = {
    "kvm_page_fault": (
        FAULT_ID,
        """\
\tfield:u64 error_code;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u64 fault_address;\toffset:16;\tsize:8;\tsigned:0;
\tfield:unsigned long guest_rip;\toffset:24;\tsize:8;\tsigned:0;
\tfield:unsigned int vcpu_id;\toffset:32;\tsize:4;\tsigned:0;
""",
    ),
    "kvm_vm_set_mem_attributes": (
        ATTRIBUTES_ID,
        """\
\tfield:gfn_t start;\toffset:8;\tsize:8;\tsigned:0;
\tfield:gfn_t end;\toffset:16;\tsize:8;\tsigned:0;
\tfield:unsigned long attr;\toffset:24;\tsize:8;\tsigned:0;
""",
    ),
    "kvm_rmp_fault": (
        RMP_ID,
        """\
\tfield:u64 gpa;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u64 pfn;\toffset:16;\tsize:8;\tsigned:0;
\tfield:u64 error_code;\toffset:24;\tsize:8;\tsigned:0;
\tfield:int rmp_level;\toffset:32;\tsize:4;\tsigned:1;
\tfield:int psmash_ret;\toffset:36;\tsize:4;\tsigned:1;
\tfield:unsigned int vcpu_id;\toffset:40;\tsize:4;\tsigned:0;
""",
    ),
}


def format_text(name: str, number: int, fields: str) -> str:
    return f'name: {name}\nID: {number}\nformat:\n{_COMMON}{fields}\nprint fmt: "%u", REC->vcpu_id\n'


def fault(tid: int, address: int, error_code: int, *, rip: int = 0x400123, vcpu: int = 0) -> bytes:
    return struct.pack("<HBBiQQQI4x", FAULT_ID, 0, 0, tid, error_code, address, rip, vcpu)


def attributes(tid: int, start: int, end: int, attr: int) -> bytes:
    return struct.pack("<HBBiQQQ", ATTRIBUTES_ID, 0, 0, tid, start, end, attr)


def rmp_fault(tid: int, gpa: int, error_code: int, level: int, psmash: int, *, vcpu: int = 0) -> bytes:
    return struct.pack(
        "<HBBiQQQiiI4x", RMP_ID, 0, 0, tid, gpa, 0x2B000 + gpa // 4096 % 512, error_code, level, psmash, vcpu
    )


def other(tid: int) -> bytes:
    return struct.pack("<HBBi", OTHER_ID, 0, 0, tid)


def head(kind: int, delta: int) -> bytes:
    """The first word of a record."""
    return struct.pack("<I", kind | delta << 5)


def short(delta: int, payload: bytes) -> bytes:
    """A record whose length is in its first word: 4 to 112 bytes, a multiple of 4."""
    return head(len(payload) // 4, delta) + payload


def long(delta: int, payload: bytes) -> bytes:
    """A record whose length is a word of its own."""
    return head(0, delta) + struct.pack("<I", len(payload) + 4) + payload + bytes(-len(payload) % 4)


def extend(delta: int) -> bytes:
    """A record that moves the clock by more than 27 bits can say."""
    return head(30, delta & (1 << 27) - 1) + struct.pack("<I", delta >> 27)


def absolute(stamp: int) -> bytes:
    """A record that sets the clock (its low 59 bits)."""
    return head(31, stamp & (1 << 27) - 1) + struct.pack("<I", stamp >> 27 & 0xFFFF_FFFF)


def discarded(delta: int, size: int) -> bytes:
    """A record that was taken back: *size* bytes behind its first word."""
    return head(29, delta) + struct.pack("<I", size) + bytes(size - 4)


def page(stamp: int, *records: bytes, lost: int | None = None, lost_number: bool = True) -> bytes:
    """A page that begins at time *stamp*; *lost* records were lost before it."""
    data = b"".join(records)
    commit = len(data)
    if lost is not None:
        commit |= 1 << 31
        if lost_number:
            commit |= 1 << 30
    body = data + (struct.pack("<Q", lost) if lost is not None and lost_number else b"")
    return (struct.pack("<QQ", stamp, commit) + body).ljust(4096, b"\0")


class FakeTracefs:
    """The folder: instances get what *pages* holds for each CPU when they are made."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.pages: dict[int, list[bytes]] = {0: [], 1: []}
        self.made: list[Path] = []
        self.removed: list[Path] = []
        self.settings: dict[str, str] = {}
        events = root / "events"
        for name, (number, fields) in FORMATS.items():
            (events / "kvm" / name).mkdir(parents=True)
            (events / "kvm" / name / "format").write_text(format_text(name, number, fields))
        (events / "header_page").write_text(HEADER_PAGE)
        (events / "header_event").write_text(HEADER_EVENT)
        (root / "instances").mkdir()
        monkeypatch.setattr(tracefs, "make_instance", self.make)
        monkeypatch.setattr(tracefs, "remove_instance", self.remove)

    def make(self, path: Path) -> None:
        """What mkdir does in tracefs."""
        path.mkdir()
        self.made.append(path)
        names = ["tracing_on", "buffer_size_kb", "trace_clock", "buffer_percent", "set_event_pid"]
        names += ["options/event-fork", "events/enable"]
        names += [f"events/kvm/{name}/{file}" for name in FORMATS for file in ("enable", "filter")]
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("")
        for cpu, pages in self.pages.items():
            (path / "per_cpu" / f"cpu{cpu}").mkdir(parents=True)
            (path / "per_cpu" / f"cpu{cpu}" / "trace_pipe_raw").write_bytes(b"".join(pages))

    def remove(self, path: Path) -> None:
        """What rmdir does in tracefs."""
        for file in path.rglob("*"):
            if file.is_file() and file.name != "trace_pipe_raw":
                self.settings[str(file.relative_to(path))] = file.read_text()
        shutil.rmtree(path)
        self.removed.append(path)

    @property
    def left(self) -> list[str]:
        """The instances that exist."""
        return sorted(path.name for path in (self.root / "instances").iterdir())
