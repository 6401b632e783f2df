# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import select
import threading

import pytest

from kvmpy.core.eventfd import EventFd


def test_read_returns_the_sum_of_the_signals_and_resets_it() -> None:
    with EventFd() as event:
        event.signal()
        event.signal(41)
        assert event.read() == 42
        assert event.read() == 0


def test_initial_count_is_there_at_once() -> None:
    with EventFd(7) as event:
        assert event.read() == 7


def test_semaphore_gives_one_at_a_time() -> None:
    with EventFd(2, semaphore=True) as event:
        assert [event.read(), event.read(), event.read()] == [1, 1, 0]


def test_wait_returns_what_another_thread_signals() -> None:
    with EventFd() as event:
        thread = threading.Thread(target=event.signal, args=(5,))
        thread.start()
        assert event.wait(10) == 5
        thread.join(10)


def test_wait_raises_when_nothing_comes() -> None:
    with EventFd() as event, pytest.raises(TimeoutError, match=r"not signalled within 0\.01 s"):
        event.wait(0.01)


def test_it_can_be_polled() -> None:
    with EventFd() as event:
        assert select.select([event], [], [], 0)[0] == []
        event.signal()
        assert select.select([event], [], [], 0)[0] == [event]


def test_close_closes_the_descriptor_once() -> None:
    event = EventFd()
    fd = event.fd
    event.close()
    event.close()
    assert event.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ValueError, match="closed"):
        event.signal()


@pytest.mark.parametrize("count", [0, -1, 2**64 - 1])
def test_counts_outside_64_bits_are_refused(count: int) -> None:
    with EventFd() as event, pytest.raises(ValueError, match="outside"):
        event.signal(count)


def test_overflow_is_an_error_not_a_wait() -> None:
    with EventFd() as event:
        event.signal(2**64 - 2)
        with pytest.raises(BlockingIOError):
            event.signal()
