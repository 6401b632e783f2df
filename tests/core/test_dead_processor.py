# SPDX-License-Identifier: Apache-2.0
"""A secure processor that answers no more is told from ASIDs that ran out: one question, and the run ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpy.core.errors import DeadProcessorError
from kvmpy.core.fd import KvmFd
from kvmpy.core.sev import VmSev
from kvmpy.core.sev_device import SevDevice
from kvmpy.core.sev_errors import SevError
from kvmpy.core.topic import topic
from kvmpy.uapi import ioctls

EBUSY, ENOTTY, ETIMEDOUT = errno.EBUSY, errno.ENOTTY, errno.ETIMEDOUT


class BareVm(KvmFd):
    """A VM of which there is no more than its SEV commands."""

    sev = topic(VmSev)

    def close(self) -> None:
        """Close it as a VM does."""
        super().close()
        self.sev.close()


class Kernel:
    """KVM and ccp: commands of a VM end with *answer*, those of /dev/sev with *status*, *asked* times."""

    def __init__(self) -> None:
        self.answer = self.status = 0
        self.asked = 0

    def issue(self, _fd: KvmFd, op: Any, _arg: object) -> tuple[int, int]:
        """Stand for the ioctl."""
        self.asked += op is ioctls.SEV_ISSUE_CMD
        number = self.status if op is ioctls.SEV_ISSUE_CMD else self.answer
        return (-1, number) if number else (0, 0)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    fake_kernel = Kernel()
    (tmp_path / "sev").touch()
    monkeypatch.setenv("KVMPY_DEV_SEV", str(tmp_path / "sev"))
    monkeypatch.setattr(KvmFd, "_issue", lambda fd, op, arg: fake_kernel.issue(fd, op, arg))
    return fake_kernel


@pytest.fixture
def vm() -> Iterator[BareVm]:
    with BareVm(os.open(os.devnull, os.O_RDWR), "vm0") as result:
        yield result


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("INIT2", EBUSY),
        ("LAUNCH_START", EBUSY),
        ("LAUNCH_START", ETIMEDOUT),
        ("SNP_LAUNCH_START", ENOTTY),
        ("SNP_LAUNCH_FINISH", ETIMEDOUT),
    ],
)
@pytest.mark.parametrize("status", [EBUSY, ETIMEDOUT])
def test_a_dead_processor(kernel: Kernel, vm: BareVm, command: str, number: int, status: int) -> None:
    kernel.answer, kernel.status = number, status
    with pytest.raises(DeadProcessorError, match="the secure processor does not answer; reboot") as caught:
        vm.sev.command_raw(command)
    assert f"KVM_SEV_{command} on vm0 came back with {errno.errorcode[number]}" in str(caught.value)
    assert kernel.asked == 1


@pytest.mark.parametrize("command", ["INIT2", "SNP_LAUNCH_START"])
def test_one_that_answers(kernel: Kernel, vm: BareVm, command: str) -> None:
    kernel.answer = ENOTTY if command == "SNP_LAUNCH_START" else EBUSY
    assert vm.sev.command_raw(command).errno == kernel.answer
    assert kernel.asked == 1


@pytest.mark.parametrize(
    ("command", "number"), [("INIT2", errno.EINVAL), ("LAUNCH_START", errno.EIO), ("INIT2", 0)]
)
def test_other_answers_raise_no_doubt(kernel: Kernel, vm: BareVm, command: str, number: int) -> None:
    kernel.answer, kernel.status = number, EBUSY
    assert vm.sev.command_raw(command).errno == number
    assert kernel.asked == 0


@pytest.mark.parametrize("number", [EBUSY, ETIMEDOUT])
def test_commands_of_the_platform(kernel: Kernel, number: int) -> None:
    """Nor does /dev/sev itself read as refused: SNP_CONFIG or a certificate that nobody answers."""
    kernel.status = number
    with SevDevice() as device:
        with pytest.raises(DeadProcessorError, match=f"came back with {errno.errorcode[number]}"):
            device.command("SNP_SET_CONFIG")
        assert kernel.asked == 2
        kernel.status = errno.EIO
        with pytest.raises(SevError):
            device.command("SNP_SET_CONFIG")
        assert kernel.asked == 3


def test_without_a_device_nobody_can_be_asked(
    kernel: Kernel, vm: BareVm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVMPY_DEV_SEV", str(tmp_path / "none"))
    kernel.answer = EBUSY
    assert vm.sev.command_raw("INIT2").errno == EBUSY


def test_asids_that_ran_out(kernel: Kernel, vm: BareVm) -> None:
    """While guests of this process live, EBUSY of INIT2 is theirs: a sweep asks nobody."""
    with BareVm(os.open(os.devnull, os.O_RDWR), "vm1") as other:
        assert other.sev.command_raw("INIT2").ok
        kernel.answer, kernel.status = EBUSY, EBUSY
        assert vm.sev.command_raw("INIT2").errno == EBUSY
        assert kernel.asked == 0
        # That of another command is nobody's.
        with pytest.raises(DeadProcessorError):
            vm.sev.command_raw("LAUNCH_START")
    with pytest.raises(DeadProcessorError):
        vm.sev.command_raw("INIT2")
