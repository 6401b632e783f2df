# SPDX-License-Identifier: Apache-2.0
"""System calls seen from outside become frames: ioctls of KVM with what they read and wrote."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from kvmpy.debug.preload.shared import RING_DUMP
from kvmpy.debug.record.capture import Capture
from kvmpy.debug.record.events import IOCTL, MEMORY, Close, Map, Object, Unmap
from kvmpy.debug.record.format import (
    MAP_SHARED,
    MEMORY_INITIAL,
    PAGE_SIZE,
    FrameType,
    ObjectKind,
    object_kind,
)
from kvmpy.debug.watch.ptrace_calls import SyscallInfo
from kvmpy.debug.watch.ptrace_state import Process, Traced
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.links import Link

_IOCTL, _CLOSE, _MMAP, _MUNMAP, _DUP, _DUP2, _FCNTL, _DUP3, _CLOSE_RANGE = 16, 3, 9, 11, 32, 33, 72, 292, 436
_F_DUPFD, _F_DUPFD_CLOEXEC = 0, 1030
_MAP_SHARED = 1

Put = Callable[[int, bytes, int, int, int, int], None]
Finish = Callable[[SyscallInfo], None]


def _signed(value: int) -> int:
    low = value & 0xFFFF_FFFF
    return low - (1 << 32) if low >> 31 else low


class IoctlWatcher:
    """Makes frames of what system calls mean for KVM's file descriptors.

    With *memory* also of what the slots of a VM hold before it runs first.
    """

    def __init__(self, put: Put, order: Callable[[], int], *, memory: bool = False) -> None:
        self._put = put
        self._order = order
        self._memory = memory
        self._objects = 0
        self._vms = ffi.new("uint32_t *")

    # Objects.

    def _new(
        self,
        process: Process,
        fd: int,
        kind: ObjectKind,
        name: str,
        maker: Traced | None,
        tid: int,
        made_by: int = 0,
        vm_type: int = 0,
    ) -> Traced:
        self._objects += 1
        known = process.objects[fd] = Traced(self._objects, kind, name, maker, vm_type)
        said = Object(known.ident, 0 if maker is None else maker.ident, fd, kind, made_by, name)
        self._say(said.TYPE, said.pack(), tid, process)
        return known

    def _say(self, kind: int, payload: bytes, tid: int, process: Process) -> None:
        self._put(kind, payload, tid, process.pid, self._order(), time.monotonic_ns())

    def existing(self, process: Process) -> None:
        """Take in what a process had when it was attached to."""
        links = {fd: process.link(fd) for fd in process.open_files()}
        known = {fd: link for fd, link in links.items() if link.kvm}
        vms = [self._vm(process, fd, process.pid) for fd, link in known.items() if link.kind == "vm"]
        for fd, link in known.items():
            if link.kind != "vm":
                self._found(process, fd, link, vms[0] if len(vms) == 1 else None, process.pid)

    def _vm(self, process: Process, fd: int, tid: int) -> Traced:
        name = f"vm{self._vms[0]}"
        self._vms[0] += 1
        return self._new(process, fd, ObjectKind.VM, name, None, tid)

    def _found(self, process: Process, fd: int, link: Link, vm: Traced | None, tid: int) -> Traced:
        kind = object_kind(link.kind)
        if not link.of_vm:
            return self._new(process, fd, kind, link.name, None, tid)
        known = self._new(process, fd, kind, f"{vm.name if vm is not None else 'vm?'}/{link.name}", vm, tid)
        if kind == ObjectKind.VCPU:
            areas = process.run_mappings(link)
            if len(areas) == 1:
                known.mapped(*areas[0])
        return known

    def _of(self, process: Process, fd: int, tid: int, *, foreign: bool = False) -> Traced | None:
        """Return what a descriptor is; with *foreign* also where it takes no ioctls of KVM."""
        known = process.objects.get(fd)
        if known is not None:
            return known
        link = process.link(fd)
        if not (link.kvm or (foreign and link.name)):
            return None
        if link.kind == "vm":
            return self._vm(process, fd, tid)
        return self._found(process, fd, link, None, tid)

    # System calls.

    def entered(self, tid: int, process: Process, number: int, args: tuple[int, ...]) -> Finish | None:
        """A thread enters a system call; return what to call when it leaves it, None where nobody cares."""
        if number == _IOCTL:
            return self._ioctl(tid, process, _signed(args[0]), args[1] & 0xFFFF_FFFF, args[2])
        if number == _CLOSE:
            self._closed(tid, process, _signed(args[0]))
        elif number == _CLOSE_RANGE and not args[2] & 4:
            for fd in [each for each in process.objects if args[0] <= each <= args[1]]:
                self._closed(tid, process, fd)
        elif number in (_DUP, _DUP2, _DUP3) or (number == _FCNTL and args[1] in (_F_DUPFD, _F_DUPFD_CLOEXEC)):
            return self._copied(tid, process, _signed(args[0]))
        elif number == _MMAP and process.objects.get(_signed(args[4])) is not None:
            return self._mapped(tid, process, process.objects[_signed(args[4])], args)
        elif number == _MUNMAP:
            for known in process.objects.values():
                if args[0] <= known.native.run < args[0] + args[1]:
                    known.mapped(0, 0)
                    gone = Unmap(args[0], args[1])
                    self._say(gone.TYPE, gone.pack(), tid, process)
        return None

    def _closed(self, tid: int, process: Process, fd: int) -> None:
        known = process.objects.pop(fd, None)
        if known is not None and known not in process.objects.values():
            said = Close(known.ident)
            self._say(said.TYPE, said.pack(), tid, process)

    def _copied(self, tid: int, process: Process, fd: int) -> Finish:
        def finish(info: SyscallInfo) -> None:
            if info.is_error or info.result == fd:
                return
            self._closed(tid, process, info.result)
            if fd in process.objects:
                process.objects[info.result] = process.objects[fd]

        return finish

    def _mapped(self, tid: int, process: Process, known: Traced, args: tuple[int, ...]) -> Finish:
        def finish(info: SyscallInfo) -> None:
            if info.is_error:
                return
            address = info.result & (1 << 64) - 1
            if known.kind == ObjectKind.VCPU and args[5] == 0:
                known.mapped(address, args[1])
            shared = MAP_SHARED if args[3] & _MAP_SHARED else 0
            said = Map(address, args[1], args[5], known.ident, shared)
            self._say(said.TYPE, said.pack(), tid, process)

        return finish

    def _ioctl(self, tid: int, process: Process, fd: int, nr: int, arg: int) -> Finish | None:
        known = process.objects.get(fd)
        if (known is None and nr >> 8 & 0xFF == ioctls.KVMIO) or (
            known is None and nr == ioctls.SEV_ISSUE_CMD.nr
        ):
            known = self._of(process, fd, tid)
        if known is None:
            return self._stray(tid, process, fd, nr, arg) if nr >> 8 & 0xFF == ioctls.KVMIO else None
        # A descriptor that is none of KVM's becomes an object when it is given to KVM first.
        for each in process.source.foreign_fds(nr, arg):
            self._of(process, each, tid, foreign=True)
        running = nr == ioctls.KVM_RUN.nr
        if running and self._memory and not known.vm.dumped:
            self._dump(tid, process, known.vm)
        capture = Capture(process.source)
        capture.enter(known, fd, nr, arg)
        order, start = self._order(), time.monotonic_ns()
        if running:
            self._put(FrameType.ENTER, capture.payload(), tid, process.pid, order, start)

        def finish(info: SyscallInfo) -> None:
            result = -1 if info.is_error else info.result
            error = -info.result if info.is_error else 0
            capture.exit(result)
            end, now = self._order(), time.monotonic_ns()
            payload = capture.payload(result, error, end, now)
            self._put(FrameType.IOCTL, payload, tid, process.pid, order, start)
            made = None if info.is_error else capture.made(result, self._vms)
            if made is not None:
                self._closed(tid, process, made.fd)
                kind = ObjectKind(made.kind)
                self._new(process, made.fd, kind, made.name, known, tid, order, arg & 0xFFFF_FFFF)
            capture.end()

        return finish

    def _stray(self, tid: int, process: Process, fd: int, nr: int, arg: int) -> Finish:
        """An ioctl of KVM's on what is none of its file descriptors, or on none at all."""
        start = time.monotonic_ns()

        def finish(info: SyscallInfo) -> None:
            if info.is_error and -info.result in (errno.EBADF, errno.ENOTTY):
                order, end, now = self._order(), self._order(), time.monotonic_ns()
                payload = IOCTL.pack(0, fd, nr, arg, -1, -info.result, 0, 0, end, now)
                self._put(FrameType.IOCTL, payload, tid, process.pid, order, start)

        return finish

    def _dump(self, tid: int, process: Process, vm: Traced) -> None:
        vm.dumped = True
        for address, size in vm.slots:
            for where, content in process.populated(address, size):
                head = MEMORY.pack(where, len(content) // PAGE_SIZE, MEMORY_INITIAL)
                self._say(RING_DUMP, head + content, tid, process)
