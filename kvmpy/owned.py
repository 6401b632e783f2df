# SPDX-License-Identifier: Apache-2.0
"""Processes and folders that do not outlive their owner, however it ends.

It imports nothing of kvmpy, so that every room may use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PREFIX = "kvmpy-"
_LOCK = ".owner"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where recorded programs share memory with us
# What dies between making its folder and locking it leaves one without a lock.
_UNLOCKED_SECONDS = 600.0
_POLL = 0.02


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let this process get signal *number* when its parent dies; prctl(2), PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def dies_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """Return a function for the child, as ``preexec_fn``: it gets signal *number* when its parent dies.

    The child must be started by the parent's main thread: the kernel looks at the thread that forked.
    prctl(2), PR_SET_PDEATHSIG.
    """
    libc = ctypes.CDLL(None)  # loaded here, as little as possible happens between fork and exec
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies; prctl(2), PR_SET_CHILD_SUBREAPER."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(seconds: float = 10.0) -> None:
    """Kill every descendant of this process, which has called :func:`adopt_orphans`, and reap them.

    Returns after *seconds* at the latest: a process in the kernel's hands may not die at once.
    """
    import psutil

    deadline = time.monotonic() + seconds
    while running := psutil.Process().children(recursive=True):
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.kill()
        psutil.wait_procs(running, timeout=_POLL)
        if time.monotonic() > deadline:
            return


def _mine(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and path.is_dir() and not path.is_symlink()


def _abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            return not any(path.iterdir()) and time.time() - path.stat().st_mtime > _UNLOCKED_SECONDS
        return False
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def is_owned(path: Path) -> bool:
    """Whether *path* is called as an :class:`OwnedFolder` is."""
    return path.name.startswith(_PREFIX)


def sweep(*bases: Path) -> None:
    """Remove the folders of owners that are dead: in temporary folders, in shared memory, and in *bases*."""
    for base in {Path(tempfile.gettempdir()), _SHARED_MEMORY, *bases}:
        for path in base.glob(f"{_PREFIX}*"):
            if _mine(path) and _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


class OwnedFolder:
    """A temporary folder that this process removes, or, when it is killed, the next one that makes one.

    Its name begins with ``kvmpy-`` and *kind*; *base* is where it is made. It belongs to this process and
    those it forks as long as they keep its lock open.
    """

    def __init__(self, kind: str, base: Path | None = None) -> None:
        sweep(*([] if base is None else [base]))
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-", dir=base))
        # Under another name until it is locked: nobody sees a lock that is not held.
        fresh = self.path / f"{_LOCK}.new"
        self._lock = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh.rename(self.path / _LOCK)

    def close(self) -> None:
        """Remove the folder with all that is in it; harmless a second time."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            descriptor, self._lock = self._lock, -1
            os.close(descriptor)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def write_atomically(path: Path, data: str | bytes, opener: Callable[[str, int], int] | None = None) -> None:
    """Write a file that is whole or not there, making its folder; what cannot be UTF-8 is escaped.

    An older file stays until the new one is complete. What is no regular file is written as it is.  *opener*
    is that of ``open``: without one a new file has an older one's mode.  OSError where that fails.
    """
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    if (path.exists() and not path.is_file()) or path.absolute().parts[1:2] in (("dev",), ("proc",)):
        path.write_bytes(raw)
        return
    target = path.resolve()
    fresh = target.with_name(f".{target.name[:200]}.{os.getpid()}.new")
    try:
        with open(fresh, "wb", opener=opener) as stream:
            stream.write(raw)
        if opener is None and target.exists():
            shutil.copymode(target, fresh)
        fresh.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
