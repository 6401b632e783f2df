# SPDX-License-Identifier: Apache-2.0
"""The recorder inside a kvmpy process: an observer of the ioctl funnel that writes a record as things happen.

When no recorder is attached nobody is called, and it costs nothing.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from struct import Struct as Packing
from time import monotonic_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvmpy.core import observe
from kvmpy.debug.record.arguments import Follower, content_of, plan_of, struct_chunk
from kvmpy.debug.record.events import Close, Deadline, Event, FileCall, Kick, Map, Note, Object, Thread
from kvmpy.debug.record.format import (
    EVENT_WRITTEN,
    FILE_FALLOCATE,
    KICK_IMMEDIATE_EXIT,
    KICK_SIGNAL,
    SYNTHETIC,
    FrameType,
    ObjectKind,
    When,
    object_kind,
)
from kvmpy.debug.record.runarea import RunArea
from kvmpy.debug.record.tracker import MemoryTracker
from kvmpy.debug.record.writer import RecordWriter
from kvmpy.uapi import ffi, ioctls, lib
from kvmpy.uapi.buffers import descriptors_in, field_place
from kvmpy.uapi.constants import SnpPageType
from kvmpy.uapi.constants.coco import SevCmd
from kvmpy.uapi.links import link_of
from kvmpy.uapi.structs import kvm_sev_cmd, kvm_sev_snp_launch_update

if TYPE_CHECKING:
    from kvmpy.core.observe import KvmFd
    from kvmpy.uapi.ioctls import Ioctl
    from kvmpy.uapi.structs import Struct

_RUN = ioctls.KVM_RUN.nr
_ENCRYPT = ioctls.KVM_MEMORY_ENCRYPT_OP.nr
# Ioctls that look at guest memory: its content must be in the record by then. After some it is another: what
# the host finds there then, it did not write.
_READERS = frozenset(op.nr for op in ioctls.IOCTLS.values() if op.memory != "none")
_WRITERS = frozenset(op.nr for op in ioctls.IOCTLS.values() if op.memory == "inout")
# Arguments with descriptors of what is no KVM object.
_FOREIGN = frozenset(op.nr for op in ioctls.IOCTLS.values() if any(not each.seen for each in op.fd_fields))
_SPECIAL = _READERS | ioctls.SETS_SLOT | ioctls.MAKERS.keys() | _FOREIGN
_pack = Packing("<IiQQqIHHQQ").pack
_IOCTL, _ENTER = int(FrameType.IOCTL), int(FrameType.ENTER)
_IN, _OUT = int(When.IN), int(When.OUT)
_cast = ffi.cast
_record_ioctl = lib.kvmpy_record_ioctl
_SMALL = lib.KVMPY_RECORD_SMALL
# How kvmpy_record_ioctl() copies: before, after, once for both.
_BEFORE, _AFTER, _ONCE = 1, 2, 4
_direct: dict[int, int] = {}


def _copied(nr: int) -> int:
    """Return how the argument of a request is copied, -1 where there is more to it than the argument."""
    plan = plan_of(nr)
    if nr in _SPECIAL or plan.deep:
        return -1
    if plan.before and not plan.after:
        return _ONCE
    return (_BEFORE if plan.before else 0) | (_AFTER if plan.after else 0)


class _Mine(threading.local):
    # What belongs to one thread; a signal handler may issue an ioctl within another.
    def __init__(self) -> None:
        self.tid = threading.get_native_id()
        self.told = False
        self.pending: list[tuple[int, int, list[bytes]]] = []


class Recorder:
    """Records every KVM object of this process into *path* between :meth:`start` and :meth:`stop`.

    With *eager* every ioctl is announced before it is issued, so that not even one that kills the process is
    lost; that doubles the cost.  *about* are further lines of the frame HOST, such as ``test``.
    """

    def __init__(self, path: str | os.PathLike[str], *, eager: bool = False, **about: str) -> None:
        self.path = os.fspath(path)
        self.writer = RecordWriter(path, **about)
        self.memory = MemoryTracker(self.writer)
        self._eager = eager
        self._follow = Follower(self.memory.peek, self.memory.in_record)
        self._ids: dict[KvmFd, int] = {}
        self._by_number: dict[int, int] = {}
        self._made: dict[int, tuple[int, int]] = {}
        self._next_id = itertools.count(1).__next__
        self._inodes: dict[int, int] = {}
        self._areas: dict[KvmFd, RunArea] = {}
        self._deadlines: dict[KvmFd, int] = {}
        self._mine = _Mine()
        self._lock = threading.RLock()
        self._attached = False
        self._flags = 0

    # Life.

    def start(self) -> Recorder:
        """Attach to this process's KVM objects."""
        if not self._attached:
            observe.add(self)
            observe.host.append(self)
            self._attached = True
        return self

    def stop(self) -> None:
        """Detach and close the record; harmless a second time."""
        self._detach()
        self.writer.close()
        self.memory.close()
        self._areas.clear()

    def _detach(self) -> None:
        if self._attached:
            self._attached = False
            observe.remove(self)
            observe.host.remove(self)

    def forked(self) -> None:
        """Detach in a child, which shares the file: it must not write there."""
        self._detach()

    def __enter__(self) -> Recorder:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.note(outcome="failed", error=f"{type(error).__name__}: {error}")
        self.stop()

    @property
    def used(self) -> bool:
        """Whether any ioctl was recorded."""
        return bool(self._ids) or self.writer.frames > 1

    def note(self, **values: str) -> None:
        """Add a remark to the record."""
        self.writer.put(Note(values), tid=self._tid())

    @contextmanager
    def introducing(self) -> Iterator[None]:
        """Within the block nothing is recorded but what :meth:`tell` tells, as SYNTHETIC."""
        observing, self._attached = self._attached, False
        if observing:
            observe.remove(self)
            observe.host.remove(self)
        self._flags = SYNTHETIC
        try:
            yield
        finally:
            self._flags = 0
            if observing:
                self.start()

    def tell(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int = 0) -> None:
        """Write an ioctl as if it had been issued now."""
        self.ioctl_enter(fd, op, arg)
        self.ioctl_exit(fd, op, arg, result, 0)

    # Objects.

    def _tid(self) -> int:
        mine = self._mine
        if not mine.told:
            mine.told = True
            name = threading.current_thread().name
            self.writer.put(Thread(mine.tid, self.writer.pid, os.getppid(), name), tid=mine.tid)
        return mine.tid

    def _object(self, fd: KvmFd, *, late: bool = True) -> int:
        ident = self._ids.get(fd)
        if ident is not None:
            return ident
        with self._lock:
            if fd in self._ids:
                return self._ids[fd]
            tid = self._tid()
            number = fd.fd
            made_by, above = self._made.pop(number, (0, 0))
            parent = getattr(fd, "vm", None) or getattr(fd, "kvm", None)
            if not above and parent is not None and parent is not fd:
                above = self._object(parent)
            ident = self._next_id()
            kind = object_kind(fd.kind)
            if kind == ObjectKind.GMEM and not made_by:
                above = self._same_file(number)
            flags = SYNTHETIC if late and not made_by else self._flags
            self.writer.put(Object(ident, above, number, kind, made_by, fd.name), tid=tid, flags=flags)
            self._ids[fd] = self._by_number[number] = ident
            if kind == ObjectKind.GMEM:
                self._inodes[ident] = os.fstat(number).st_ino
        return ident

    def _same_file(self, number: int) -> int:
        inode = os.fstat(number).st_ino
        return next((ident for ident, each in self._inodes.items() if each == inode), 0)

    def _foreign(self, number: int) -> None:
        with self._lock:
            if number in self._by_number:
                return
            try:
                link = link_of(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                return
            ident = self._next_id()
            kind = object_kind(link.kind)
            parent = self._same_file(number) if kind == ObjectKind.GMEM else 0
            self._by_number[number] = ident
            self.writer.put(Object(ident, parent, number, kind, 0, link.name), tid=self._tid())
            count = _event_count(number) if kind == ObjectKind.EVENTFD else 0
            if count:
                self.writer.put(Event(ident, EVENT_WRITTEN, count), tid=self._tid())

    def fd_opened(self, fd: KvmFd) -> None:
        """Write the object."""
        self._by_number.pop(fd.fd, None)
        self._object(fd, late=False)

    def fd_closed(self, fd: KvmFd) -> None:
        """Write that it goes."""
        with self._lock:
            ident = self._ids.pop(fd, 0)
            self._areas.pop(fd, None)
            self._deadlines.pop(fd, None)
            self._by_number.pop(fd.fd, None)
            if fd.kind == "vm":
                self.memory.vm_closed(fd, self._tid())
            if ident:
                self.writer.put(Close(ident), tid=self._tid())

    # Ioctls.

    def ioctl_enter(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None) -> None:
        """Copy what the kernel is about to read."""
        nr = op.nr
        if fd not in self._ids:
            self._object(fd)
        if nr in _SPECIAL:
            chunks = self._special_before(fd, nr, arg)
        elif arg is None:
            chunks = []
        else:
            chunks = self._before(fd, nr, arg)
        order = self.writer.order()
        if self._eager:
            head = _pack(self._object(fd), fd.fd, nr, _value(arg), 0, 0, len(chunks), 0, 0, 0)
            self.writer.raw(_ENTER, head + b"".join(chunks), self._tid(), order, monotonic_ns())
        self._mine.pending.append((order, monotonic_ns(), chunks))

    def ioctl_issue(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None) -> tuple[int, int] | None:
        """Issue an ioctl and write its frame in one step in C, where its argument is all there is to copy."""
        nr = op.nr
        ident = self._ids.get(fd)
        copied = _direct.get(nr)
        if copied is None:
            copied = _direct[nr] = _copied(nr)
        mine = self._mine
        if ident is None or copied < 0 or not mine.told or self._eager:
            return None
        if arg is None or isinstance(arg, int):
            if copied and arg:
                return None  # an address: the generic path probes what lies there
            place, size = _cast("void *", arg or 0), 0
        else:
            place, size = arg.cdata, arg.nbytes
            if size > _SMALL:
                return None
        result = _record_ioctl(self.writer.native, ident, mine.tid, fd.fd, nr, place, size, copied)
        return result, ffi.errno if result < 0 else 0

    def _before(self, fd: KvmFd, nr: int, arg: Struct | int) -> list[bytes]:
        plan = plan_of(nr)
        if isinstance(arg, int):
            if not plan.size or not arg:
                return []
            chunks = self._follow.raw(arg, plan, plan.when) if plan.before else []
        else:
            chunks = [struct_chunk(arg, plan.when)] if plan.before else []
        if plan.deep and chunks and plan.buffer is not None:
            chunks.extend(self._follow.nested(plan.buffer, content_of(chunks[0]), _IN, self._slot_bytes(fd)))
        return chunks

    def _slot_bytes(self, fd: KvmFd) -> Any:
        return lambda slot: self.memory.slot_bytes(fd, slot)

    def _special_before(self, fd: KvmFd, nr: int, arg: Struct | int | None) -> list[bytes]:
        tid = self._tid()
        if nr in _READERS:
            if self.memory.unread:
                self._object(fd)
                self.memory.read_fresh(getattr(fd, "vm", fd), tid)
            if self.memory.shown:
                self.memory.compare(tid)
        if nr == _RUN:
            return self._area(fd).before()
        if nr == _ENCRYPT:
            self._source(fd, arg, tid)
        chunks = [] if arg is None else self._before(fd, nr, arg)
        if nr in _FOREIGN and chunks:
            content = content_of(chunks[0])
            for offset, _ in descriptors_in(ioctls.BY_NR[nr], content, seen=False):
                self._foreign(int.from_bytes(content[offset : offset + 4], "little"))
        return chunks

    def _source(self, fd: KvmFd, arg: Struct | int | None, tid: int) -> None:
        # Pages that KVM copies into a guest can be many: they are told as memory, not with the argument.
        command = self.memory.peek(_value(arg), kvm_sev_cmd.SIZE)
        if len(command) < kvm_sev_cmd.SIZE or command[0] != SevCmd.KVM_SEV_SNP_LAUNCH_UPDATE:
            return
        place = int.from_bytes(command[8:16], "little")
        raw = self.memory.peek(place, kvm_sev_snp_launch_update.SIZE)
        if len(raw) == kvm_sev_snp_launch_update.SIZE:
            update = kvm_sev_snp_launch_update.from_bytes(raw)
            if update.type != SnpPageType.KVM_SEV_SNP_PAGE_TYPE_ZERO:
                self.memory.source(fd, update.uaddr, update.len, tid)

    def _area(self, fd: KvmFd) -> RunArea:
        area = self._areas.get(fd)
        if area is None:
            vcpu: Any = fd
            area = self._areas[fd] = RunArea(vcpu.area)
            if not self.memory.was_mapped(area.address):
                self._map(fd, area.address, area.size, 0)
        return area

    def ioctl_dropped(self, fd: KvmFd, op: Ioctl) -> None:  # noqa: ARG002
        """Write nothing: KVM was not asked."""
        if self._mine.pending:
            self._mine.pending.pop()

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno_: int) -> None:
        """Write what was asked and what came back."""
        end = monotonic_ns()
        mine = self._mine
        if not mine.pending:
            return
        order, begin, chunks = mine.pending.pop()
        nr = op.nr
        if nr == _RUN:
            chunks += self._areas[fd].after()
        elif arg is not None:
            plan = plan_of(nr)
            if plan.after or plan.deep:
                self._after(fd, arg, nr, chunks)
        if nr in _WRITERS and self.memory.shown:
            self.memory.look_again()
        writer = self.writer
        ident = self._ids.get(fd) or self._object(fd)
        head = _pack(ident, fd.fd, nr, _value(arg), result, errno_, len(chunks), 0, writer.order(), end)
        if not mine.told:
            self._tid()
        writer.raw(_IOCTL, head + b"".join(chunks), mine.tid, order, begin, self._flags)
        if nr in _SPECIAL and result >= 0:
            self._special_after(fd, nr, chunks, result, order, mine.tid)

    def _after(self, fd: KvmFd, arg: Struct | int, nr: int, chunks: list[bytes]) -> None:
        plan = plan_of(nr)
        if isinstance(arg, int):
            if not plan.size or not arg:
                return
            pieces = self._follow.raw(arg, plan, _OUT)
        else:
            pieces = [struct_chunk(arg, _OUT)]
        if plan.after:
            chunks += pieces
        if plan.deep and pieces and plan.buffer is not None:
            content = content_of(chunks[0] if plan.before and chunks else pieces[0])
            chunks.extend(self._follow.nested(plan.buffer, content, _OUT, self._slot_bytes(fd)))

    def _special_after(
        self, fd: KvmFd, nr: int, chunks: list[bytes], result: int, order: int, tid: int
    ) -> None:
        if nr in ioctls.MAKERS:
            op = ioctls.BY_NR[nr]
            number = result
            if op.made_in and op.struct is not None:
                offset, size = field_place(op.struct, op.made_in)
                number = int.from_bytes(content_of(chunks[-1])[offset : offset + size], "little")
            self._by_number.pop(number, None)
            self._made[number] = (order, self._ids[fd])
        elif nr == _ENCRYPT and chunks:
            if content_of(chunks[0])[0] == SevCmd.KVM_SEV_SNP_LAUNCH_FINISH:
                self.memory.sources_done(fd, tid)
        elif nr in ioctls.SETS_SLOT and chunks:
            content = content_of(chunks[0])
            slot = int.from_bytes(content[:4], "little")
            size, address = (
                int.from_bytes(content[position : position + 8], "little") for position in (16, 24)
            )
            self.memory.slot_set(fd, slot, address, size, tid)

    # What else the host does.

    def _map(self, fd: KvmFd, address: int, size: int, offset: int) -> None:
        self.memory.mapped(address)
        self.writer.put(Map(address, size, offset, self._object(fd), 1), tid=self._tid())

    def mapped(self, fd: KvmFd, address: int, size: int, offset: int) -> None:
        """Write the mapping."""
        self._map(fd, address, size, offset)

    def memory_written(self, view: memoryview) -> None:
        """Write the bytes, once the VM ran."""
        self.memory.written(view, self._mine.tid)

    def memory_shown(self, view: memoryview, once: bool) -> None:
        """Compare what is under *view* before the next run."""
        self.memory.show(view, once)

    def kicked(self, vcpu: KvmFd, tid: int, signal: int) -> None:
        """Write the kick."""
        flags = KICK_IMMEDIATE_EXIT | (KICK_SIGNAL if tid else 0)
        self.writer.put(Kick(self._object(vcpu), flags, signal, tid), tid=self._tid())

    def deadline_set(self, vcpu: KvmFd, ns: int) -> None:
        """Write the deadline where it is another than before."""
        if self._deadlines.get(vcpu) != ns:
            self._deadlines[vcpu] = ns
            self.writer.put(Deadline(self._object(vcpu), ns), tid=self._tid())

    def file_called(self, fd: KvmFd, mode: int, offset: int, size: int, errno_: int) -> None:
        """Write the call."""
        call = FileCall(self._object(fd), FILE_FALLOCATE, mode, offset, size, -1 if errno_ else 0, errno_)
        self.writer.put(call, tid=self._tid())

    def event_signalled(self, fd: int, count: int) -> None:
        """Write the signal, where the eventfd is known to KVM."""
        ident = self._by_number.get(fd)
        if ident is not None:
            self.writer.put(Event(ident, EVENT_WRITTEN, count), tid=self._tid())


def _event_count(number: int) -> int:
    try:
        with open(f"/proc/self/fdinfo/{number}") as lines:
            return next((int(line.split()[1], 16) for line in lines if line.startswith("eventfd-count")), 0)
    except (OSError, ValueError):
        return 0


def _value(arg: Struct | int | None) -> int:
    if arg is None:
        return 0
    return arg & (1 << 64) - 1 if isinstance(arg, int) else arg.host_address
