# SPDX-License-Identifier: Apache-2.0
"""The ioctl funnel, with a kernel that is made up."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from kvmpy.core.errors import KvmError
from kvmpy.core.fd import KvmFd
from kvmpy.uapi import ioctls
from kvmpy.uapi.ioctls import Ioctl
from kvmpy.uapi.structs import Struct


class Scripted(KvmFd):
    """Answers ioctls from a list of ``(result, errno)``."""

    def __init__(self, *answers: tuple[int, int]) -> None:
        super().__init__(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), "scripted")
        self.answers = list(answers)

    def ioctl_raw(self, op: Ioctl, arg: Struct | int | None = None) -> tuple[int, int]:  # noqa: ARG002
        """Return the next answer."""
        return self.answers.pop(0)


@pytest.fixture
def made() -> Iterator[list[Scripted]]:
    fds: list[Scripted] = []
    yield fds
    for fd in fds:
        fd.close()


def test_interrupted_ioctl_is_issued_again(made: list[Scripted]) -> None:
    """A signal must not make KVM_CREATE_VM fail."""
    fd = Scripted((-1, errno.EINTR), (-1, errno.EINTR), (7, 0))
    made.append(fd)
    assert fd.ioctl(ioctls.KVM_CREATE_VM, 0) == 7


def test_error_after_interruption(made: list[Scripted]) -> None:
    """What the repetition says counts."""
    fd = Scripted((-1, errno.EINTR), (-1, errno.EINVAL), (7, 0))
    made.append(fd)
    with pytest.raises(KvmError) as caught:
        fd.ioctl(ioctls.KVM_CREATE_VM, 99)
    assert caught.value.errno == errno.EINVAL
    assert len(fd.answers) == 1


def test_interrupted_run_is_told(made: list[Scripted]) -> None:
    """EINTR is an answer of KVM_RUN, not an accident."""
    fd = Scripted((-1, errno.EINTR), (0, 0))
    made.append(fd)
    with pytest.raises(KvmError) as caught:
        fd.ioctl(ioctls.KVM_RUN)
    assert caught.value.errno == errno.EINTR
