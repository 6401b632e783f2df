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
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvmpy.core import observe
from kvmpy.debug.record.capture import Capture, Known
from kvmpy.debug.record.events import Close, Deadline, Event, FileCall, Kick, Map, Note, Object, Thread
from kvmpy.debug.record.format import (
    EVENT_WRITTEN,
    FILE_FALLOCATE,
    KICK_IMMEDIATE_EXIT,
    KICK_SIGNAL,
    MAP_SHARED,
    SYNTHETIC,
    FrameType,
    ObjectKind,
    object_kind,
)
from kvmpy.debug.record.tracker import MemoryTracker, address_of
from kvmpy.debug.record.writer import RecordWriter
from kvmpy.uapi import ffi, ioctls, lib
from kvmpy.uapi.buffers import BUFFERS
from kvmpy.uapi.constants import SnpPageType
from kvmpy.uapi.constants.coco import SevCmd
from kvmpy.uapi.links import link_of
from kvmpy.uapi.structs import (
    kvm_sev_cmd,
    kvm_sev_snp_launch_update,
    kvm_userspace_memory_region,
)

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
# Arguments with pointers: what these lead to may be in the record already.
_DEEP = frozenset(nr for nr, buffer in BUFFERS.items() if buffer.children or buffer.cases)
_SPECIAL = _READERS | ioctls.SETS_SLOT | ioctls.MAKERS.keys() | _FOREIGN | _DEEP
_IOCTL, _ENTER = int(FrameType.IOCTL), int(FrameType.ENTER)
_NULL = ffi.NULL
_enter = lib.kvmpy_record_enter
_record = lib.kvmpy_record_ioctl
_U64 = (1 << 64) - 1


class _Thread:
    # A signal handler may issue an ioctl within another.
    __slots__ = ("pending", "spare", "tid", "told")

    def __init__(self) -> None:
        self.tid = threading.get_native_id()
        self.told = False
        self.pending: list[Capture] = []
        self.spare: list[Capture] = []


class _Local(threading.local):
    def __init__(self) -> None:
        self.mine = _Thread()


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
        self._known: dict[KvmFd, Known] = {}
        self._by_number: dict[int, int] = {}
        self._made: dict[int, tuple[int, Known | None, int]] = {}
        self._next_id = itertools.count(1).__next__
        self._inodes: dict[int, int] = {}
        self._deadlines: dict[KvmFd, int] = {}
        self._local = _Local()
        self._lock = threading.RLock()
        self._flags = 0

    # Life.

    def start(self) -> Recorder:
        """Attach to this process's KVM objects."""
        observe.attach(self)
        return self

    def stop(self) -> None:
        """Detach and close the record; harmless a second time."""
        observe.detach(self)
        self.writer.close()
        self.memory.close()
        self._known.clear()

    def forked(self) -> None:
        """Detach in a child, which shares the file: it must not write there."""
        observe.detach(self)

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
        return bool(self._known) or self.writer.frames > 1

    def note(self, **values: str) -> None:
        """Add a remark to the record."""
        self.writer.put(Note(values), tid=self._tid())

    @contextmanager
    def introducing(self) -> Iterator[None]:
        """Within the block nothing is recorded but what :meth:`tell` tells, as SYNTHETIC."""
        observing = observe.detach(self)
        self._flags = self.writer.native.flags = SYNTHETIC
        try:
            yield
        finally:
            self._flags = self.writer.native.flags = 0
            if observing:
                self.start()

    def tell(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int = 0) -> None:
        """Write an ioctl as if it had been issued now."""
        self.ioctl_enter(fd, op, arg)
        self.ioctl_exit(fd, op, arg, result, 0)

    # Objects.

    def _tid(self) -> int:
        mine = self._local.mine
        if not mine.told:
            mine.told = True
            name = threading.current_thread().name
            self.writer.put(Thread(mine.tid, self.writer.pid, os.getppid(), name), tid=mine.tid)
        return mine.tid

    def _object(self, fd: KvmFd, *, late: bool = True) -> Known:
        known = self._known.get(fd)
        if known is not None:
            return known
        with self._lock:
            if fd in self._known:
                return self._known[fd]
            tid = self._tid()
            number = fd.fd
            made_by, maker, vm_type = self._made.pop(number, (0, None, getattr(fd, "vm_type", 0)))
            parent = getattr(fd, "vm", None) or getattr(fd, "kvm", None)
            if maker is None and parent is not None and parent is not fd:
                maker = self._object(parent)
            above = 0 if maker is None else maker.ident
            ident = self._next_id()
            kind = object_kind(fd.kind)
            if kind == ObjectKind.GMEM and not made_by:
                above = self._same_file(number)
            flags = SYNTHETIC if late and not made_by else self._flags
            self.writer.put(Object(ident, above, number, kind, made_by, fd.name), tid=tid, flags=flags)
            known = Known(ident, kind, maker, fd=number, vm_type=vm_type)
            self._known[fd], self._by_number[number] = known, ident
            if kind == ObjectKind.GMEM:
                self._inodes[ident] = os.fstat(number).st_ino
        return known

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
            known = self._known.pop(fd, None)
            self._deadlines.pop(fd, None)
            self._by_number.pop(fd.fd, None)
            if fd.kind == "vm":
                self.memory.vm_closed(fd, self._tid())
            if known is not None:
                self.writer.put(Close(known.ident), tid=self._tid())

    # Ioctls.

    def ioctl_enter(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None) -> None:
        """Copy what the kernel is about to read."""
        nr = op.nr
        known = self._known.get(fd) or self._object(fd)
        special = nr in _SPECIAL
        if special:
            self._special_before(fd, nr, arg)
        mine = self._local.mine
        capture = mine.spare.pop() if mine.spare else self._new_capture()
        if special and nr in _DEEP:
            capture.read_from(self.memory.source)
        # lifetime: the engine holds its address until the ioctl returned, however soon the object goes.
        capture.known = known
        if arg is None or isinstance(arg, int):
            _enter(capture.native, known.native, known.fd, nr, _NULL, (arg or 0) & _U64)
        else:
            _enter(capture.native, known.native, known.fd, nr, arg.cdata, arg.nbytes)
        if self._eager:
            _record(capture.native, _ENTER, 0, 0)
        mine.pending.append(capture)

    def _new_capture(self) -> Capture:
        capture = Capture()
        capture.native.record, capture.native.tid = self.writer.native, self._tid()
        return capture

    def _special_before(self, fd: KvmFd, nr: int, arg: Struct | int | None) -> None:
        if nr in _READERS:
            tid = self._tid()
            if self.memory.unread:
                self.memory.read_fresh(getattr(fd, "vm", fd), tid)
            if self.memory.shown:
                self.memory.compare(tid)
        if nr == _RUN:
            self._find_area(fd)
        elif nr == _ENCRYPT:
            self._copies(fd, _value(arg), self._tid())
        elif nr in _FOREIGN:
            for number in self.memory.source.foreign_fds(nr, _value(arg)):
                self._foreign(number)

    def _copies(self, fd: KvmFd, arg: int, tid: int) -> None:
        # Pages that KVM copies into a guest can be many: they are told as memory, not with the argument.
        command = self.memory.peek(arg, kvm_sev_cmd.SIZE)
        if len(command) < kvm_sev_cmd.SIZE or command[0] != SevCmd.KVM_SEV_SNP_LAUNCH_UPDATE:
            return
        place = int.from_bytes(command[8:16], "little")
        raw = self.memory.peek(place, kvm_sev_snp_launch_update.SIZE)
        if len(raw) == kvm_sev_snp_launch_update.SIZE:
            update = kvm_sev_snp_launch_update.from_bytes(raw)
            if update.type != SnpPageType.KVM_SEV_SNP_PAGE_TYPE_ZERO:
                self.memory.copied(fd, update.uaddr, update.len, tid)

    def _find_area(self, fd: KvmFd) -> None:
        known = self._object(fd)
        if not known.native.run:
            vcpu: Any = fd
            address, size = address_of(memoryview(vcpu.area)), len(vcpu.area)
            known.mapped(address, size)
            if not self.memory.was_mapped(address):
                self._map(fd, address, size, 0)

    def ioctl_dropped(self, fd: KvmFd, op: Ioctl) -> None:  # noqa: ARG002
        """Write nothing: KVM was not asked."""
        mine = self._local.mine
        if mine.pending:
            capture = mine.pending.pop()
            capture.end()
            mine.spare.append(capture)

    def ioctl_exit(self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, result: int, errno_: int) -> None:
        """Write what was asked and what came back."""
        mine = self._local.mine
        if not mine.pending:
            return
        capture = mine.pending.pop()
        _record(capture.native, _IOCTL, result, errno_)
        nr = op.nr
        if nr in _SPECIAL:
            if nr in _WRITERS and self.memory.shown:
                self.memory.look_again()
            if result >= 0 and nr != _RUN:
                self._special_after(fd, nr, arg, result, capture)
        capture.known = None
        mine.spare.append(capture)

    def _special_after(
        self, fd: KvmFd, nr: int, arg: Struct | int | None, result: int, capture: Capture
    ) -> None:
        made = capture.made(result)
        if made is not None:
            self._by_number.pop(made.fd, None)
            native = capture.native
            self._made[made.fd] = (int(native.order), self._object(fd), native.arg & 0xFFFF_FFFF)
        elif nr == _ENCRYPT:
            if self.memory.peek(_value(arg), 1) == bytes([SevCmd.KVM_SEV_SNP_LAUNCH_FINISH]):
                self.memory.sources_done(fd, self._local.mine.tid)
        elif nr in ioctls.SETS_SLOT:
            raw = self.memory.peek(_value(arg), kvm_userspace_memory_region.SIZE)
            region = kvm_userspace_memory_region.from_bytes(raw)
            self.memory.slot_set(fd, region.userspace_addr, region.memory_size, self._local.mine.tid)

    # What else the host does.

    def _map(self, fd: KvmFd, address: int, size: int, offset: int) -> None:
        self.memory.mapped(address)
        self.writer.put(Map(address, size, offset, self._object(fd).ident, MAP_SHARED), tid=self._tid())

    def mapped(self, fd: KvmFd, address: int, size: int, offset: int) -> None:
        """Write the mapping."""
        self._map(fd, address, size, offset)

    def memory_written(self, view: memoryview) -> None:
        """Write the bytes, once the VM ran."""
        self.memory.written(view, self._local.mine.tid)

    def memory_shown(self, view: memoryview, once: bool) -> None:
        """Compare what is under *view* before the next run."""
        self.memory.show(view, once)

    def kicked(self, vcpu: KvmFd, tid: int, signal: int) -> None:
        """Write the kick."""
        flags = KICK_IMMEDIATE_EXIT | (KICK_SIGNAL if tid else 0)
        self.writer.put(Kick(self._object(vcpu).ident, flags, signal, tid), tid=self._tid())

    def deadline_set(self, vcpu: KvmFd, ns: int) -> None:
        """Write the deadline where it is another than before."""
        if self._deadlines.get(vcpu) != ns:
            self._deadlines[vcpu] = ns
            self.writer.put(Deadline(self._object(vcpu).ident, ns), tid=self._tid())

    def file_called(self, fd: KvmFd, mode: int, offset: int, size: int, errno_: int) -> None:
        """Write the call."""
        call = FileCall(
            self._object(fd).ident, FILE_FALLOCATE, mode, offset, size, -1 if errno_ else 0, errno_
        )
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
    return arg & _U64 if isinstance(arg, int) else arg.host_address
