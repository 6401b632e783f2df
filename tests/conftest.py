# SPDX-License-Identifier: Apache-2.0
"""What all of kvmpy's own tests need."""

from __future__ import annotations

import signal

import hypothesis

# How long an example takes says more about the machine's load than about kvmpy; each test has its time-out.
hypothesis.settings.register_profile("kvmpy", deadline=None)
hypothesis.settings.load_profile("kvmpy")


def pytest_configure() -> None:
    """Let signals end the programs that tests start: a shell's background jobs inherit some as ignored."""
    for number, default in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)
