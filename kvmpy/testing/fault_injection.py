# SPDX-License-Identifier: Apache-2.0
"""Ioctls whose allocations fail, one after another: KVM must answer ENOMEM and leave everything as it was."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmpy.core import observe
from kvmpy.core.errors import errno_name
from kvmpy.core.vcpu import RUN_ERROR, RUN_NO_TIMER, Vcpu
from kvmpy.uapi.structs import Struct

if TYPE_CHECKING:
    from kvmpy.core.fd import KvmFd
    from kvmpy.uapi.ioctls import Ioctl

FAIL_NTH = Path("/proc/thread-self/fail-nth")
DEBUGFS = Path("/sys/kernel/debug")
_SLAB, _PAGES = "failslab", "fail_page_alloc"
# A call that allocates more than this does not come to an end.
_MOST = 20_000
Spare = Callable[["Ioctl", "Struct | int | None"], bool]
_UNDONE_BY_CLOSE = ("vm", "stats", "gmem")


def missing() -> str:
    """Return what this kernel or user lacks for fault injection, empty where nothing."""
    if not FAIL_NTH.exists():
        return "a kernel with fault injection"
    for name in (_SLAB, _PAGES):
        if not os.access(DEBUGFS / name / "verbose", os.W_OK):
            return f"the right to write {DEBUGFS / name}"
    return ""


class FaultInjection:
    """Within the block each allocation of each ioctl of this process fails once, and the ioctl is repeated.

    An ioctl is issued with its first allocation failing, then with its second, and so on; after each failure
    errno has to be ENOMEM, the argument and this process's descriptors what they were before. The attempt in
    which all allocations succeed is the one that the caller hears of: any test runs within the block as it
    does outside, if KVM keeps its promise. A call that succeeds although an allocation failed stands, if it
    cannot be undone; the next one of its kind begins with the allocation after that. KVM_RUN goes on where
    it failed.

    *min_order* is the least order of the page allocations that fail, 0 for all; above 0 no others do. *spare*
    returns True for ioctls whose allocations do not fail. At the end of the block AssertionError tells what
    deviated, and, if *required*, that no allocation failed. ``failed`` and ``borne`` count failed calls and
    those that went on, by the names of ioctls. Needs root, and a kernel with FAILSLAB and FAIL_PAGE_ALLOC
    (Documentation/fault-injection/fault-injection.rst, fail-nth). Processes that inject faults wait for each
    other.
    """

    def __init__(self, *, min_order: int = 0, spare: Spare | None = None, required: bool = True) -> None:
        self._min_order = min_order
        self._spare = spare
        self._required = required
        self.failed: Counter[str] = Counter()
        self.borne: Counter[str] = Counter()
        self.deviations: list[str] = []
        self._first: dict[str, int] = {}
        self._local = threading.local()
        self._files: list[int] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FaultInjection:
        with contextlib.ExitStack() as stack:
            lock = os.open(DEBUGFS / _SLAB, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            every, every_user = ("N", "Y") if self._min_order == 0 else ("Y", "N")
            for name, value in (
                (f"{_SLAB}/ignore-gfp-wait", every),
                (f"{_SLAB}/verbose", "0"),
                (f"{_PAGES}/ignore-gfp-wait", "N"),
                (f"{_PAGES}/min-order", str(self._min_order)),
                # Pages of user space fail only where they are large: others have nothing to fall back to.
                (f"{_PAGES}/ignore-gfp-highmem", every_user),
                (f"{_PAGES}/verbose", "0"),
            ):
                stack.enter_context(_set(DEBUGFS / name, value))
            stack.callback(self._close_files)
            # The descriptor that a test has closed is to stay closed: this one is opened before.
            self._counter()
            stack.enter_context(observe.interposing(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is not None:
            return
        if self.deviations:
            raise AssertionError("\n".join(["with a failed allocation:", *self.deviations]))
        if self._required and not self.failed and not self.borne:
            raise AssertionError("no allocation failed: nothing was tested")

    def ioctl(
        self, fd: KvmFd, op: Ioctl, arg: Struct | int | None, issue: Callable[[], tuple[int, int]]
    ) -> tuple[int, int]:
        """Issue *op* until none of its allocations is left to fail."""
        if self._spare is not None and self._spare(op, arg):
            return issue()
        given = (arg, arg.copy()) if isinstance(arg, Struct) else None
        # It is open before descriptors are looked at.
        self._counter()
        for nth in self._numbers(op.name):
            descriptors = os.listdir("/proc/self/fd") if op.makes else []
            self._arm(nth)
            result, number = issue()
            if not self._was_injected():
                self._first.pop(op.name, None)
                return result, number
            if result >= 0:
                self._bear(op.name, nth)
                if not _again(op, result):
                    return result, number
            else:
                self._fail(fd, op.name, nth, number)
                if op.makes and os.listdir("/proc/self/fd") != descriptors:
                    self._deviate(fd, op.name, nth, "left a descriptor open")
                if given is not None and given[0].to_bytes() != given[1].to_bytes():
                    self._deviate(fd, op.name, nth, "changed its argument")
            if given is not None:
                given[0].assign(given[1])
        raise AssertionError(f"{op.name} of {fd.name} makes more than {_MOST} allocations")

    def run(self, vcpu: Vcpu, issue: Callable[[], int]) -> int:
        """Issue KVM_RUN until it ends for another reason than a failed allocation."""
        for nth in self._numbers("KVM_RUN"):
            self._arm(nth)
            outcome = issue()
            if not self._was_injected():
                self._first.pop("KVM_RUN", None)
                return outcome
            if outcome == RUN_NO_TIMER:
                # The deadline's timer is none of KVM's.
                continue
            if outcome != RUN_ERROR:
                self._bear("KVM_RUN", nth)
                return outcome
            self._fail(vcpu, "KVM_RUN", nth, vcpu.run_errno)
        raise AssertionError(f"KVM_RUN of {vcpu.name} makes more than {_MOST} allocations")

    def _numbers(self, name: str) -> range:
        return range(self._first.get(name, 1), _MOST)

    def _bear(self, name: str, nth: int) -> None:
        self.borne[name] += 1
        self._first[name] = nth + 1

    def _fail(self, fd: KvmFd, name: str, nth: int, number: int) -> None:
        self.failed[name] += 1
        if number != errno.ENOMEM:
            self._deviate(fd, name, nth, f"failed with {errno_name(number)}, expected ENOMEM")

    def _deviate(self, fd: KvmFd, name: str, nth: int, how: str) -> None:
        self.deviations.append(f"{name} of {fd.name}, allocation {nth}: {how}")

    # ---- the calling thread's counter

    def _counter(self) -> int:
        file: int | None = getattr(self._local, "file", None)
        if file is None:
            file = self._local.file = os.open(FAIL_NTH, os.O_RDWR | os.O_CLOEXEC)
            self._files.append(file)
        return file

    def _arm(self, nth: int) -> None:
        os.pwrite(self._counter(), b"%d" % nth, 0)

    def _was_injected(self) -> bool:
        left = int(os.pread(self._local.file, 32, 0))
        if left:
            os.pwrite(self._local.file, b"0", 0)
        return left == 0

    def _close_files(self) -> None:
        for file in self._files:
            os.close(file)


def _again(op: Ioctl, result: int) -> bool:
    """Undo a call that succeeded; tell whether that was possible: it asked, or made what its fd ends."""
    if op.makes in _UNDONE_BY_CLOSE:
        os.close(result)
        return True
    return op.asks and op.makes is None


@contextlib.contextmanager
def _set(file: Path, value: str) -> Iterator[None]:
    before = file.read_text(encoding="ascii").strip()
    file.write_text(value, encoding="ascii")
    try:
        yield
    finally:
        file.write_text(before, encoding="ascii")


class EveryTest:
    """Plugin object: injects faults into each test's set-up and body, but not where a test does so itself."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Set up with failing allocations."""
        with _injecting(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Run with failing allocations."""
        with _injecting(item):
            return (yield)


def of_secure_processor(op: Ioctl, _: Struct | int | None) -> bool:
    """Tell a SEV command: a launch is no sequence of calls that could each be repeated.

    With Linux 7.2 each failure to prepare a command of SEV or SEV-ES leaves one of the driver's two buffers
    in use, where SNP is initialised: __sev_do_cmd_locked() in drivers/crypto/ccp/sev-dev.c.
    """
    return op.name == "KVM_MEMORY_ENCRYPT_OP" or op.fd == "sev"


def _injecting(item: pytest.Item) -> contextlib.AbstractContextManager[object]:
    own = any("fault-injection" in mark.args for mark in item.iter_markers("requires"))
    return contextlib.nullcontext() if own else FaultInjection(spare=of_secure_processor, required=False)
