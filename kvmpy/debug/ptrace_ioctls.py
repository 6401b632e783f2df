# SPDX-License-Identifier: Apache-2.0
"""System calls seen from outside become frames: ioctls of KVM with what they read and wrote."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from kvmpy.debug.preload.shared import RING_DUMP
from kvmpy.debug.ptrace_calls import SyscallInfo
from kvmpy.debug.ptrace_state import Known, Process
from kvmpy.debug.record.arguments import Follower, chunk, content_of, plan_of
from kvmpy.debug.record.events import IOCTL, MEMORY, Close, Map, Object
from kvmpy.debug.record.format import (
    MAP_SHARED,
    MEMORY_INITIAL,
    PAGE_SIZE,
    FrameType,
    ObjectKind,
    What,
    When,
    object_kind,
)
from kvmpy.uapi import ioctls
from kvmpy.uapi.buffers import BUFFERS, descriptors_in
from kvmpy.uapi.constants import KVM_CAP_XSAVE2, KVM_CREATE_DEVICE_TEST, KVM_EXIT_IO, KVM_EXIT_IO_IN
from kvmpy.uapi.links import Link
from kvmpy.uapi.structs import kvm_create_device, kvm_run, kvm_userspace_memory_region

_IOCTL, _CLOSE, _MMAP, _MUNMAP, _DUP, _DUP2, _FCNTL, _DUP3, _CLOSE_RANGE = 16, 3, 9, 11, 32, 33, 72, 292, 436
_F_DUPFD, _F_DUPFD_CLOEXEC = 0, 1030
_RUN_HEAD = 32 + 256
_SYNC_END = kvm_run.SIZE
_MOST_IO = 4096
_MAP_SHARED = 1

Put = Callable[[int, bytes, int, int, int, int], None]
Finish = Callable[[SyscallInfo], None]


def _nothing(address: int) -> bool:
    del address
    return False


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
        self._vms = 0

    # Objects.

    def _new(
        self,
        process: Process,
        fd: int,
        kind: ObjectKind,
        name: str,
        vm: Known | None,
        tid: int,
        made_by: int = 0,
    ) -> Known:
        self._objects += 1
        known = Known(self._objects, kind, name, vm)
        process.objects[fd] = known
        said = Object(known.ident, vm.ident if vm is not None else 0, fd, kind, made_by, name)
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

    def _vm(self, process: Process, fd: int, tid: int, made_by: int = 0, kvm: Known | None = None) -> Known:
        known = self._new(process, fd, ObjectKind.VM, f"vm{self._vms}", kvm, tid, made_by)
        known.vm = None
        self._vms += 1
        return known

    def _found(self, process: Process, fd: int, link: Link, vm: Known | None, tid: int) -> Known:
        kind = object_kind(link.kind)
        if not link.of_vm:
            return self._new(process, fd, kind, link.name, None, tid)
        known = self._new(process, fd, kind, f"{vm.name if vm is not None else 'vm?'}/{link.name}", vm, tid)
        if kind == ObjectKind.VCPU:
            areas = process.run_mappings(link)
            if len(areas) == 1:
                known.run, known.run_length = areas[0]
        return known

    def _of(self, process: Process, fd: int, tid: int, *, foreign: bool = False) -> Known | None:
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
                if known.run and args[0] <= known.run < args[0] + args[1]:
                    known.run = 0
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

    def _mapped(self, tid: int, process: Process, known: Known, args: tuple[int, ...]) -> Finish:
        def finish(info: SyscallInfo) -> None:
            if info.is_error:
                return
            address = info.result & (1 << 64) - 1
            if known.kind == ObjectKind.VCPU and args[5] == 0:
                known.run, known.run_length, known.shadow = address, args[1], b""
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
        self._name_descriptors(tid, process, nr, arg)
        running = nr == ioctls.KVM_RUN.nr
        if running and self._memory and not known.owner.dumped:
            self._dump(tid, process, known.owner)
        order, start = self._order(), time.monotonic_ns()
        before = self._run_in(process, known) if running else self._argument(process, known, nr, arg, When.IN)
        if running:
            head = IOCTL.pack(known.ident, fd, nr, arg, 0, 0, len(before), 0, 0, 0)
            self._put(FrameType.ENTER, head + b"".join(before), tid, process.pid, order, start)

        def finish(info: SyscallInfo) -> None:
            result = -1 if info.is_error else info.result
            error = -info.result if info.is_error else 0
            if running:
                after = self._run_out(process, known)
            elif info.is_error and plan_of(nr).when == When.IN and not plan_of(nr).before:
                after = []
            else:
                after = self._argument(process, known, nr, arg, When.OUT)
            chunks = before + after
            end, now = self._order(), time.monotonic_ns()
            head = IOCTL.pack(known.ident, fd, nr, arg, result, error, len(chunks), 0, end, now)
            self._put(FrameType.IOCTL, head + b"".join(chunks), tid, process.pid, order, start)
            if not info.is_error:
                self._happened(tid, process, known, nr, arg, result, order)

        return finish

    def _name_descriptors(self, tid: int, process: Process, nr: int, arg: int) -> None:
        """A descriptor that is none of KVM's becomes an object when it is given to KVM first."""
        op = ioctls.BY_NR.get(nr)
        if op is None or not op.fd_fields or (buffer := BUFFERS.get(nr)) is None:
            return
        content = process.peek(arg, buffer.size.bytes(0))
        for offset, _ in descriptors_in(op, content, seen=False):
            fd = int.from_bytes(content[offset : offset + 4], "little", signed=True)
            self._of(process, fd, tid, foreign=True)

    def _stray(self, tid: int, process: Process, fd: int, nr: int, arg: int) -> Finish:
        """An ioctl of KVM's on what is none of its file descriptors, or on none at all."""
        start = time.monotonic_ns()

        def finish(info: SyscallInfo) -> None:
            if info.is_error and -info.result in (errno.EBADF, errno.ENOTTY):
                order, end, now = self._order(), self._order(), time.monotonic_ns()
                payload = IOCTL.pack(0, fd, nr, arg, -1, -info.result, 0, 0, end, now)
                self._put(FrameType.IOCTL, payload, tid, process.pid, order, start)

        return finish

    def _dump(self, tid: int, process: Process, vm: Known) -> None:
        vm.dumped = True
        for address, size in vm.slots.values():
            for where, content in process.populated(address, size):
                head = MEMORY.pack(where, len(content) // PAGE_SIZE, MEMORY_INITIAL)
                self._say(RING_DUMP, head + content, tid, process)

    def _argument(self, process: Process, known: Known, nr: int, arg: int, when: When) -> list[bytes]:
        plan = plan_of(nr)
        if plan.buffer is None and plan.size == 0:
            return []
        follower = Follower(process.peek, _nothing)
        wanted = plan.before if when == When.IN else plan.after
        told = int(plan.when) if when == When.IN else int(When.OUT)
        pieces = follower.raw(arg, plan, told if wanted else int(when))
        content = content_of(pieces[0]) if pieces else b""
        chunks = pieces if wanted else []
        if plan.deep and plan.buffer is not None and content:

            def slot_bytes(slot: int) -> int:
                return (known.owner.slots.get(slot & 0xFFFF_FFFF, (0, 0))[1] // PAGE_SIZE + 63) // 64 * 8

            chunks = [*chunks, *follower.nested(plan.buffer, content, int(when), slot_bytes)]
        return chunks

    def _run_in(self, process: Process, known: Known) -> list[bytes]:
        if not known.run:
            return []
        now = process.peek(known.run, _RUN_HEAD)
        results = []
        if len(now) == _RUN_HEAD and now != (known.shadow or bytes(_RUN_HEAD)):
            results.append(chunk(known.run, now, When.IN, What.RUN))
        address, size = known.answer
        if size:
            results.append(chunk(address, process.peek(address, size), When.IN, What.RUN))
        return results

    def _run_out(self, process: Process, known: Known) -> list[bytes]:
        if not known.run:
            return []
        now = process.peek(known.run, _SYNC_END)
        if len(now) < _SYNC_END:
            return []
        run = kvm_run.from_bytes(now)
        known.shadow = now[:_RUN_HEAD]
        chunks = [chunk(known.run, now if run.kvm_valid_regs else known.shadow, When.OUT, What.RUN)]
        size = run.io.size * run.io.count
        known.answer = (0, 0)
        if run.exit_reason == KVM_EXIT_IO and 0 < size <= _MOST_IO and run.io.data_offset < known.run_length:
            address = known.run + run.io.data_offset
            chunks.append(chunk(address, process.peek(address, size), When.OUT, What.RUN))
            if run.io.direction == KVM_EXIT_IO_IN:
                known.answer = (address, size)
        return chunks

    def _happened(
        self, tid: int, process: Process, known: Known, nr: int, arg: int, result: int, order: int
    ) -> None:
        """Learn from an ioctl that succeeded."""
        if nr in ioctls.SETS_SLOT:
            raw = process.peek(arg, kvm_userspace_memory_region.SIZE)
            if len(raw) == kvm_userspace_memory_region.SIZE:
                region = kvm_userspace_memory_region.from_bytes(raw)
                known.owner.slots[region.slot] = region.userspace_addr, region.memory_size
        elif nr == ioctls.KVM_CHECK_EXTENSION.nr and arg == KVM_CAP_XSAVE2:
            known.xsave = result
        elif nr == ioctls.KVM_CREATE_VM.nr:
            self._closed(tid, process, result)
            self._vm(process, result, tid, order, known)
        elif nr in ioctls.MAKERS:
            self._created(tid, process, known, nr, arg, result, order)

    def _created(
        self, tid: int, process: Process, known: Known, nr: int, arg: int, result: int, order: int
    ) -> None:
        kind = object_kind(ioctls.MAKERS[nr])
        name = {ObjectKind.VCPU: f"vcpu{arg}", ObjectKind.STATS: "stats"}.get(kind, f"gmem{known.gmems}")
        if kind == ObjectKind.GMEM:
            known.gmems += 1
        if kind == ObjectKind.DEVICE:
            raw = process.peek(arg, kvm_create_device.SIZE)
            if len(raw) < kvm_create_device.SIZE:
                return
            device = kvm_create_device.from_bytes(raw)
            if device.flags & KVM_CREATE_DEVICE_TEST:
                return
            result, name = device.fd, f"device{device.type}"
        self._closed(tid, process, result)
        self._new(process, result, kind, f"{known.name}/{name}", known, tid, order)
