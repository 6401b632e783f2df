# SPDX-License-Identifier: Apache-2.0
"""Threads that run vCPUs: pinned, stopped by a kick, joined with a time limit, errors raised at the join."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from kvmpy.core.errors import ClosedError
from kvmpy.core.vcpu import VcpuKickedError

T = TypeVar("T")
# How long a thread may take to end after its vCPU was kicked.
STOP_SECONDS = 10.0


class Kickable(Protocol):
    """What a thread needs of a vCPU."""

    name: str

    def kick(self) -> None:
        """Make the running or the next KVM_RUN return at once."""


class ThreadTimeoutError(TimeoutError):
    """A vCPU thread was still running at its time limit; the message says where."""


def allowed_cpus() -> list[int]:
    """Return the host CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))


def _check_cpus(cpus: Iterable[int]) -> set[int]:
    wanted = set(cpus)
    allowed = allowed_cpus()
    if not wanted or not wanted <= set(allowed):
        raise ValueError(f"cannot pin to CPUs {sorted(wanted)}: this process may use {allowed}")
    return wanted


class StoppedAtExit:
    """What a with block stops at its end."""

    def stop(self) -> object:
        """Stop it."""
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except Exception:
            # The error of the with block comes first: this one may be its consequence.
            if error is None:
                raise


class VcpuThread(StoppedAtExit, Generic[T]):
    """Runs *target* in a thread, by convention the loop of one vCPU.

    *vcpu* is kicked by :meth:`stop`; a target that catches VcpuKickedError itself looks at :attr:`stopping`
    and returns. *cpus* pins the thread to host CPUs; ValueError for those that this process may not use.
    The thread starts with :meth:`start` or with the ``with`` block, whose end stops it.
    """

    def __init__(
        self,
        target: Callable[[], T],
        *,
        vcpu: Kickable | None = None,
        name: str | None = None,
        cpus: Iterable[int] | None = None,
    ) -> None:
        self.name = name or (vcpu.name if vcpu is not None else "vcpu-thread")
        self.vcpu = vcpu
        self.stopping = False
        self._target = target
        self._cpus = None if cpus is None else _check_cpus(cpus)
        self._future: concurrent.futures.Future[T | None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)

    def _main(self) -> None:
        try:
            if self._cpus is not None:
                os.sched_setaffinity(0, self._cpus)
            result: T | None = self._target()
        except VcpuKickedError as error:
            if self.stopping:
                self._future.set_result(None)
            else:
                self._future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - raised again by join()
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    def start(self) -> VcpuThread[T]:
        """Start the thread and return this object; RuntimeError for a second start."""
        self._thread.start()
        return self

    @property
    def started(self) -> bool:
        """Whether the thread was started."""
        return self._thread.ident is not None

    @property
    def alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self._thread.is_alive()

    @property
    def native_id(self) -> int:
        """The kernel's id of the thread; ValueError before it was started."""
        if self._thread.native_id is None:
            raise ValueError(f"{self.name} was not started")
        return self._thread.native_id

    def pin(self, cpus: Iterable[int]) -> None:
        """Move the running thread to host CPUs *cpus*; ValueError for those that this process may not use."""
        os.sched_setaffinity(self.native_id, _check_cpus(cpus))

    def cpu_affinity(self) -> list[int]:
        """Return the host CPUs that the running thread may use."""
        return sorted(os.sched_getaffinity(self.native_id))

    def cpu_times(self) -> tuple[float, float]:
        """Return the (user, system) seconds that the thread has used; (0, 0) once it has ended."""
        import psutil

        for thread in psutil.Process().threads():
            if thread.id == self._thread.native_id:
                return thread.user_time, thread.system_time
        return 0.0, 0.0

    def join(self, timeout: float) -> T | None:
        """Wait for the target and return its result, None after a stop; raise what it raised.

        ThreadTimeoutError, with the thread's Python stack, after *timeout* seconds; the thread goes on then.
        """
        if not self.started:
            raise RuntimeError(f"{self.name} was not started")
        try:
            result = self._future.result(timeout)
        except concurrent.futures.TimeoutError as error:
            if self._future.done():
                return self._future.result()  # it ended just now, or the target itself raised a TimeoutError
            raise ThreadTimeoutError(
                f"{self.name} was still running after {timeout} s, at:\n{self.stack()}"
            ) from error
        self._thread.join(timeout)
        return result

    def stack(self) -> str:
        """Return the Python stack of the running thread as text."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "(it is not running)"

    def stop(self, timeout: float | None = None) -> T | None:
        """Kick the vCPU until the target ends, then :meth:`join`; *timeout* is STOP_SECONDS by default.

        Harmless when it has ended or was never started.
        """
        self.stopping = True
        if not self.started:
            return None
        deadline = time.monotonic() + (STOP_SECONDS if timeout is None else timeout)
        while self.alive and time.monotonic() < deadline:
            if self.vcpu is not None:
                with contextlib.suppress(ClosedError):  # the target finds that out by itself
                    self.vcpu.kick()
            # One kick is enough for a target that lets VcpuKickedError pass; one that catches it may need
            # another.
            self._thread.join(min(0.1, max(0.0, deadline - time.monotonic())))
        return self.join(max(0.001, deadline - time.monotonic()))

    def __enter__(self) -> VcpuThread[T]:
        return self if self.started else self.start()


def run_threads(threads: Sequence[VcpuThread[Any]], timeout: float) -> list[Any]:
    """Start all threads that were not started, wait for all, and return their results in order.

    At the first exception, or after *timeout* seconds (ThreadTimeoutError), the others are stopped and it is
    raised.
    """
    for thread in threads:
        if not thread.started:
            thread.start()
    futures = [thread._future for thread in threads]
    try:
        done, pending = concurrent.futures.wait(
            futures, timeout, return_when=concurrent.futures.FIRST_EXCEPTION
        )
    except BaseException:
        for thread in threads:
            with contextlib.suppress(Exception):
                thread.stop()
        raise
    error: BaseException | None = next((e for e in (f.exception() for f in futures if f in done) if e), None)
    if error is None and not pending:
        return [thread.join(timeout) for thread in threads]
    if error is None:
        late = next(thread for thread in threads if thread._future in pending)
        error = ThreadTimeoutError(f"{late.name} was still running after {timeout} s, at:\n{late.stack()}")
    for thread in threads:
        try:
            thread.stop()
        except Exception as other:  # noqa: BLE001 - the first failure is the one to tell
            if other is not error and error.__context__ is None:
                error.__context__ = other
    raise error
