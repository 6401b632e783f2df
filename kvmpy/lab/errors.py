# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on the way to a running lab."""

from __future__ import annotations


class LabError(RuntimeError):
    """The lab cannot do what was asked: ``.what`` says why, ``.how`` what to do about it."""

    def __init__(self, what: str, how: str = "") -> None:
        self.what = what
        self.how = how
        super().__init__(f"{what}\n  {how}" if how else what)
