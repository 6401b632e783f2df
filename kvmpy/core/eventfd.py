# SPDX-License-Identifier: Apache-2.0
"""eventfd(2) as an object: what irqfd and ioeventfd signal and are signalled through."""

from __future__ import annotations

import os
import select
import time

from kvmpy.core import observe
from kvmpy.core.closing import Closing

_MAX_SIGNAL = (1 << 64) - 2


class EventFd(Closing):
    """A 64-bit kernel counter that KVM can read and write.

    It is created non-blocking; :meth:`wait` is the call that waits, always with a time limit. With
    *semaphore* a read takes one from the counter instead of all of it.
    """

    def __init__(self, initial: int = 0, *, semaphore: bool = False) -> None:
        if not 0 <= initial < 1 << 32:
            raise ValueError(f"initial count {initial} is outside 0..{(1 << 32) - 1}")
        self._fd = os.eventfd(
            initial, os.EFD_CLOEXEC | os.EFD_NONBLOCK | (os.EFD_SEMAPHORE if semaphore else 0)
        )

    @property
    def fd(self) -> int:
        """The number of the file descriptor; ValueError once closed."""
        if self._fd < 0:
            raise ValueError("the eventfd is closed")
        return self._fd

    def fileno(self) -> int:
        """Return :attr:`fd`, for select() and friends."""
        return self.fd

    @property
    def closed(self) -> bool:
        """Whether the file descriptor was closed."""
        return self._fd < 0

    def signal(self, count: int = 1) -> None:
        """Add *count* to the counter; BlockingIOError where it would overflow."""
        if not 0 < count <= _MAX_SIGNAL:
            raise ValueError(f"count {count} is outside 1..2^64-2")
        os.eventfd_write(self.fd, count)
        for observer in observe.host:
            observer.event_signalled(self.fd, count)

    def read(self) -> int:
        """Return the counter and reset it, or 0 when nothing was signalled."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def wait(self, timeout: float) -> int:
        """Wait until it is signalled, then return the counter and reset it.

        TimeoutError after *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        while True:
            poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            # Another reader may have taken the count between poll and read.
            count = self.read()
            if count:
                return count
            if time.monotonic() >= deadline:
                raise TimeoutError(f"eventfd {self._fd} was not signalled within {timeout} s")

    def close(self) -> None:
        """Close the file descriptor; twice is harmless."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __repr__(self) -> str:
        return f"<EventFd {'closed' if self._fd < 0 else f'fd {self._fd}'}>"


def fd_number(fd: EventFd | int) -> int:
    """Return the number of the file descriptor."""
    return fd if isinstance(fd, int) else fd.fd
