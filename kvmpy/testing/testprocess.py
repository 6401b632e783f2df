# SPDX-License-Identifier: Apache-2.0
"""What a supervised test process does: end in order on signals, show its stacks, die with its parent."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.owned import die_with_parent
from kvmpy.signals import Interrupter, handled

SUPERVISOR_VARIABLE = "KVMPY_SUPERVISED"
STACK_SIGNAL = signal.SIGQUIT
STACK_SUFFIX = ".stack"


def supervised() -> bool:
    """Whether this process was started by a supervisor, which has prepared for its death."""
    return os.environ.get(SUPERVISOR_VARIABLE) == str(os.getppid())


def stack_file(journal: Path) -> Path:
    """Return where the process of *journal* writes its stacks when it gets STACK_SIGNAL."""
    return journal.with_name(journal.name + STACK_SUFFIX)


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
