# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import threading

import pytest

from kvmpy.core.threads import ThreadTimeoutError, VcpuThread, allowed_cpus, run_threads
from kvmpy.core.vcpu import VcpuKickedError, VcpuTimeoutError


class FakeVcpu:
    """Runs "in the guest" until it is kicked."""

    name = "vm0/vcpu0"

    def __init__(self) -> None:
        self.kicks = 0
        self._kicked = threading.Event()

    def kick(self) -> None:
        self.kicks += 1
        self._kicked.set()

    def run(self) -> None:
        if not self._kicked.wait(20):
            raise RuntimeError("nobody kicked")
        self._kicked.clear()
        raise VcpuKickedError(self.name)


def fail() -> int:
    raise ZeroDivisionError("in the thread")


def test_join_returns_the_result() -> None:
    thread = VcpuThread(lambda: 42).start()
    assert thread.join(10) == 42
    assert not thread.alive


def test_join_raises_what_the_target_raised() -> None:
    thread = VcpuThread(fail).start()
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        thread.join(10)


def test_a_time_out_of_the_target_is_not_one_of_the_join() -> None:
    def target() -> None:
        raise VcpuTimeoutError("guest")

    with pytest.raises(VcpuTimeoutError, match="guest"):
        VcpuThread(target).start().join(10)


def test_join_says_where_a_thread_is_stuck() -> None:
    vcpu = FakeVcpu()
    thread = VcpuThread(vcpu.run, vcpu=vcpu).start()
    with pytest.raises(
        ThreadTimeoutError, match=r"(?s)vm0/vcpu0 was still running after 0.05 s.*_kicked.wait"
    ):
        thread.join(0.05)
    assert thread.stop() is None


def test_stop_kicks_a_running_vcpu() -> None:
    vcpu = FakeVcpu()
    thread = VcpuThread(vcpu.run, vcpu=vcpu).start()
    assert thread.stop(10) is None
    assert vcpu.kicks >= 1


def test_a_kick_without_stop_is_an_error_of_the_target() -> None:
    vcpu = FakeVcpu()
    thread = VcpuThread(vcpu.run, vcpu=vcpu).start()
    vcpu.kick()
    with pytest.raises(VcpuKickedError):
        thread.join(10)


def test_a_target_that_catches_kicks_can_look_at_stopping() -> None:
    vcpu = FakeVcpu()

    def target() -> str:
        while not thread.stopping:
            try:
                vcpu.run()
            except VcpuKickedError:
                continue
        return "stopped"

    thread: VcpuThread[str] = VcpuThread(target, vcpu=vcpu)
    thread.start()
    vcpu.kick()
    assert thread.stop(10) == "stopped"


def test_the_end_of_the_with_block_stops_the_thread() -> None:
    vcpu = FakeVcpu()
    with VcpuThread(vcpu.run, vcpu=vcpu) as thread:
        assert thread.alive
    assert not thread.alive


def test_stop_without_start_is_harmless_and_join_is_not() -> None:
    thread = VcpuThread(lambda: 1, name="idle")
    assert thread.stop() is None
    with pytest.raises(RuntimeError, match="idle was not started"):
        thread.join(1)


def test_pinned_threads_run_where_they_were_told() -> None:
    cpu = allowed_cpus()[-1]
    vcpu = FakeVcpu()
    seen: list[list[int]] = []

    def target() -> None:
        seen.append(thread.cpu_affinity())
        vcpu.run()

    thread = VcpuThread(target, vcpu=vcpu, cpus=[cpu])
    with thread:
        pass
    assert seen == [[cpu]]


def test_a_running_thread_can_be_moved() -> None:
    vcpu = FakeVcpu()
    with VcpuThread(vcpu.run, vcpu=vcpu) as thread:
        thread.pin([allowed_cpus()[0]])
        assert thread.cpu_affinity() == [allowed_cpus()[0]]
        user, system = thread.cpu_times()
        assert user >= 0
        assert system >= 0


@pytest.mark.parametrize("cpus", [[], [100_000]])
def test_cpus_that_the_process_may_not_use_are_refused(cpus: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot pin to CPUs"):
        VcpuThread(lambda: 1, cpus=cpus)


def test_run_threads_returns_results_in_order() -> None:
    assert run_threads([VcpuThread(functools.partial(pow, n, 2)) for n in range(5)], 10) == [0, 1, 4, 9, 16]


@pytest.mark.timeout(15)
def test_run_threads_stops_the_others_at_the_first_failure() -> None:
    vcpu = FakeVcpu()
    running = VcpuThread(vcpu.run, vcpu=vcpu)
    with pytest.raises(ZeroDivisionError):
        run_threads([running, VcpuThread(fail)], 60)
    assert not running.alive


def test_run_threads_names_the_thread_that_does_not_end() -> None:
    vcpu = FakeVcpu()
    running = VcpuThread(vcpu.run, vcpu=vcpu)
    with pytest.raises(ThreadTimeoutError, match=r"vm0/vcpu0 was still running after 0\.05 s"):
        run_threads([VcpuThread(lambda: None), running], 0.05)
    assert not running.alive
