# SPDX-License-Identifier: Apache-2.0
"""Writes a record: each frame reaches the file with one write(2), so that a killed process loses none."""

from __future__ import annotations

import datetime
import fcntl
import os
import platform
import resource
import sys
import time
from pathlib import Path

from kvmpy import __version__
from kvmpy.debug.record.events import End, Lines, Lost, Pages, Payload
from kvmpy.debug.record.format import PAGE_SIZE, FileHeader, private
from kvmpy.uapi import ffi, lib

_order = lib.kvmpy_record_order
_frame = lib.kvmpy_record_frame
# Pages of one frame: enough to compress well, little enough to be lost.
_BATCH = 256
_ZEROES = bytes(PAGE_SIZE)
# More descriptors than recorders have; higher numbers would only make the kernel's table long.
_ROOM = 256
_HIGHEST = 1 << 16


def host_summary() -> dict[str, str]:
    """Return what is known of this host, for the frame HOST."""
    uname = os.uname()
    values = {
        "kvmpy": __version__,
        "kernel": uname.release,
        "machine": uname.machine,
        "cpu": _cpu(),
        "platform": os.environ.get("KVMPY_PLATFORM", "host"),
        "command": " ".join(sys.argv)[:1000],
        "pid": str(os.getpid()),
        "python": platform.python_version(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clock": str(time.time_ns() - time.monotonic_ns()),
        "recorder": "kvmpy",
    }
    # Built in, both vendors' modules have a folder: the CPU tells which of them works.
    others = {"kvm_intel"} if "AMD" in values["cpu"] else {"kvm_amd"}
    for module in ("kvm_amd", "kvm_intel", "kvm_pvm"):
        folder = Path("/sys/module") / module
        if folder.is_dir() and module not in others:
            values["module"] = module
            values["params"] = " ".join([*_params(folder), *_params(Path("/sys/module/kvm"), "kvm.")])
    return values


def _params(folder: Path, prefix: str = "") -> list[str]:
    results = []
    for path in sorted((folder / "parameters").glob("*")):
        try:
            results.append(f"{prefix}{path.name}={path.read_text().strip()}")
        except (OSError, UnicodeDecodeError):
            continue
    return results


def _cpu() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
            )
    except OSError:
        return ""


def out_of_the_way(fd: int) -> int:
    """Move a descriptor to where it takes no number that the observed program may use; return the new one.

    Above the soft limit where the hard one leaves room, else to the upper end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    start = min(soft if hard >= soft + _ROOM else max(0, soft - _ROOM), _HIGHEST)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, start + _ROOM)), hard))
        try:
            moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, start)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (OSError, ValueError):
        return fd
    os.close(fd)
    return moved


class RecordWriter:
    """A record that is being written to *path*, which is replaced; safe for several threads."""

    def __init__(self, path: str | os.PathLike[str], **about: str) -> None:
        self.path = os.fspath(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self.fd = out_of_the_way(private(self.path, flags))
        # The C side's view of the record: it writes frames of its own accord, too.
        self.native = ffi.new("struct kvmpy_record *", {"fd": self.fd, "pid": os.getpid(), "order": 1})
        self._ids: dict[bytes, int] = {_ZEROES: 0}
        os.write(self.fd, FileHeader().pack())
        self.put(Lines({**host_summary(), **about}), tid=self.pid)

    def order(self) -> int:
        """Return the next number that puts events in order."""
        return int(_order(self.native))

    def go_on_from(self, order: int) -> None:
        """Let *order* be the next number: frames with lower ones came from elsewhere."""
        self.native.order = order

    @property
    def pid(self) -> int:
        """The process that frames are of."""
        return int(self.native.pid)

    @pid.setter
    def pid(self, pid: int) -> None:
        self.native.pid = pid

    @property
    def frames(self) -> int:
        """How many frames were written."""
        return int(self.native.frames)

    @property
    def lost(self) -> int:
        """How many could not be: no space left, or closed meanwhile.  What is recorded goes on."""
        return int(self.native.lost)

    def raw(self, kind: int, payload: bytes, tid: int, order: int, time_ns: int, flags: int = 0) -> None:
        """Write one frame."""
        _frame(self.native, kind, flags, tid, order, time_ns, payload, len(payload))

    def put(self, payload: Payload, *, tid: int, order: int = 0, time_ns: int = 0, flags: int = 0) -> None:
        """Write *payload*; order and time default to now."""
        self.raw(
            payload.TYPE, payload.pack(), tid, order or self.order(), time_ns or time.monotonic_ns(), flags
        )

    def page_ids(self, pages: list[bytes], tid: int) -> tuple[int, ...]:
        """Return the ids of these page contents; those that are new are written first."""
        known = self._ids
        fresh: list[bytes] = []
        rows = []
        for page in pages:
            ident = known.get(page)
            if ident is None:
                ident = known[page] = len(known)
                fresh.append(page)
            rows.append(ident)
        first = len(known) - len(fresh)
        for offset in range(0, len(fresh), _BATCH):
            self.put(Pages(first + offset, tuple(fresh[offset : offset + _BATCH])), tid=tid)
        return tuple(rows)

    def close(self) -> None:
        """Write the end and close the file; harmless a second time."""
        if self.fd < 0:
            return
        if self.lost:
            self.put(Lost(self.lost), tid=self.pid)
        self.put(End(self.frames), tid=self.pid)
        fd, self.fd = self.fd, -1
        self.native.fd = -1
        os.close(fd)
