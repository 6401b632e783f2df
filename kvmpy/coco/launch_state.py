# SPDX-License-Identifier: Apache-2.0
"""A launch as a chain of states: each step uses one state up and returns the next.

A step exists only in the state that allows it, so a wrong order is a type error.  Negative tests go around
it with ``vm.sev.command()``.
"""

from __future__ import annotations

from kvmpy.core.vm import Vm


class LaunchStateError(RuntimeError):
    """A state of a launch was used after a step had left it."""


class LaunchState:
    """One state of the launch of *vm*."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._left_by = ""

    def _check(self, step: str) -> None:
        if self._left_by:
            raise LaunchStateError(
                f"{self.vm.name}: {step} on {type(self).__name__}, which {self._left_by} left"
            )

    def _leave(self, step: str) -> None:
        # After the step has succeeded: one that failed leaves the firmware where it was.
        self._left_by = step
