# SPDX-License-Identifier: Apache-2.0
"""The record format, version 1.0, as docs/record.md defines it: the file header and the frames.

What frames say is in :mod:`kvmpy.debug.record.events`.  Needs neither KVM nor the native part; format.h has
the same for C (:mod:`kvmpy.gen`).
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from kvmpy.debug.record.layouts import layout

MAGIC = b"kvmpyrec"
MAJOR = 1
MINOR = 0
X86_64 = 62
PAGE_SIZE = 4096
FRAME_MAGIC = 0x524D564B
MAX_PAYLOAD = 64 << 20

FILE_HEADER = layout(
    "rec_file_header",
    "uint8_t magic[8]; uint16_t major; uint16_t minor; uint32_t arch; uint32_t page_size; uint32_t flags; "
    "uint32_t reserved; uint32_t crc;",
)
FRAME_HEADER = layout(
    "rec_frame",
    "uint32_t magic; uint32_t crc; "
    # What the checksum covers.
    "uint32_t length; uint16_t type; uint16_t flags; uint32_t tid; uint32_t pid; uint64_t order; "
    "uint64_t time_ns;",
)
CHECKED_FROM = 8
FRAME_CHECKED = struct.Struct("<" + FRAME_HEADER.format.removeprefix("<II"))
PADDING = tuple(bytes(-size % 8) for size in range(8))


class FrameType(IntEnum):
    """What a frame tells."""

    HOST = 1
    THREAD = 2
    OBJECT = 3
    CLOSE = 4
    IOCTL = 5
    ENTER = 6
    MAP = 7
    UNMAP = 8
    PAGES = 9
    MEMORY = 10
    WRITE = 11
    KICK = 12
    DEADLINE = 13
    FILE = 14
    EVENT = 15
    NOTE = 16
    END = 17
    LOST = 18


class ObjectKind(IntEnum):
    """What a file descriptor is."""

    SYSTEM = 1
    VM = 2
    VCPU = 3
    DEVICE = 4
    GMEM = 5
    STATS = 6
    SEV = 7
    UFFD = 8
    EVENTFD = 9
    MEMFD = 10
    OTHER = 11

    @classmethod
    def _missing_(cls, value: object) -> ObjectKind | None:
        # A newer minor version may know further kinds: they are descriptors of no kind that is known here.
        return cls.OTHER if isinstance(value, int) and value >= 0 else None


def object_kind(name: str) -> ObjectKind:
    """Return the kind of a descriptor that kvmpy calls *name* (FdKind, LinkKind)."""
    return ObjectKind.__members__.get(name.upper(), ObjectKind.OTHER)


class When(IntFlag):
    """Whether a chunk is what the kernel found, what it left, or both."""

    IN = 1
    OUT = 2
    BOTH = 3


class What(IntEnum):
    """Where a chunk lies."""

    ARGUMENT = 0
    NESTED = 1
    RUN = 2


SYNTHETIC = 1
CUT = 1
MAP_SHARED = 1
MAP_HUGETLB = 2
MAP_THP = 4
MAP_NO_THP = 8
MAP_NO_READ = 16
MAP_NO_WRITE = 32
MEMORY_INITIAL = 1
KICK_IMMEDIATE_EXIT = 1
KICK_SIGNAL = 2
FILE_FALLOCATE = 1
FILE_FTRUNCATE = 2
FILE_MADVISE = 3
EVENT_WRITTEN = 1
EVENT_READ = 2
CODEC_RAW = 0
CODEC_ZLIB = 1


class RecordError(ValueError):
    """A file that is no record, or one that cannot be used; the text says why and what could be read."""


class RecordVersionError(RecordError):
    """A record of a newer version or of another architecture; ``.host`` is what it says about its origin."""

    def __init__(self, text: str, host: dict[str, str]) -> None:
        super().__init__(text)
        self.host = host


@dataclass(frozen=True)
class FileHeader:
    """The first 32 bytes."""

    major: int = MAJOR
    minor: int = MINOR
    arch: int = X86_64
    page_size: int = PAGE_SIZE
    flags: int = 0

    def pack(self) -> bytes:
        """Return the header as bytes."""
        raw = FILE_HEADER.pack(MAGIC, self.major, self.minor, self.arch, self.page_size, self.flags, 0, 0)
        return raw[:28] + zlib.crc32(raw[:28]).to_bytes(4, "little")


@dataclass(frozen=True)
class Frame:
    """A frame as it is in the file; *offset* is where it begins."""

    type: int
    payload: bytes = field(repr=False)
    tid: int = 0
    pid: int = 0
    order: int = 0
    time_ns: int = 0
    flags: int = 0
    offset: int = 0

    @property
    def synthetic(self) -> bool:
        """Whether the recorder made it up from the state that it found."""
        return bool(self.flags & SYNTHETIC)

    def pack(self) -> bytes:
        """Return the frame as bytes, padded."""
        return pack_frame(self.type, self.payload, self.tid, self.pid, self.order, self.time_ns, self.flags)


def pack_frame(
    kind: int, payload: bytes, tid: int, pid: int, order: int, time_ns: int, flags: int = 0
) -> bytes:
    """Return a frame as bytes, padded to a multiple of 8; ValueError when the payload is too long."""
    size = len(payload)
    if size > MAX_PAYLOAD:
        raise ValueError(f"a payload of {size} bytes: frames take {MAX_PAYLOAD}")
    body = FRAME_CHECKED.pack(size, kind, flags, tid, pid, order, time_ns) + payload
    crc = zlib.crc32(body)
    return b"KVMR" + crc.to_bytes(4, "little") + body + PADDING[size & 7]


@dataclass(frozen=True)
class Problem:
    """Why reading ended before the end of the file."""

    offset: int
    text: str

    def __str__(self) -> str:
        return f"at byte {self.offset}: {self.text}"


def read_header(data: bytes | memoryview) -> FileHeader:
    """Return the file header at the begin of *data*; RecordError when it is none or damaged."""
    raw = bytes(data[: FILE_HEADER.size])
    if raw[:8] != MAGIC[: len(raw)] or len(raw) < 8:
        raise RecordError("this is not a record: it does not begin with 'kvmpyrec'")
    if len(raw) < FILE_HEADER.size:
        raise RecordError(f"the record ends within its header, after {len(raw)} bytes")
    _, major, minor, arch, page_size, flags, _, crc = FILE_HEADER.unpack(raw)
    if zlib.crc32(raw[:28]) != crc:
        raise RecordError("the record's header is damaged: its checksum does not match")
    return FileHeader(major, minor, arch, page_size, flags)


class FrameReader:
    """Iterates over the frames of *data*, a whole record; what ended it early is in :attr:`problem`.

    Check :attr:`header` (:meth:`check`) before you trust payloads.  With *resync* a damaged frame is passed
    over: reading goes on at the next frame whose checksum is right, and :attr:`problems` lists the gaps.
    """

    def __init__(self, data: bytes | memoryview, *, resync: bool = False) -> None:
        self.data = memoryview(data)
        self.header = read_header(self.data)
        self.resync = resync
        self.problems: list[Problem] = []
        self.end = FILE_HEADER.size

    @property
    def problem(self) -> Problem | None:
        """The first problem, None when every frame could be read."""
        return self.problems[0] if self.problems else None

    def check(self) -> None:
        """Raise RecordVersionError when this kvmpy cannot understand the record."""
        header = self.header
        if header.major == MAJOR and header.arch == X86_64 and header.page_size == PAGE_SIZE:
            return
        host = self._host()
        by = f" (written by kvmpy {host['kvmpy']})" if "kvmpy" in host else ""
        if header.major != MAJOR:
            text = (
                f"the record has format version {header.major}.{header.minor}{by}, this kvmpy reads {MAJOR}.x"
            )
        elif header.arch != X86_64:
            text = (
                f"the record is of another architecture{by}: ELF machine {header.arch}, not {X86_64} (x86-64)"
            )
        else:
            text = f"the record has pages of {header.page_size} bytes{by}, not {PAGE_SIZE}"
        raise RecordVersionError(text, host)

    def _host(self) -> dict[str, str]:
        first = next(iter(FrameReader(self.data)), None)
        return parse_lines(first.payload) if first is not None and first.type == FrameType.HOST else {}

    def __iter__(self) -> Iterator[Frame]:
        position = FILE_HEADER.size
        self.problems = []
        while position < len(self.data):
            frame = self._frame(position)
            if isinstance(frame, Frame):
                yield frame
                position = self.end = position + padded(FRAME_HEADER.size + len(frame.payload))
                continue
            if frame is None:
                return
            self.problems.append(frame)
            following = self._next(position + 1) if self.resync else None
            if following is None:
                return
            position = following

    def _frame(self, offset: int) -> Frame | Problem | None:
        rest = len(self.data) - offset
        if self.data[offset : offset + 8] == bytes(min(8, rest)):
            return None
        if rest < FRAME_HEADER.size:
            return Problem(
                offset, f"the record ends within a frame header ({rest} bytes of {FRAME_HEADER.size})"
            )
        magic, crc, size, kind, flags, tid, pid, order, time_ns = FRAME_HEADER.unpack_from(self.data, offset)
        if magic != FRAME_MAGIC:
            return Problem(offset, f"no frame begins here ({magic:#010x} is not its magic number)")
        if size > MAX_PAYLOAD:
            return Problem(offset, f"a frame of {size} bytes: its length is damaged")
        if size > rest - FRAME_HEADER.size:
            have = rest - FRAME_HEADER.size
            return Problem(offset, f"the record ends within a frame ({have} of {size} bytes are there)")
        start = offset + FRAME_HEADER.size
        if zlib.crc32(self.data[offset + CHECKED_FROM : start + size]) != crc:
            return Problem(offset, f"a frame of type {kind} is damaged: its checksum does not match")
        return Frame(kind, bytes(self.data[start : start + size]), tid, pid, order, time_ns, flags, offset)

    def _next(self, offset: int) -> int | None:
        raw = bytes(self.data[offset:])
        position = raw.find(b"KVMR")
        while position >= 0:
            if isinstance(self._frame(offset + position), Frame):
                return offset + position
            position = raw.find(b"KVMR", position + 1)
        return None


def private(path: str, flags: int) -> int:
    """Open a file that is written for its owner alone: guest memory may hold keys. An opener for ``open``."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    # An older file has the mode that it had; devices and other people's files keep it.
    about = os.fstat(fd)
    if stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid():
        os.fchmod(fd, 0o600)
    return fd


def padded(size: int) -> int:
    return (size + 7) & ~7


def parse_lines(payload: bytes) -> dict[str, str]:
    """Return the ``key=value`` lines of a HOST or NOTE payload."""
    lines = payload.decode("utf-8", "replace").split("\n")
    return {key: value for key, mark, value in (line.partition("=") for line in lines) if mark}


def format_lines(values: dict[str, str]) -> bytes:
    """Return *values* as ``key=value`` lines; line breaks in them become blanks."""
    lines = (f"{key}={value.replace(chr(10), ' ')}\n" for key, value in values.items())
    return "".join(lines).encode("utf-8", "backslashreplace")
