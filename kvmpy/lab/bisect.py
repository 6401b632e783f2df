# SPDX-License-Identifier: Apache-2.0
"""What a run of a developer's tree means to ``git bisect run``: its exit statuses. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kvmpy.testing.verdicts import NOTHING_RAN

GOOD, BAD, UNTESTABLE = 0, 1, 125
# git stops at this and above; what pytest or click ends with is added.
TROUBLE = 128
INTERRUPTED, INTERNAL, USAGE = TROUBLE + 2, TROUBLE + 3, TROUBLE + 4


@dataclass(frozen=True)
class Ended:
    """How a session came to its end.

    ``status`` is pytest's; ``begun``: a test was started; ``passed`` and ``bad``: there is a test that
    passed, and one that failed or was lost; ``kernel_failed``: the kernel did not reach its tests, and that
    was not QEMU's fault; ``stopped``: a test said that no other one can say anything.
    """

    status: int
    begun: bool = False
    passed: bool = False
    bad: bool = False
    kernel_failed: bool = False
    stopped: bool = False


def judge(ended: Ended) -> tuple[int, str]:
    """Return the exit status for git, and what it says of the tree."""
    if ended.status == 0 and ended.passed:
        return GOOD, "good: what ran passed"
    if ended.status in (0, NOTHING_RAN):
        return UNTESTABLE, "cannot be tested: no test passed, and none failed"
    if ended.status == 1 or (ended.bad and (ended.status == 3 or ended.stopped)):
        return BAD, "bad: a test failed or was lost"
    if ended.kernel_failed and not ended.begun:
        return UNTESTABLE, "cannot be tested: its kernel does not reach the tests"
    reasons = {2: "the run was interrupted", 4: "a wrong argument", 5: "no test matches"}
    return TROUBLE + ended.status, f"not judged: {reasons.get(ended.status, 'something else went wrong')}"
