# SPDX-License-Identifier: Apache-2.0
"""What a test left behind: descriptors, VMs, threads, mappings, children; and memory growth over a run."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvmpy.testing.host import ACCELERATOR_VARIABLE
from kvmpy.uapi.links import is_mapped, link_of

# A VM takes a worker thread of KVM along when it is closed, and on an emulated CPU that takes a while.
GRACE = 30.0 if os.environ.get(ACCELERATOR_VARIABLE) == "tcg" else 5.0
_SELF = "/proc/self"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Snapshot:
    """What this process holds at one moment. ``mappings`` counts the named ones, ``mapped`` all of them."""

    fds: dict[int, str]
    threads: dict[int, str]
    children: dict[int, str]
    mappings: Counter[str]
    mapped: int
    rss: int


def _fds() -> dict[int, str]:
    results = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            results[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the directory's own descriptor
    return results


def _read(path: str) -> bytes:
    # Around every test: without Python's layers a look takes a third of the time.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = [os.read(fd, _CHUNK)]
        while parts[-1]:
            parts.append(os.read(fd, _CHUNK))
    finally:
        os.close(fd)
    return b"".join(parts)


def _comm(folder: str) -> str:
    try:
        return _read(f"{folder}/comm").decode("utf-8", "replace").strip()
    except OSError:
        return "?"


def _tids() -> list[str]:
    folder = f"{_SELF}/task"
    # The kernel ends the listing at a thread that ends meanwhile, and those behind it are missing: pytest's
    # watchdog of this test, say, behind that of the last one. The number of links counts them all.
    for _ in range(100):
        there = os.stat(folder).st_nlink - 2
        names = os.listdir(folder)
        if len(names) >= there:
            break
    return names


def _threads() -> dict[int, str]:
    return {int(name): _comm(f"{_SELF}/task/{name}") for name in _tids()}


def _state(tid: str) -> str:
    """Where thread *tid* is: its state and, where the kernel tells, the function that it waits in."""
    folder = f"{_SELF}/task/{tid}"
    try:
        state = _read(f"{folder}/stat").decode("utf-8", "replace").rpartition(")")[2].split()[0]
        waits = _read(f"{folder}/wchan").decode("ascii").strip("0\n")
    except OSError:
        return "gone by now"
    return f"state {state}, in {waits}" if waits else f"state {state}"


def _children(threads: Sequence[int]) -> dict[int, str]:
    by_name = {}
    for tid in threads:
        try:
            pids = _read(f"{_SELF}/task/{tid}/children").split()
        except OSError:
            continue
        by_name.update({int(pid): _comm(f"/proc/{int(pid)}") for pid in pids})
    return by_name


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return int(_read(f"{_SELF}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@functools.lru_cache(maxsize=1)
def named_mappings(maps: str) -> Counter[str]:
    """Count the mappings in /proc/PID/maps whose name tells that a test made them."""
    # Anonymous ones come and go with the allocators. Before and after most tests there is no other: one
    # search through all of it is enough.
    lines = maps.splitlines() if is_mapped(maps) else []
    return Counter(line.split(None, 5)[5] for line in lines if is_mapped(line))


def snapshot() -> Snapshot:
    """Look at this process."""
    threads = _threads()
    maps = _read(f"{_SELF}/maps").decode("utf-8", "replace")
    return Snapshot(
        _fds(), threads, _children(tuple(threads)), named_mappings(maps), maps.count("\n"), resident()
    )


def renewed(earlier: Snapshot) -> Snapshot:
    """Return a snapshot of now that has the mappings of *earlier*: to look at these takes most of the time.

    Between two tests pytest and its plugins open files and start threads, and map nothing with such a name.
    """
    threads = _threads()
    return replace(earlier, fds=_fds(), threads=threads, children=_children(tuple(threads)))


@dataclass
class Allowed:
    """What fixtures of a wider scope opened and will close later."""

    fds: set[tuple[int, str]] = field(default_factory=set)
    threads: set[int] = field(default_factory=set)
    children: set[int] = field(default_factory=set)
    mappings: Counter[str] = field(default_factory=Counter)

    def add(self, before: Snapshot, after: Snapshot) -> None:
        """Allow what appeared between two snapshots."""
        self.fds |= set(after.fds.items()) - set(before.fds.items())
        self.threads |= set(after.threads) - set(before.threads)
        self.children |= set(after.children) - set(before.children)
        self.mappings += after.mappings - before.mappings


def _vm_word(target: str) -> str:
    return " (a VM)" if link_of(target).kind == "vm" else ""


def differences(before: Snapshot, after: Snapshot, allowed: Allowed) -> list[str]:
    """Name everything in *after* that *before* did not have and nobody allowed."""
    rows = [
        f"file descriptor {fd}: {target}{_vm_word(target)}"
        for fd, target in sorted(after.fds.items())
        if before.fds.get(fd) != target and (fd, target) not in allowed.fds
    ]
    rows += [
        f"thread {tid}: {name} ({_state(str(tid))})"
        for tid, name in sorted(after.threads.items())
        if tid not in before.threads and tid not in allowed.threads
    ]
    rows += [
        f"child process {pid}: {name}"
        for pid, name in sorted(after.children.items())
        if pid not in before.children and pid not in allowed.children
    ]
    extra = after.mappings - before.mappings - allowed.mappings
    rows += [f"mapping of {name} ({count} more)" for name, count in sorted(extra.items())]
    return rows


def leaks_since(before: Snapshot, allowed: Allowed, grace: float = GRACE) -> tuple[list[str], Snapshot]:
    """Return what was left behind since *before*, and the state now.

    A thread or child that is just ending gets *grace* seconds; garbage is collected first.
    """
    now = snapshot()
    leaks_found = differences(before, now, allowed)
    if not leaks_found:
        return leaks_found, now
    gc.collect()
    deadline = time.monotonic() + grace
    while True:
        now = snapshot()
        leaks_found = differences(before, now, allowed)
        waiting = any(entry.startswith(("thread", "child")) for entry in leaks_found)
        if not waiting or time.monotonic() > deadline:
            return leaks_found, now
        time.sleep(0.005)


def steady_growth(samples: Sequence[int]) -> float:
    """Return by how much *samples* grow with every test when they never stop growing, else 0.

    The first quarter is warm-up. The rest is cut into four parts; growth counts only when the median of every
    part is above the one before, so that a single jump or a cache that fills is no growth. Needs 40 samples.
    """
    if len(samples) < 40:
        return 0.0
    rest = samples[len(samples) // 4 :]
    size = len(rest) // 4
    medians = [statistics.median(rest[part * size : (part + 1) * size]) for part in range(4)]
    steps = [(later - earlier) / size for earlier, later in itertools.pairwise(medians)]
    return min(steps) if min(steps) > 0 else 0.0
