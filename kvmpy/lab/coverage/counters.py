# SPDX-License-Identifier: Apache-2.0
"""KVM's counters where they are: read from the running kernel's debugfs, packed, and set to zero.

This is what the session inside a lab kernel loads: it imports next to nothing.
"""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path("/sys/kernel/debug/gcov")
NOTES = Path("/sys/kernel/notes")
DATA = ".gcda"
# What the kernel executed before the first test.
BOOT = "(boot)"
# Of a whole object's file, and of what is packed of all.
_FILE, _PACKED = 4 << 20, 16 << 20


class CountersError(RuntimeError):
    """The running kernel's counters cannot be read."""


class Counters:
    """The counters of the running kernel; *names* are their files below *folder*, without the ending."""

    def __init__(self, folder: Path = FOLDER) -> None:
        # Where nothing is counted nothing of it is needed.
        from kvmpy.uapi import ffi, lib

        self._lib = lib
        found = sorted(folder.rglob(f"*{DATA}")) if folder.is_dir() else []
        if not found:
            raise CountersError(f"{folder} has no counters: this kernel does not count what it executes")
        self.names = [path.relative_to(folder).as_posix()[: -len(DATA)] for path in found]
        # lifetime: the array points into these
        self._texts = [ffi.new("char[]", os.fsencode(path)) for path in found]
        self._paths = ffi.new("const char *[]", self._texts)
        self._file, self._out = ffi.new("uint8_t[]", _FILE), ffi.new("uint8_t[]", _PACKED)
        self._bytes = ffi.buffer(self._out)
        try:
            self._reset = os.open(folder / "reset", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CountersError(f"{folder / 'reset'}: {error.strerror}") from error

    def close(self) -> None:
        """Close what is open."""
        os.close(self._reset)

    def reset(self) -> None:
        """Set all to zero."""
        os.write(self._reset, b"1")

    def take(self) -> bytes:
        """Return the counters that are not zero, packed and compressed, and set all to zero."""
        length = self._lib.kvmpy_gcov_collect(
            self._paths, len(self._texts), self._file, _FILE, self._out, _PACKED
        )
        if length < 0:
            raise CountersError(f"reading the counters: {os.strerror(-length)}")
        self.reset()
        return zlib.compress(self._bytes[:length], 1)


def objects(counters: Counters, suite: str = "") -> dict[str, Any]:
    """Return the event that tells which objects count, for tests of *suite*."""
    return {"event": "objects", "names": counters.names, "suite": suite}


def counted(test: str, data: bytes, seconds: float = 0.0) -> dict[str, Any]:
    """Return the event with what a test, or a file of tests, caused."""
    text = base64.b64encode(data).decode("ascii")
    return {"event": "counted", "test": test, "data": text, "seconds": seconds}


class Collector:
    """Sends the counters of each test, or of the tests of each file, to the host."""

    def __init__(self, write: Callable[[dict[str, Any]], None], *, by_test: bool) -> None:
        self._write = write
        self._by_test = by_test
        self._counters = Counters()
        self._file = ""
        write(objects(self._counters))
        self.send(BOOT)

    def send(self, name: str) -> None:
        """Send what was counted since the last time, as caused by *name*."""
        self._write(counted(name, self._counters.take()))

    def begin(self) -> None:
        """Tests are going to run: what was counted since the last ones is nobody's."""
        self._counters.reset()

    def over(self, test: str) -> None:
        """A test is over."""
        if self._by_test:
            self.send(test)
        else:
            self._file = test.partition("::")[0]

    def done(self) -> None:
        """The tests of a share, all of one file, are over."""
        if self._file:
            self.send(self._file)
            self._file = ""
