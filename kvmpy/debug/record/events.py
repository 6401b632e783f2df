# SPDX-License-Identifier: Apache-2.0
"""What frames of a record say: a class for each type, with pack() and unpack(), laid out by docs/record.md.

unpack() raises ValueError or struct.error where the payload is too short; :func:`unpack` makes that a
RecordError.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from kvmpy.debug.record.format import (
    CODEC_RAW,
    CODEC_ZLIB,
    KICK_IMMEDIATE_EXIT,
    KICK_SIGNAL,
    MAX_PAYLOAD,
    PADDING,
    PAGE_SIZE,
    FileHeader,
    Frame,
    FrameType,
    RecordError,
    What,
    When,
    format_lines,
    pack_frame,
    padded,
    parse_lines,
)
from kvmpy.debug.record.layouts import layout

THREAD = layout("rec_thread", "uint32_t tid; uint32_t pid; uint32_t ppid; uint32_t reserved;")
OBJECT = layout("rec_object", "uint32_t id; uint32_t parent; int32_t fd; uint32_t kind; uint64_t made_by;")
CLOSE = layout("rec_close", "uint32_t object; uint32_t reserved;")
IOCTL = layout(
    "rec_ioctl",
    "uint32_t object; int32_t fd; uint64_t request; uint64_t arg; int64_t result; uint32_t error; "
    "uint16_t chunks; uint16_t reserved; uint64_t end_order; uint64_t end_ns;",
)
CHUNK = layout("rec_chunk", "uint64_t address; uint32_t length; uint8_t when; uint8_t what; uint16_t flags;")
MAP = layout(
    "rec_map",
    "uint64_t address; uint64_t length; uint64_t offset; uint32_t object; uint32_t flags;",
)
PAGES = layout("rec_pages", "uint32_t first; uint32_t count; uint32_t codec; uint32_t stored;")
MEMORY = layout("rec_memory", "uint64_t address; uint32_t count; uint32_t flags;")
WRITE = layout("rec_write", "uint64_t address;")
KICK = layout("rec_kick", "uint32_t object; uint32_t how; uint32_t signal; uint32_t tid;")
DEADLINE = layout("rec_deadline", "uint32_t object; uint32_t reserved; uint64_t ns;")
FILE = layout(
    "rec_file",
    "uint32_t object; uint32_t call; uint64_t mode; uint64_t offset; uint64_t length; int64_t result; "
    "uint32_t error; uint32_t reserved;",
)
EVENT = layout("rec_event", "uint32_t object; uint32_t what; uint64_t value;")
END = layout("rec_end", "uint64_t frames;")
LOST = layout("rec_lost", "uint64_t frames;")


@dataclass(frozen=True)
class Chunk:
    """A piece of memory that an ioctl read or wrote."""

    address: int
    data: bytes
    when: int = When.BOTH
    what: int = What.ARGUMENT
    flags: int = 0

    def pack(self) -> bytes:
        """Return the chunk as bytes, padded."""
        size = len(self.data)
        return (
            CHUNK.pack(self.address, size, self.when, self.what, self.flags) + self.data + PADDING[size & 7]
        )


@dataclass(frozen=True)
class Ioctl:
    """An ioctl; ``end_order`` 0 means that it was in flight (frame ENTER)."""

    TYPE: ClassVar[FrameType] = FrameType.IOCTL

    object: int
    fd: int
    request: int
    arg: int
    result: int = 0
    errno: int = 0
    end_order: int = 0
    end_ns: int = 0
    chunks: tuple[Chunk, ...] = ()

    def pack(self) -> bytes:
        """Return the payload."""
        head = IOCTL.pack(
            self.object,
            self.fd,
            self.request,
            self.arg,
            self.result,
            self.errno,
            len(self.chunks),
            0,
            self.end_order,
            self.end_ns,
        )
        return head + b"".join(chunk.pack() for chunk in self.chunks)

    @classmethod
    def unpack(cls, payload: bytes) -> Ioctl:
        """Return the ioctl in *payload*."""
        ident, fd, request, arg, result, errno, count, _, end_order, end_ns = IOCTL.unpack_from(payload)
        chunks = []
        start = IOCTL.size
        for _ in range(count):
            address, size, when, source, flags = CHUNK.unpack_from(payload, start)
            start += CHUNK.size
            if start + size > len(payload):
                raise ValueError(f"a chunk of {size} bytes reaches beyond its frame")
            chunks.append(Chunk(address, payload[start : start + size], when, source, flags))
            start += padded(size)
        return cls(ident, fd, request, arg, result, errno, end_order, end_ns, tuple(chunks))

    def chunk(self, address: int, when: int) -> bytes | None:
        """Return the content at *address* before (IN) or after (OUT), None where it is not told."""
        match = None
        for each in self.chunks:
            if each.address == address and each.when & when:
                match = each.data
        return match

    @property
    def argument_in(self) -> bytes | None:
        """The argument as the kernel found it."""
        return self.chunk(self.arg, When.IN)

    @property
    def argument_out(self) -> bytes | None:
        """The argument as the kernel left it, where that is known."""
        return self.chunk(self.arg, When.OUT)


@dataclass(frozen=True)
class Enter(Ioctl):
    """An ioctl that is about to be issued."""

    TYPE: ClassVar[FrameType] = FrameType.ENTER


@dataclass(frozen=True)
class Lines:
    """``key=value`` lines: what is known of the host."""

    TYPE: ClassVar[FrameType] = FrameType.HOST

    values: dict[str, str]

    def pack(self) -> bytes:
        """Return the payload."""
        return format_lines(self.values)

    @classmethod
    def unpack(cls, payload: bytes) -> Lines:
        """Return the lines in *payload*."""
        return cls(parse_lines(payload))


@dataclass(frozen=True)
class Note(Lines):
    """A remark."""

    TYPE: ClassVar[FrameType] = FrameType.NOTE


@dataclass(frozen=True)
class Thread:
    """A thread was seen for the first time."""

    TYPE: ClassVar[FrameType] = FrameType.THREAD

    tid: int
    pid: int
    ppid: int = 0
    name: str = ""

    def pack(self) -> bytes:
        """Return the payload."""
        return THREAD.pack(self.tid, self.pid, self.ppid, 0) + self.name.encode("utf-8", "replace")

    @classmethod
    def unpack(cls, payload: bytes) -> Thread:
        """Return the thread in *payload*."""
        tid, pid, ppid, _ = THREAD.unpack_from(payload)
        return cls(tid, pid, ppid, _text(payload, THREAD.size))


def _text(payload: bytes, position: int) -> str:
    return payload[position:].rstrip(b"\0").decode("utf-8", "replace")


@dataclass(frozen=True)
class Object:
    """A file descriptor came into being."""

    TYPE: ClassVar[FrameType] = FrameType.OBJECT

    id: int
    parent: int
    fd: int
    kind: int
    made_by: int = 0
    name: str = ""

    def pack(self) -> bytes:
        """Return the payload."""
        return OBJECT.pack(self.id, self.parent, self.fd, self.kind, self.made_by) + self.name.encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Object:
        """Return the object in *payload*."""
        ident, parent, fd, kind, made_by = OBJECT.unpack_from(payload)
        return cls(ident, parent, fd, kind, made_by, _text(payload, OBJECT.size))


@dataclass(frozen=True)
class Close:
    """An object is about to be closed."""

    TYPE: ClassVar[FrameType] = FrameType.CLOSE

    object: int

    def pack(self) -> bytes:
        """Return the payload."""
        return CLOSE.pack(self.object, 0)

    @classmethod
    def unpack(cls, payload: bytes) -> Close:
        """Return what *payload* says."""
        return cls(CLOSE.unpack_from(payload)[0])


@dataclass(frozen=True)
class Map:
    """Memory was mapped."""

    TYPE: ClassVar[FrameType] = FrameType.MAP

    address: int
    length: int
    offset: int = 0
    object: int = 0
    flags: int = 0

    def pack(self) -> bytes:
        """Return the payload."""
        return MAP.pack(self.address, self.length, self.offset, self.object, self.flags)

    @classmethod
    def unpack(cls, payload: bytes) -> Map:
        """Return what *payload* says."""
        return cls(*MAP.unpack_from(payload))


@dataclass(frozen=True)
class Unmap(Map):
    """Memory was unmapped."""

    TYPE: ClassVar[FrameType] = FrameType.UNMAP


@dataclass(frozen=True)
class Pages:
    """Contents of pages; the first has id *first*."""

    TYPE: ClassVar[FrameType] = FrameType.PAGES

    first: int
    pages: tuple[bytes, ...] = field(repr=False)

    def pack(self, *, level: int = 1) -> bytes:
        """Return the payload, compressed where that makes it smaller."""
        raw = b"".join(self.pages)
        packed = zlib.compress(raw, level)
        codec = CODEC_ZLIB if len(packed) < len(raw) else CODEC_RAW
        body = packed if codec == CODEC_ZLIB else raw
        return PAGES.pack(self.first, len(self.pages), codec, len(body)) + body

    @classmethod
    def unpack(cls, payload: bytes) -> Pages:
        """Return the pages in *payload*."""
        first, count, codec, size = PAGES.unpack_from(payload)
        body = payload[PAGES.size : PAGES.size + size]
        if first == 0 or len(body) != size or count * PAGE_SIZE > MAX_PAYLOAD:
            raise ValueError("its numbers contradict each other")
        if codec == CODEC_ZLIB:
            try:
                body = zlib.decompressobj().decompress(body, count * PAGE_SIZE)
            except zlib.error as error:
                raise ValueError(f"its pages cannot be decompressed: {error}") from None
        elif codec != CODEC_RAW:
            raise ValueError(f"codec {codec} is not known")
        if len(body) != count * PAGE_SIZE:
            raise ValueError(f"{len(body)} bytes for {count} pages")
        return cls(
            first, tuple(body[offset : offset + PAGE_SIZE] for offset in range(0, len(body), PAGE_SIZE))
        )


@dataclass(frozen=True)
class Memory:
    """Whole pages at *address* hold the contents with these ids from now on (0: zeroes)."""

    TYPE: ClassVar[FrameType] = FrameType.MEMORY

    address: int
    ids: tuple[int, ...]
    flags: int = 0

    def pack(self) -> bytes:
        """Return the payload."""
        head = MEMORY.pack(self.address, len(self.ids), self.flags)
        return head + struct.pack(f"<{len(self.ids)}I", *self.ids)

    @classmethod
    def unpack(cls, payload: bytes) -> Memory:
        """Return what *payload* says."""
        address, count, flags = MEMORY.unpack_from(payload)
        return cls(address, struct.unpack_from(f"<{count}I", payload, MEMORY.size), flags)


@dataclass(frozen=True)
class Write:
    """The host wrote *data* at *address*."""

    TYPE: ClassVar[FrameType] = FrameType.WRITE

    address: int
    data: bytes

    def pack(self) -> bytes:
        """Return the payload."""
        return WRITE.pack(self.address) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Write:
        """Return what *payload* says."""
        return cls(WRITE.unpack_from(payload)[0], payload[WRITE.size :])


@dataclass(frozen=True)
class Kick:
    """A vCPU was made to leave the guest."""

    TYPE: ClassVar[FrameType] = FrameType.KICK

    object: int
    how: int = KICK_IMMEDIATE_EXIT | KICK_SIGNAL
    signal: int = 0
    tid: int = 0

    def pack(self) -> bytes:
        """Return the payload."""
        return KICK.pack(self.object, self.how, self.signal, self.tid)

    @classmethod
    def unpack(cls, payload: bytes) -> Kick:
        """Return what *payload* says."""
        return cls(*KICK.unpack_from(payload))


@dataclass(frozen=True)
class Deadline:
    """Runs of a vCPU end by themselves *ns* from now; 0 lifts that."""

    TYPE: ClassVar[FrameType] = FrameType.DEADLINE

    object: int
    ns: int

    def pack(self) -> bytes:
        """Return the payload."""
        return DEADLINE.pack(self.object, 0, self.ns)

    @classmethod
    def unpack(cls, payload: bytes) -> Deadline:
        """Return what *payload* says."""
        ident, _, ns = DEADLINE.unpack_from(payload)
        return cls(ident, ns)


@dataclass(frozen=True)
class FileCall:
    """fallocate, ftruncate or madvise on guest memory."""

    TYPE: ClassVar[FrameType] = FrameType.FILE

    object: int
    call: int
    mode: int
    offset: int
    length: int
    result: int = 0
    errno: int = 0

    def pack(self) -> bytes:
        """Return the payload."""
        return FILE.pack(
            self.object, self.call, self.mode, self.offset, self.length, self.result, self.errno, 0
        )

    @classmethod
    def unpack(cls, payload: bytes) -> FileCall:
        """Return what *payload* says."""
        return cls(*FILE.unpack_from(payload)[:7])


@dataclass(frozen=True)
class Event:
    """An eventfd was written or read."""

    TYPE: ClassVar[FrameType] = FrameType.EVENT

    object: int
    what: int
    value: int

    def pack(self) -> bytes:
        """Return the payload."""
        return EVENT.pack(self.object, self.what, self.value)

    @classmethod
    def unpack(cls, payload: bytes) -> Event:
        """Return what *payload* says."""
        return cls(*EVENT.unpack_from(payload))


@dataclass(frozen=True)
class End:
    """The record was closed in order."""

    TYPE: ClassVar[FrameType] = FrameType.END

    frames: int

    def pack(self) -> bytes:
        """Return the payload."""
        return END.pack(self.frames)

    @classmethod
    def unpack(cls, payload: bytes) -> End:
        """Return what *payload* says."""
        return cls(*END.unpack_from(payload))


@dataclass(frozen=True)
class Lost:
    """Frames could not be written."""

    TYPE: ClassVar[FrameType] = FrameType.LOST

    frames: int

    def pack(self) -> bytes:
        """Return the payload."""
        return LOST.pack(self.frames)

    @classmethod
    def unpack(cls, payload: bytes) -> Lost:
        """Return what *payload* says."""
        return cls(*LOST.unpack_from(payload))


Payload = (
    Ioctl
    | Lines
    | Thread
    | Object
    | Close
    | Map
    | Pages
    | Memory
    | Write
    | Kick
    | Deadline
    | FileCall
    | Event
    | End
    | Lost
)

_UNPACK: dict[int, Callable[[bytes], Payload]] = {
    FrameType.HOST: Lines.unpack,
    FrameType.THREAD: Thread.unpack,
    FrameType.OBJECT: Object.unpack,
    FrameType.CLOSE: Close.unpack,
    FrameType.IOCTL: Ioctl.unpack,
    FrameType.ENTER: Enter.unpack,
    FrameType.MAP: Map.unpack,
    FrameType.UNMAP: Unmap.unpack,
    FrameType.PAGES: Pages.unpack,
    FrameType.MEMORY: Memory.unpack,
    FrameType.WRITE: Write.unpack,
    FrameType.KICK: Kick.unpack,
    FrameType.DEADLINE: Deadline.unpack,
    FrameType.FILE: FileCall.unpack,
    FrameType.EVENT: Event.unpack,
    FrameType.NOTE: Note.unpack,
    FrameType.END: End.unpack,
    FrameType.LOST: Lost.unpack,
}


def unpack(frame: Frame) -> Payload | None:
    """Return what *frame* says, None for a type that is not known; RecordError when it makes no sense."""
    convert = _UNPACK.get(frame.type)
    if convert is None:
        return None
    try:
        return convert(frame.payload)
    except (ValueError, struct.error) as error:
        name = FrameType(frame.type).name
        raise RecordError(f"at byte {frame.offset}: the frame {name} makes no sense: {error}") from None


def pack_all(payloads: Iterable[tuple[Frame, Payload]]) -> bytes:
    """Return a whole record: header, then each payload in a frame with the other's thread, order and time."""
    parts = [FileHeader().pack()]
    for frame, payload in payloads:
        parts.append(
            pack_frame(
                payload.TYPE, payload.pack(), frame.tid, frame.pid, frame.order, frame.time_ns, frame.flags
            )
        )
    return b"".join(parts)
