# SPDX-License-Identifier: Apache-2.0
"""The two words of a kick, the flag and immediate_exit, and the order in which they are set."""

from __future__ import annotations

import errno
import resource
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvmpy.core.address import PAGE_SIZE
from kvmpy.core.backing import Anonymous, Mapping
from kvmpy.core.errors import MissingError
from kvmpy.core.uffd import DemandPager, PageFault, Userfaultfd
from kvmpy.uapi import ffi, lib


@pytest.fixture
def area() -> Iterator[Mapping]:
    """Stands for a vCPU's run page: nothing is there yet."""
    mapping = Anonymous(huge="never").map(PAGE_SIZE)
    yield mapping
    mapping.close()


def test_the_flag_of_a_kick_comes_last(area: Mapping) -> None:
    """A run takes both back together: what a kick set behind its flag would end every run from then on."""
    try:
        Userfaultfd().close()
    except MissingError as error:
        pytest.skip(str(error))
    run = ffi.cast("struct kvm_run *", area.hva)
    native = lib.kvmpy_vcpu_new(-1, run)
    flags: list[int] = []

    def at_immediate_exit(_fault: PageFault) -> None:
        flags.append(native.kick)

    try:
        with DemandPager(at_immediate_exit) as pager:
            pager.register(area.hva, area.size)
            assert lib.kvmpy_vcpu_kick(native) == 0
        assert flags == [0]
        assert (native.kick, run.immediate_exit) == (1, 1)
    finally:
        lib.kvmpy_vcpu_free(native)


def test_a_run_that_fails_leaves_the_kick_to_the_next(area: Mapping) -> None:
    native = lib.kvmpy_vcpu_new(-1, ffi.cast("struct kvm_run *", area.hva))
    try:
        lib.kvmpy_vcpu_kick(native)
        # There is no vCPU behind it: an error, which leaves the kick to the next run.
        assert lib.kvmpy_vcpu_run(native, ffi.NULL) == lib.KVMPY_RUN_ERROR
        assert (native.kick, native.run.immediate_exit, native.busy) == (1, 1, 0)
    finally:
        lib.kvmpy_vcpu_free(native)


@pytest.fixture
def native(area: Mapping) -> Iterator[Any]:
    """A vCPU's run state with no vCPU behind it: KVM_RUN of it fails with EBADF."""
    handle = lib.kvmpy_vcpu_new(-1, ffi.cast("struct kvm_run *", area.hva))
    yield handle
    lib.kvmpy_vcpu_free(handle)


def test_no_run_begins_after_a_stop(native: Any) -> None:
    assert lib.kvmpy_vcpu_run(native, ffi.NULL) == lib.KVMPY_RUN_ERROR
    lib.kvmpy_vcpu_stop(native)
    native.err = 0
    for _ in range(2):
        assert lib.kvmpy_vcpu_run(native, ffi.NULL) == lib.KVMPY_RUN_STOPPED
    assert native.err == 0


def test_a_closed_vcpu_is_neither_run_nor_kicked(native: Any) -> None:
    run = native.run
    lib.kvmpy_vcpu_stop(native)
    for _ in range(2):
        assert lib.kvmpy_vcpu_close(native) == 0
        assert lib.kvmpy_vcpu_run(native, ffi.NULL) == lib.KVMPY_RUN_CLOSED
        assert lib.kvmpy_vcpu_kick(native) == -1
    assert (native.kick, run.immediate_exit) == (0, 0)


def test_a_vcpu_that_a_thread_runs_is_not_closed(native: Any) -> None:
    native.busy = 1
    assert lib.kvmpy_vcpu_close(native) == -1
    assert lib.kvmpy_vcpu_run(native, ffi.NULL) == lib.KVMPY_RUN_BUSY
    lib.kvmpy_vcpu_stop(native)
    assert lib.kvmpy_vcpu_close(native) == -1
    native.busy &= ~1
    assert lib.kvmpy_vcpu_close(native) == 0


def test_a_run_says_what_it_did(native: Any) -> None:
    """Whether KVM was asked at all, and its answer, whatever the run state of others holds."""
    ran = ffi.new("struct kvmpy_ran *")
    assert lib.kvmpy_vcpu_run(native, ran) == lib.KVMPY_RUN_ERROR
    assert (ran.issued, ran.result, ran.error) == (1, -1, errno.EBADF)
    native.busy, native.err = 1, errno.EINTR  # another thread is between two runs
    assert lib.kvmpy_vcpu_run(native, ran) == lib.KVMPY_RUN_BUSY
    assert (ran.issued, ran.result, ran.error) == (0, 0, 0)
    native.busy = 0
    lib.kvmpy_vcpu_stop(native)
    ran.issued = 1
    assert lib.kvmpy_vcpu_run(native, ran) == lib.KVMPY_RUN_STOPPED
    assert ran.issued == 0


def test_a_kick_needs_no_place_in_the_queue_of_signals(native: Any) -> None:
    """tgkill(2) of a real-time signal fails with EAGAIN where RLIMIT_SIGPENDING is used up."""
    native.busy, native.tid = 1, threading.get_native_id()
    before = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, before[1]))
    signal.pthread_sigmask(signal.SIG_BLOCK, {lib.kvmpy_kick_signal()})
    try:
        assert lib.kvmpy_vcpu_kick(native) == 0
        assert lib.kvmpy_kick_signal() in signal.sigpending()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {lib.kvmpy_kick_signal()})
        resource.setrlimit(resource.RLIMIT_SIGPENDING, before)


def test_a_thread_that_has_just_ended_is_no_error_of_a_kick(native: Any) -> None:
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    native.busy, native.tid = 1, ended.native_id
    assert lib.kvmpy_vcpu_kick(native) == 0
    assert native.kick == 1
