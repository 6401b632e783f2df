# SPDX-License-Identifier: Apache-2.0
"""Faults around the harness: limits of the process, sudden death, many VMs."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvmpy import GuestError, GuestProgram, HypercallExit, Kvm, LaunchError, MakeVm, refused

NOTHING = """
#include <kvmpy/guest.h>

void guest_main(void)
{
}
"""

SPINS = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_SYNC(1);
	for (;;)
		cpu_relax();
}
"""

# Makes VMs that run in threads of their own, says so, and waits to be killed.
VICTIM = f"""
import sys, threading
from kvmpy.coco.kvm import Kvm
from kvmpy.guest.program import GuestProgram

program = GuestProgram.from_c({SPINS!r})
kvm = Kvm()
started = []
for _ in range(8):
    vm = kvm.create_vm(program, protection="none", deadline=120.0)
    vm.launch()
    vm.vcpus[0].sync()
    thread = threading.Thread(target=vm.vcpus[0].run_to_done, daemon=True)
    thread.start()
    started.append((vm, thread))
print("running", flush=True)
sys.stdin.read()
"""


def kvm_fds(pid: int) -> list[str]:
    results = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if "kvm" in target:
            results.append(target)
    return results


@pytest.mark.requires("kvm")
def test_sigkill_leaves_nothing_behind() -> None:
    """SIGKILL of a process with 8 running VMs ends it at once, with its threads and KVM file descriptors."""
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "running\n"
        process = psutil.Process(victim.pid)
        assert sum("kvm-vm" in target for target in kvm_fds(victim.pid)) == 8
        assert process.num_threads() >= 9
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(timeout=20) == -signal.SIGKILL
        assert not psutil.pid_exists(victim.pid)
    # What the dead process held is free again: this one still makes VMs.
    with Kvm() as kvm, kvm.create_vm(GuestProgram.from_c(NOTHING), protection="none") as vm:
        vm.launch()
        vm.vcpus[0].run_to_done()


def test_a_held_exit_holds_no_vcpu(kvm: Kvm) -> None:
    """close() gives back a vCPU's descriptor and its mapping; whoever holds a view of kvm_run keeps a copy.

    A mapping alone would keep the VM in the kernel: kvm_vcpu_mmap(), kvm_vcpu_release() in Linux.
    """
    gc.collect()
    before = kvm_fds(os.getpid())
    with kvm.create_vm(GuestProgram.from_c(NOTHING), protection="none") as vm:
        assert sorted(kvm_fds(os.getpid())) == sorted([*before, "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vm"])
        held = vm.vcpus[0].run_area
        vm.launch()
        with pytest.raises(GuestError):
            vm.vcpus[0].expect(HypercallExit)
        reason = held.exit_reason
        assert reason
    assert kvm_fds(os.getpid()) == before
    assert "kvm-vcpu" not in Path("/proc/self/maps").read_text()
    assert held.exit_reason == reason
    held.exit_reason = 7  # still memory, and nobody's


def test_too_many_open_files(kvm: Kvm) -> None:
    """Running out of file descriptors (EMFILE) is a KvmError that names RLIMIT_NOFILE, and leaks no other."""
    program = GuestProgram.from_c(NOTHING)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    failures = []
    try:
        # One file descriptor more each time: creation fails at every step that opens one.
        for spare in range(1, 3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + spare, hard))
            while True:
                try:
                    filler = os.dup(kvm.fd)
                except OSError:
                    break
                failures.append(filler)
            for _ in range(spare - 1):
                os.close(failures.pop())
            with refused(errno.EMFILE) as caught:
                kvm.create_vm(program, protection="none")
            assert "RLIMIT_NOFILE" in str(caught.value)
            while failures:
                os.close(failures.pop())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in failures:
            os.close(filler)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.requires("kvm")
def test_no_memory_for_the_guest() -> None:
    """A guest larger than RLIMIT_AS allows is refused with ENOMEM, and the VM that was begun is closed."""
    code = (
        "import errno, os, resource, sys\n"
        "from kvmpy.coco.kvm import Kvm\n"
        "from kvmpy.guest.program import GuestProgram\n"
        f"program = GuestProgram.from_c({NOTHING!r})\n"
        "kvm = Kvm()\n"
        "before = sorted(os.listdir('/proc/self/fd'))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n"
        "    kvm.create_vm(program, protection='none', memory=16 << 30)\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.ENOMEM, error\n"
        "    assert sorted(os.listdir('/proc/self/fd')) == before\n"
        "    sys.exit(42)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 42, done.stderr


def test_hundreds_of_vms_without_growth(make_vm: MakeVm) -> None:
    """Three hundred VMs one after another leave no fd, mapping or thread, and no growing memory.

    Where twenty take longer than two seconds, as under emulation, fewer follow, but sixty at least.
    """
    program = GuestProgram.from_c(NOTHING)
    me = psutil.Process()

    def lives(count: int) -> None:
        for _ in range(count):
            with make_vm.kvm.create_vm(program, protection=make_vm.protection) as vm:
                vm.launch()
                vm.vcpus[0].run_to_done()

    def timers() -> int:
        # Absent where the kernel lacks CONFIG_CHECKPOINT_RESTORE.
        listing = Path("/proc/self/timers")
        return listing.read_text().count("ID:") if listing.exists() else 0

    begun = time.monotonic()
    lives(20)
    count = max(60, min(300, int(600 / (time.monotonic() - begun))))
    gc.collect()
    fds, threads, maps = me.num_fds(), me.num_threads(), len(me.memory_maps(False))
    rss, armed = me.memory_info().rss, timers()
    lives(count)
    gc.collect()
    assert me.num_fds() == fds
    assert me.num_threads() == threads
    assert timers() == armed
    assert len(me.memory_maps(False)) <= maps + 2
    # For three hundred, a page a VM would be more.
    assert me.memory_info().rss - rss < 1 << 20


def test_order_of_a_vms_life(make_vm: MakeVm) -> None:
    """Running before launch, launching twice and changing the initial state later are refused by name."""
    vm = make_vm(NOTHING)
    with pytest.raises(LaunchError, match=r"call vm\.launch"):
        vm.vcpus[0].run_to_done()
    vm.launch()
    with pytest.raises(LaunchError, match="launched before"):
        vm.launch()
    with pytest.raises(LaunchError, match="frozen"):
        vm.vcpus[0].set_entry("guest_main")
    vm.vcpus[0].run_to_done()
