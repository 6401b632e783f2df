# SPDX-License-Identifier: Apache-2.0
"""A folder with coverage of one kernel: a file of counters for each run, added to as they come.

A run that is killed, or whose disk is full, leaves a file that is right up to its last whole entry.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvmpy.lab.coverage.kept import ARCHIVE, Kept
from kvmpy.lab.errors import LabError

if TYPE_CHECKING:
    from kvmpy.lab.kernels import Kernel

SCHEMA = "kvmpy-coverage/1"
OWN_SUITE = "kvmpy"
_FACTS = "coverage.json"
_SUFFIX = ".counters"
_SUITE = re.compile(r"[\w.-]{1,100}")
_FRAME = struct.Struct("<II")
_ENTRY = struct.Struct("<III")
# Of what a machine sends: the counters of all objects, unpacked.
MAX_UNPACKED = 16 << 20
# By ident, the numbers and the values of the counters that are not zero.
Functions = dict[int, list[tuple[int, int]]]


class Facts(msgspec.Struct, frozen=True):
    """Which kernel a folder is about; *build_id* is in hexadecimal."""

    kernel: str
    release: str
    build_id: str
    schema: str = SCHEMA


class Run(msgspec.Struct, frozen=True):
    """What the entries of a file have in common: *objects* are the names that their numbers mean."""

    suite: str
    objects: list[str]
    parameters: list[str] = []
    started: float = 0.0


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    test: str
    seconds: float
    data: bytes


@dataclass(frozen=True)
class Counted:
    """What one test, or a file of tests, caused."""

    suite: str
    test: str
    seconds: float
    data: bytes
    objects: Sequence[str]

    def counters(self) -> Iterator[tuple[str, int, Functions]]:
        """Yield the name, the stamp, and the functions of each object that was entered."""
        for number, stamp, packed in _objects(unpacked(self.data)):
            yield self.objects[number], stamp, _functions(packed)


def unpacked(data: bytes) -> bytes:
    """Return what a machine has packed; LabError for what is not of its making."""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(data, MAX_UNPACKED + 1)
    except zlib.error as error:
        raise LabError(f"counters that cannot be unpacked: {error}") from error
    if len(content) > MAX_UNPACKED or not unpacker.eof:
        raise LabError(f"counters of more than {MAX_UNPACKED} bytes")
    return content


def check(data: bytes, objects: int) -> None:
    """Raise LabError unless *data*, packed, holds counters of that many objects."""
    for number, _, packed in _objects(unpacked(data)):
        if number >= objects:
            raise LabError("counters that are none")
        try:
            _functions(packed)
        except IndexError as error:
            raise LabError("counters that are none") from error


def _objects(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number, the stamp and the packed functions of each object."""
    at = 0
    while at < len(content):
        if at + _ENTRY.size > len(content):
            raise LabError("counters that end in the middle")
        number, stamp, length = _ENTRY.unpack_from(content, at)
        at += _ENTRY.size
        if at + length > len(content):
            raise LabError("counters that are none")
        yield number, stamp, content[at : at + length]
        at += length


def _functions(data: bytes) -> Functions:
    functions: Functions = {}
    numbers: list[int] = []
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
        else:
            shift += 7
    at = 0
    while at < len(numbers):
        ident, used = numbers[at], numbers[at + 1]
        at += 2
        last = at + 2 * used
        index = -1
        counters = functions.setdefault(ident, [])
        for pair in range(at, last, 2):
            index += numbers[pair] + 1
            counters.append((index, numbers[pair + 1]))
        at = last
    return functions


class Writer:
    """Adds a run of tests of *suite* to a folder; ``failure`` says what could not be written, and why."""

    def __init__(self, folder: Path, suite: str, parameters: Sequence[str] = ()) -> None:
        if not _SUITE.fullmatch(suite):
            raise LabError(f"{suite!r} is no name of a suite: letters, digits, dots and dashes")
        self._folder = folder
        self._suite = suite
        self._parameters = list(parameters)
        self._path: Path | None = None
        self._objects: list[str] = []
        self.failure = ""

    def objects(self, names: Sequence[str]) -> None:
        """Begin: these are what the numbers in the counters mean. LabError for others than before."""
        if self._path is not None:
            if list(names) != self._objects:
                raise LabError("another machine of the run counts in other objects")
            return
        self._objects = list(names)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        prefix = f"{self._suite}-{stamp}-"
        try:
            handle, path = tempfile.mkstemp(prefix=prefix, suffix=_SUFFIX, dir=self._folder)
        except OSError as error:
            self.failure = f"{self._folder}: {error.strerror}"
            return
        os.close(handle)
        self._path = Path(path)
        self._path.chmod(0o644)
        self._append(msgspec.msgpack.encode(Run(self._suite, self._objects, self._parameters, time.time())))
        if self.failure:
            # Nobody would know what the entries mean.
            self._path.unlink(missing_ok=True)
            self._path = None

    def add(self, test: str, seconds: float, data: bytes) -> None:
        """Add what *test* caused, as packed by the machine; LabError for what is no counters.

        What cannot be written is in ``failure``; what was written before stays right.
        """
        if self._path is None:
            if self.failure:
                return
            raise LabError("counters of unknown objects")
        check(data, len(self._objects))
        self._append(msgspec.msgpack.encode(_Entry(test, seconds, data)))

    def _append(self, payload: bytes) -> None:
        path = self._path
        if path is None:
            return
        try:
            # Without a buffer, which would come again when it is closed.
            with path.open("ab", buffering=0) as stream:
                before = stream.seek(0, os.SEEK_END)
                left = memoryview(_FRAME.pack(len(payload), zlib.crc32(payload)) + payload)
                try:
                    while left:
                        left = left[stream.write(left) :]
                except OSError:
                    # Half an entry would hide the next ones.
                    with contextlib.suppress(OSError):
                        os.ftruncate(stream.fileno(), before)
                    raise
        except OSError as error:
            self.failure = self.failure or f"{path}: {error.strerror}"


def _frames(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while len(head := stream.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(head)
            payload = stream.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            yield payload


class Coverage:
    """A folder with coverage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts = msgspec.json.decode((folder / _FACTS).read_bytes(), type=Facts)
        except FileNotFoundError:
            raise LabError(
                f"{folder} has no coverage in it", "measure some: kvmpy lab run --coverage DIR"
            ) from None
        except (OSError, msgspec.DecodeError) as error:
            raise LabError(f"{folder / _FACTS}: {error}") from error
        if self.facts.schema != SCHEMA:
            raise LabError(f"{folder} has coverage of the schema {self.facts.schema}, not {SCHEMA}")
        self.kept = Kept(folder / ARCHIVE)

    @property
    def files(self) -> list[Path]:
        """The files of counters, the oldest first."""
        return sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda path: path.name.split("-", 1)[1:])

    def entries(self) -> Iterator[Counted]:
        """Yield what was counted, run by run."""
        for path in self.files:
            frames = _frames(path)
            try:
                if (first := next(frames, None)) is None:
                    continue
                run = msgspec.msgpack.decode(first, type=Run)
                names = [self._name(name) for name in run.objects]
                for payload in frames:
                    entry = msgspec.msgpack.decode(payload, type=_Entry)
                    yield Counted(run.suite, entry.test, entry.seconds, entry.data, names)
            except msgspec.DecodeError as error:
                raise LabError(f"{path}: {error}") from error

    def _name(self, name: str) -> str:
        root = str(self.kept.build).lstrip("/")
        return os.path.normpath(name.removeprefix(f"{root}/"))


def merge(folder: Path, other: Coverage) -> int:
    """Add the runs of *other* to *folder*, which may be new; return how many. LabError for another kernel."""
    if (folder / _FACTS).exists():
        _same_kernel(folder, other.facts.kernel, other.facts.build_id)
    else:
        _fill(folder, other.folder / ARCHIVE, other.facts)
    there = {path.name for path in Coverage(folder).files}
    added = [path for path in other.files if path.name not in there]
    try:
        for path in added:
            part = folder / f".{path.name}.part"
            shutil.copy(path, part)
            part.replace(folder / path.name)
    except OSError as error:
        raise LabError(f"{folder}: {error.strerror}") from error
    return len(added)


def create(folder: Path, kernel: Kernel) -> None:
    """Make *folder* one for coverage of *kernel*, or check that it is; LabError for one of another kernel."""
    archive = kernel.coverage
    if archive is None:
        raise LabError(
            f"{kernel.name} does not count what KVM executes", "build one: kvmpy lab build --coverage"
        )
    if (folder / _FACTS).exists():
        _same_kernel(folder, kernel.name, kernel.build_id)
    else:
        _fill(folder, archive, Facts(kernel.name, kernel.release, kernel.build_id))


def _same_kernel(folder: Path, kernel: str, build_id: str) -> None:
    facts = Coverage(folder).facts
    if facts.build_id != build_id:
        raise LabError(
            f"{folder} has coverage of {facts.kernel} (build id {facts.build_id}), and {kernel} is another "
            f"kernel (build id {build_id})",
            "name another folder",
        )


def _fill(folder: Path, archive: Path, facts: Facts) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} has other things in it than coverage", "name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(archive, folder / ARCHIVE)
        text = json.dumps(msgspec.to_builtins(facts), indent=2) + "\n"
        (folder / _FACTS).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LabError(f"{folder} cannot be made: {error.strerror}") from error
