# SPDX-License-Identifier: Apache-2.0
"""The last ioctls that the funnel keeps, and their text."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.core import observe, recent
from kvmpy.core.fd import KvmFd
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.constants import Cap, ExitReason, SevCmd
from kvmpy.uapi.structs import kvm_enable_cap, kvm_sev_cmd, kvm_userspace_memory_region

FD: Any = SimpleNamespace(name="vm0", kind="vm")


@pytest.fixture(autouse=True)
def _emptied() -> Iterator[None]:
    recent.calls.clear()
    yield
    recent.calls.clear()


def a_vcpu(reason: int) -> Any:
    run = ffi.new("struct kvm_run *")
    run.exit_reason = reason
    return SimpleNamespace(name="vm0/vcpu0", kind="vcpu", _run=run)


def test_an_ioctl_is_told() -> None:
    """Name, file descriptor, decoded argument and result of an ioctl; an error by its name."""
    region = kvm_userspace_memory_region(slot=7, memory_size=0x1000)
    recent.remember(FD, ioctls.KVM_SET_USER_MEMORY_REGION, region, 0, 0)
    region.slot = 9  # the caller's struct goes on living
    recent.remember(FD, ioctls.KVM_CHECK_EXTENSION, int(Cap.KVM_CAP_VM_TYPES), -1, errno.EINVAL)
    first, second = recent.entries(list(recent.calls))
    assert (first["fd"], first["ioctl"], first["result"], first["failed"]) == (
        "vm0",
        "KVM_SET_USER_MEMORY_REGION",
        "0",
        False,
    )
    assert "slot=0x7" in first["arg"]
    assert (second["result"], second["failed"]) == ("EINVAL", True)
    assert second["arg"] == "KVM_CAP_VM_TYPES"
    recent.remember(FD, ioctls.KVM_CREATE_VCPU, 3, -1, errno.EEXIST)
    assert [bool(line["meaning"]) for line in recent.entries(list(recent.calls))] == [False, False, True]
    assert first["ms"] == 0
    assert second["ms"] >= 0


def test_a_refused_command_has_its_own_meaning() -> None:
    """KVM_MEMORY_ENCRYPT_OP is many commands, each with rules of its own."""
    command = kvm_sev_cmd(id=SevCmd.KVM_SEV_LAUNCH_MEASURE)
    recent.remember(FD, ioctls.KVM_MEMORY_ENCRYPT_OP, command, -1, errno.EINVAL)
    assert recent.entries(list(recent.calls))[0]["meaning"] == "len is more than 16 KiB"


def test_runs_that_end_alike_are_one_line() -> None:
    """KVM_RUNs of one vCPU with the same exit are counted; another exit begins a line."""
    io, hlt = (a_vcpu(int(reason)) for reason in (ExitReason.KVM_EXIT_IO, ExitReason.KVM_EXIT_HLT))
    for vcpu in (io, io, io, hlt, io):
        recent.remember_run(vcpu, vcpu._run, 0, 0)
    lines = [(line["arg"].partition(" ")[0], line["count"]) for line in recent.entries(list(recent.calls))]
    assert lines == [("KVM_EXIT_IO", 3), ("KVM_EXIT_HLT", 1), ("KVM_EXIT_IO", 1)]


def test_the_oldest_go() -> None:
    """Only the last ioctls are kept."""
    for number in range(100):
        recent.remember(FD, ioctls.KVM_CREATE_VCPU, number, 0, 0)
    assert [call[5] for call in recent.calls] == list(range(36, 100))


def test_threads_are_numbered() -> None:
    """The lines of two threads can be told apart."""
    recent.remember(FD, ioctls.KVM_CREATE_VCPU, 0, 0, 0)
    other = threading.Thread(target=recent.remember, args=(FD, ioctls.KVM_CREATE_VCPU, 1, 0, 0))
    other.start()
    other.join()
    assert [line["thread"] for line in recent.entries(list(recent.calls))] == [0, 1]


def test_a_look_at_the_vm_is_left_out() -> None:
    """What a post-mortem asks of the VM is no part of what led to the failure."""
    recent.remember(FD, ioctls.KVM_CREATE_VCPU, 0, 0, 0)
    with observe.inspecting():
        recent.remember(FD, ioctls.KVM_GET_REGS, None, 0, 0)
    recent.remember(FD, ioctls.KVM_CREATE_VCPU, 1, 0, 0)
    assert [line["ioctl"] for line in recent.entries(list(recent.calls))] == ["KVM_CREATE_VCPU"] * 2


def test_the_lines_of_a_vm_are_those_of_its_entries() -> None:
    """Words and not numbers, only what is the VM's own, and no KVM_RUN: a vCPU keeps its exits itself."""
    cap = kvm_enable_cap(cap=int(Cap.KVM_CAP_SPLIT_IRQCHIP))
    recent.remember(FD, ioctls.KVM_ENABLE_CAP, cap, -1, errno.EINVAL)
    other: Any = SimpleNamespace(name="vm01", kind="vm")
    recent.remember(other, ioctls.KVM_CREATE_VCPU, 0, 7, 0)
    vcpu = a_vcpu(int(ExitReason.KVM_EXIT_HLT))
    recent.remember_run(vcpu, vcpu._run, 0, 0)
    recent.remember(vcpu, ioctls.KVM_GET_MP_STATE, None, 0, 0)
    taken = recent.of_vm("vm0", list(recent.calls))
    assert [recent.line(entry) for entry in recent.entries(taken)] == [
        "vm0 KVM_ENABLE_CAP {cap=KVM_CAP_SPLIT_IRQCHIP} = -1 EINVAL",
        "vm0/vcpu0 KVM_GET_MP_STATE = 0",
    ]
    assert [call[2] for call in recent.of_vm("vm0", list(recent.calls), 1)] == ["vm0/vcpu0"]


def test_the_funnel_keeps_what_it_issued() -> None:
    """With and without an observer alike."""
    with KvmFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "null") as fd:
        fd.ioctl_raw(ioctls.KVM_CREATE_VCPU, 3)
    (entry,) = recent.entries(list(recent.calls))
    assert recent.line(entry) == "null KVM_CREATE_VCPU 3 = -1 ENOTTY"
