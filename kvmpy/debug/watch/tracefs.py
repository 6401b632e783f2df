# SPDX-License-Identifier: Apache-2.0
"""tracefs: a trace instance of one's own, its events read as they happen, and nothing left behind.

Where tracefs is not mounted it is mounted for this process alone, without a place in any mount namespace
(fsmount(2), Linux 5.2): such a mount goes with its last file descriptor, even when the process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

from kvmpy.debug.watch.mounts import mount_detached
from kvmpy.debug.watch.tracering import EventFormat, PageLayout, Record

MOUNTS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
FILESYSTEMS = Path("/proc/filesystems")
PREFIX = "kvmpy-"
# Per CPU. What does not fit is lost and counted.
BUFFER_KIB = 2048
# CLOCK_MONOTONIC in nanoseconds, that time.monotonic_ns() and the other tools have, too.
CLOCK = "mono"

_OWNER = re.compile(re.escape(PREFIX) + r"(\d+)-\d+")
_TRIES = 3
# What the kernel says of an instance that another process has removed, or removes just now.
_GONE = (errno.ENOENT, errno.ENODEV)


class TracefsError(RuntimeError):
    """Events cannot be traced here: ``.missing`` says what is missing, ``.how`` how to get it."""

    def __init__(self, missing: str, how: str) -> None:
        self.missing = missing
        self.how = how
        super().__init__(f"{missing}: {how}" if how else missing)


def _refused(action: str, error: OSError) -> TracefsError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return TracefsError(
            f"no permission to {action}", "run as root (sudo); in a container, with CAP_SYS_ADMIN"
        )
    return TracefsError(f"cannot {action} ({error.strerror})", "see dmesg for why the kernel refused")


class Tracefs:
    """tracefs, found or mounted; a context manager.

    TracefsError when this kernel has none or it may not be used. *root* is a folder to use instead.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self._mount = -1
        if root is not None:
            self.root = Path(root)
        else:
            self.root = self._find()
        try:
            page = (self.root / "events" / "header_page").read_text()
            event = (self.root / "events" / "header_event").read_text()
        except FileNotFoundError:
            self.close()
            raise TracefsError(
                f"{self.root} holds no tracefs", "mount -t tracefs tracefs DIRECTORY"
            ) from None
        except OSError as error:
            self.close()
            raise _refused(f"read {self.root}", error) from error
        self.layout = PageLayout.parse(page, event)

    def _find(self) -> Path:
        for place in MOUNTS:
            try:
                if (place / "events").is_dir():
                    return place
            except PermissionError as error:
                raise _refused(f"read {place}", error) from error
        known = FILESYSTEMS.read_text().split()
        if "tracefs" not in known:
            raise TracefsError(
                "tracefs", "a kernel with CONFIG_FTRACE=y and CONFIG_EVENT_TRACING (CONFIG_TRACING)"
            )
        try:
            self._mount = mount_detached("tracefs")
        except OSError as error:
            if error.errno == errno.ENOSYS:
                raise TracefsError(
                    "tracefs is not mounted", "mount -t tracefs tracefs /sys/kernel/tracing"
                ) from error
            raise _refused("mount tracefs", error) from error
        return Path(f"/proc/{os.getpid()}/fd/{self._mount}")

    @property
    def mounted_here(self) -> bool:
        """Whether this object mounted it, for itself alone."""
        return self._mount >= 0

    def format(self, system: str, event: str) -> EventFormat:
        """Return the format of an event; TracefsError where this kernel does not have it."""
        try:
            text = (self.root / "events" / system / event / "format").read_text()
        except FileNotFoundError:
            if not (self.root / "events" / system).is_dir():
                how = "load KVM (modprobe kvm), in a kernel with CONFIG_EVENT_TRACING"
            else:
                how = f"a kernel whose KVM has it; this one has no {event}"
            raise TracefsError(f"trace event {system}:{event}", how) from None
        except OSError as error:
            raise _refused(f"read the format of {system}:{event}", error) from error
        return EventFormat.parse(text)

    def has(self, system: str, event: str) -> bool:
        """Whether this kernel has an event."""
        return (self.root / "events" / system / event / "format").is_file()

    def remove_stale(self) -> list[str]:
        """Remove the instances that dead processes left, and return their names.

        One that is in use is refused by the kernel (EBUSY), whatever its process is called here.
        """
        removed = []
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self.root / "instances")):
                owner = _OWNER.fullmatch(name)
                if owner is None or _alive(int(owner[1])):
                    continue
                with contextlib.suppress(OSError):
                    remove_instance(self.root / "instances" / name)
                    removed.append(name)
        return removed

    def instance(self, buffer_kib: int = BUFFER_KIB) -> TraceInstance:
        """Make a trace instance of one's own; TracefsError when that is refused."""
        return TraceInstance(self, buffer_kib)

    def close(self) -> None:
        """Let a mount of one's own go."""
        mount, self._mount = self._mount, -1
        if mount >= 0:
            os.close(mount)

    def __enter__(self) -> Tracefs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def make_instance(path: Path) -> None:
    """Make the instance at *path* (mkdir: the kernel fills it)."""
    os.mkdir(path)


def remove_instance(path: Path) -> None:
    """Remove the instance at *path* (rmdir: the kernel empties it)."""
    os.rmdir(path)


class TraceInstance:
    """A trace instance, ``instances/kvmpy-PID-N``: its own buffers and switches beside everybody else's.

    A context manager. It is removed when the block is left, by whatever way, and by SIGTERM where that would
    end the process (in the main thread, as long as the program has no handler of its own).
    """

    def __init__(self, tracefs: Tracefs, buffer_kib: int = BUFFER_KIB) -> None:
        self.tracefs = tracefs
        self.path: Path | None = None
        self._files: dict[int, int] = {}
        self._formats: dict[int, EventFormat] = {}
        self._poll = select.poll()
        self._handler_set = False
        self.lost = 0
        tracefs.remove_stale()
        for left in range(_TRIES - 1, -1, -1):
            self._make()
            try:
                self._prepare(buffer_kib)
            except OSError as error:
                self.close()
                # Until it is open, a process in another PID namespace, where the number of this one says
                # nothing, may take it for one that a dead process has left.
                if left and error.errno in _GONE:
                    continue
                raise _refused("set up a trace instance", error) from error
            except BaseException:
                self.close()
                raise
            return

    def _make(self) -> None:
        folder = self.tracefs.root / "instances"
        for number in range(1000):
            path = folder / f"{PREFIX}{os.getpid()}-{number}"
            try:
                make_instance(path)
            except FileExistsError:
                continue
            except FileNotFoundError:
                raise TracefsError("trace instances", "a kernel with CONFIG_TRACING (Linux 3.10)") from None
            except OSError as error:
                raise _refused("make a trace instance", error) from error
            self.path = path
            return
        raise TracefsError(f"a free instance in {folder}", f"rmdir {folder}/{PREFIX}*")

    def _prepare(self, buffer_kib: int) -> None:
        self.write("tracing_on", "0")
        self.write("buffer_size_kb", str(buffer_kib))
        self.write("trace_clock", CLOCK)
        # Readers are woken at the first record, not by a half-full buffer.
        with contextlib.suppress(OSError):
            self.write("buffer_percent", "0")
        cpus = self._path("per_cpu")
        for name in sorted(os.listdir(cpus)):
            cpu = int(name.removeprefix("cpu"))
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            self._files[cpu] = os.open(cpus / name / "trace_pipe_raw", flags)
            self._poll.register(self._files[cpu], select.POLLIN)

    def _path(self, name: str) -> Path:
        if self.path is None:
            raise TracefsError("the trace instance", "it was closed")
        return self.path / name

    def write(self, name: str, text: str, *, append: bool = False) -> None:
        """Write one of the instance's files; OSError as the kernel answers."""
        # One write(2): the kernel takes each as a command of its own.
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
        fd = os.open(self._path(name), flags)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def enable(self, system: str, event: str, condition: str = "") -> EventFormat:
        """Record an event from now on, if *condition* holds (Linux: Documentation/trace/events.rst, 5).

        TracefsError where this kernel lacks the event, OSError (EINVAL) for a condition that means nothing.
        """
        event_format = self.tracefs.format(system, event)
        folder = f"events/{system}/{event}"
        if condition:
            self.write(f"{folder}/filter", condition)
        self.write(f"{folder}/enable", "1")
        self._formats[event_format.id] = event_format
        return event_format

    def watch(self, tids: Iterable[int], *, children: bool = False) -> None:
        """Record events of these threads only; with *children* also of those that they start from now on."""
        self.write("set_event_pid", " ".join(str(tid) for tid in tids))
        self.write("options/event-fork", "1" if children else "0")

    def start(self) -> None:
        """Record from now on."""
        self.write("tracing_on", "1")

    def stop(self) -> None:
        """Record no more; what was recorded can still be read."""
        self.write("tracing_on", "0")

    def wait(self, timeout: float) -> bool:
        """Wait until there are records to read; False when there were none within *timeout* seconds."""
        return bool(self._poll.poll(timeout * 1000))

    def read(self) -> list[Record]:
        """Return what was recorded since the last call, in the order of time, without waiting.

        ``.lost`` counts the records that did not fit into the buffers.
        """
        results: list[Record] = []
        if not self._formats:
            return results
        for cpu, fd in self._files.items():
            for page in self._pages(fd):
                content = self.tracefs.layout.read(page)
                self.lost += abs(content.lost)
                for timestamp, payload in content.records:
                    event_format = self._formats.get(self._number(payload))
                    if event_format is not None:
                        results.append(Record(timestamp, cpu, event_format, payload))
        results.sort(key=lambda record: record.timestamp)
        return results

    def _number(self, payload: bytes) -> int:
        # The common fields lie at the same place in every event.
        return next(iter(self._formats.values())).number(payload, "common_type")

    def _pages(self, fd: int) -> Iterator[bytes]:
        size = self.tracefs.layout.size
        while True:
            try:
                page = os.read(fd, size)
            except BlockingIOError:
                return
            if not page:
                return
            yield page

    def close(self) -> None:
        """Stop recording and remove the instance; twice is harmless."""
        for fd in self._files.values():
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
            os.close(fd)
        self._files.clear()
        path, self.path = self.path, None
        if path is not None:
            with contextlib.suppress(OSError):
                (path / "events" / "enable").write_text("0")
            try:
                remove_instance(path)
            except OSError as error:
                if error.errno not in _GONE:
                    raise

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.close()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def __enter__(self) -> TraceInstance:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminated)
            self._handler_set = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        finally:
            if self._handler_set:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._handler_set = False
