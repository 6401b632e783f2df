# SPDX-License-Identifier: Apache-2.0
"""KVM's counters of somebody else's VMs: from debugfs, or from the statistics files that the VMM itself has
open.

Both need privilege. A VM's ioctls are refused to every process but its own (EIO), so KVM_GET_STATS_FD is no
way in.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvmpy.debug.watch.mounts import mount_detached
from kvmpy.uapi.constants import StatsType
from kvmpy.uapi.stats import StatsFile

MOUNTS = Path("/proc/self/mounts")
# The syscall has no function in the standard library; the number is the same on every architecture.
_SYS_PIDFD_GETFD = 438
_COUNTERS = "KVM's counters in debugfs"
_CUMULATIVE = int(StatsType.KVM_STATS_TYPE_CUMULATIVE)

_FOLDER = re.compile(r"(\d+)-(\d+)")
_VCPU_FOLDER = re.compile(r"vcpu(\d+)")

Counters = dict[str, int]


@dataclass(frozen=True)
class Unseen:
    """Something that this process may not see: what, and what to do to see it."""

    what: str
    how: str

    def __str__(self) -> str:
        return f"{self.what}: {self.how}" if self.how else self.what


@dataclass(frozen=True)
class StatsFolder:
    """A VM's folder in debugfs; *creator* is the thread that made the VM, *fd* the number it got."""

    path: Path
    creator: int
    fd: int

    def counters(self) -> Counters:
        """Return the VM's counters; those of its vCPUs are summed up. Empty once the VM is gone."""
        results = {}
        try:
            entries = list(os.scandir(self.path))
        except OSError:
            return {}
        for entry in entries:
            # Histograms hold several numbers and mmu_rmaps_stat a table: neither is a counter.
            if entry.name.endswith("_hist") or entry.name == "mmu_rmaps_stat":
                continue
            try:
                if entry.is_file():
                    results[entry.name] = int(Path(entry.path).read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue
        return results

    def refusal(self) -> Unseen | None:
        """Return why the counters of a VM that is there cannot be read, or None when they can."""
        try:
            (self.path / "exits").read_bytes()
        except PermissionError as error:
            # Since Linux 5.4 a kernel in lockdown refuses debugfs files that can be written.
            locked = error.errno == errno.EPERM
            return Unseen(
                _COUNTERS,
                "this kernel is locked down: boot it with lockdown=none" if locked else "run as root",
            )
        except OSError:
            return None
        return None

    def threads(self) -> dict[int, int]:
        """Return the thread of each vCPU that has run, by vCPU id."""
        by_name = {}
        try:
            for entry in os.scandir(self.path):
                match = _VCPU_FOLDER.fullmatch(entry.name)
                if match is None:
                    continue
                number = int(Path(entry.path, "pid").read_text(encoding="ascii"))
                if number > 0:
                    by_name[int(match[1])] = number
        except (OSError, ValueError):
            pass
        return by_name


@contextmanager
def debugfs(mounts: Path = MOUNTS) -> Iterator[Path | Unseen]:
    """Yield where debugfs can be read, or why it cannot.

    Where it is not mounted it is mounted for this block and this process alone, which root may.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        yield Unseen(_COUNTERS, f"{mounts} cannot be read ({error.strerror})")
        return
    places = [fields[1] for line in lines if len(fields := line.split()) > 2 and fields[2] == "debugfs"]
    # The kernel writes blanks in such names as octal numbers.
    paths = [Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)) for place in places]
    if paths:
        yield _readable(paths)
        return
    try:
        fd = mount_detached("debugfs")
    except OSError:
        yield Unseen(_COUNTERS, "run as root, or mount it: mount -t debugfs none /sys/kernel/debug")
        return
    try:
        yield _readable([Path(f"/proc/self/fd/{fd}")])
    finally:
        os.close(fd)


def _readable(paths: Sequence[Path]) -> Path | Unseen:
    for path in paths:
        try:
            os.listdir(path / "kvm")
        except FileNotFoundError:
            continue
        except PermissionError:
            return Unseen(_COUNTERS, f"{path} is closed to this user: run as root")
        return path
    return Unseen(_COUNTERS, "debugfs has no folder kvm: load KVM (modprobe kvm)")


def stats_folders(root: Path) -> list[StatsFolder]:
    """Return the folders of all VMs below debugfs' mount point *root*."""
    try:
        names = os.listdir(root / "kvm")
    except OSError:
        return []
    matches = [match for name in names if (match := _FOLDER.fullmatch(name))]
    return [StatsFolder(root / "kvm" / match[0], int(match[1]), int(match[2])) for match in matches]


@contextmanager
def borrowed_fd(pid: int, fd: int) -> Iterator[int]:
    """Yield a duplicate of file descriptor *fd* of process *pid*, closed at the end (pidfd_getfd).

    PermissionError where this process may not attach to the other with ptrace.  Keep it short: a duplicate of
    a statistics file keeps the VM alive.
    """
    pidfd = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        copy = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))
        if copy < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"pidfd_getfd of {fd} from process {pid}: {os.strerror(number)}")
    finally:
        os.close(pidfd)
    try:
        yield copy
    finally:
        os.close(copy)


def read_stats_fd(pid: int, fd: int) -> tuple[str, Counters]:
    """Return id and cumulative counters of a statistics file that process *pid* has open as *fd*.

    OSError when it may not be taken; ValueError when it is no statistics file.
    """
    with borrowed_fd(pid, fd) as copy:

        def read(offset: int, size: int) -> bytes:
            parts = []
            while size > 0 and (part := os.pread(copy, size, offset)):
                parts.append(part)
                offset += len(part)
                size -= len(part)
            return b"".join(parts)

        file = StatsFile.parse(read)
        values = file.values(read)
    return file.id, {
        name: value.value
        for name, value in values.items()
        if value.type == _CUMULATIVE and len(value.values) == 1
    }


def summed(parts: Iterator[Counters] | list[Counters]) -> Counters:
    """Return the sum of counters, name by name."""
    total: Counters = {}
    for part in parts:
        for name, number in part.items():
            total[name] = total.get(name, 0) + number
    return total


def rates(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Return the increase per second of each counter that was there both times; none where it fell."""
    if seconds <= 0:
        return {}
    return {
        name: (number - before[name]) / seconds
        for name, number in after.items()
        if name in before and number >= before[name]
    }
