# SPDX-License-Identifier: Apache-2.0
"""KVM's uevents: the kernel announces every VM and its end over netlink."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy import Kvm, KvmFd
from kvmpy.debug.watch.uevents import KvmUevent, UeventKind, UeventListener, why_unreachable

TIMEOUT = 5.0
# Kernel: PROC_PID_INIT_INO, the same on every machine.
INITIAL_PID_NAMESPACE = 0xEFFFFFFC

# Makes a VM, says so, and waits to be killed.
CHILD = """
import sys
from kvmpy.core.kvm import Kvm
with Kvm() as kvm, kvm.create_vm() as vm:
    print("made", flush=True)
    sys.stdin.read()
"""


def initial_namespaces(_kvm: object) -> str | None:
    """Tell what keeps this process from hearing KVM's uevents and from recognising its own."""
    missing = why_unreachable()
    if missing is not None:
        return missing
    # A kernel without PID namespaces has no such file.
    own = Path("/proc/self/ns/pid")
    if own.exists() and own.stat().st_ino != INITIAL_PID_NAMESPACE:
        return "the initial PID namespace: uevents name processes by their ids there"
    return None


# A lone callable would be taken for what the mark decorates.
pytestmark = pytest.mark.requires("kvm", initial_namespaces)


@pytest.fixture
def listener() -> Iterator[UeventListener]:
    with UeventListener() as opened:
        yield opened


def mine(listener: UeventListener, kind: UeventKind) -> KvmUevent:
    """Return the next event of this process, which must be of *kind*."""
    event = listener.next(TIMEOUT, pid=os.getpid())
    assert event.kind == kind
    return event


def test_create_and_destroy(kvm: Kvm, listener: UeventListener) -> None:
    """Creating a VM and closing it send one event each, with the creator's process id.

    Commit 286de8f6ac92 (KVM: trigger uevents when creating or destroying a VM).
    """
    with kvm.create_vm():
        created = mine(listener, UeventKind.CREATE)
        assert list(listener.pending(pid=os.getpid())) == []
    destroyed = mine(listener, UeventKind.DESTROY)
    assert destroyed.seqnum > created.seqnum
    assert list(listener.pending(pid=os.getpid())) == []


def test_stats_path(kvm: Kvm, listener: UeventListener) -> None:
    """STATS_PATH names the VM's folder by creator and file descriptor, the same in both events.

    Commit 286de8f6ac92; Documentation/virt/kvm/api.rst, 4.2 KVM_CREATE_VM (the file descriptor).
    """
    with kvm.create_vm() as vm:
        fd = vm.fd
        created = mine(listener, UeventKind.CREATE)
    if created.stats_path is None:
        pytest.skip(
            "needs debugfs in the kernel (CONFIG_DEBUG_FS=y, not debugfs=off): without it there is no path"
        )
    assert created.stats_path == f"/kvm/{os.getpid()}-{fd}"
    assert mine(listener, UeventKind.DESTROY).stats_path == created.stats_path


def test_counters(kvm: Kvm, listener: UeventListener) -> None:
    """CREATED counts up with every VM; COUNT includes a new VM and no longer one that is gone.

    Commit 286de8f6ac92: how many were created so far, and how many are active.
    """
    created = []
    vms = []
    try:
        for _ in range(3):
            vms.append(kvm.create_vm())
            created.append(mine(listener, UeventKind.CREATE))
        assert created[0].created < created[1].created < created[2].created
        # Others may come and go on this host meanwhile: three is the least.
        assert created[2].count >= 3
    finally:
        while vms:
            vms.pop().close()
    for left in (2, 1, 0):
        destroyed = mine(listener, UeventKind.DESTROY)
        assert destroyed.count >= left
        assert destroyed.created >= created[2].created


def test_vcpu_keeps_vm_alive(kvm: Kvm, listener: UeventListener) -> None:
    """A VM whose file descriptor is closed lives on until its last vCPU is closed: the event comes then.

    Documentation/virt/kvm/api.rst, 2 (file descriptors): a VM is freed with the last reference to it.
    """
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu()
    try:
        mine(listener, UeventKind.CREATE)
        KvmFd.close(vm)
        assert list(listener.pending(pid=os.getpid())) == []
    finally:
        vcpu.close()
    mine(listener, UeventKind.DESTROY)


def test_killed_owner(kvm: Kvm, listener: UeventListener) -> None:
    """The VM of a process that is killed is destroyed, and the event names the process that created it.

    Commit 286de8f6ac92: PID is the creator's, also when another process lets go last.
    """
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "made\n"
            created = listener.next(TIMEOUT, pid=child.pid)
            assert created.kind == UeventKind.CREATE
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(TIMEOUT)
    destroyed = listener.next(TIMEOUT, pid=child.pid)
    assert (destroyed.kind, destroyed.stats_path) == (UeventKind.DESTROY, created.stats_path)
