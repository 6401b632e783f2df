# SPDX-License-Identifier: Apache-2.0
"""What a stream of frames says: ioctls with the names of their file descriptors and threads, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvmpy.debug.decode import Decoded, Decoder, Place, as_json
from kvmpy.debug.record.events import Close, Enter, FileCall, Ioctl, Lost, Note, Object, Thread, unpack
from kvmpy.debug.record.format import Frame, FrameType, ObjectKind, RecordError
from kvmpy.uapi.error_hints import error_words
from kvmpy.uapi.ioctls import KVM_CREATE_VM

KINDS = {
    ObjectKind.SYSTEM: "system",
    ObjectKind.VM: "vm",
    ObjectKind.VCPU: "vcpu",
    ObjectKind.DEVICE: "device",
    ObjectKind.GMEM: "gmem",
    ObjectKind.STATS: "stats",
    ObjectKind.SEV: "sev",
    ObjectKind.UFFD: "uffd",
}
_NS = 1_000_000_000


@dataclass(frozen=True)
class Event:
    """An ioctl, or with ``text`` something else worth a line."""

    frame: Frame
    thread: str
    target: str
    ioctl: Ioctl | None = None
    decoded: Decoded | None = None
    place: Place = field(default_factory=Place)
    text: str = ""
    warning: bool = False

    @property
    def seconds(self) -> float:
        """When it began (CLOCK_MONOTONIC)."""
        return self.frame.time_ns / _NS

    @property
    def duration_ns(self) -> int:
        """How long the ioctl took, 0 while it has not returned."""
        return (
            max(0, self.ioctl.end_ns - self.frame.time_ns)
            if self.ioctl is not None and self.ioctl.end_ns
            else 0
        )

    def line(self, start: float) -> str:
        """Return the line of a live trace; *start* is the time that counts as 0."""
        if self.decoded is None:
            return f"{self.seconds - start:11.6f} {self.thread} {self.target} {self.text}".rstrip()
        took = f" <{self.duration_ns / 1000:.1f} us>" if self.duration_ns else " <did not return>"
        return f"{self.seconds - start:11.6f} {self.thread} {self.target} {self.decoded}{took}"

    def json(self, start: float) -> dict[str, Any]:
        """Return the same as JSON-ready values."""
        row: dict[str, Any] = {
            "time": round(self.seconds - start, 9),
            "pid": self.frame.pid,
            "tid": self.frame.tid,
            "thread": self.thread,
            "target": self.target,
        }
        if self.ioctl is None or self.decoded is None:
            return row | {"note": self.text, "warning": self.warning}
        row["duration_us"] = round(self.duration_ns / 1000, 3)
        return row | as_json(self.ioctl, self.decoded, self.place)


class Stream:
    """Keeps what frames say about objects and threads, and yields an :class:`Event` for each ioctl.

    With *quiet* it yields warnings and remarks alone, which costs next to nothing.
    """

    def __init__(self, decoder: Decoder, *, quiet: bool = False) -> None:
        self.decoder = decoder
        self.quiet = quiet
        self.objects: dict[int, Object] = {}
        self.types: dict[int, int] = {}
        self.threads: dict[int, str] = {}
        self.in_flight: dict[int, tuple[Frame, Enter]] = {}
        self._made: dict[int, int] = {}

    def feed(self, frame: Frame) -> Iterator[Event]:
        """Take in a frame and yield what it says."""
        if self.quiet and frame.type not in (FrameType.NOTE, FrameType.LOST):
            return
        try:
            said = unpack(frame)
        except RecordError as error:
            yield Event(frame, self._thread(frame), "", text=f"damaged frame: {error}", warning=True)
            return
        if isinstance(said, Enter):
            self.in_flight[frame.tid] = (frame, said)
        elif isinstance(said, Ioctl):
            self.in_flight.pop(frame.tid, None)
            if said.request == KVM_CREATE_VM.nr and said.result >= 0:
                self._made[frame.order] = said.arg
            yield self._event(frame, said)
        elif isinstance(said, Object):
            self._object(said)
        elif isinstance(said, Thread):
            self.threads[said.tid] = said.name
        elif isinstance(said, FileCall):
            result = f"-1 {error_words(None, said.errno)}" if said.result < 0 else str(said.result)
            text = f"fallocate mode={said.mode:#x} offset={said.offset:#x} length={said.length:#x} = {result}"
            yield Event(frame, self._thread(frame), self._name(said.object, -1), text=text)
        elif isinstance(said, Close):
            yield Event(frame, self._thread(frame), self._name(said.object, -1), text="closed")
        elif isinstance(said, Lost):
            text = f"{said.frames} frames were lost"
            yield Event(frame, self._thread(frame), "", text=text, warning=True)
        elif isinstance(said, Note):
            text = ", ".join(f"{key} {value}" for key, value in said.values.items())
            yield Event(frame, self._thread(frame), "", text=text)

    def unfinished(self) -> Iterator[Event]:
        """Yield the ioctls that have not returned."""
        for frame, said in self.in_flight.values():
            yield self._event(frame, said)

    def _object(self, said: Object) -> None:
        self.objects[said.id] = said
        if said.kind == ObjectKind.VM:
            self.types[said.id] = self._made.pop(said.made_by, 0)
        else:
            self.types[said.id] = self.types.get(said.parent, 0)

    def _thread(self, frame: Frame) -> str:
        name = self.threads.get(frame.tid, "")
        return f"{name}:{frame.tid}" if name else str(frame.tid)

    def _name(self, ident: int, fd: int) -> str:
        known = self.objects.get(ident)
        return known.name if known is not None else f"fd{fd}" if fd >= 0 else "?"

    def _event(self, frame: Frame, said: Ioctl) -> Event:
        known = self.objects.get(said.object)
        kind = KINDS.get(ObjectKind(known.kind), "") if known is not None and known.kind in KINDS else ""
        place = Place(kind, self.types.get(said.object, 0))
        decoded = self.decoder.ioctl(said, place)
        return Event(frame, self._thread(frame), self._name(said.object, said.fd), said, decoded, place)
