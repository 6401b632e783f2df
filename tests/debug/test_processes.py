# SPDX-License-Identifier: Apache-2.0
"""The VMs of this machine, as they are seen from outside."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import select
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpy.cli import columns
from kvmpy.cli import ps as ps_command
from kvmpy.cli.main import main
from kvmpy.debug.watch import counters, processes
from kvmpy.debug.watch.counters import StatsFolder, Unseen, debugfs, rates
from kvmpy.debug.watch.hottest import hottest
from kvmpy.debug.watch.processes import Survey, VcpuInfo, VmInfo, guess_type, survey, with_rates

# A VM whose vCPU 1 waits for a line of standard input between two rounds of exits.
CHILD = """
import os, sys, threading
from kvmpy import Kvm
from kvmpy.guest import GuestProgram

GUEST = '''
#include <kvmpy/guest.h>
void guest_main(void)
{
	for (;;)
		GUEST_SYNC(1);
}
'''
with Kvm() as kvm, kvm.create_vm(GuestProgram.from_c(GUEST), vcpus=2) as vm:
    vm.launch()
    stats = [vcpu.stats.get_fd() for vcpu in vm.vcpus]
    gmem = vm.create_guest_memfd(1 << 21) if kvm.check_extension(CAP) else None
    os.sched_setaffinity(0, {CPU})
    vm.vcpus[0].sync()
    vm.vcpus[1].sync()
    print(vm.fd, threading.get_native_id(), flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            vm.vcpus[1].sync()
        print("ran", flush=True)
"""

HALTED = """
import threading
from kvmpy import Kvm
from kvmpy.guest import GuestProgram

GUEST = '#include <kvmpy/guest.h>\\nvoid guest_main(void) { for (;;) asm volatile("cli; hlt"); }'
with Kvm() as kvm, kvm.create_vm(GuestProgram.from_c(GUEST), deadline=90) as vm:
    vm.launch()
    print(threading.get_native_id(), vm.vcpus[0].fd, flush=True)
    vm.vcpus[0].next()
"""


class Child:
    """A process with a VM of two vCPUs."""

    def __init__(self) -> None:
        from kvmpy.uapi.constants import KVM_CAP_GUEST_MEMFD

        self.cpu = min(os.sched_getaffinity(0))
        source = CHILD.replace("CAP", str(int(KVM_CAP_GUEST_MEMFD))).replace("CPU", str(self.cpu))
        self.process = subprocess.Popen(
            [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.fd, self.thread = map(int, self.process.stdout.readline().split())

    def exits(self, count: int) -> None:
        """Let vCPU 1 leave the guest *count* times."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ran\n"

    def vm(self, snapshot: Survey) -> VmInfo:
        """This process's VM in a survey."""
        (vm,) = [vm for vm in snapshot.vms if vm.pid == self.process.pid]
        return vm


@pytest.fixture
def child() -> Iterator[Child]:
    process = Child()
    try:
        yield process
    finally:
        process.process.kill()
        process.process.communicate(timeout=30)


def vm_of(**values: object) -> VmInfo:
    return VmInfo(**{"pid": 1, "fd": 4, "command": "vmm", "user": "root", "started": 0.0, **values})  # type: ignore[arg-type]


@pytest.mark.requires("kvm")
def test_a_vm_of_another_process(child: Child) -> None:
    """Process, file descriptor, vCPUs, memory and command line are those of the process that has the VM."""
    vm = child.vm(survey())
    assert (vm.pid, vm.fd) == (child.process.pid, child.fd)
    assert [vcpu.id for vcpu in vm.vcpus] == [0, 1]
    assert vm.command.startswith(sys.executable)
    assert vm.rss > 1 << 20
    if vm.gmem:
        assert (vm.gmem, vm.gmem_used, vm.type) == (1 << 21, 0, "with guest_memfd")


@pytest.mark.requires("kvm")
def test_a_vm_that_is_gone(child: Child) -> None:
    """A VM is there as long as its process is."""
    child.process.kill()
    child.process.communicate(timeout=30)
    assert child.process.pid not in [vm.pid for vm in survey().vms]


@pytest.mark.requires("kvm")
@pytest.mark.skipif(os.geteuid() != 0, reason="debugfs and pidfd_getfd need root")
def test_threads_and_exits(child: Child) -> None:
    """The thread of each vCPU is known, with its pinning; exits are counted for each vCPU and second."""
    before = survey()
    for entry in before.unseen:
        if "debugfs" in entry.what and "mount" in entry.how:
            pytest.skip(str(entry))
    child.exits(500)
    after = with_rates(before, survey())
    vm = child.vm(after)
    assert [(vcpu.thread, vcpu.thread_from) for vcpu in vm.vcpus] == [(child.thread, "debugfs")] * 2
    assert [vcpu.cpus for vcpu in vm.vcpus] == [(child.cpu,)] * 2
    assert [vcpu.pinned for vcpu in vm.vcpus] == [(os.cpu_count() or 1) > 1] * 2
    seconds = after.when - before.when
    idle, busy = (vcpu.exits_per_second for vcpu in vm.vcpus)
    assert idle == 0
    # A KVM may leave the guest for reasons of its own, too.
    assert busy is not None
    # The rate is a quotient of 500 and the seconds: rounded, for the product may fall short in the last bit.
    assert round(busy * seconds) >= 500
    assert vm.exits_per_second is not None
    assert round(vm.exits_per_second * seconds) >= 500
    hot = [entry for entry in hottest([vm]) if entry.counter == "exits"]
    assert [entry.share for entry in hot] == [1.0]
    assert hot[0].total >= 500


@pytest.mark.requires("kvm")
def test_a_worker_is_no_vcpu(child: Child) -> None:
    """KVM's own thread in the process, which has a copy of a vCPU's registers, is not taken for one."""
    (vm,) = [vm for vm in survey().vms if vm.pid == child.process.pid]
    by_fd = {fd: vcpu.id for vcpu in vm.vcpus for fd in (vcpu.fd, vcpu.fd + 1)}
    # Without debugfs, and while the only thread that runs them waits for a line.
    assert processes._threads(child.process.pid, None, by_fd, only=True) == {}


@pytest.mark.requires("kvm")
@pytest.mark.skipif(os.geteuid() != 0, reason="the system call of another process's thread needs root")
def test_a_thread_that_waits_in_the_guest() -> None:
    """Without debugfs a halted vCPU's thread is known by the system call that it waits in."""
    with subprocess.Popen([sys.executable, "-c", HALTED], stdout=subprocess.PIPE, text=True) as halted:
        try:
            assert halted.stdout is not None
            thread, fd = map(int, halted.stdout.readline().split())
            results: dict[int, tuple[int, str]] = {}
            end = time.monotonic() + 30
            while not results and time.monotonic() < end:
                results = processes._threads(halted.pid, None, {fd: 0, fd + 1: 0}, only=True)
            assert results == {0: (thread, "syscall")}
        finally:
            halted.kill()


@pytest.mark.requires("kvm")
def test_the_command(child: Child) -> None:
    """`kvmpy ps` names the VM, as a table and as JSON, and what it could not see."""
    result = CliRunner().invoke(main, ["ps", "--interval", "0.05"])
    assert result.exit_code == 0, result.output
    assert f"{child.process.pid}:{child.fd}" in result.stdout
    assert "2 vCPUs" in result.stdout
    result = CliRunner().invoke(main, ["ps", "--json", "--interval", "0.05"])
    document = json.loads(result.stdout)
    assert document["schema"] == "kvmpy-ps/1"
    (vm,) = [vm for vm in document["vms"] if vm["pid"] == child.process.pid]
    assert [vcpu["id"] for vcpu in vm["vcpus"]] == [0, 1]


@pytest.mark.requires("kvm")
@pytest.mark.skipif(os.geteuid() != 0, reason="pidfd_getfd needs root")
def test_top_once(child: Child) -> None:
    """`kvmpy top --once --json` has the VM and its total of exits per second."""
    result = CliRunner().invoke(main, ["top", "--once", "--json", "--interval", "0.1"])
    document = json.loads(result.stdout)
    (vm,) = [vm for vm in document["vms"] if vm["pid"] == child.process.pid]
    assert vm["exits_per_second"] == 0  # the child waits for its next line


def _read_until(fd: int, text: bytes, seconds: float) -> bytes:
    seen = b""
    end = time.monotonic() + seconds
    while text not in seen and time.monotonic() < end:
        if select.select([fd], [], [], 0.2)[0]:
            try:
                seen += os.read(fd, 65536)
            except OSError:
                break
    return seen


@pytest.mark.timeout(60)
def test_top_in_a_terminal() -> None:
    """`kvmpy top` refreshes on a terminal, ends with q, and leaves the terminal as it was."""
    import termios

    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        with subprocess.Popen(
            [sys.executable, "-m", "kvmpy", "top", "--interval", "0.1"],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        ) as top:
            assert b"exits/s" in _read_until(master, b"exits/s", 30)
            os.write(master, b"q")
            shown = _read_until(master, b"\x1b[?1049l", 30)
            assert top.wait(30) == 0
        assert b"\x1b[?1049l" in shown  # back from the alternate screen
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)


def test_top_without_a_terminal() -> None:
    """Without a terminal `kvmpy top` says what to ask for."""
    result = CliRunner().invoke(main, ["top"])
    assert result.exit_code == 2
    assert "--once" in result.output


@pytest.mark.requires("kvm")
@pytest.mark.timeout(60)
def test_watch() -> None:
    """`kvmpy watch` names the process that creates a VM, and says how long the VM lived."""
    from kvmpy.debug.watch.uevents import why_unreachable

    reason = why_unreachable()
    if reason:
        pytest.skip(reason)
    with subprocess.Popen(
        [sys.executable, "-m", "kvmpy", "watch", "--json", "--timeout", "40"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watch:
        try:
            assert watch.stderr is not None
            assert watch.stdout is not None
            assert watch.stderr.readline().startswith("watching")
            # The kernel takes the VM away after the process has lost its command line.
            source = "import os, kvmpy; print(kvmpy.Kvm().create_vm().fd, flush=True); input(); os._exit(0)"
            done = subprocess.Popen(
                [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert done.stdout is not None
            fd = int(done.stdout.readline())
            events: list[dict[str, Any]] = []
            while len(events) < 2:
                event = json.loads(watch.stdout.readline())
                if event["pid"] != done.pid:
                    continue
                events.append(event)
                if len(events) == 1:
                    done.communicate("go\n", timeout=30)
        finally:
            watch.kill()
    assert [event["event"] for event in events] == ["create", "destroy"]
    assert {event["fd"] for event in events} <= {fd, None}
    assert {event["command"] for event in events} == {f"{sys.executable} -c {source}"}
    assert events[0]["lived"] is None
    assert 0 <= events[1]["lived"] < 30


@pytest.mark.parametrize(
    ("command", "sev", "gmem", "expected"),
    [
        ("qemu -object sev-snp-guest,id=s0,policy=0x30000", True, True, ("snp", "command line")),
        ("qemu -object sev-guest,id=s0,policy=0x5", True, False, ("sev-es", "command line")),
        ("qemu -object sev-guest,id=s0,policy=0x1", True, False, ("sev", "command line")),
        ("qemu -object tdx-guest,id=t", False, True, ("tdx", "command line")),
        ("vmm", True, False, ("sev, sev-es or snp", "it holds /dev/sev")),
        ("vmm", False, True, ("with guest_memfd", "its file descriptors")),
        ("qemu -m 4G", False, False, (None, "")),
    ],
)
def test_type(command: str, sev: bool, gmem: bool, expected: tuple[str | None, str]) -> None:
    """A VM's type is what gives it away, and unknown when nothing does."""
    assert guess_type(command.split(), sev, gmem) == expected


def test_several_vms_in_a_process() -> None:
    """A vCPU belongs to the VM with the nearest lower number; a duplicate is no second vCPU."""
    shared = processes._share_out([4, 20], [(5, 0), (6, 0), (7, 1), (21, 0)])
    assert shared == {4: {5: 0, 6: 0, 7: 1}, 20: {21: 0}}


@pytest.mark.parametrize(
    "name", ["CPU 3/KVM", "fc_vcpu 3", "vcpu3", "crosvm_vcpu3", "kvm-vcpu-3", "vm0/vcpu3"]
)
def test_thread_names(name: str) -> None:
    """The thread names of known VMMs tell the vCPU."""
    assert processes._thread_by_name(name) == 3
    assert processes._thread_by_name("worker 3") is None


def test_a_thread_with_a_name() -> None:
    """Where neither debugfs nor a system call tells, a thread's name does, but not among several VMs."""
    named, over = threading.Event(), threading.Event()
    ids: list[int] = []

    def run() -> None:
        ctypes.CDLL(None).prctl(15, b"CPU 1/KVM", 0, 0, 0)
        ids.append(threading.get_native_id())
        named.set()
        over.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert named.wait(30)
        answer = processes._threads(os.getpid(), None, {77: 1, 78: 2}, only=True)
        assert answer == {1: (ids[0], "name")}
        assert processes._threads(os.getpid(), None, {77: 1, 78: 2}, only=False) == {}
    finally:
        over.set()
        thread.join(30)


def test_rates() -> None:
    """A rate is the increase per second; what fell or is new has none."""
    assert rates({"a": 10, "b": 5}, {"a": 30, "b": 4, "c": 1}, 2.0) == {"a": 10.0}
    assert rates({"a": 1}, {"a": 2}, 0) == {}


def test_rates_of_a_new_process() -> None:
    """A VM of another process with the same pid and fd is no older one."""
    before = Survey((vm_of(counters={"exits": 5}),), (), 0.0)
    after = Survey((vm_of(counters={"exits": 900}, started=3.0),), (), 1.0)
    assert with_rates(before, after).vms[0].exits_per_second is None
    same = Survey((vm_of(counters={"exits": 900}),), (), 1.0)
    assert with_rates(before, same).vms[0].exits_per_second == 895.0


def test_hottest() -> None:
    """The fastest counter comes first; gauges and times are none; a share is of all exits."""
    vm = vm_of(
        counters={
            "exits": 9,
            "io_exits": 3,
            "pages_4k": 7,
            "halt_wait_ns": 8,
            "fpu_reload": 1,
            "pf_taken": 2,
        },
        rates={
            "exits": 100.0,
            "io_exits": 25.0,
            "pages_4k": 900.0,
            "halt_wait_ns": 900.0,
            "fpu_reload": 50.0,
            "pf_taken": 300.0,
            "mmio_exits": 0.0,
        },
    )
    assert [(hot.counter, hot.share) for hot in hottest([vm])] == [
        ("pf_taken", None),
        ("exits", 1.0),
        ("io_exits", 0.25),
    ]
    assert [hot.counter for hot in hottest([vm], everything=True)] == [
        "pf_taken",
        "exits",
        "fpu_reload",
        "io_exits",
    ]


def test_stats_folder(tmp_path: Path) -> None:
    """Counters are the files with one number; the thread of a vCPU is in its folder; -1 is no thread."""
    for name, text in (("exits", "17"), ("halt_wait_hist", "1 2 3"), ("odd", "x"), ("mmu_rmaps_stat", "1")):
        (tmp_path / name).write_text(f"{text}\n")
    for number, thread in ((0, 44), (7, -1)):
        (tmp_path / f"vcpu{number}").mkdir()
        (tmp_path / f"vcpu{number}" / "pid").write_text(f"{thread}\n")
    folder = StatsFolder(tmp_path, 1, 4)
    assert folder.counters() == {"exits": 17}
    assert folder.threads() == {0: 44}
    assert folder.refusal() is None
    assert StatsFolder(tmp_path / "gone", 1, 4).counters() == {}


def test_debugfs_is_found(tmp_path: Path) -> None:
    """debugfs is looked for among the mounts, blanks in its name included."""
    place = tmp_path / "de bug"
    (place / "kvm").mkdir(parents=True)
    (place / "kvm" / "12-4").mkdir()
    (place / "kvm" / "exits").touch()
    mounts = tmp_path / "mounts"
    escaped = str(place).replace(" ", "\\040")
    mounts.write_text(f"proc /proc proc rw 0 0\nnone {escaped} debugfs rw 0 0\n")
    with debugfs(mounts) as mounted:
        assert mounted == place
        assert counters.stats_folders(place) == [StatsFolder(place / "kvm" / "12-4", 12, 4)]


def test_debugfs_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without debugfs, and without the right to mount it, the way to get it is named."""

    def refuse(kind: str) -> int:
        raise PermissionError(kind)

    monkeypatch.setattr(counters, "mount_detached", refuse)
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n")
    with debugfs(mounts) as folder:
        assert isinstance(folder, Unseen)
        assert "mount -t debugfs" in folder.how
    with debugfs(tmp_path / "no-such-file") as folder:
        assert isinstance(folder, Unseen)


def test_debugfs_without_kvm(tmp_path: Path) -> None:
    """A debugfs without KVM's folder says to load KVM."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"none {tmp_path} debugfs rw 0 0\n")
    with debugfs(mounts) as folder:
        assert isinstance(folder, Unseen)
        assert "modprobe kvm" in folder.how


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to give root up")
def test_without_privilege() -> None:
    """Another user's `kvmpy ps` works, and names what to do to see more."""
    source = textwrap.dedent(
        """
        import os, kvmpy.uapi.ioctls
        from kvmpy.debug.watch.processes import survey
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        for entry in survey().unseen:
            print(entry)
        """
    )
    shown = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=True
    )
    assert "run as root" in shown.stdout
    assert "whether they have VMs" in shown.stdout


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (columns.size, 0, "-"),
        (columns.size, 1536, "1.5 KiB"),
        (columns.size, 64 << 20, "64 MiB"),
        (columns.size, 3 << 40, "3.0 TiB"),
        (columns.per_second, None, "-"),
        (columns.per_second, 9999.0, "9999"),
        (columns.per_second, 12345.0, "12.3k"),
        (columns.per_second, 2.5e6, "2.5M"),
        (columns.span, 3.25, "3.2s"),
        (columns.span, 75, "1m15s"),
        (columns.span, 90061, "1d01h"),
        (columns.numbers, [3, 1, 0, 2, 8], "0-3,8"),
        (columns.shorten, "/usr/bin/vmm -m 4G", "vmm -m 4G"),
    ],
)
def test_words(function: object, value: object, expected: str) -> None:
    """Sizes, rates, times and CPU lists as the table shows them."""
    assert callable(function)
    assert function(value) == expected


def test_vcpus_in_the_table() -> None:
    """A vCPU's row has its thread and how that is known, and its host CPUs."""
    vcpu = VcpuInfo(2, 9, 77, "name", 1.0, 50.0, (4, 5), True, 10, 12.0)
    survey = Survey((vm_of(vcpus=(vcpu,)),), (), 0.0)
    table = ps_command.table(survey)
    cells = [list(column.cells)[1] for column in table.columns]
    assert cells == ["  vcpu 2", "77 (name)", "50%", "1.0s", "pinned to 4-5", "", "12", ""]
