# SPDX-License-Identifier: Apache-2.0
"""Descriptors that are none of KVM's become objects of a record when they are given to KVM first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvmpy.core.kvm import Kvm
from kvmpy.debug.record.events import Object
from kvmpy.debug.record.format import ObjectKind
from kvmpy.debug.record.model import Record
from kvmpy.debug.record.recorder import Recorder
from kvmpy.debug.record.script import build
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE
from kvmpy.uapi.structs import kvm_hyperv_eventfd, kvm_ioeventfd, kvm_irqfd
from tests.debug.tracing import ROOT, kvmpy

# KVM may refuse them: what counts is what they name.
PROGRAM = """
import sys
from tests.debug.test_fd_fields import issue
from kvmpy.core.kvm import Kvm
with Kvm() as kvm:
    print(*issue(kvm))
"""
NAMES = ("irqfd", "resamplefd", "ioeventfd", "hyperv", "deassigned", "pipe")


def issue(kvm: Kvm) -> list[int]:
    """Give KVM an eventfd in every field that takes one, and a pipe; return their numbers."""
    with kvm.create_vm() as vm:
        vm.ioctl(ioctls.KVM_CREATE_IRQCHIP)
        fds = [os.eventfd(0) for _ in NAMES[:-1]]
        reading, writing = os.pipe()
        for op, arg in (
            (ioctls.KVM_IRQFD, kvm_irqfd(fd=fds[0], resamplefd=fds[1], gsi=9, flags=KVM_IRQFD_FLAG_RESAMPLE)),
            (ioctls.KVM_IOEVENTFD, kvm_ioeventfd(fd=fds[2], addr=0x1000, len=4)),
            (ioctls.KVM_HYPERV_EVENTFD, kvm_hyperv_eventfd(fd=fds[3], conn_id=1)),
            (ioctls.KVM_IRQFD, kvm_irqfd(fd=fds[4], resamplefd=writing, flags=KVM_IRQFD_FLAG_DEASSIGN)),
            (ioctls.KVM_IOEVENTFD, kvm_ioeventfd(fd=reading, addr=0x2000, len=4)),
            (ioctls.KVM_IOEVENTFD, kvm_ioeventfd(fd=-1, addr=0x2000, len=4)),
        ):
            vm.ioctl_raw(op, arg)
        for fd in (*fds, reading, writing):
            os.close(fd)
    return [*fds, reading, writing]


def in_process(path: Path) -> list[int]:
    with Kvm() as kvm, Recorder(path):
        return issue(kvm)


def traced(path: Path, *options: str) -> list[int]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ("trace", "-q", *options, "-o", str(path), "--", sys.executable, "-c", PROGRAM)
    done = kvmpy(*command, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.requires("kvm")
@pytest.mark.parametrize("door", ["in-process", "preload", "ptrace"])
def test_every_door_names_every_descriptor(door: str, tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    if door == "in-process":
        fds = in_process(path)
    else:
        fds = traced(path, *(["--ptrace"] if door == "ptrace" else []))
    record = Record.load(path)
    objects = [each.what for each in record.entries if isinstance(each.what, Object)]
    numbers = dict(zip(NAMES, fds, strict=False))
    kinds = {each.fd: (each.kind, each.name) for each in objects if each.fd in fds}
    assert {name: kinds[fd] for name, fd in list(numbers.items())[:-1]} == dict.fromkeys(
        NAMES[:-1], (ObjectKind.EVENTFD, "eventfd")
    )
    # Another file is an object, too: the ioctl fails because of what it is.
    kind, name = kinds[numbers["pipe"]]
    assert (kind, name.partition(":")[0]) == (ObjectKind.OTHER, "pipe")
    # Without its flag a field is not looked at.
    assert fds[-1] not in kinds
    named = [
        sorted(ref.object for ref in step.argument.node.refs if ref.object)
        for step in build(record).steps
        if step.ioctl is not None and step.argument is not None and step.argument.node is not None
        and step.request in (ioctls.KVM_IRQFD.nr, ioctls.KVM_IOEVENTFD.nr, ioctls.KVM_HYPERV_EVENTFD.nr)
    ]  # fmt: skip
    assert [len(each) for each in named] == [2, 1, 1, 1, 1, 0]
