# SPDX-License-Identifier: Apache-2.0
"""How signals end kvmpy: as exceptions, so that every block that has something to put in order does so."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, "FrameType | None"], object]
# The terminal's Ctrl-C reaches everyone, and the supervisor passes on what it gets.
SAME_SECONDS = 1.0
_AGAIN_SECONDS = 0.01


class Signalled(SystemExit):
    """A signal ends the program; the code is its exit status."""


class Interrupted(KeyboardInterrupt):
    """A signal ends a session like Ctrl-C."""

    def __init__(self, number: int, interrupter: Interrupter) -> None:
        super().__init__()
        self.number = number
        self.interrupter = interrupter


class Interrupter:
    """A handler that ends the session like Ctrl-C, once for what is sent twice."""

    def __init__(self) -> None:
        self._last = -SAME_SECONDS

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if now - self._last >= SAME_SECONDS:
            self._last = now
            raise Interrupted(number, self)

    def forget(self) -> None:
        """Take the next signal, however soon it comes: the last one ended nothing."""
        self._last = -SAME_SECONDS


@contextlib.contextmanager
def handled(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Within the block *handler* gets these signals; who ignores one, as under nohup, goes on ignoring it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {
        number: signal.signal(number, handler)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)


def end_by_exception() -> None:
    """Let SIGTERM and SIGHUP end this program as SystemExit; what nohup had it ignore stays ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)
    sys.unraisablehook = again


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    raise Signalled(128 + number)


def again(unraisable: sys.UnraisableHookArgs) -> None:
    """Let a signal come again that was taken in a callback of the interpreter: no exception ends that."""
    ended = unraisable.exc_value
    if isinstance(ended, Signalled):
        number = int(ended.code or 0) - 128
    elif isinstance(ended, Interrupted):
        ended.interrupter.forget()
        number = ended.number
    elif isinstance(ended, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        sys.__unraisablehook__(unraisable)
        return
    threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()
