# SPDX-License-Identifier: Apache-2.0
"""Children that do not outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def dies_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """Return a function for ``preexec_fn``: the child gets signal *number* when its parent dies.

    The child must be started by the parent's main thread: the kernel looks at the thread that forked.
    """
    libc = ctypes.CDLL(None)  # loaded here, as little as possible happens between fork and exec
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def end_group(child: subprocess.Popen[bytes], grace: float = 2.0) -> None:
    """End the process group that *child* leads: SIGTERM, and SIGKILL after *grace* seconds."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 30.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
