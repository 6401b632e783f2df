# SPDX-License-Identifier: Apache-2.0
"""A timeline out of a record file, of whatever program it was recorded from."""

from __future__ import annotations

import os
from errno import EINTR, errorcode

from kvmpy.debug.decode.decoder import Decoder, Place
from kvmpy.debug.decode.timeline import Event, TraceFile, Tracks
from kvmpy.debug.record.events import Ioctl, Kick, Object, Thread
from kvmpy.debug.record.format import ObjectKind
from kvmpy.debug.record.model import Entry, Record, request_name
from kvmpy.uapi.ioctls import BY_NR

_RUN = "KVM_RUN"


class _Converter:
    def __init__(self, record: Record) -> None:
        self.events: list[Event] = []
        self._objects: dict[int, Object] = {}
        self._names = {
            (entry.frame.pid, entry.what.tid): entry.what.name
            for entry in record.entries
            if isinstance(entry.what, Thread)
        }
        self._tracks: dict[int, Tracks] = {}
        self._decoder = Decoder()

    def tracks(self, pid: int) -> Tracks:
        if pid not in self._tracks:
            self._tracks[pid] = Tracks(pid, self.events.append, f"process {pid}")
        return self._tracks[pid]

    def take(self, entry: Entry) -> None:
        payload, frame = entry.what, entry.frame
        if isinstance(payload, Object):
            self._objects[payload.id] = payload
        elif isinstance(payload, Ioctl) and not frame.synthetic:
            self._ioctl(entry, payload, payload.end_ns)
        elif isinstance(payload, Kick):
            tracks = self.tracks(frame.pid)
            thread = tracks.thread(frame.tid, self._names.get((frame.pid, frame.tid), ""))
            tracks.kick(thread, self._name(payload.object), frame.time_ns, payload.tid != 0)

    def _name(self, ident: int) -> str:
        known = self._objects.get(ident)
        return (known.name or f"fd {known.fd}") if known is not None else f"object {ident}"

    def _ioctl(self, entry: Entry, ioctl: Ioctl, end_ns: int) -> None:
        frame = entry.frame
        tracks = self.tracks(frame.pid)
        thread = tracks.thread(frame.tid, self._names.get((frame.pid, frame.tid), ""))
        name = request_name(ioctl)
        known = self._objects.get(ioctl.object)
        kind = ObjectKind(known.kind).name.lower() if known is not None else ""
        decoded = self._decoder.ioctl(ioctl, Place(kind))
        args: dict[str, object] = {"on": self._name(ioctl.object), "result": ioctl.result}
        if ioctl.errno:
            args["errno"] = errorcode.get(ioctl.errno, ioctl.errno)
        op = BY_NR.get(ioctl.request)
        for key, text in (("before", decoded.before), ("after", decoded.after)):
            if text and op is not None and op.name != _RUN:
                args[key] = text
        tracks.slice(thread, frame.time_ns, end_ns, name, "ioctl", args)
        if op is not None and op.name == _RUN:
            ended, values = self._exit(ioctl, decoded.exit)
            tracks.guest(self._name(ioctl.object), frame.time_ns, end_ns, ended, values)

    @staticmethod
    def _exit(call: Ioctl, text: str) -> tuple[str, dict[str, object]]:
        if text:
            reason = text.partition(" ")[0].partition("(")[0]
            return reason.removeprefix("KVM_EXIT_"), {"exit": text}
        if call.errno == EINTR:
            return "interrupted", {}
        return (f"failed: {os.strerror(call.errno)}" if call.errno else "exit"), {}


def _end(entry: Entry) -> int:
    if isinstance(entry.what, Object):
        return 0
    return entry.what.end_ns if isinstance(entry.what, Ioctl) else entry.frame.time_ns


def write_timeline(record: Record, path: str | os.PathLike[str]) -> int:
    """Write the timeline of *record* to *path* and return the number of events; those in flight end it."""
    converter = _Converter(record)
    # In the order of their ends: a kick comes before the end of the run that it cuts short.
    for entry in sorted(record.entries, key=_end):
        converter.take(entry)
    last = max((event[3] or event[2] for event in converter.events), default=0)
    for entry in record.in_flight:
        if isinstance(entry.what, Ioctl):
            converter._ioctl(entry, entry.what, max(last, entry.frame.time_ns))
    file = TraceFile(path)
    file.write(converter.events)
    file.close()
    return len(converter.events)
