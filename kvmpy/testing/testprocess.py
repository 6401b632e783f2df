# SPDX-License-Identifier: Apache-2.0
"""What a supervised test process does: end in order on signals, show its stacks, die with its parent."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from kvmpy.owned import die_with_parent

SUPERVISOR_VARIABLE = "KVMPY_SUPERVISED"
STACK_SIGNAL = signal.SIGQUIT
# The terminal's Ctrl-C reaches everyone, and the supervisor passes on what it gets.
SAME_SECONDS = 1.0
STACK_SUFFIX = ".stack"

Handler = Callable[[int, "FrameType | None"], object]


def supervised() -> bool:
    """Whether this process was started by a supervisor, which has prepared for its death."""
    return os.environ.get(SUPERVISOR_VARIABLE) == str(os.getppid())


def stack_file(journal: Path) -> Path:
    """Return where the process of *journal* writes its stacks when it gets STACK_SIGNAL."""
    return journal.with_name(journal.name + STACK_SUFFIX)


class Interrupter:
    """A handler that ends the session like Ctrl-C, once for what is sent twice."""

    def __init__(self) -> None:
        self._last = -SAME_SECONDS

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        now = time.monotonic()
        if now - self._last >= SAME_SECONDS:
            self._last = now
            raise KeyboardInterrupt


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


@contextlib.contextmanager
def _stacks(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as stream:
        faulthandler.register(STACK_SIGNAL, file=stream, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(STACK_SIGNAL)


def attach(config: pytest.Config, journal: Path) -> None:
    """Do what a supervised test process with this *journal* does, until *config* is done."""
    die_with_parent()
    stack = contextlib.ExitStack()
    stack.enter_context(_stacks(stack_file(journal)))
    stack.enter_context(handled(Interrupter(), signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    config.add_cleanup(stack.close)
