# SPDX-License-Identifier: Apache-2.0
"""The memory that kvmpy shares with recorded processes: a control page, and a ring of frames for each.

The layouts are those of ring.h, which a test compares.  A recorded process can write anything into its ring
and into the control page: what comes from there is copied first and checked then, and what makes no sense
costs frames, which are counted, and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
import time
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from kvmpy.debug.record.format import FRAME_HEADER, FRAME_MAGIC, Frame, FrameType
from kvmpy.debug.record.layouts import OFFSETS, layout

CONTROL_SIZE = 4096
RING_HEADER = 4096
RING_MAGIC = 0x676E69725652564B
# Copy guest memory before the first KVM_RUN of a VM, and before later ones what the program changed.
FLAG_MEMORY = 1
FLAG_WRITES = 2
# A frame type of its own, never in a file: MEMORY of the record format with its pages in place of their ids.
RING_DUMP = 0xFF00
# The word of a robust mutex: the holder's number, marked by the kernel when the holder died.
HOLDER_TID = 0x3FFF_FFFF
HOLDER_DIED = 0x4000_0000
# Numbers below are free for frames that kvmpy adds.
FIRST_ORDER = 1 << 32

# refused counts processes that found no room for a ring; ring_size is a power of two.
CONTROL = layout(
    "control",
    "_Atomic uint64_t order; _Atomic uint32_t objects; _Atomic uint32_t vms; _Atomic uint32_t rings; "
    "_Atomic uint32_t refused; uint32_t flags; uint32_t reserved; uint64_t ring_size; "
    "_Alignas(64) _Atomic uint32_t holder; uint8_t mutex[60];",
)
RING = layout(
    "ring",
    "uint64_t magic; uint64_t size; uint32_t pid; uint32_t ppid; char name[40]; "
    "_Alignas(64) _Atomic uint64_t head; _Alignas(64) _Atomic uint64_t tail; "
    "_Alignas(64) _Atomic uint64_t lost;",
)
RINGS_AT, REFUSED_AT, HOLDER_AT = (OFFSETS["control"][name] for name in ("rings", "refused", "holder"))
HEAD_AT, TAIL_AT, LOST_AT = (OFFSETS["ring"][name] for name in ("head", "tail", "lost"))

_FROM_PROCESSES = frozenset(
    (
        FrameType.THREAD,
        FrameType.OBJECT,
        FrameType.CLOSE,
        FrameType.IOCTL,
        FrameType.ENTER,
        FrameType.MAP,
        FrameType.UNMAP,
        FrameType.FILE,
        FrameType.NOTE,
        RING_DUMP,
    )
)
_MAGIC_AND_LENGTH = struct.Struct("<I4xI")
_ZEROES = bytes(1 << 16)
_place = itemgetter(0)
# Far beyond what any thread takes from the begin of a frame to its end.
_STALLED_S = 5.0


class Lease:
    """A robust mutex at *HOLDER_AT* of a control page, held until :meth:`end` or this thread's death.

    The kernel marks the word when the holder dies, however that comes about (Linux:
    Documentation/locking/robust-futex-ABI.rst); recorded processes look at the word and need neither a file
    descriptor nor a process number for it.
    """

    SIZE = 64
    # What the C library's list of held robust mutexes leads to must stay mapped.
    _held: set[Lease] = set()  # noqa: RUF012 - shared on purpose

    def __init__(self, page: mmap.mmap) -> None:
        libc = ctypes.CDLL(None)
        self._mutex = (ctypes.c_char * self.SIZE).from_buffer(page, HOLDER_AT)
        attributes = ctypes.create_string_buffer(self.SIZE)
        self._unlock = libc.pthread_mutex_unlock
        for step in (
            libc.pthread_mutexattr_init(attributes),
            libc.pthread_mutexattr_setpshared(attributes, 1),
            libc.pthread_mutexattr_setrobust(attributes, 1),
            libc.pthread_mutex_init(self._mutex, attributes),
            libc.pthread_mutex_lock(self._mutex),
        ):
            if step:
                raise OSError(step, os.strerror(step))
        self._held.add(self)
        word = int.from_bytes(page[HOLDER_AT : HOLDER_AT + 4], "little")
        if word & HOLDER_TID != threading.get_native_id():
            raise OSError(errno.ENOSYS, "this C library's mutexes do not begin with the holder's number")

    def end(self) -> None:
        """Let go; from another thread than the holder's nothing happens."""
        if self in self._held and self._unlock(self._mutex) == 0:
            self._held.discard(self)
            del self._mutex

    @classmethod
    def lives(cls, page: bytes) -> bool:
        """Whether the holder of the control page with this content is alive and has not let go."""
        word = int.from_bytes(page[HOLDER_AT : HOLDER_AT + 4], "little")
        return bool(word & HOLDER_TID) and not word & HOLDER_DIED


class Raw(NamedTuple):
    """A frame as it came: *place* puts those of all rings in order."""

    place: int
    type: int
    flags: int
    tid: int
    pid: int
    order: int
    time_ns: int
    payload: bytes

    def frame(self) -> Frame:
        """Return the same for those who decode."""
        return Frame(self.type, self.payload, self.tid, self.pid, self.order, self.time_ns, self.flags)


class Ring:
    """What one process recorded; OSError or ValueError where the file is no ring of *size* bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            info = os.fstat(self._file)
            head = os.pread(self._file, RING.size, 0)
            magic, self.size, self.pid, self.ppid, name, *_ = RING.unpack(head.ljust(RING.size, b"\0"))
            if magic != RING_MAGIC or not stat.S_ISREG(info.st_mode):
                raise ValueError(f"{path} is not a ring")
            if not size == self.size == info.st_size - RING_HEADER:
                raise ValueError(f"{path}: a ring of {self.size} bytes in {info.st_size}, not of {size}")
            self._map = mmap.mmap(self._file, RING_HEADER + self.size)
        except BaseException:
            os.close(self._file)
            raise
        self._numbers = memoryview(self._map).cast("Q")
        self.name = name.split(b"\0")[0].decode("utf-8", "replace").strip()
        # The copy in the ring is for the process; this one nobody else writes.
        self._tail = self._numbers[TAIL_AT // 8]
        self._damaged = 0
        self._stalled: tuple[int, float] | None = None

    @property
    def lost(self) -> int:
        """Frames that the process had to drop, and those that made no sense."""
        return int(self._numbers[LOST_AT // 8]) + self._damaged

    @property
    def damaged(self) -> bool:
        """Whether something else than frames was in it."""
        return self._damaged > 0

    @property
    def pending(self) -> bool:
        """Whether something was reserved that has not been read."""
        return bool(self._numbers[HEAD_AT // 8] != self._tail)

    @property
    def alive(self) -> bool:
        """Whether anybody else has it mapped, so may write to it."""
        try:
            # Given only where no other open file leads to the inode, be it that of a mapping.
            fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN or _exists(self.pid)
        fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False

    def _read(self, offset: int, size: int) -> bytes:
        start = offset & (self.size - 1)
        first = self._map[RING_HEADER + start : RING_HEADER + min(start + size, self.size)]
        return (
            first if len(first) == size else first + self._map[RING_HEADER : RING_HEADER + size - len(first)]
        )

    def _free(self, end: int) -> None:
        # Writers rely on zeros where no frame has been written.
        position, size = self._tail, end - self._tail
        while size > 0:
            start = position & (self.size - 1)
            part = min(size, self.size - start, len(_ZEROES))
            self._map[RING_HEADER + start : RING_HEADER + start + part] = _ZEROES[:part]
            position += part
            size -= part
        self._tail = self._numbers[TAIL_AT // 8] = end & (1 << 64) - 1

    def take(self, *, abandoned: bool = False) -> tuple[list[Raw], float]:
        """Return the frames that are complete and free their room; and how full the ring was (0 to 1).

        With *abandoned* the process is gone: what it began and never completed is passed over.
        """
        tail, head = self._tail, self._numbers[HEAD_AT // 8]
        used = head - tail
        if not 0 <= used <= self.size:
            self._damaged += 1
            self._tail = head - self.size
            self._free(head)
            return [], 1.0
        if not used:
            return [], 0.0
        end = self._complete(tail, used, abandoned)
        frames = self._parse(self._read(tail, end), abandoned)
        self._free(tail + end)
        return frames, used / self.size

    def _complete(self, tail: int, used: int, abandoned: bool) -> int:
        """Return how many bytes hold complete frames: a header is looked at before its payload is copied."""
        if abandoned:
            return used
        offset, mask, read, buffer = 0, self.size - 1, _MAGIC_AND_LENGTH.unpack_from, self._map
        while offset + FRAME_HEADER.size <= used:
            # Headers begin at multiples of 8: magic and length may lie on both sides of the end.
            start = tail + offset & mask
            where = RING_HEADER + start
            magic, size = (
                read(buffer, where) if start + 12 <= self.size else read(self._read(tail + offset, 12))
            )
            if magic == FRAME_MAGIC:
                offset += FRAME_HEADER.size + (size + 7 & ~7)
                if offset <= used:
                    continue
            elif not magic and not self._stands_still(tail + offset, used):
                return offset
            # Nothing here is a frame: what follows is lost, the ring goes on behind it.
            return used
        return min(offset, used)

    def _stands_still(self, offset: int, used: int) -> bool:
        """Whether a frame that was begun holds up a full ring for too long."""
        if used * 2 < self.size:
            self._stalled = None
            return False
        now = time.monotonic()
        if self._stalled is None or self._stalled[0] != offset:
            self._stalled = offset, now
        return now - self._stalled[1] > _STALLED_S

    def _parse(self, data: bytes, abandoned: bool) -> list[Raw]:
        frames = []
        offset, size_of_head, unpack, known = 0, FRAME_HEADER.size, FRAME_HEADER.unpack_from, _FROM_PROCESSES
        thread, end = FrameType.THREAD, len(data)
        damaged = gap = False
        while offset + size_of_head <= end:
            magic, _, size, kind, flags, tid, pid, order, time_ns = unpack(data, offset)
            start = offset + size_of_head
            if magic == FRAME_MAGIC and start + size <= end and kind in known:
                payload = data[start : start + size]
                # A thread announces itself with its first frame, whose number may be an earlier one.
                place = 0 if kind == thread else order
                frames.append(Raw(place, kind, flags, tid, pid, order, time_ns, payload))
                offset = start + (size + 7 & ~7)
                gap = False
                continue
            # What a process that died had begun is no damage: it lacks its magic number.
            damaged = damaged or (not gap and (bool(magic) or not abandoned))
            gap = True
            offset += 8
        self._damaged += damaged
        return frames

    def close(self) -> None:
        """Unmap the ring and remove its file."""
        self._numbers.release()
        self._map.close()
        os.close(self._file)
        self.path.unlink(missing_ok=True)


def _exists(pid: int) -> bool:
    """Whether a process exists, and is no zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


class Shared:
    """The folder that recorded processes find through KVMPY_TRACE_DIR.

    They wait for room in their rings as long as the thread that made this object lives and has not closed it.
    """

    def __init__(
        self, folder: Path, *, memory: bool = False, writes: bool = False, ring_size: int = 8 << 20
    ) -> None:
        if ring_size & (ring_size - 1) or ring_size < mmap.PAGESIZE:
            raise ValueError(f"a ring of {ring_size} bytes: a power of two, at least {mmap.PAGESIZE}")
        self.folder = folder
        self.ring_size = ring_size
        self.rings: dict[str, Ring] = {}
        self.fill = 0.0
        """How full the fullest ring was at the last :meth:`poll`, 0 to 1."""
        self.damaged = 0
        """Processes whose rings held something else than frames."""
        self._lost = 0
        self._seen: set[str] = set()
        flags = (FLAG_MEMORY if memory or writes else 0) | (FLAG_WRITES if writes else 0)
        content = CONTROL.pack(FIRST_ORDER, 0, 0, 0, 0, flags, 0, ring_size, 0, b"")
        (folder / "control").write_bytes(content.ljust(CONTROL_SIZE, b"\0"))
        with (folder / "control").open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), CONTROL_SIZE)
        self._lease = Lease(self._map)

    def _number(self, offset: int, size: int) -> int:
        return int.from_bytes(self._map[offset : offset + size], "little")

    @property
    def order(self) -> int:
        """The last order number that was given out."""
        return self._number(0, 8)

    @property
    def refused(self) -> int:
        """Processes that found no room for a ring: nothing of them is recorded."""
        return self._number(REFUSED_AT, 4)

    def poll(self) -> list[Raw]:
        """Return what was recorded since the last call, in order."""
        self._discover()
        self.fill = 0.0
        results: list[Raw] = []
        for name, ring in list(self.rings.items()):
            # Asked before reading: what a process wrote before it ended is there afterwards.
            dead = not ring.alive
            frames, fill = ring.take(abandoned=dead)
            results += frames
            self.fill = max(self.fill, fill)
            if dead:
                self._lost += ring.lost
                self.damaged += ring.damaged
                del self.rings[name]
                ring.close()
        results.sort(key=_place)
        return results

    def _discover(self) -> None:
        if len(self._seen) == self._number(RINGS_AT, 4):
            return
        with os.scandir(self.folder) as items:
            names = {item.name for item in items if item.name.startswith("ring.")}
        for name in sorted(names - self._seen):
            # One that is being made has no magic number yet.
            with contextlib.suppress(OSError, ValueError):
                self.rings[name] = Ring(self.folder / name, self.ring_size)
                self._seen.add(name)

    @property
    def alive(self) -> list[Ring]:
        """The recorded processes that still exist."""
        return [ring for ring in self.rings.values() if ring.alive]

    @property
    def lost(self) -> int:
        """Frames that processes had to drop, and those that made no sense."""
        return self._lost + sum(ring.lost for ring in self.rings.values())

    def close(self) -> None:
        """Unmap everything, and let nobody wait any more; the folder is the caller's."""
        self._lease.end()
        for ring in self.rings.values():
            with contextlib.suppress(OSError):
                ring.close()
        self.rings.clear()
        with contextlib.suppress(BufferError):
            self._map.close()
