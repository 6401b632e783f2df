# SPDX-License-Identifier: Apache-2.0
"""Fault injection: which attempt fails, what counts as a deviation, and what the caller hears of."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from kvmpy.core.fd import KvmFd
from kvmpy.testing import fault_injection
from kvmpy.testing.fault_injection import FaultInjection
from kvmpy.uapi import ioctls
from kvmpy.uapi.structs import kvm_irqfd
from tests.testing.support import Suite

Answer = tuple[int, int]
NO_MEMORY = (-1, errno.ENOMEM)


class Kernel(FaultInjection):
    """Allocates *room* times in each call, and answers *failure* when one fails."""

    def __init__(self, room: int, failure: Answer | Callable[[int], Answer] = NO_MEMORY) -> None:
        super().__init__()
        self.room = room
        self.failure = failure
        self.nth = 0
        self.attempts: list[int] = []

    def _counter(self) -> int:
        return -1

    def _arm(self, nth: int) -> None:
        self.nth = nth

    def _was_injected(self) -> bool:
        return self.nth <= self.room

    def issue(self) -> Answer:
        self.attempts.append(self.nth)
        if not self._was_injected():
            return 42, 0
        return self.failure(self.nth) if callable(self.failure) else self.failure


@pytest.fixture
def fd() -> Iterator[KvmFd]:
    with KvmFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), "vm1") as file:
        yield file


def test_each_allocation_fails_once(fd: KvmFd) -> None:
    kernel = Kernel(3)
    with pytest.raises(AssertionError, match="no allocation failed"):
        kernel.__exit__(None)
    assert kernel.ioctl(fd, ioctls.KVM_CREATE_VCPU, 0, kernel.issue) == (42, 0)
    assert kernel.attempts == [1, 2, 3, 4]
    assert kernel.failed == {"KVM_CREATE_VCPU": 3}
    kernel.__exit__(None)
    kernel.__exit__(KeyError)


def test_another_error_deviates(fd: KvmFd) -> None:
    kernel = Kernel(3, lambda nth: (-1, errno.EFAULT if nth == 2 else errno.ENOMEM))
    assert kernel.ioctl(fd, ioctls.KVM_CREATE_VCPU, 0, kernel.issue) == (42, 0)
    assert kernel.deviations == ["KVM_CREATE_VCPU of vm1, allocation 2: failed with EFAULT, expected ENOMEM"]
    with pytest.raises(AssertionError, match="allocation 2: failed with EFAULT"):
        kernel.__exit__(None)
    # A failure of the block's own is what is told.
    kernel.__exit__(KeyError)


def test_a_failed_call_changes_nothing(fd: KvmFd) -> None:
    """Its argument is put back for the next attempt, and a descriptor that it left open is told."""
    arg = kvm_irqfd(fd=3, gsi=7)
    seen, left = [], []

    def fails(nth: int) -> Answer:
        seen.append(arg.gsi)
        if nth == 1:
            arg.gsi = 99
        return NO_MEMORY

    kernel = Kernel(2, fails)
    assert kernel.ioctl(fd, ioctls.KVM_IRQFD, arg, kernel.issue) == (42, 0)
    assert (seen, arg.gsi) == ([7, 7], 7)
    assert kernel.deviations == ["KVM_IRQFD of vm1, allocation 1: changed its argument"]

    def leaves(nth: int) -> Answer:
        if nth == 2:
            left.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        return NO_MEMORY

    kernel = Kernel(2, leaves)
    kernel.ioctl(fd, ioctls.KVM_CREATE_VCPU, 0, kernel.issue)
    os.close(left[0])
    assert kernel.deviations == ["KVM_CREATE_VCPU of vm1, allocation 2: left a descriptor open"]


def test_a_call_that_goes_on_stands(fd: KvmFd) -> None:
    """The next call of its kind begins with the allocation behind it, the one after that with the first."""
    kernel = Kernel(3, lambda nth: (42, 0) if nth == 2 else NO_MEMORY)
    for _ in range(3):
        assert kernel.ioctl(fd, ioctls.KVM_SET_CPUID2, 0, kernel.issue) == (42, 0)
    assert kernel.attempts == [1, 2, 3, 4, 1, 2]
    assert (kernel.failed, kernel.borne) == ({"KVM_SET_CPUID2": 3}, {"KVM_SET_CPUID2": 2})
    assert kernel.deviations == []


def test_a_call_without_an_end(fd: KvmFd) -> None:
    kernel = Kernel(1 << 40)
    with pytest.raises(AssertionError, match="more than 20000 allocations"):
        kernel.ioctl(fd, ioctls.KVM_SET_CPUID2, 0, kernel.issue)


@pytest.mark.skipif(fault_injection.missing() == "", reason="this kernel has fault injection")
def test_a_kernel_without_it_is_told(suite: Suite) -> None:
    suite.add("test_a.py", "import pytest\n@pytest.mark.requires('fault-injection')\ndef test_it(): pass\n")
    report = suite.run("-rs")
    assert set(report.verdicts().values()) == {"skip"}
    assert "CONFIG_FAILSLAB=y" in report.text
    assert f"--fail-allocations needs {fault_injection.missing()}" in suite.run("--fail-allocations").text
