# SPDX-License-Identifier: Apache-2.0
"""Report files: each is written on its own and atomically; what could not be written is named at the end."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import pytest
from _pytest.junitxml import xml_key

from kvmpy.owned import write_atomically
from kvmpy.testing import ktap
from kvmpy.testing.verdicts import TestVerdict

UNWRITTEN = pytest.StashKey[list[str]]()
"""What could not be written while a test ran: a line for each file."""


def why(error: BaseException) -> str:
    """Return what an error says, in the system's words where they are all there is."""
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"


class ReportFiles:
    """What is written at the end of a session, and ``failures``: a line for each file that is not there."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def write(self, name: str, path: Path, make: Callable[[], str]) -> None:
        """Write what *make* returns; neither its failure nor the disk's ends more than this file."""
        try:
            write_atomically(path, make())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other reports are written
            self.failures.append(f"{name}: {path} is not written: {why(error)}")


class KtapFile:
    """The KTAP report, which grows with the verdicts.

    What comes of a run that is killed is cut off: its plan says so.
    """

    def __init__(self, files: ReportFiles, path: Path) -> None:
        self._files = files
        self._path = path
        self._made: ktap.Stream | None = None
        self._output: TextIO | None = None
        self._failed = False

    def add(self, entry: TestVerdict, make: Callable[[], ktap.Stream]) -> None:
        """Write what can be written with one more verdict; *make* returns a document at its beginning."""
        self._write(lambda: self._begun(make).add(entry))

    def _begun(self, make: Callable[[], ktap.Stream]) -> ktap.Stream:
        if self._made is None:
            self._made = make()
        return self._made

    def end(self, verdicts: Iterable[TestVerdict], render: Callable[[], str]) -> None:
        """Write the rest, where *verdicts* are all that there are; *render* returns the whole document."""
        if self._made is None:
            self._files.write("ktap", self._path, render)
            return
        for entry in verdicts:
            self._made.take(entry)
        self._write(self._made.end)
        if self._output is not None:
            self._output.close()

    def _write(self, lines: Callable[[], Iterable[str]]) -> None:
        if self._failed:
            return
        try:
            text = "".join(f"{line}\n" for line in lines())
            if self._output is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._output = self._path.open("w", encoding="utf-8", errors="backslashreplace")
            self._output.write(text)
            self._output.flush()
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
            self._failed = True
            self._files.failures.append(f"ktap: {self._path} is not complete: {why(error)}")
            with contextlib.suppress(OSError):
                if self._output is not None:
                    self._output.close()
            self._output = None


class Junit:
    """pytest's own JUnit report, written to memory so that it can be written like all others."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._writer: Any = None
        self._memory = -1

    @property
    def _path(self) -> str:
        return f"/proc/self/fd/{self._memory}"

    def divert(self) -> None:
        """Let pytest write to memory, when it does."""
        self._writer = self._config.stash.get(xml_key, None)
        if self._writer is not None:
            self._memory = os.memfd_create("junit")
            self.target, self._writer.logfile = Path(self._writer.logfile), self._path

    def restore(self) -> None:
        """Let pytest's summary name the real file."""
        if self._memory >= 0:
            self._writer.logfile = str(self.target)

    def write(self, files: ReportFiles) -> None:
        """Write what pytest wrote."""
        if self._memory < 0:
            return
        with open(self._memory, encoding="utf-8") as stream:
            stream.seek(0)
            text = stream.read()
        self._memory = -1
        files.write("junit", self.target, lambda: text)


class SteadyStream:
    """A stream whose reader may leave and whose disk may be full: what is written after that is dropped.

    ``failure`` is the error that ended it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write text; what the stream's encoding lacks is escaped."""
        if self.failure is not None:
            return len(text)
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError:
            return int(self._stream.write(text.encode("ascii", "backslashreplace").decode()))
        except OSError as error:
            self.failure = error
        return len(text)

    def flush(self) -> None:
        """Write out what is buffered."""
        if self.failure is not None:
            return
        try:
            self._stream.flush()
        except OSError as error:
            self.failure = error

    def finish(self) -> None:
        """Let what is still buffered go nowhere: the end of the process would try once more to write it."""
        if self.failure is None:
            return
        with contextlib.suppress(OSError, ValueError):
            sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(sink, self._stream.fileno(), inheritable=True)
            os.close(sink)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def lost(self) -> str:
        """What could not be shown and matters: nothing where the reader has left of its own accord."""
        if self.failure is None or self.failure.errno in (errno.EPIPE, errno.EIO):
            return ""
        return f"standard output is not complete: {why(self.failure)}"
