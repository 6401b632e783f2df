# SPDX-License-Identifier: Apache-2.0
"""Runs a program with the recorder loaded, and hands on what it and its children ask of KVM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from kvmpy.debug.preload.build import recorder
from kvmpy.debug.preload.shared import FIRST_ORDER, RING_DUMP, Shared
from kvmpy.debug.record.events import MEMORY, Lost, Memory, Note, Object, Thread, unpack
from kvmpy.debug.record.format import PAGE_SIZE, Frame, FrameReader, RecordError
from kvmpy.debug.record.format import FrameType as Kind
from kvmpy.debug.record.writer import RecordWriter
from kvmpy.debug.watch.trace_events import AnyFrame, Event, Stream
from kvmpy.debug.watch.trace_program import ProgramError, examine, passed_on
from kvmpy.debug.watch.unseen import Unseen
from kvmpy.owned import OwnedFolder

# A look at the rings costs as much as some twenty frames: it waits for that many where there is room.
_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.02
_FILL = 0.25
_LAST_ORDER = 1 << 63
_IOCTLS = (int(Kind.IOCTL), int(Kind.ENTER))
_TOLD = (int(Kind.OBJECT), int(Kind.NOTE))

Emit = Callable[[Event], None]


class Sink:
    """Takes frames as they come: into a record, where there is one, and as events to *emit*.

    With *emit* None nothing is decoded.
    """

    def __init__(
        self,
        stream: Stream,
        emit: Emit | None,
        record: RecordWriter | None = None,
        flush: Callable[[], None] | None = None,
    ) -> None:
        self.stream = stream
        self.emit = emit
        self.record = record
        self.flush = flush
        self.ioctls = 0
        """How many were seen, in flight or returned."""
        self.lost: list[str] = []
        """What is missing, in words."""

    def take(self, frames: Iterable[AnyFrame]) -> int:
        """Take in *frames* and return how many they were."""
        count = ioctls = 0
        emit, feed, record = self.emit, self.stream.feed, self.record
        for frame in frames:
            count += 1
            ioctls += frame.type in _IOCTLS
            if frame.type == RING_DUMP:
                self._memory(frame)
                continue
            if record is not None:
                record.pid = frame.pid
                record.raw(frame.type, frame.payload, frame.tid, frame.order, frame.time_ns, frame.flags)
            if emit is not None:
                for event in feed(frame):
                    emit(event)
        self.ioctls += ioctls
        if count and self.flush is not None:
            self.flush()
        return count

    def _memory(self, frame: AnyFrame) -> None:
        if self.record is None or len(frame.payload) < MEMORY.size:
            return
        address, count, flags = MEMORY.unpack_from(frame.payload)
        body = frame.payload[MEMORY.size :]
        if len(body) != count * PAGE_SIZE:
            self.remark(f"damaged frame: {len(body)} bytes for {count} pages")
            return
        pages = [body[offset : offset + PAGE_SIZE] for offset in range(0, count * PAGE_SIZE, PAGE_SIZE)]
        self.record.pid = frame.pid
        ids = self.record.page_ids(pages, frame.tid)
        said = Memory(address, ids, flags)
        self.record.put(said, tid=frame.tid, order=frame.order, time_ns=frame.time_ns)

    def remark(self, text: str, *, warning: bool = True) -> None:
        """Emit a line that no frame stands for."""
        if self.emit is not None:
            frame = Frame(Kind.NOTE, b"", time_ns=time.monotonic_ns(), pid=os.getpid())
            self.emit(Event(frame, "kvmpy", "", text=text, warning=warning))

    def lose(self, frames: int, text: str) -> None:
        """Note that *frames* frames are missing, which *text* explains; nothing for none."""
        if not frames:
            return
        self.lost.append(f"{frames} {text}")
        if self.record is not None:
            self.record.put(Lost(frames), tid=self.record.pid)

    def finish(self, last_order: int) -> None:
        """Emit what has not returned, and close the record."""
        if self.emit is not None:
            for event in self.stream.unfinished():
                self.emit(event)
        if self.record is not None:
            self.record.go_on_from(min(last_order + 1, _LAST_ORDER))
            if self.record.lost:
                self.lost.append(f"{self.record.lost} frames could not be written to {self.record.path}")
            self.record.close()


def open_record(path: str, mode: str, command: Sequence[str], pid: int = 0) -> RecordWriter:
    """Begin a record at *path*; OSError when that cannot be written."""
    return RecordWriter(path, recorder=mode, command=" ".join(command)[:1000], pid=str(pid or os.getpid()))


class PreloadTracer:
    """Runs *command* under the recorder; :meth:`run` returns its exit status.

    *memory* copies guest memory before a VM runs first, for records that are replayed; *writes* also what the
    program changes between runs, by hashing all of it around each KVM_RUN.
    ProgramError when it cannot be started, :class:`kvmpy.debug.preload.build.RecorderBuildError` without a
    compiler.
    """

    def __init__(
        self, command: Sequence[str], sink: Sink, *, memory: bool = False, writes: bool = False
    ) -> None:
        self.command = list(command)
        self.sink = sink
        self.interrupts = 0
        shared_memory = Path("/dev/shm")  # noqa: S108 - shared memory is the point
        self._owned = OwnedFolder("trace", shared_memory if os.access(shared_memory, os.W_OK) else None)
        self._folder = self._owned.path
        try:
            self._library = recorder(self._folder)
            self.shared = Shared(self._folder, memory=memory, writes=writes)
        except BaseException:
            self._owned.close()
            raise
        self._warned: set[str] = set()
        self._unseen = Unseen()
        self._root = 0

    def run(self) -> int:
        """Run the program, and its children that use KVM, to the end; return its status as a shell does.

        SIGTERM and SIGHUP end the program, too.  After two SIGINT it runs on, no longer traced.
        """
        earlier = signal.signal(signal.SIGINT, self._interrupted)
        try:
            return self._run()
        finally:
            signal.signal(signal.SIGINT, earlier)
            self.shared.close()
            self._owned.close()

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        # The program got the signal, too, where it shares our terminal; what it does then is worth seeing.
        del number, frame
        self.interrupts += 1

    def _run(self) -> int:
        environment = dict(os.environ)
        others = environment.get("LD_PRELOAD", "")
        environment["LD_PRELOAD"] = f"{self._library}:{others}" if others else str(self._library)
        environment["KVMPY_TRACE_DIR"] = str(self._folder)
        try:
            child = subprocess.Popen(self.command, env=environment)
        except OSError as error:
            raise ProgramError(f"{self.command[0]}: {error.strerror}") from None
        self._root = child.pid
        with passed_on(child.send_signal) as ending:
            status = self._follow(child, ending)
        self._poll()
        for hint in self._unseen.rest():
            self.sink.remark(hint)
        if status is None:
            self.sink.remark(f"process {child.pid} runs on, no longer traced")
        elif not self.sink.ioctls and not self._unseen.hinted:
            self.sink.remark(
                "neither the program nor a child issued an ioctl of KVM that the recorder saw: programs that "
                "issue system calls by themselves are traced with --ptrace"
            )
        shared = self.shared
        self.sink.lose(shared.lost, "frames were lost")
        if shared.damaged:
            self.sink.lost.append(f"{shared.damaged} processes wrote something else into their rings")
        if shared.refused:
            self.sink.lost.append(
                f"{shared.refused} processes found no room for a ring in {self._folder.parent}"
            )
        self.sink.finish(max(shared.order, FIRST_ORDER))
        return 130 if status is None else 128 - status if status < 0 else status

    def _follow(self, child: subprocess.Popen[bytes], ending: list[int]) -> int | None:
        """Hand on what comes until all have ended; return the child's status, None where it runs on."""
        pause = _PAUSE_S
        status: int | None = None
        while self.interrupts < 2:
            status = child.poll() if status is None else status
            rest = self.shared.alive if status is not None else []
            if self._poll():
                pause = _PAUSE_S
                if self.shared.fill > _FILL:
                    continue
            elif status is not None and (not rest or self.interrupts or ending):
                break
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S)
        return status

    def _poll(self) -> int:
        frames = self.shared.poll()
        others = [raw.frame() for raw in frames if raw.type in _TOLD]
        for frame in others:
            if frame.type == Kind.OBJECT:
                # A damaged one is the sink's to report.
                with suppress(RecordError):
                    self._unseen.known(unpack(frame))
        hints = self._unseen.look({self._root, *(ring.pid for ring in self.shared.rings.values())})
        count = self.sink.take(frames)
        for frame in others:
            if frame.type == Kind.NOTE:
                self._exec(frame)
        for hint in hints:
            self.sink.remark(hint)
        return count

    def _exec(self, frame: Frame) -> None:
        said = unpack(frame)
        name = said.values.get("exec", "") if isinstance(said, Note) else ""
        if not name or name in self._warned:
            return
        self._warned.add(name)
        try:
            program = examine(name)
        except ProgramError:
            return
        why = reason(program.static, program.privileged, program.foreign)
        if why:
            text = f"process {frame.pid} executes {program.path}: {why}; from here it is not traced"
            self.sink.remark(text)


def reason(static: bool, privileged: str, foreign: str) -> str:
    """Return why the recorder cannot be loaded into a program, ``""`` where it can."""
    if privileged:
        return f"{privileged}, and such programs ignore LD_PRELOAD"
    if foreign:
        return foreign
    return "statically linked, and nothing can be loaded into it" if static else ""


def read_record(path: str, stream: Stream, emit: Emit) -> None:
    """Emit what a record holds, in order; RecordError when it is none or of another version."""
    with open(path, "rb") as file:
        data = file.read()
    reader = FrameReader(data)
    reader.check()
    frames = list(reader)
    # Objects may stand behind their ioctl.
    for frame in frames:
        if frame.type in (Kind.OBJECT, Kind.THREAD):
            said = unpack(frame)
            if isinstance(said, Object):
                stream.objects.setdefault(said.id, said)
            elif isinstance(said, Thread):
                stream.threads.setdefault(said.tid, said.name)
    for frame in sorted(frames, key=lambda each: each.order):
        if frame.type not in (Kind.HOST, Kind.PAGES, Kind.MEMORY, Kind.MAP, Kind.UNMAP, Kind.END):
            for event in stream.feed(frame):
                emit(event)
    for event in stream.unfinished():
        emit(event)
    if reader.problem is not None:
        raise RecordError(f"{path}: {reader.problem}; what could be read is above")
