# SPDX-License-Identifier: Apache-2.0
"""The memory that kvmpy shares with recorded processes: a control page, and a ring of frames for each.

The layouts are those of ring.h, which a test compares.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from kvmpy.debug.preload.plan import compile_plan
from kvmpy.debug.record.format import FRAME_HEADER, FRAME_MAGIC, Frame, FrameType, padded

CONTROL_SIZE = 4096
RING_HEADER = 4096
RING_MAGIC = 0x676E69725652564B
FLAG_MEMORY = 1
FLAG_WRITES = 2
DUMP = 0xFF00

CONTROL = struct.Struct("<QQIIIIQQ")
RING = struct.Struct("<QQII40s")
HEAD_AT, TAIL_AT, LOST_AT = 64, 128, 192
FIRST_ORDER = 1 << 32
"""Numbers below are free for frames that this process adds."""

PATIENCE_NS = 3_000_000_000


class Ring:
    """What one process recorded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self._numbers = memoryview(self._map).cast("Q")
        _, self.size, self.pid, self.ppid, name = RING.unpack_from(self._map)
        self.name = name.split(b"\0")[0].decode("utf-8", "replace").strip()
        self._zeroes = bytes(1 << 16)

    @property
    def lost(self) -> int:
        """Frames that the process had to drop."""
        return self._numbers[LOST_AT // 8]

    @property
    def pending(self) -> bool:
        """Whether something was reserved that has not been read."""
        return self._numbers[HEAD_AT // 8] != self._numbers[TAIL_AT // 8]

    @property
    def alive(self) -> bool:
        """Whether the process exists, and is no zombie."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:
            return False
        return status.rpartition(b")")[2].split()[0] not in (b"Z", b"X")

    def _read(self, at: int, size: int) -> bytes:
        start = at & (self.size - 1)
        first = self._map[RING_HEADER + start : RING_HEADER + min(start + size, self.size)]
        return (
            first if len(first) == size else first + self._map[RING_HEADER : RING_HEADER + size - len(first)]
        )

    def _clear(self, at: int, size: int) -> None:
        # Writers rely on zeros where no frame has been written.
        while size:
            start = at & (self.size - 1)
            part = min(size, self.size - start, len(self._zeroes))
            self._map[RING_HEADER + start : RING_HEADER + start + part] = self._zeroes[:part]
            at += part
            size -= part

    def frames(self, *, abandoned: bool = False) -> Iterator[Frame]:
        """Yield the frames that are complete, and free their room.

        With *abandoned* the process is dead: what it began and never completed is passed over.
        """
        tail = self._numbers[TAIL_AT // 8]
        head = self._numbers[HEAD_AT // 8]
        while tail < head:
            fields = FRAME_HEADER.unpack(self._read(tail, FRAME_HEADER.size))
            magic, _, size, kind, flags, tid, pid, order, time_ns = fields
            whole = 8
            if magic == FRAME_MAGIC:
                whole = padded(FRAME_HEADER.size + size)
                payload = self._read(tail + FRAME_HEADER.size, size)
                yield Frame(kind, payload, tid, pid, order, time_ns, flags)
            elif not abandoned:
                return
            self._clear(tail, whole)
            tail += whole
            self._numbers[TAIL_AT // 8] = tail

    def close(self) -> None:
        """Unmap the ring and remove its file."""
        self._numbers.release()
        self._map.close()
        self.path.unlink(missing_ok=True)


class Shared:
    """The folder that recorded processes find through KVMPY_TRACE_DIR."""

    def __init__(
        self, folder: Path, *, memory: bool = False, writes: bool = False, ring_size: int = 8 << 20
    ) -> None:
        if ring_size & (ring_size - 1) or ring_size < mmap.PAGESIZE:
            raise ValueError(f"a ring of {ring_size} bytes: a power of two, at least {mmap.PAGESIZE}")
        self.folder = folder
        self.rings: dict[str, Ring] = {}
        self._lost = 0
        (folder / "plan").write_bytes(compile_plan())
        flags = (FLAG_MEMORY if memory or writes else 0) | (FLAG_WRITES if writes else 0)
        content = CONTROL.pack(FIRST_ORDER, 0, 0, 0, 0, flags, ring_size, PATIENCE_NS)
        (folder / "control").write_bytes(content.ljust(CONTROL_SIZE, b"\0"))
        with (folder / "control").open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), CONTROL_SIZE)
        self._numbers = memoryview(self._map).cast("Q")

    @property
    def order(self) -> int:
        """The last order number that was given out."""
        return self._numbers[0]

    def poll(self) -> list[Frame]:
        """Return what was recorded since the last call, in order."""
        self._numbers[1] += 1
        self._discover()
        found = [frame for ring in list(self.rings.values()) for frame in self._drain(ring)]
        # A thread announces itself with its first frame, whose number may be an earlier one.
        found.sort(key=lambda frame: (frame.type != FrameType.THREAD, frame.order))
        return found

    def _drain(self, ring: Ring) -> Iterator[Frame]:
        # Asked before reading: what a process wrote before it ended is there afterwards.
        dead = not ring.alive
        yield from ring.frames(abandoned=dead)
        if dead:
            self._lost += ring.lost
            del self.rings[ring.path.name]
            ring.close()

    def _discover(self) -> None:
        with os.scandir(self.folder) as items:
            names = [item.name for item in items if item.name.startswith("ring.")]
        for name in sorted(names):
            if name not in self.rings and self._complete(self.folder / name):
                self.rings[name] = Ring(self.folder / name)

    @staticmethod
    def _complete(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                head = file.read(RING.size)
        except OSError:
            return False
        return len(head) == RING.size and RING.unpack(head)[0] == RING_MAGIC

    @property
    def alive(self) -> list[Ring]:
        """The recorded processes that still exist."""
        return [ring for ring in self.rings.values() if ring.alive]

    @property
    def lost(self) -> int:
        """Frames that processes had to drop."""
        return self._lost + sum(ring.lost for ring in self.rings.values())

    def close(self) -> None:
        """Unmap everything; the folder is the caller's."""
        for ring in self.rings.values():
            with contextlib.suppress(OSError):
                ring.close()
        self.rings.clear()
        self._numbers.release()
        self._map.close()
