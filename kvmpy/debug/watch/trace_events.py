# SPDX-License-Identifier: Apache-2.0
"""What a stream of frames says: ioctls with the names of their file descriptors and threads, in words."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Protocol

from kvmpy.debug.decode.decoder import (
    PARTIAL,
    Decoded,
    Decoder,
    Place,
    as_json,
    exit_name,
    request_name,
    was_partial,
)
from kvmpy.debug.record.events import (
    IOCTL,
    Close,
    FileCall,
    Ioctl,
    Lost,
    Note,
    Object,
    Thread,
    unpack,
)
from kvmpy.debug.record.format import Frame, FrameType, ObjectKind, RecordError
from kvmpy.uapi.error_hints import error_words
from kvmpy.uapi.error_rules import region_of
from kvmpy.uapi.ioctls import (
    KVM_CREATE_VM,
    KVM_RUN,
    SETS_SLOT,
)

_NS = 1_000_000_000
_NOWHERE = Place()
# Members of an enum are looked up anew each time.
_ENTER, _IOCTL = int(FrameType.ENTER), int(FrameType.IOCTL)
_DAMAGED = "damaged frame: its parts do not fit into it"


class AnyFrame(Protocol):
    """A frame of a record or of a ring."""

    @property
    def type(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def tid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def order(self) -> int: ...
    @property
    def time_ns(self) -> int: ...
    @property
    def payload(self) -> bytes: ...


def printable(text: str) -> str:
    """Return *text* for a terminal: what a traced program chose holds no control sequence."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)


class Event:
    """An ioctl, or with ``text`` something else worth a line.

    What counting and filtering need is read from the frame; the words are made when they are asked for.
    """

    def __init__(
        self,
        frame: AnyFrame,
        thread: str,
        target: str,
        *,
        head: tuple[int, ...] | None = None,
        decoder: Decoder | None = None,
        place: Place = _NOWHERE,
        text: str = "",
        warning: bool = False,
    ) -> None:
        self.frame = frame
        self.thread = thread
        self.target = target
        self.text = text
        self.warning = warning
        self.place = place
        self.is_ioctl = head is not None
        self._decoder = decoder
        _, self.fd, self.request, _, self.result, self.errno, _, _, _, self.end_ns = head or (0,) * 10

    @property
    def seconds(self) -> float:
        """When it began (CLOCK_MONOTONIC)."""
        return self.frame.time_ns / _NS

    @property
    def duration_ns(self) -> int:
        """How long the ioctl took, 0 while it has not returned."""
        return max(0, self.end_ns - self.frame.time_ns) if self.end_ns else 0

    @property
    def name(self) -> str:
        """The ioctl's name, or its number and parts."""
        return request_name(self.request)

    @property
    def exit(self) -> str:
        """Why KVM_RUN ended, ``""`` for other ioctls and where that is not told."""
        return exit_name(self.frame.payload, self.result, self.errno) if self.request == KVM_RUN.nr else ""

    @property
    def partial(self) -> bool:
        """Whether an ioctl that succeeded did less than it was asked for."""
        return self.request in PARTIAL and was_partial(self.frame.payload)

    @property
    def failed(self) -> bool:
        """Whether it failed, in part or altogether."""
        return bool(self.errno or self.partial)

    @cached_property
    def ioctl(self) -> Ioctl | None:
        """The ioctl with what it read and wrote; None where the frame makes no sense."""
        try:
            return Ioctl.unpack(self.frame.payload) if self.is_ioctl else None
        except (ValueError, struct.error):
            return None

    @cached_property
    def decoded(self) -> Decoded | None:
        """The ioctl in words."""
        if self.ioctl is None or self._decoder is None:
            return None
        return self._decoder.ioctl(self.ioctl, self.place)

    def line(self, start: float) -> str:
        """Return the line of a live trace; *start* is the time that counts as 0."""
        text = self.text
        if self.is_ioctl:
            took = f"<{self.duration_ns / 1000:.1f} us>" if self.duration_ns else "<did not return>"
            text = f"{self.decoded or f'{self.name} [{_DAMAGED}]'} {took}"
        return printable(f"{self.seconds - start:11.6f} {self.thread} {self.target} {text}".rstrip())

    def json(self, start: float) -> dict[str, Any]:
        """Return the same as JSON-ready values."""
        row: dict[str, Any] = {
            "time": round(self.seconds - start, 9),
            "pid": self.frame.pid,
            "tid": self.frame.tid,
            "thread": self.thread,
            "target": self.target,
        }
        if not self.is_ioctl:
            return row | {"note": self.text, "warning": self.warning}
        if self.ioctl is None or self.decoded is None:
            return row | {"note": f"{self.name}: {_DAMAGED}", "warning": True}
        row["duration_us"] = round(self.duration_ns / 1000, 3)
        return row | as_json(self.ioctl, self.decoded, self.place)


class Stream:
    """Keeps what frames say about objects and threads, and yields an :class:`Event` for each ioctl.

    With *quiet* it yields warnings and remarks alone, which costs next to nothing; *count* takes the frames
    of ioctls then.
    """

    def __init__(
        self, decoder: Decoder, *, quiet: bool = False, count: Callable[[AnyFrame], None] | None = None
    ) -> None:
        self.decoder = decoder
        self.count = count
        self.quiet = quiet
        self.objects: dict[int, Object] = {}
        self.threads: dict[int, str] = {}
        self.in_flight: dict[int, AnyFrame] = {}
        self._places: dict[int, Place] = {}
        self._made: dict[int, int] = {}

    def feed(self, frame: AnyFrame) -> Iterator[Event]:
        """Take in a frame and yield what it says."""
        kind = frame.type
        if kind == _ENTER:
            self.in_flight[frame.tid] = frame
        elif kind == _IOCTL:
            self.in_flight.pop(frame.tid, None)
            if len(frame.payload) < IOCTL.size:
                yield self._remark(frame, "damaged frame: it is too short for an ioctl", warning=True)
            elif not self.quiet:
                yield self._event(frame)
            elif self.count is not None:
                self.count(frame)
        elif not self.quiet or kind in (FrameType.NOTE, FrameType.LOST):
            yield from self._other(frame)

    def _other(self, frame: AnyFrame) -> Iterator[Event]:
        try:
            said = unpack(Frame(frame.type, frame.payload))
        except RecordError as error:
            yield self._remark(frame, f"damaged frame: {error}", warning=True)
            return
        if isinstance(said, Object):
            self._object(said)
        elif isinstance(said, Thread):
            self.threads[said.tid] = said.name
        elif isinstance(said, FileCall):
            result = f"-1 {error_words(None, said.errno)}" if said.result < 0 else str(said.result)
            text = f"fallocate mode={said.mode:#x} offset={said.offset:#x} length={said.length:#x} = {result}"
            yield self._remark(frame, text, self._name(said.object, -1))
        elif isinstance(said, Close):
            yield self._remark(frame, "closed", self._name(said.object, -1))
        elif isinstance(said, Lost):
            yield self._remark(frame, f"{said.frames} frames were lost", warning=True)
        elif isinstance(said, Note):
            yield self._remark(frame, ", ".join(f"{key} {value}" for key, value in said.values.items()))

    def unfinished(self) -> Iterator[Event]:
        """Yield the ioctls that have not returned."""
        for frame in self.in_flight.values():
            if len(frame.payload) < IOCTL.size:
                continue
            if not self.quiet:
                yield self._event(frame)
            elif self.count is not None:
                self.count(frame)

    def _object(self, said: Object) -> None:
        self.objects[said.id] = said
        parent = self._places.get(said.parent, _NOWHERE)
        vm_type = self._made.pop(said.made_by, 0) if said.kind == ObjectKind.VM else parent.vm_type
        # A VM whose making was seen has no slots yet; what one had before is not known.
        slots = {} if said.kind == ObjectKind.VM and said.made_by else parent.slots
        self._places[said.id] = Place(ObjectKind(said.kind).name.lower(), vm_type, slots)

    def _thread(self, frame: AnyFrame) -> str:
        name = self.threads.get(frame.tid, "")
        return f"{name}:{frame.tid}" if name else str(frame.tid)

    def _name(self, ident: int, fd: int) -> str:
        known = self.objects.get(ident)
        return known.name if known is not None else f"fd{fd}" if fd >= 0 or not ident else "?"

    def _remark(self, frame: AnyFrame, text: str, target: str = "", *, warning: bool = False) -> Event:
        return Event(frame, self._thread(frame), target, text=text, warning=warning)

    def _event(self, frame: AnyFrame) -> Event:
        head = IOCTL.unpack_from(frame.payload)
        ident, fd, request, arg, result = head[:5]
        if request == KVM_CREATE_VM.nr and result >= 0:
            self._made[frame.order] = arg
        place = self._places.get(ident, _NOWHERE)
        event = Event(
            frame, self._thread(frame), self._name(ident, fd), head=head, decoder=self.decoder, place=place
        )
        if request in SETS_SLOT and event.ioctl is not None and isinstance(place.slots, dict):
            # The words are about what was before.
            before = Place(place.kind, place.vm_type, dict(place.slots))
            event.place = before
            number, slot, _ = region_of(event.ioctl.argument_in or b"")
            if not result and slot.size:
                place.slots[number] = slot
            elif not result:
                place.slots.pop(number, None)
        return event
