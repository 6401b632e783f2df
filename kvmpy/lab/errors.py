# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on the way to a running lab."""

from __future__ import annotations


class LabError(RuntimeError):
    """The lab cannot do what was asked: ``.what`` says why, ``.how`` what to do about it."""

    def __init__(self, action: str, mode: str = "") -> None:
        self.what = action
        self.how = mode
        super().__init__(f"{action}\n  {mode}" if mode else action)


class BuildError(LabError):
    """The tree is why there is no kernel: it does not compile, or lacks what the lab needs."""
