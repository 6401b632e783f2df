# SPDX-License-Identifier: Apache-2.0
"""A timeline of ioctls and vCPUs for Perfetto's and Chrome's viewers, in the Trace Event format (JSON).

The process has a track for each thread, with its ioctls; each VM is shown as a process of its own with a
track for each vCPU: when it was in the guest, how each stay ended, ucalls, and kicks with an arrow from the
thread that kicked.  Times are of CLOCK_MONOTONIC.  Nothing of this runs while no timeline is attached.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from errno import EINTR, errorcode
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvmpy.core import observe

if TYPE_CHECKING:
    from kvmpy.core.observe import KvmFd
    from kvmpy.uapi.ioctls import Ioctl
    from kvmpy.uapi.structs import Struct

# Kernel: PID_MAX_LIMIT is 2**22, so that these stand beside the ids of processes and threads.
FIRST_ID = 1 << 23
# So many events are kept until they are written: writing disturbs what is shown.
BATCH = 1 << 16
_LINES = 4096
_NOTHING: Mapping[str, object] = {}
_RUN = "KVM_RUN"
_HEAD = b"[\n"
_LEFT = {EINTR: "interrupted"}
_TAIL = b"\n]\n"


class TimelineError(OSError):
    """The file of a timeline cannot be written, or is none."""


# Process and thread of the format: a vCPU is a thread of its VM.
Track = tuple[int, int]
# Phase, track, start, end (both ns), name, category, arguments, number of a flow.
Event = tuple[str, Track, int, int, str, str, Mapping[str, object], int | None]


def as_json(event: Event) -> str:
    """Return an event as a line of the format."""
    phase, (pid, tid), start, end, name, category, args, flow = event
    values: dict[str, object] = {"ph": phase, "pid": pid, "tid": tid, "ts": start / 1000}
    if phase == "M":
        values = {"ph": phase, "pid": pid, "tid": tid, "name": name, "args": args}
        return json.dumps(values)
    if phase != "E":
        values["name"] = name
        values["cat"] = category
    if phase == "X":
        values["dur"] = (end - start) / 1000
    elif phase == "i":
        values["s"] = "t"
    if flow is not None:
        values["id"] = flow
        if phase == "f":
            values["bp"] = "e"
    if args:
        values["args"] = args
    return json.dumps(values)


class TraceFile:
    """A file in the JSON array format; the bracket at its end may be missing, so what was written stays
    readable.

    Several processes may add to one file: lines are appended whole.  With *append* an unfinished file is
    continued.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self.path = os.fspath(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._fd = os.open(self.path, flags | (0 if append else os.O_TRUNC), 0o666)
        except OSError as error:
            raise TimelineError(error.errno, f"{self.path}: {error.strerror}") from error
        if os.fstat(self._fd).st_size == 0:
            os.write(self._fd, _HEAD)

    def write(self, events: Iterable[Event]) -> None:
        """Append events."""
        lines = [f"{as_json(event)},\n" for event in events]
        for start in range(0, len(lines), _LINES):
            data = memoryview("".join(lines[start : start + _LINES]).encode())
            while data:
                data = data[os.write(self._fd, data) :]

    def close(self, *, finish: bool = True) -> None:
        """Close the file; *finish* makes it complete JSON."""
        os.close(self._fd)
        if finish:
            complete(self.path)


def complete(path: str | os.PathLike[str]) -> None:
    """Make an unfinished file complete JSON: cut what a dying process left of a line, and close the array."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65536))
        tail = file.read()
        if tail.endswith(_TAIL.lstrip()):
            return
        line = tail.rfind(b"\n")
        keep = size - len(tail) + line
        if tail[:line].endswith(b","):
            keep -= 1
        file.seek(keep)
        file.truncate()
        file.write(_TAIL)


class Tracks:
    """Gives threads and vCPUs their tracks, and turns what happens on them into events.

    An event is a tuple here: making JSON of it would take longer than most ioctls.
    """

    def __init__(self, pid: int, put: Callable[[Event], None], process: str = "kvmpy") -> None:
        self.pid = pid
        self._put = put
        self._ids = itertools.count(FIRST_ID + (pid % 997) * 4096)
        self._flows = itertools.count(pid << 20)
        self._known: set[int] = set()
        self._vms: dict[str, int] = {}
        self._vcpus: dict[str, Track] = {}
        self._kicks: dict[str, list[int]] = {}
        self._lock = threading.Lock()
        self._meta("process_name", (pid, 0), {"name": process})

    def _meta(self, action: str, track: Track, args: dict[str, object]) -> None:
        self._put(("M", track, 0, 0, action, "__metadata", args, None))

    def thread(self, tid: int, name: str) -> Track:
        """Return the track of a thread, which gets its name the first time."""
        if tid not in self._known:
            self._known.add(tid)
            self._meta("thread_name", (self.pid, tid), {"name": name})
        return self.pid, tid

    def vcpu(self, name: str) -> Track:
        """Return the track of a vCPU by its name, such as ``vm0/vcpu1``."""
        track = self._vcpus.get(name)
        if track is not None:
            return track
        with self._lock:
            vm = name.partition("/")[0]
            if vm not in self._vms:
                self._vms[vm] = next(self._ids)
                self._meta("process_name", (self._vms[vm], 0), {"name": vm})
            if name not in self._vcpus:
                self._vcpus[name] = (self._vms[vm], next(self._ids))
                self._meta("thread_name", self._vcpus[name], {"name": name})
            return self._vcpus[name]

    def slice(
        self, track: Track, start: int, end: int, name: str, category: str, args: Mapping[str, object]
    ) -> None:
        """Show that something took from *start* to *end* (ns)."""
        self._put(("X", track, start, end, name, category, args, None))

    def begin(self, track: Track, ns: int, name: str, category: str) -> None:
        """Show that something begins, whose end comes later."""
        self._put(("B", track, ns, 0, name, category, _NOTHING, None))

    def end(self, track: Track, ns: int) -> None:
        """Show that what began last ends."""
        self._put(("E", track, ns, 0, "", "", _NOTHING, None))

    def instant(self, track: Track, ns: int, name: str, category: str, args: Mapping[str, object]) -> None:
        """Mark a moment on a track."""
        self._put(("i", track, ns, 0, name, category, args, None))

    def kick(self, thread: Track, vcpu: str, ns: int, running: bool) -> None:
        """A thread kicks a vCPU: a short slice there, and an arrow to the end of the vCPU's stay in the
        guest.
        """
        self.slice(thread, ns, ns + 500, f"kick {vcpu}", "kick", _NOTHING)
        if running:
            flow = next(self._flows)
            self._kicks.setdefault(vcpu, []).append(flow)
            self._put(("s", thread, ns, 0, "kick", "kick", _NOTHING, flow))
        self.instant(self.vcpu(vcpu), ns, "kick", "kick", _NOTHING)

    def guest(self, vcpu: str, start: int, end: int, name: str, args: Mapping[str, object]) -> None:
        """A vCPU was in the guest from *start* to *end*; *name* is what ended that."""
        track = self.vcpu(vcpu)
        self.slice(track, start, end, "in guest", "guest", args)
        for flow in self._kicks.pop(vcpu, ()):
            self._put(("f", track, max(start, end - 1), 0, "kick", "kick", _NOTHING, flow))
        category = "ucall" if name.startswith("ucall") else "exit"
        self.instant(track, end, name, category, args)


class _Thread:
    """What belongs to one thread: its track, the ioctls that it is in, and how many slices it began."""

    __slots__ = ("open", "running", "track")

    def __init__(self, track: Track) -> None:
        self.track = track
        self.running: list[tuple[int, str, KvmFd]] = []
        self.open = 0


class Timeline:
    """An observer that writes a timeline of this process to *path*, from :meth:`start` to :meth:`stop`.

    With *vm* only of that VM and its vCPUs.  A context manager; with *append* the file may be one that
    another process began, and stays without its end (see :func:`complete`).
    """

    def __init__(
        self, path: str | os.PathLike[str], *, vm: KvmFd | None = None, append: bool = False
    ) -> None:
        self._file = TraceFile(path, append=append)
        self._append = append
        self._only = vm.name if vm is not None else None
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._threads: list[_Thread] = []
        self.tracks = Tracks(os.getpid(), self._put)
        self._closed = False

    # Life.

    def start(self) -> Timeline:
        """Attach to the KVM objects of this process."""
        observe.attach(self)
        return self

    def stop(self) -> None:
        """Detach and complete the file; harmless a second time."""
        observe.detach(self)
        if not self._closed:
            self._closed = True
            self._unfinished(time.monotonic_ns())
            self.flush()
            self._file.close(finish=not self._append)

    def forked(self) -> None:
        """Detach in a child, which has the parent's buffer and file: it must write neither."""
        observe.detach(self)
        self._closed = True
        self._events.clear()

    def __enter__(self) -> Timeline:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _put(self, event: Event) -> None:
        self._events.append(event)
        if len(self._events) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Write what happened so far."""
        # Other threads go on appending: what they add meanwhile is for the next time.
        with self._lock:
            events = self._events
            self._file.write([events.popleft() for _ in range(len(events))])

    def _unfinished(self, now: int) -> None:
        for mine in list(self._threads):
            while mine.running:
                start, name, fd = mine.running.pop()
                args = {"fd": fd.name, "unfinished": True}
                self.tracks.slice(mine.track, start, now, name, "ioctl", args)
                if name == _RUN:
                    self.tracks.guest(fd.name, start, now, "still in guest", _NOTHING)
            for _ in range(mine.open):
                self.tracks.end(mine.track, now)
            mine.open = 0

    def _mine(self) -> _Thread:
        try:
            mine: _Thread = self._local.mine
        except AttributeError:
            track = self.tracks.thread(threading.get_native_id(), threading.current_thread().name)
            mine = self._local.mine = _Thread(track)
            self._threads.append(mine)
        return mine

    def _wanted(self, fd: KvmFd) -> bool:
        return self._only is None or fd.name == self._only or fd.name.startswith(f"{self._only}/")

    # What tests do.

    def begin(self, name: str, category: str = "test") -> None:
        """Begin a slice of one's own on the calling thread's track."""
        mine = self._mine()
        mine.open += 1
        self.tracks.begin(mine.track, time.monotonic_ns(), name, category)

    def end(self) -> None:
        """End the slice that this thread began last."""
        mine = self._mine()
        if mine.open:
            mine.open -= 1
            self.tracks.end(mine.track, time.monotonic_ns())

    # What the funnel tells.

    def fd_opened(self, fd: KvmFd) -> None:
        """A vCPU gets its track at once, so that they stand in the order of their creation."""
        if fd.kind == "vcpu" and self._wanted(fd):
            self.tracks.vcpu(fd.name)

    def fd_closed(self, fd: KvmFd) -> None:
        """Nothing is shown of this."""

    def ioctl_enter(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None) -> None:  # noqa: ARG002
        """Note when it began."""
        if self._only is None or self._wanted(fd):
            # A signal handler may issue an ioctl within another.
            self._mine().running.append((time.monotonic_ns(), op.name, fd))

    def ioctl_dropped(self, fd: KvmFd, op: Ioctl) -> None:  # noqa: ARG002
        """Show nothing of it."""
        mine = self._mine()
        if mine.running and mine.running[-1][2] is fd:
            mine.running.pop()

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno: int) -> None:  # noqa: ARG002
        """Show it on the thread's track; KVM_RUN on the vCPU's, too."""
        now = time.monotonic_ns()
        mine = self._mine()
        if not mine.running or mine.running[-1][2] is not fd:
            return  # it began before the timeline did, or belongs to another VM
        start, name, _ = mine.running.pop()
        args: dict[str, object] = {"fd": fd.name, "result": result}
        if errno:
            args["errno"] = errorcode.get(errno, errno)
        if isinstance(arg, int):
            args["arg"] = hex(arg)
        if name == _RUN:
            self.tracks.guest(fd.name, start, now, *_how_it_ended(fd, result, errno))
        self.tracks.slice(mine.track, start, now, name, "ioctl", args)

    # What else the host does.

    def kicked(self, vcpu: KvmFd, tid: int, signal: int) -> None:  # noqa: ARG002
        """A vCPU is kicked."""
        if self._wanted(vcpu):
            self.tracks.kick(self._mine().track, vcpu.name, time.monotonic_ns(), tid != 0)

    def mapped(self, fd: KvmFd, address: int, size: int, offset: int) -> None:
        """Nothing is shown of this."""

    def memory_written(self, view: memoryview) -> None:
        """Nothing is shown of this."""

    def memory_shown(self, view: memoryview, once: bool) -> None:
        """Nothing is shown of this."""

    def deadline_set(self, vcpu: KvmFd, ns: int) -> None:
        """Nothing is shown of this."""

    def file_called(self, fd: KvmFd, mode: int, offset: int, size: int, errno: int) -> None:
        """Nothing is shown of this."""

    def event_signalled(self, fd: int, count: int) -> None:
        """Nothing is shown of this."""


def _how_it_ended(fd: Any, result: int, errno: int) -> tuple[str, dict[str, Any]]:
    if result < 0 and errno:
        return _LEFT.get(errno, f"failed: {os.strerror(errno)}"), {"errno": errorcode.get(errno, errno)}
    name, values = fd.last_exit()
    return name, values


def timeline(vm: KvmFd, path: str | os.PathLike[str]) -> Timeline:
    """Write what *vm* and its vCPUs do to *path* until the end of the with block, for Perfetto's viewer.

    TimelineError when the file cannot be written.  See docs/timeline.md.
    """
    return Timeline(path, vm=vm)
