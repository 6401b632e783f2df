# SPDX-License-Identifier: Apache-2.0
"""Ioctls of running and of static programs through ptrace(2): slow, every system call stops twice."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kvmpy.debug.preload.shared import FIRST_ORDER
from kvmpy.debug.record.events import Payload, Thread
from kvmpy.debug.record.format import Frame, ObjectKind
from kvmpy.debug.record.writer import RecordWriter
from kvmpy.debug.watch import ptrace_calls as pt
from kvmpy.debug.watch.ptrace_ioctls import IoctlWatcher
from kvmpy.debug.watch.ptrace_state import Process
from kvmpy.debug.watch.trace import Sink
from kvmpy.debug.watch.trace_program import passed_on

_STOP_SIGNALS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DETACH_S = 2.0
_PAUSE_S = 0.005
_PF_USER_WORKER = 0x4000
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class PtraceError(Exception):
    """A process cannot be traced; the text says why and what to do."""


@dataclass
class _Thread:
    """A traced thread; *began* is the system call that it is in, with what was seen of it."""

    tid: int
    process: Process
    began: Callable[[pt.SyscallInfo], None] | None = None


class Tracer:
    """Traces processes and all their threads and children; frames go to *sink*."""

    def __init__(self, sink: Sink, *, memory: bool = False) -> None:
        self.sink = sink
        self.threads: dict[int, _Thread] = {}
        self.processes: dict[int, Process] = {}
        self.root_status: int | None = None
        self.stopping = False
        self.waiting = False
        self._order = itertools.count(FIRST_ORDER)
        self.watcher = IoctlWatcher(self.put, self.order, memory=memory)

    def order(self) -> int:
        """Return the next order number."""
        return next(self._order)

    def put(self, kind: int, payload: bytes, tid: int, pid: int, order: int, time_ns: int) -> None:
        """Hand a frame to the sink."""
        self.sink.take([Frame(kind, payload, tid, pid, order, time_ns)])

    def say(self, said: Payload, tid: int, pid: int) -> None:
        """Hand over what is no ioctl."""
        self.put(said.TYPE, said.pack(), tid, pid, self.order(), time.monotonic_ns())

    # Threads.

    def add(self, tid: int) -> _Thread:
        """Begin to follow a thread that is traced already."""
        pid, parent = _ids(tid)
        process = self.processes.get(pid)
        if process is None:
            process = self.processes[pid] = Process(pid)
            origin = self.processes.get(parent)
            if origin is not None:
                process.objects = dict(origin.objects)
        thread = self.threads[tid] = _Thread(tid, process)
        self.say(Thread(tid, pid, parent, _name(tid)), tid, pid)
        return thread

    def seize(self, tid: int, options: int) -> None:
        """Attach to a thread; PtraceError when that is not allowed."""
        try:
            pt.call(pt.SEIZE, tid, 0, options)
        except OSError as error:
            raise PtraceError(_refusal(tid, error)) from None

    def forget(self, tid: int) -> None:
        """A thread ended."""
        thread = self.threads.pop(tid, None)
        if thread is not None and not any(each.process is thread.process for each in self.threads.values()):
            thread.process.close()
            self.processes.pop(thread.process.pid, None)

    # The loop.

    def run(self, root: int) -> None:
        """Follow until no thread is left; KeyboardInterrupt passes through."""
        while self.threads and not self.stopping:
            self.waiting = True
            try:
                tid, status = os.waitpid(-1, pt.WALL)
            except ChildProcessError:
                return
            finally:
                self.waiting = False
            self.handle(tid, status, root)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """End :meth:`run` between two reports; a signal handler."""
        del number, frame
        self.stopping = True
        if self.waiting:
            raise KeyboardInterrupt

    def handle(self, tid: int, status: int, root: int) -> None:
        """Deal with one report of waitpid()."""
        if not os.WIFSTOPPED(status):
            if tid == root:
                self.root_status = os.waitstatus_to_exitcode(status)
            self.forget(tid)
            return
        thread = self.threads.get(tid) or self.add(tid)
        try:
            self._stopped(thread, os.WSTOPSIG(status), status >> 16)
        except OSError as error:
            if not pt.gone(error):
                raise

    def _stopped(self, thread: _Thread, number: int, event: int) -> None:
        if number == signal.SIGTRAP | pt.SYSCALL_STOP:
            self._syscall(thread)
            pt.call(pt.SYSCALL, thread.tid)
        elif event == pt.EVENT_STOP:
            pt.call(pt.LISTEN if number in _STOP_SIGNALS else pt.SYSCALL, thread.tid)
        elif event:
            if event == pt.EVENT_EXEC:
                self._executed(thread)
            pt.call(pt.SYSCALL, thread.tid)
        else:
            pt.call(pt.SYSCALL, thread.tid, 0, number)

    def _executed(self, thread: _Thread) -> None:
        thread.began = None
        thread.process.executed()
        for other in [each.tid for each in self.threads.values() if each.process is thread.process]:
            if other != thread.tid:
                self.forget(other)
        self.say(Thread(thread.tid, thread.process.pid, 0, _name(thread.tid)), thread.tid, thread.process.pid)

    def _syscall(self, thread: _Thread) -> None:
        info = pt.syscall_info(thread.tid)
        if info.op == pt.INFO_ENTRY:
            thread.began = self.watcher.entered(thread.tid, thread.process, info.number, info.args)
        elif info.op == pt.INFO_EXIT and thread.began is not None:
            began, thread.began = thread.began, None
            began(info)

    def detach(self) -> None:
        """Let every thread run on untraced."""
        running = []
        for tid in list(self.threads):
            try:
                # What stands still already would not stop once more.
                pt.call(pt.DETACH, tid)
            except OSError:
                with contextlib.suppress(OSError):
                    pt.call(pt.INTERRUPT, tid)
                running.append(tid)
        deadline = time.monotonic() + _DETACH_S
        for tid in running:
            self._detach_one(tid, deadline)
        for tid in list(self.threads):
            self.forget(tid)

    def _detach_one(self, tid: int, deadline: float) -> None:
        # Whoever does not stop in time is detached by the kernel when this process ends.
        while time.monotonic() < deadline:
            try:
                waited, status = os.waitpid(tid, pt.WALL | os.WNOHANG)
            except ChildProcessError:
                return
            if not waited:
                time.sleep(_PAUSE_S)
                continue
            if not os.WIFSTOPPED(status):
                return
            number = os.WSTOPSIG(status)
            # A signal that was about to be delivered must not be lost.
            passed = 0 if status >> 16 or number == signal.SIGTRAP | pt.SYSCALL_STOP else number
            with contextlib.suppress(OSError):
                pt.call(pt.DETACH, tid, 0, passed)
            return


def _ids(tid: int) -> tuple[int, int]:
    """Return process and parent process of a thread."""
    try:
        text = Path(f"/proc/{tid}/status").read_text()
    except OSError:
        return tid, 0
    rows = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    return int(rows.get("Tgid", tid)), int(rows.get("PPid", 0))


def _name(tid: int) -> str:
    try:
        return Path(f"/proc/{tid}/comm").read_text().strip()
    except OSError:
        return ""


def _refusal(pid: int, error: OSError) -> str:
    if error.errno == errno.ESRCH:
        return f"there is no process {pid}"
    if error.errno != errno.EPERM:
        return f"process {pid} cannot be traced: {error.strerror}"
    tracer = ""
    with contextlib.suppress(OSError):
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
        tracer = next((row.split()[1] for row in rows if row.startswith("TracerPid:")), "")
    if tracer not in ("", "0"):
        return f"process {pid} is traced by process {tracer} already: end that first"
    text = f"no permission to trace process {pid}: it takes the same user, or CAP_SYS_PTRACE (root)"
    with contextlib.suppress(OSError):
        scope = _YAMA.read_text().strip()
        if scope != "0":
            text += (
                f"; and kernel.yama.ptrace_scope is {scope}, so that only "
                + ("a parent may" if scope == "1" else "CAP_SYS_PTRACE may" if scope == "2" else "nobody may")
                + " (sysctl kernel.yama.ptrace_scope=0)"
            )
    return text


def _threads_of(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/task"):
            if not _worker(int(name)):
                yield int(name)


def _worker(tid: int) -> bool:
    """Whether the thread is one of the kernel's (KVM has such in a VM's process): it runs no program."""
    try:
        fields = Path(f"/proc/{tid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & _PF_USER_WORKER)


def attach(pid: int, sink: Sink, record: Callable[[], RecordWriter | None], *, memory: bool = False) -> int:
    """Trace a running process until it ends or a signal asks to, and leave it running then; return 0.

    *record* opens the record once the process could be attached to; with *memory* it holds what VMs that
    are made later hold before they run. PtraceError when it could not.
    """
    tracer = Tracer(sink, memory=memory)
    pid_of, _ = _ids(pid)
    known: set[int] = set()
    # Threads may come while their list is read.
    while True:
        fresh = [tid for tid in _threads_of(pid_of) if tid not in known]
        if not fresh:
            break
        for tid in fresh:
            try:
                tracer.seize(tid, pt.FOLLOW)
            except PtraceError:
                if not known:
                    raise
            known.add(tid)
    if not known:
        raise PtraceError(f"there is no process {pid}")
    sink.record = record()
    text = f"attached to process {pid_of} ({len(known)} threads); it is slow from here on; Ctrl-C detaches"
    sink.remark(text)
    # Also where a shell started us with SIGINT ignored.
    earlier = {number: signal.signal(number, tracer.stop) for number in _ENDS}
    try:
        for tid in known:
            tracer.add(tid)
            pt.call(pt.INTERRUPT, tid)
        tracer.watcher.existing(tracer.processes[pid_of])
        results = [
            known.name for known in tracer.processes[pid_of].objects.values() if known.kind == ObjectKind.VM
        ]
        if results and sink.record is not None:
            sink.remark(f"the record lacks the memory of {', '.join(results)}: it ran before kvmpy came")
        tracer.run(pid_of)
    except KeyboardInterrupt:
        pass
    finally:
        if tracer.stopping:
            sink.remark("detached")
        for number in _ENDS:
            signal.signal(number, signal.SIG_IGN)
        tracer.detach()
        sink.finish(tracer.order())
        for number, handler in earlier.items():
            signal.signal(number, handler)
    return 0


def launch(command: Sequence[str], sink: Sink, *, memory: bool = False) -> int:
    """Run *command* under ptrace, return its status as a shell does; PtraceError when it cannot start.

    With *memory* the record holds guest memory as it was before each VM ran first.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _become(command, writing)
    os.close(writing)
    tracer = Tracer(sink, memory=memory)
    try:
        os.waitpid(pid, os.WUNTRACED)
        tracer.seize(pid, pt.FOLLOW | pt.O_EXITKILL)
        tracer.add(pid)
        os.kill(pid, signal.SIGCONT)
        # The terminal's SIGINT reaches the program, too: its end is ours.
        earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with passed_on(lambda number: os.kill(pid, number)):
                tracer.run(pid)
        finally:
            signal.signal(signal.SIGINT, earlier)
        with os.fdopen(reading, "rb") as pipe:
            failure = pipe.read()
        if failure:
            raise PtraceError(f"{command[0]}: {os.strerror(int(failure))}")
    finally:
        tracer.detach()
        sink.finish(tracer.order())
    status = tracer.root_status or 0
    return 128 - status if status < 0 else status


def _become(command: Sequence[str], writing: int) -> None:
    try:
        os.kill(os.getpid(), signal.SIGSTOP)
        os.execvp(command[0], list(command))  # noqa: S606
    except OSError as error:
        os.write(writing, str(error.errno).encode())
    finally:
        os._exit(127)
