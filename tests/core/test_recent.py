# SPDX-License-Identifier: Apache-2.0
"""The last ioctls that the funnel keeps, and their text."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.core import observe, recent
from kvmpy.core.fd import KvmFd
from kvmpy.uapi import ffi, ioctls, lib
from kvmpy.uapi.constants import Cap, ExitReason, SevCmd
from kvmpy.uapi.structs import Struct, kvm_enable_cap, kvm_sev_cmd, kvm_userspace_memory_region

FD: Any = SimpleNamespace(name="vm0", kind="vm")


@pytest.fixture(autouse=True)
def _emptied() -> Iterator[None]:
    recent.clear()
    yield
    recent.clear()


def label(fd: Any) -> Any:
    return ffi.new("char[]", f"{fd.kind} {fd.name}".encode())


def remember(fd: Any, op: ioctls.Ioctl, arg: Struct | int | None, result: int, number: int) -> None:
    """Keep what KvmFd keeps of an ioctl, with a result of the test's choice."""
    value, data = (0, arg) if isinstance(arg, Struct) else (arg or 0, None)
    what = (ffi.NULL, 0, 0) if data is None else (data.cdata, data.nbytes, data.INDEX)
    lib.kvmpy_call_note(label(fd), op.nr, value, *what, result, number)


def a_vcpu(reason: int) -> Any:
    run = ffi.new("struct kvm_run *")
    run.exit_reason = reason
    return SimpleNamespace(name="vm0/vcpu0", kind="vcpu", _run=run)


def test_an_ioctl_is_told() -> None:
    """Name, file descriptor, decoded argument and result of an ioctl; an error by its name."""
    region = kvm_userspace_memory_region(slot=7, memory_size=0x1000)
    remember(FD, ioctls.KVM_SET_USER_MEMORY_REGION, region, 0, 0)
    region.slot = 9  # the caller's struct goes on living
    remember(FD, ioctls.KVM_CHECK_EXTENSION, int(Cap.KVM_CAP_VM_TYPES), -1, errno.EINVAL)
    first, second = recent.entries(recent.taken())
    assert (first["fd"], first["ioctl"], first["result"], first["failed"]) == (
        "vm0",
        "KVM_SET_USER_MEMORY_REGION",
        "0",
        False,
    )
    assert "slot=0x7" in first["arg"]
    assert (second["result"], second["failed"]) == ("EINVAL", True)
    assert second["arg"] == "KVM_CAP_VM_TYPES"
    remember(FD, ioctls.KVM_CREATE_VCPU, 3, -1, errno.EEXIST)
    assert [bool(line["meaning"]) for line in recent.entries(recent.taken())] == [False, False, True]
    assert first["ms"] == 0
    assert second["ms"] >= 0


def test_a_refused_command_has_its_own_meaning() -> None:
    """KVM_MEMORY_ENCRYPT_OP is many commands, each with rules of its own."""
    command = kvm_sev_cmd(id=SevCmd.KVM_SEV_LAUNCH_MEASURE)
    remember(FD, ioctls.KVM_MEMORY_ENCRYPT_OP, command, -1, errno.EINVAL)
    assert recent.entries(recent.taken())[0]["meaning"] == "len is more than 16 KiB"


def test_runs_that_end_alike_are_one_line() -> None:
    """KVM_RUNs of one vCPU with the same exit are counted; another exit begins a line."""
    io, hlt = (a_vcpu(int(reason)) for reason in (ExitReason.KVM_EXIT_IO, ExitReason.KVM_EXIT_HLT))
    for vcpu in (io, io, io, hlt, io):
        recent.remember_run(label(vcpu), vcpu._run, 0, 0)
    lines = [(line["arg"].partition(" ")[0], line["count"]) for line in recent.entries(recent.taken())]
    assert lines == [("KVM_EXIT_IO", 3), ("KVM_EXIT_HLT", 1), ("KVM_EXIT_IO", 1)]


def test_the_oldest_go() -> None:
    """Only the last ioctls are kept."""
    for number in range(100):
        remember(FD, ioctls.KVM_CREATE_VCPU, number, 0, 0)
    assert [call.value for call in recent.taken()] == list(range(36, 100))


def test_threads_are_numbered() -> None:
    """The lines of two threads can be told apart."""
    remember(FD, ioctls.KVM_CREATE_VCPU, 0, 0, 0)
    other = threading.Thread(target=remember, args=(FD, ioctls.KVM_CREATE_VCPU, 1, 0, 0))
    other.start()
    other.join()
    assert [line["thread"] for line in recent.entries(recent.taken())] == [0, 1]


def test_a_look_at_the_vm_is_left_out() -> None:
    """What a post-mortem asks of the VM is no part of what led to the failure."""
    remember(FD, ioctls.KVM_CREATE_VCPU, 0, 0, 0)
    with observe.inspecting():
        remember(FD, ioctls.KVM_GET_REGS, None, 0, 0)
    remember(FD, ioctls.KVM_CREATE_VCPU, 1, 0, 0)
    assert [line["ioctl"] for line in recent.entries(recent.taken())] == ["KVM_CREATE_VCPU"] * 2


def test_the_lines_of_a_vm_are_those_of_its_entries() -> None:
    """Words and not numbers, only what is the VM's own, and no KVM_RUN: a vCPU keeps its exits itself."""
    cap = kvm_enable_cap(cap=int(Cap.KVM_CAP_SPLIT_IRQCHIP))
    remember(FD, ioctls.KVM_ENABLE_CAP, cap, -1, errno.EINVAL)
    other: Any = SimpleNamespace(name="vm01", kind="vm")
    remember(other, ioctls.KVM_CREATE_VCPU, 0, 7, 0)
    vcpu = a_vcpu(int(ExitReason.KVM_EXIT_HLT))
    recent.remember_run(label(vcpu), vcpu._run, 0, 0)
    remember(vcpu, ioctls.KVM_GET_MP_STATE, None, 0, 0)
    taken = recent.of_vm("vm0", recent.taken())
    assert [recent.line(entry) for entry in recent.entries(taken)] == [
        "vm0 KVM_ENABLE_CAP {cap=KVM_CAP_SPLIT_IRQCHIP} = -1 EINVAL",
        "vm0/vcpu0 KVM_GET_MP_STATE = 0",
    ]
    assert [call.fd for call in recent.of_vm("vm0", recent.taken(), 1)] == ["vm0/vcpu0"]


def test_the_funnel_keeps_what_it_issued() -> None:
    """With and without an observer alike."""
    with KvmFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "null") as fd:
        fd.ioctl_raw(ioctls.KVM_CREATE_VCPU, 3)
    (entry,) = recent.entries(recent.taken())
    assert recent.line(entry) == "null KVM_CREATE_VCPU 3 = -1 ENOTTY"


def test_threads_that_call_while_they_are_read() -> None:
    """No call is torn, whatever the sizes of the arguments."""
    done = threading.Event()

    def issue(number: int) -> None:
        fd: Any = SimpleNamespace(name=f"vm{number}" * (number + 1), kind="vm")
        name, sizes = label(fd), (1, 7, 8, 100, 5000)
        data = ffi.new("char[]", bytes([number]) * max(sizes))
        while not done.is_set():
            for size in sizes:
                lib.kvmpy_call_note(name, number, size, data, size, 1, number, 0)

    threads = [threading.Thread(target=issue, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            calls = recent.taken()
            assert len(calls) <= 64
            for call in calls:
                assert call.fd == f"vm{call.request}" * (call.request + 1)
                assert call.result == call.request
                assert call.data == bytes([call.request]) * call.value
            assert [call.when for call in calls] == sorted(call.when for call in calls)
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_child_of_a_program_whose_threads_call() -> None:
    """fork() while another thread keeps a call leaves the child with a ring that can be used."""
    done = threading.Event()

    def issue() -> None:
        name, data = label(FD), ffi.new("char[]", 1 << 16)
        while not done.is_set():
            lib.kvmpy_call_note(name, 1, 0, data, 1 << 16, 1, 0, 0)

    thread = threading.Thread(target=issue)
    thread.start()
    try:
        for _ in range(100):
            child = os.fork()
            if not child:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)
                lib.kvmpy_calls_clear()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()


def test_a_name_that_is_too_long() -> None:
    """It is cut, and the next entry is whole."""
    long: Any = SimpleNamespace(name="é" * 100, kind="vm")
    remember(long, ioctls.KVM_CREATE_VCPU, 1, 0, 0)
    remember(FD, ioctls.KVM_CREATE_VCPU, 2, 0, 0)
    first, second = recent.taken()
    assert set(first.fd[:-1]) == {"é"}
    assert (second.fd, second.value) == ("vm0", 2)


def test_an_ioctl_that_no_table_has() -> None:
    with KvmFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "null") as fd:
        fd.ioctl_raw(replace(ioctls.KVM_CREATE_VCPU, nr=0x4B01), 5)
    (entry,) = recent.entries(recent.taken())
    assert recent.line(entry) == "null ioctl 0x4b01 arg=0x5 = -1 ENOTTY"
