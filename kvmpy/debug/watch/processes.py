# SPDX-License-Identifier: Apache-2.0
"""Every VM of this machine, by the processes that hold them: /proc, debugfs and statistics files, no ioctl.

KVM answers a VM's ioctls to its own process alone, so what only an ioctl could tell (its type, its memory
slots) is known where something else gives it away, and is said to be unknown otherwise.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from kvmpy.debug.watch.counters import (
    MOUNTS,
    Counters,
    StatsFolder,
    Unseen,
    debugfs,
    rates,
    read_stats_fd,
    stats_folders,
    summed,
)
from kvmpy.uapi import ioctls
from kvmpy.uapi.links import link_of

_STATS_ID = re.compile(r"kvm-(\d+)/vcpu-(\d+)")

_SYS_IOCTL = 16
_SYS_KCMP = 312
_KCMP_FILE = 0
# What VMMs call the thread of vCPU N: QEMU, Firecracker, Cloud Hypervisor, crosvm, kvmtool, libkrun, kvmpy.
_THREAD_NAMES = (
    re.compile(r"CPU (\d+)/KVM"),
    re.compile(r"fc_vcpu (\d+)"),
    re.compile(r"(?:crosvm_|kvm-)?vcpu-?(\d+)"),
    re.compile(r"vm\d+/vcpu(\d+)"),
)
_FEW = 3
_TRACE = "run as root, with CAP_SYS_PTRACE and no capability less than the process has"
_WORKER = "kvm-nx-lpage"
_SEV_ES_POLICY = 1 << 2


@dataclass(frozen=True)
class VcpuInfo:
    """A vCPU: ``thread`` runs it (None where nothing tells); ``cpu_seconds`` is what that thread has used.

    ``thread_from`` says how the thread is known: debugfs, syscall or name.  ``cpus`` are the host CPUs that
    the thread may use, and ``pinned`` whether they are fewer than the machine has.  ``exits`` is None where
    the vCPU's own counters cannot be read; rates are per second of the survey's interval.
    """

    id: int
    fd: int
    thread: int | None = None
    thread_from: str = ""
    cpu_seconds: float | None = None
    cpu_percent: float | None = None
    cpus: tuple[int, ...] = ()
    pinned: bool = False
    exits: int | None = None
    exits_per_second: float | None = None


@dataclass(frozen=True)
class VmInfo:
    """A VM: the process ``pid`` holds it as file descriptor ``fd``.

    ``type`` is None where nothing gives it away, else ``type_from`` says what did.  ``rss`` is the memory of
    the whole process in bytes, ``gmem`` the size of its guest_memfds and ``gmem_used`` what of them is
    allocated.  ``folder`` is the VM's folder in debugfs, such as ``1234-8``.
    """

    pid: int
    fd: int
    command: str
    user: str
    started: float
    vcpus: tuple[VcpuInfo, ...] = ()
    type: str | None = None
    type_from: str = ""
    rss: int = 0
    gmem: int = 0
    gmem_used: int = 0
    folder: str | None = None
    counters: Counters = field(default_factory=dict, repr=False)
    exits: int | None = None
    exits_per_second: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        values = asdict(self)
        values["rates"] = {name: round(rate, 1) for name, rate in self.rates.items() if rate}
        return values


@dataclass(frozen=True)
class Survey:
    """All VMs that could be seen, when (seconds, monotonic), and what could not be seen."""

    vms: tuple[VmInfo, ...]
    unseen: tuple[Unseen, ...]
    when: float


@dataclass
class _Fds:
    """The KVM file descriptors of one process."""

    vms: list[int] = field(default_factory=list)
    vcpus: list[tuple[int, int]] = field(default_factory=list)
    vcpu_stats: list[tuple[int, int]] = field(default_factory=list)
    gmem: list[int] = field(default_factory=list)
    sev: bool = False


def _fds_of(pid: int) -> _Fds:
    fds = _Fds()
    folder = f"/proc/{pid}/fd"
    for name in sorted(os.listdir(folder), key=int):
        try:
            link = link_of(os.readlink(f"{folder}/{name}"))
        except FileNotFoundError:
            continue
        fd = int(name)
        if link.kind == "vm":
            fds.vms.append(fd)
        elif link.kind == "gmem":
            fds.gmem.append(fd)
        elif link.kind == "sev":
            fds.sev = True
        elif link.number is not None:
            (fds.vcpus if link.kind == "vcpu" else fds.vcpu_stats).append((fd, link.number))
    return fds


def _same_file(pid: int, first: int, second: int) -> bool:
    # Needs CONFIG_KCMP and the right to trace the process; without them two numbers are two VMs.
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_SYS_KCMP, pid, pid, _KCMP_FILE, first, second)) == 0


def _distinct(pid: int, fds: Sequence[int]) -> list[int]:
    kept: list[int] = []
    for fd in fds:
        if not any(_same_file(pid, known, fd) for known in kept):
            kept.append(fd)
    return kept


def _share_out(vms: Sequence[int], vcpus: Iterable[tuple[int, int]]) -> dict[int, dict[int, int]]:
    """Return fd -> vCPU id for each VM: a vCPU is made after its VM, so its number is above it.

    Several file descriptors with one id are one vCPU.
    """
    shared: dict[int, dict[int, int]] = {vm: {} for vm in vms}
    for fd, number in sorted(vcpus):
        owner = max((vm for vm in vms if vm < fd), default=vms[0])
        shared[owner][fd] = number
    return shared


def guess_type(command: Sequence[str], fds_sev: bool, gmem: bool) -> tuple[str | None, str]:
    """Return what kind of VM a VMM with this command line and these file descriptors has, and by what it is
    known.
    """
    for argument in command:
        kind = argument.partition(",")[0]
        if kind == "sev-snp-guest":
            return "snp", "command line"
        if kind == "tdx-guest":
            return "tdx", "command line"
        if kind == "sev-guest":
            match = re.search(r"[,]policy=(0x[0-9a-fA-F]+|\d+)", argument)
            policy = int(match[1], 0) if match else 0
            return ("sev-es" if policy & _SEV_ES_POLICY else "sev"), "command line"
    if fds_sev:
        return "sev, sev-es or snp", "it holds /dev/sev"
    if gmem:
        return "with guest_memfd", "its file descriptors"
    return None, ""


def _thread_by_name(name: str) -> int | None:
    for pattern in _THREAD_NAMES:
        match = pattern.fullmatch(name)
        if match:
            return int(match[1])
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _threads(
    pid: int, folder: StatsFolder | None, by_fd: Mapping[int, int], only: bool
) -> dict[int, tuple[int, str]]:
    """Return ``(thread, how that is known)`` by vCPU id. *only*: the process has no other VM."""
    results: dict[int, tuple[int, str]] = {}
    try:
        tasks = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return results
    for task in tasks:
        name = _read(f"/proc/{pid}/task/{task}/comm")
        # KVM's own worker in the process has a copy of the registers of the thread that it was made from.
        if name.startswith(_WORKER):
            continue
        # A thread that waits inside KVM_RUN says so; one that runs says no more than that.
        words = _read(f"/proc/{pid}/task/{task}/syscall").split()
        if len(words) > 2 and words[0] == str(_SYS_IOCTL) and int(words[2], 16) == ioctls.KVM_RUN.nr:
            number = by_fd.get(int(words[1], 16))
            if number is not None:
                results[number] = (task, "syscall")
        named = _thread_by_name(name)
        if only and named in by_fd.values() and named is not None:
            results.setdefault(named, (task, "name"))
    if folder is not None:
        results.update(
            {number: (task, "debugfs") for number, task in folder.threads().items() if task in tasks}
        )
    return results


def _folder_of(pid: int, fd: int, folders: Sequence[StatsFolder]) -> StatsFolder | None:
    # KVM names the folder by the thread that made the VM, which may have ended since.
    candidates = [folder for folder in folders if folder.fd == fd]
    try:
        tasks = {int(name) for name in os.listdir(f"/proc/{pid}/task")}
    except OSError:
        return None
    for folder in candidates:
        if folder.creator in tasks:
            return folder
    return next((folder for folder in candidates if tasks & set(folder.threads().values())), None)


def _affinity(task: int) -> tuple[int, ...]:
    try:
        return tuple(sorted(os.sched_getaffinity(task)))
    except OSError:
        return ()


def _vcpu(number: int, fd: int, thread: tuple[int, str] | None, times: Mapping[int, float]) -> VcpuInfo:
    if thread is None:
        return VcpuInfo(number, fd)
    task, state = thread
    cpus = _affinity(task)
    online = psutil.cpu_count() or 0
    return VcpuInfo(
        number,
        fd,
        thread=task,
        thread_from=state,
        cpu_seconds=times.get(task),
        cpus=cpus,
        pinned=0 < len(cpus) < online,
    )


def _stats_of_vcpus(pid: int, fds: _Fds, refused: set[Unseen]) -> dict[int, Counters]:
    """Return counters by vCPU id from the statistics files that the process has open itself."""
    by_name: dict[int, Counters] = {}
    for fd, number in fds.vcpu_stats:
        try:
            _, by_name[number] = read_stats_fd(pid, fd)
        except PermissionError:
            refused.add(Unseen("statistics files that VMMs have open", _TRACE))
        except (OSError, ValueError):
            continue
    return by_name


def _process_vms(
    process: psutil.Process, folders: Sequence[StatsFolder], refused: set[Unseen]
) -> list[VmInfo]:
    pid = process.pid
    fds = _fds_of(pid)
    if not fds.vms:
        return []
    with process.oneshot():
        command = process.cmdline()
        user, started, rss = process.username(), process.create_time(), process.memory_info().rss
    times = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    vms = _distinct(pid, fds.vms)
    sizes = [os.stat(f"/proc/{pid}/fd/{fd}") for fd in fds.gmem]
    kind, known_by = guess_type(command, fds.sev, bool(fds.gmem))
    only = len(vms) == 1
    # With several VMs the id in a statistics file does not tell whose vCPU it is.
    stats = _stats_of_vcpus(pid, fds, refused) if only else {}
    rows = []
    for fd, by_fd in _share_out(vms, fds.vcpus).items():
        folder = _folder_of(pid, fd, folders)
        threads = _threads(pid, folder, by_fd, only)
        vcpus = {number: vcpu_fd for vcpu_fd, number in sorted(by_fd.items(), reverse=True)}
        infos = [
            replace(
                _vcpu(number, vcpu_fd, threads.get(number), times),
                exits=stats.get(number, {}).get("exits"),
            )
            for number, vcpu_fd in sorted(vcpus.items())
        ]
        counters = folder.counters() if folder is not None else {}
        refusal = folder.refusal() if folder is not None and "exits" not in counters else None
        if "exits" not in counters and vcpus and set(stats) == set(vcpus):
            counters = summed(list(stats.values()))
        elif refusal is not None:
            refused.add(refusal)
        rows.append(
            VmInfo(
                pid=pid,
                fd=fd,
                command=" ".join(command) or process.name(),
                user=user,
                started=started,
                vcpus=tuple(infos),
                type=kind,
                type_from=known_by,
                rss=rss,
                gmem=sum(size.st_size for size in sizes),
                gmem_used=sum(size.st_blocks * 512 for size in sizes),
                folder=folder.path.name if folder is not None else None,
                counters=counters,
                exits=counters.get("exits"),
            )
        )
    return rows


def survey(*, mounts: Path = MOUNTS) -> Survey:
    """Look once at every process; *mounts* is the list of mounts to find debugfs in."""
    with debugfs(mounts) as place:
        if isinstance(place, Unseen):
            return _survey([], [place])
        return _survey(stats_folders(place), [])


def _survey(folders: Sequence[StatsFolder], unseen: list[Unseen]) -> Survey:
    when = time.monotonic()
    vms: list[VmInfo] = []
    closed: list[str] = []
    refused: set[Unseen] = set()
    for process in psutil.process_iter():
        try:
            vms += _process_vms(process, folders, refused)
        except (PermissionError, psutil.AccessDenied):
            closed.append(f"process {process.pid}")
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            continue
    if closed:
        names = f"{len(closed)} processes" if len(closed) > _FEW else f"inside {', '.join(closed)}"
        unseen.append(Unseen(f"{names}, whether they have VMs", _TRACE))
    unseen += sorted(refused, key=str)
    return Survey(tuple(sorted(vms, key=lambda vm: (vm.pid, vm.fd))), tuple(unseen), when)


def with_rates(before: Survey, after: Survey) -> Survey:
    """Return *after* with what happened per second since *before*, for the VMs that are in both."""
    seconds = after.when - before.when
    earlier = {(vm.pid, vm.fd, vm.started): vm for vm in before.vms}
    vms = []
    for vm in after.vms:
        old = earlier.get((vm.pid, vm.fd, vm.started))
        if old is None or seconds <= 0:
            vms.append(vm)
            continue
        change = rates(old.counters, vm.counters, seconds)
        old_vcpus = {vcpu.id: vcpu for vcpu in old.vcpus}
        vcpus = tuple(
            _vcpu_rates(old_vcpus[vcpu.id], vcpu, seconds) if vcpu.id in old_vcpus else vcpu
            for vcpu in vm.vcpus
        )
        vms.append(replace(vm, vcpus=vcpus, rates=change, exits_per_second=change.get("exits")))
    return replace(after, vms=tuple(vms))


def _vcpu_rates(old: VcpuInfo, new: VcpuInfo, seconds: float) -> VcpuInfo:
    percent = per_second = None
    if old.thread == new.thread and old.cpu_seconds is not None and new.cpu_seconds is not None:
        percent = 100 * (new.cpu_seconds - old.cpu_seconds) / seconds
    if old.exits is not None and new.exits is not None and new.exits >= old.exits:
        per_second = (new.exits - old.exits) / seconds
    return replace(new, cpu_percent=percent, exits_per_second=per_second)


def survey_twice(interval: float, *, pause: Callable[[float], object] = time.sleep) -> Survey:
    """Look twice, *interval* seconds apart, so that rates are known."""
    before = survey()
    if not before.vms:
        return before
    pause(interval)
    return with_rates(before, survey())
